"""What is lost of a search where embeddings are stored in float16: on real texts.

Encodes the passages and the dev questions of a data folder with one model and searches exactly. Prints for each type
which share of the best k by float32 it finds (as sets), the judged metrics, and the largest difference of a score.

    python benchmarks/embedding_types.py --data FOLDER [--model NAME] [--passages N] [--questions N]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.collection import Collection, best, parser_of


def main() -> None:
    """Run from the command line."""
    collection = Collection.read(parser_of(__doc__, passages=10**9, questions=1000).parse_args())
    queries_QD = collection.encode(collection.retriever.query_encoder(), collection.questions)
    exact_ND = collection.encode(collection.retriever.document_encoder(), collection.passages)
    exact_QK, scores_QN = best(queries_QD, exact_ND), queries_QD @ exact_ND.T
    rows = []
    for name, stored_ND in {"float32": exact_ND, "float16": exact_ND.astype(np.float16)}.items():
        errors_QN = np.abs(queries_QD @ stored_ND.astype(np.float32).T - scores_QN)
        rows.append(
            {"stored": name, "bytes a passage": stored_ND.itemsize * stored_ND.shape[1]}
            | collection.judged(best(queries_QD, stored_ND), exact_QK)
            | {"largest score error": f"{errors_QN.max():.1e}"}
        )
    collection.show(rows)


if __name__ == "__main__":
    main()

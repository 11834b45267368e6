"""What int8 saves of an encoding on a CPU, and what it loses of a search: on real texts.

Encodes passages of a data folder in float32 and in int8, by the same path as a run does, and searches both exactly with
the same float32 queries. Prints the seconds of the processor, their ratio, which share of the best k by float32 is
found (as sets), and the judged metrics. Seconds are the processor's, so that other work on the machine counts little;
each encoding is timed as often as is said, in turns, and its least counts.

    python benchmarks/encode_int8.py --data FOLDER [--model NAME] [--passages N] [--questions N] [--repeats N]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.collection import Collection, best, parser_of
from engine.models.packed import PackedEncoder


def main() -> None:
    """Run from the command line."""
    parser = parser_of(__doc__, passages=2000, questions=400)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    collection = Collection.read(arguments)
    queries_QD = collection.encode(collection.retriever.query_encoder(), collection.questions)
    encoders = {name: collection.retriever.document_encoder() for name in ("float32", "int8")}
    assert isinstance(encoders["int8"], PackedEncoder)
    encoders["int8"].quantize()
    made: dict[str, np.ndarray] = {}
    seconds = dict.fromkeys(encoders, float("inf"))
    for _ in range(arguments.repeats):
        for name, encoder in encoders.items():
            start = time.process_time()
            made[name] = collection.encode(encoder, collection.passages)
            seconds[name] = min(seconds[name], time.process_time() - start)
    exact_QK = best(queries_QD, made["float32"])
    rows = [
        {
            "encoded in": name,
            "processor s": f"{seconds[name]:.1f}",
            "times as fast": f"{seconds['float32'] / seconds[name]:.2f}",
            "cosine": f"{(documents_ND * made['float32']).sum(axis=1).mean():.4f}",
        }
        | collection.judged(best(queries_QD, documents_ND), exact_QK)
        for name, documents_ND in made.items()
    ]
    collection.show(rows)


if __name__ == "__main__":
    main()

"""Harden a re-ranker: train a cross-encoder on the negatives of several retrievers, and order texts with it.

    python examples/harden_ranker.py --data runs/own_data/data --out runs/hardened

A ranker that has seen the mistakes of one retriever is blind to those of others. Here it is trained on negatives that
BM25 and a dense retriever propose together (R2ANKER; docs/r2anker.md; `lexical` adds a learned sparse one). What comes
of it is exported for sentence-transformers' CrossEncoder, and can order the results of any search engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sparring


def main() -> None:
    """Train a ranker and use its export."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, required=True, help="data folder, such as that of own_data.py")
    words.add_argument("--out", type=Path, default=Path("runs/hardened"), help="run folder")
    words.add_argument("--model", default="random", help="what all models start from")
    words.add_argument("--steps", type=int, default=4, help="of each phase; a real training wants thousands")
    arguments = words.parse_args()

    phase = {"steps": arguments.steps}
    recipe = sparring.Recipe.load(
        "r2anker_tiny",
        run={"path": arguments.out},
        data={"path": arguments.data},
        dense={"name": arguments.model},
        lexical=None,  # left out, as is the student: BM25 and the dense retriever propose negatives
        student=None,
        ranker={"name": arguments.model},
        r2anker={"dense_1": phase, "dense_2": phase, "ranker": phase},
        evaluation={"fuse": False, "zero_shot": False},
    )
    trained = sparring.train(recipe)
    for row in trained.rows:
        print(f"{row.split:5} {row.system:10} over {row.over or 'the corpus':10} MRR@10 {row.metrics['MRR@10']:.3f}")

    # The export alone is enough to re-rank; the run folder could be deleted.
    ranker = sparring.Searcher.open(trained.path / "export" / "ranker")
    candidates = ["the median of data", "wrap a paragraph of text so that it fits", "the factorial of a number"]
    for one in ranker.rerank("how do I wrap a paragraph of text?", candidates):
        print(f"{one.score:8.3f}  {one.document}")


if __name__ == "__main__":
    main()

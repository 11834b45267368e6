"""Distil a small retriever: it learns what a ranker says of each query's documents.

    python examples/distil.py --data runs/own_data/data --out runs/distilled

The teacher's scores come from a file, one line a query, such as others publish them (docs/distillation.md lists the
forms). Here they are made of how many words a query and a document share; put a real teacher in its place, or leave
`scores` out: then the ranker of the recipe is trained first and is the teacher. The student has one layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import sparring


def write_scores(data: sparring.Dataset, file: Path) -> None:
    """Score all documents for the training queries by a teacher of our own; higher is better."""
    documents = list(data.documents())
    words_of = {document.id: set(f"{document.title} {document.text}".lower().split()) for document in documents}
    with file.open("w") as lines:
        for qid in data.qrels["train"]:
            asked = set(data.queries[qid].text.lower().split())
            scores = {docid: 4.0 * len(asked & words) - len(asked) for docid, words in words_of.items()}
            lines.write(json.dumps({"qid": qid, "scores": scores}) + "\n")


def main() -> None:
    """Train a student and look at its vectors."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, required=True, help="data folder, such as that of own_data.py")
    words.add_argument("--out", type=Path, default=Path("runs/distilled"), help="folder for scores and run")
    words.add_argument("--model", default="random", help="what all models start from")
    words.add_argument("--steps", type=int, default=4, help="of each phase; a real training wants thousands")
    arguments = words.parse_args()

    data = sparring.load_data(arguments.data)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_scores(data, arguments.out / "scores.jsonl")

    phase = {"steps": arguments.steps}
    recipe = sparring.Recipe.load(
        "r2anker_tiny",
        run={"path": arguments.out / "run"},
        data={"path": data.path},
        dense={"name": arguments.model},
        lexical=None,
        ranker={"name": arguments.model},
        student={"name": arguments.model, "num_layers": 1},
        r2anker={
            "dense_1": phase,
            "dense_2": phase,
            "ranker": phase,
            "student": {**phase, "scores": arguments.out / "scores.jsonl", "loss": "kl"},
        },
        evaluation={"fuse": False, "zero_shot": False},
    )
    losses = []
    trained = sparring.train(
        recipe, callbacks=[lambda stage, step, values: losses.append(values.get("student/distillation"))]
    )
    print("distillation loss:", [round(loss, 3) for loss in losses if loss is not None])

    student = sparring.Searcher.open(trained.path / "export" / "student")
    queries_QD = student.encode(["wrap a paragraph", "the median of data"], side="query")
    documents_ND = student.encode([document.text for document in list(data.documents())[:5]], side="document")
    print("scores:", np.round(queries_QD @ documents_ND.T, 2).tolist())


if __name__ == "__main__":
    main()

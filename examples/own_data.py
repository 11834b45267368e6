"""From your own texts to a search engine: write a data folder, train a retriever and a ranker, search.

    python examples/own_data.py --out runs/own_data

The texts are the docstrings of Python's standard library: a document is a function's whole docstring, a query its first
line, and the judgement says that the two belong together. Put yours in their place. The models are small and random, so
that this ends within a minute and needs no download: name real ones to learn something (`--model` takes a hub id, a
folder, or `package:NAME`).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import sparring

MODULES = (
    "statistics",
    "shutil",
    "textwrap",
    "itertools",
    "math",
    "random",
    "heapq",
    "bisect",
    "fractions",
    "calendar",
)


def texts() -> Iterator[tuple[str, str, str]]:
    """Yield an id, a question and a text that answers it."""
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            is_own = str(getattr(value, "__module__", "")).lstrip("_") == name and not attribute.startswith("_")
            told = inspect.getdoc(value) if is_own else None
            if told and "\n" in told:
                first, rest = told.split("\n", 1)
                if rest.strip():
                    yield f"{name}.{attribute}", first.strip(), " ".join(rest.split())


def write_data(folder: Path) -> None:
    """Write a folder in the BEIR layout: documents, queries, and which document answers which query."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    qrels: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for place, (name, question, text) in enumerate(texts()):
            corpus.write(json.dumps({"_id": name, "title": name, "text": text}) + "\n")
            queries.write(json.dumps({"_id": f"q{place}", "text": question}) + "\n")
            split = {0: "dev", 1: "test"}.get(place % 8, "train")
            qrels[split].append(f"q{place}\t{name}\t1")
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")


def report(stage: str, step: int, values: Mapping[str, float]) -> None:
    """Print the loss of each point: a callback, such as one that draws a curve in a notebook."""
    for name, value in values.items():
        if name.endswith("/loss"):
            print(f"{stage:20} step {step:4}  loss {value:.3f}")


def main() -> None:
    """Go from texts to answers."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=Path("runs/own_data"), help="folder for data and run")
    words.add_argument("--model", default="random", help="what retriever and ranker start from")
    arguments = words.parse_args()

    write_data(arguments.out / "data")
    data = sparring.load_data(arguments.out / "data")
    print(f"{data.num_documents} documents, {len(data.queries)} queries")

    # `tiny` is the smallest recipe that comes along; what is given here takes the place of what it says.
    recipe = sparring.Recipe.load(
        "tiny",
        run={"path": arguments.out / "run"},
        data={"path": data.path},
        retriever={"name": arguments.model},
        ranker={"name": arguments.model},
        warmup_retriever={"steps": 6},
        warmup_ranker={"steps": 4},
        ar2={"iterations": 1, "retriever": {"steps": 4}, "ranker": {"steps": 4}},
    )
    recipe.save(arguments.out / "recipe.yaml")  # for `sparring train --config`, on many GPUs

    trained = sparring.train(recipe, callbacks=[report])
    print(trained.table)

    searcher = sparring.Searcher.open(trained.path)
    question = "how do I wrap a paragraph of text?"
    print(f"\n{question}")
    for found in searcher.search(question, k=3):
        print(f"{found.score:8.3f}  {found.title:28} {found.text[:60]}")


if __name__ == "__main__":
    main()

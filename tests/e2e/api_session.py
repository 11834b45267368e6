"""What somebody types in Python, from a recipe to answers; what comes of it is printed as one line of JSON.

    api_session.py RUN DATA WORDS...

The recipe is stopped in the middle by a callback and started again, in the same process; WORDS are its changes as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sparring


class Stop(Exception):
    """Raised by the callback."""


def main(folder: Path, data: Path, changes: dict[str, Any]) -> None:
    recipe = sparring.Recipe.load("tiny", run={"path": folder, "device": "cpu"}, data={"path": data}).changed(**changes)
    seen: list[tuple[str, int]] = []

    def stop(stage: str, step: int, values: Mapping[str, float]) -> None:
        seen.append((stage, step))
        if stage == "warmup_ranker" and "warmup_ranker/loss" in values:
            raise Stop

    before = dict(os.environ)
    try:
        sparring.train(recipe, callbacks=[stop], quiet=True)
    except Stop:
        stopped = len(seen)
    left = sorted(path.name for path in folder.iterdir())
    trained = sparring.train(recipe, callbacks=[lambda stage, step, _: seen.append((stage, step))], quiet=True)
    ranks = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    finished = len(seen)
    again = sparring.train(recipe, callbacks=[lambda stage, step, _: seen.append((stage, step))], quiet=True)
    told = {
        "stopped": [stopped, "run.lock" in left, "ledger.json" in left],
        "stages": [stage for stage, _ in seen[:finished]],
        "again": [len(seen) - finished, str(again.path) == str(trained.path) == str(folder)],
        "environment": ranks == {name: before.get(name) for name in ranks},
        "lock": (folder / "run.lock").exists(),
        "systems": sorted({row.system for row in trained.rows}),
        "table": "MRR@10" in trained.table,
    }
    told |= searched(sparring.Searcher.open(trained.path), trained.path)
    print(json.dumps(told))


def searched(searcher: sparring.Searcher, folder: Path) -> dict[str, Any]:
    text = searcher.search("x", 1)[0].text
    both = searcher.search([text, "another one"], 4, order="ranker")
    alone = searcher.search(text, 4, order="ranker")
    found = searcher.search(text, 2, order="retriever")
    document = f"{found[0].title} {found[0].text}"
    product = float(searcher.encode(document, "document") @ searcher.encode(text))
    ranks = searcher.rerank(text, [*reversed(alone)])
    export = sparring.Searcher.open(folder / "export")
    mixed = searcher.fused(text, 3, weights={"BM25": 1.0})
    refused = {
        "search in an export": lambda: export.search(text),
        "unknown part": lambda: searcher.fused(text, weights={"x": 1.0}),
        "weights": lambda: searcher.fused(text, weights={"G": 0.5}),
        "k": lambda: searcher.search(text, 0),
        "no question": lambda: searcher.search(["a", " "]),
        "text": lambda: searcher.search(3),  # type: ignore[call-overload]
        "half a pair": lambda: searcher.encode("\ud800"),
        "no text": lambda: searcher.encode([]),
        "side": lambda: searcher.encode("a", "title"),
        "order": lambda: searcher.search(text, order="x"),  # type: ignore[call-overload]
        "folder": lambda: sparring.Searcher.open(folder / "index"),
        "one text": lambda: searcher.rerank(text, "a text"),
        "ranks": lambda: as_one_of_two(lambda: sparring.train(sparring.Recipe.load(folder))),
    }
    return {
        "docids": [[one.docid for one in both[0]], [one.docid for one in alone]],
        "orders": [one.by_ranker is None for one in found],
        "retriever": [product, found[0].by_retriever],
        "ranker": [[one.score for one in ranks], [one.by_ranker for one in alone]],
        "places": [one.place for one in ranks],
        "export": [float(abs(export.encode(text) - searcher.encode(text)).max()), export.rerank(text, ["a"])[0].score],
        "own": searcher.rerank(text, ["a"])[0].score,
        "mixed": [mixed[0].score >= mixed[1].score >= mixed[2].score, mixed[0].text == text],
        "shapes": [searcher.encode(text).shape, searcher.encode([text, text]).shape],
        "refused": {name: message_of(function) for name, function in refused.items()},
    }


def as_one_of_two(function: Callable[[], object]) -> None:
    os.environ["WORLD_SIZE"] = "2"
    try:
        function()
    finally:
        del os.environ["WORLD_SIZE"]


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except sparring.SparringError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))

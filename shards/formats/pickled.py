"""Pickles of plain values: numbers, texts, lists, tuples and dicts, also compressed. Nothing in them is run.

A pickle is a program, and `pickle.load` runs it. Plain values need none of what makes it one: looking a name up. So
that is refused, but for the names by which numpy stores a number.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.formats.compressed import open_bytes
from shards.formats.stream import require_content

_NUMPY = {(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")} | {("numpy", "dtype")}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: Path) -> dict[Any, dict[Any, float]]:
    """Read scores by query and document, whole: some 100 bytes of memory for each.

    Args:
        path: A pickle, plain or compressed.

    Returns:
        Query id -> document id -> score.

    Raises:
        DataError: It is damaged, holds more than plain values, or is no dict of dicts.
    """
    require_content(path)
    try:
        with open_bytes(path) as file:
            found = _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no pickle of plain values: {error}",
            expected="a dict of dicts of numbers: query id -> document id -> score",
            remedy="write the scores again as .jsonl, where you know who made the file",
        ) from None
    if not isinstance(found, dict) or not all(isinstance(scores, dict) for scores in found.values()):
        raise DataError(
            f"{path} holds a {type(found).__name__}",
            expected="a dict of dicts: query id -> document id -> score",
            remedy="save the scores in that form",
        )
    return {
        qid: {docid: score.item() if hasattr(score, "item") else score for docid, score in scores.items()}
        for qid, scores in found.items()
    }

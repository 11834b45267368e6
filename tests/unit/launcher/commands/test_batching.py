"""The queue in front of the models: what waits together is computed together, and nobody fails for another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from launcher.commands.serve.batching import Batcher
from launcher.commands.serve.requests import Refused


class Models:
    """Doubles numbers; the first batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.busy, self.free = threading.Event(), threading.Event()

    def double(self, items: Sequence[Any]) -> list[Any]:
        self.batches.append(list(items))
        self.busy.set()
        assert self.free.wait(30)
        if "bad" in items:
            raise ValueError("bad")
        return [2 * item for item in items]


def test_what_waits_is_one_batch() -> None:
    models, told = Models(), list[tuple[str, int]]()
    batcher = Batcher(
        {"double": models.double, "other": models.double},
        max_batch=4,
        max_waiting=9,
        observe=lambda kind, size, _: told.append((kind, size)),
    )

    async def ask() -> list[Any]:
        first = asyncio.create_task(batcher.compute("double", 1, 1))
        await asyncio.to_thread(models.busy.wait, 30)
        asked: list[tuple[str, Any]] = [("double", 2), ("other", 3), ("double", "bad"), ("double", 4), ("double", 5)]
        others = [asyncio.create_task(batcher.compute(kind, item, 1)) for kind, item in asked]
        gone = asyncio.create_task(batcher.compute("double", 6, 1))
        await asyncio.sleep(0)
        gone.cancel()
        large = asyncio.create_task(batcher.compute("double", 7, 3))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="9 texts wait already") as refused:
            await batcher.compute("double", 8, 1)
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        assert batcher.waiting == 9
        models.free.set()
        return await asyncio.gather(first, *others, large, return_exceptions=True)

    results = asyncio.run(ask())
    assert [str(result) for result in results] == ["2", "4", "6", "bad", "8", "10", "14"]
    batcher.close(30)
    assert not batcher.is_alive
    together, alone = models.batches[1], models.batches[2:6]
    assert together == [2, "bad", 4, 5]
    assert alone == [[2], ["bad"], [4], [5]], "where a batch fails, each is computed by itself"
    assert models.batches[6:] == [[3], [7]], "who has gone is not computed, and another kind not with these"
    assert told == [("double", 1), ("double", 4), ("other", 1), ("double", 3)]

    async def late() -> None:
        await batcher.compute("double", 1, 1)

    with pytest.raises(Refused, match="stopping"):
        asyncio.run(late())

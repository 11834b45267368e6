"""Requests that wait together are computed together, by the one thread that the models have.

Nobody waits for a batch to fill: whoever comes to idle models is computed at once, and what comes meanwhile is the next
batch. So a single user has the latency of a single question, and many have the throughput of batches. Shapes: none.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.log import get_logger
from launcher.commands.serve.requests import Refused

log = get_logger(__name__)
Compute = Callable[[Sequence[Any]], Sequence[Any]]
"""From what requests bring to what they get, in the same order."""
Observe = Callable[[str, int, float], None]
"""Told of each batch: its kind, its texts, its seconds."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request in the queue."""

    kind: str
    item: Any
    size: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class Batcher:
    """A queue in front of the models.

    Args:
        computes: Kind of request to what computes some of them.
        max_batch: Texts that are computed together at most; a request with more is a batch of its own.
        max_waiting: Texts in the queue; further requests are refused.
        observe: Told of each batch.
    """

    def __init__(self, computes: Mapping[str, Compute], *, max_batch: int, max_waiting: int, observe: Observe) -> None:
        self._computes, self._max_batch, self._max_waiting, self._observe = computes, max_batch, max_waiting, observe
        self._queue: deque[_Waiting] = deque()
        self._arrived = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="models", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        with self._arrived:
            return sum(one.size for one in self._queue)

    @property
    def is_alive(self) -> bool:
        """Whether somebody computes."""
        return self._thread.is_alive()

    async def compute(self, kind: str, item: Any, size: int) -> Any:
        """Wait for the result of a request.

        Args:
            kind: One of `computes`.
            item: What it is given.
            size: Texts in it.

        Raises:
            Refused: Too many wait already, or the server ends.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._arrived:
            if self._ended:
                raise Refused(503, "the server is stopping", "stopping", {"Retry-After": "5"})
            waiting = sum(one.size for one in self._queue)
            if waiting and waiting + size > self._max_waiting:
                message = f"{waiting} texts wait already: expected at most {self._max_waiting} with those of a request"
                raise Refused(429, f"{message}; try again in a moment", "overloaded", {"Retry-After": "1"})
            self._queue.append(_Waiting(kind, item, size, loop, future))
            self._arrived.notify()
        return await future

    def close(self, timeout_seconds: float) -> None:
        """Compute what waits, take nothing more, and end.

        Args:
            timeout_seconds: How long that may take.
        """
        with self._arrived:
            self._ended = True
            self._arrived.notify()
        self._thread.join(timeout_seconds)

    def _work(self) -> None:
        while batch := self._next():
            begun = time.monotonic()
            self._answer(batch)
            self._observe(batch[0].kind, sum(one.size for one in batch), time.monotonic() - begun)

    def _next(self) -> list[_Waiting]:
        """Take the first of the queue, and those of its kind that fit with it; empty at the end."""
        with self._arrived:
            while True:
                while not self._queue and not self._ended:
                    self._arrived.wait()
                if not self._queue:
                    return []
                first = self._queue.popleft()
                if first.future.cancelled():  # whoever asked has gone
                    continue
                batch, size, left = [first], first.size, deque[_Waiting]()
                for one in self._queue:
                    if one.kind == first.kind and size + one.size <= self._max_batch:
                        batch.append(one)
                        size += one.size
                    else:
                        left.append(one)
                self._queue = left
                return batch

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Compute a batch; where that fails, each request by itself, so that none fails for another."""
        try:
            results = self._computes[batch[0].kind]([one.item for one in batch])
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
                return
            _give(batch[0], error)
            return
        for one, result in zip(batch, results, strict=True):
            _give(one, result)


def _give(waiting: _Waiting, result: Any) -> None:
    """Hand a result, or an error, to whoever waits for it."""

    def give() -> None:
        if waiting.future.cancelled():
            return
        if isinstance(result, Exception):
            waiting.future.set_exception(result)
        else:
            waiting.future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        waiting.loop.call_soon_threadsafe(give)

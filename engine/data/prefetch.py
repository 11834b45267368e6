"""Batches made ahead of the steps that take them.

Collating a batch is Python's work, and a device that waits for it is idle. A thread makes the next ones meanwhile: a
batch is a function of its step's number, so the result is the same, and an interrupted run needs nothing of what was
made ahead. For a GPU the copy is made from pinned memory, in a stream of its own, beside the computation.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

B = TypeVar("B")
AHEAD = 2
"""Batches that wait, made, for their step."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Made:
    """A batch on its way, or the error that stopped the thread."""

    batch: Any = None
    error: BaseException | None = None
    copied: Any = None
    """CUDA's event behind the copy."""


@contextmanager
def prefetched(prepare: Callable[[int], B], steps: Sequence[int], device: torch.device) -> Iterator[Iterator[B]]:
    """Make batches in a thread, in the order of the steps.

    Args:
        prepare: Makes a step's batch on the CPU: tensors in dataclasses, dicts, lists and tuples. It runs beside the
            steps, so it must use no random state and no collective.
        steps: Numbers of the steps.
        device: Where the batches are needed.

    Yields:
        An iterator over the batches, on the device. An error of `prepare` comes out where its batch would.
    """
    made: queue.Queue[_Made] = queue.Queue(maxsize=AHEAD)
    ended = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def put(one: _Made) -> None:
        while not ended.is_set():
            try:
                return made.put(one, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                if ended.is_set():
                    return
                put(_upload(prepare(step), device, stream))
        except BaseException as error:
            put(_Made(error=error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield _taken(made, len(steps))
    finally:
        ended.set()
        thread.join()


def _taken(made: queue.Queue[_Made], count: int) -> Iterator[Any]:
    for _ in range(count):
        one = made.get()
        if one.error is not None:
            raise one.error
        if one.copied is not None:
            torch.cuda.current_stream().wait_event(one.copied)
            map_tensors(one.batch, _used_here)
        yield one.batch


def _used_here(tensor: torch.Tensor) -> torch.Tensor:
    """Keep the memory of a copy until this stream is through with it."""
    tensor.record_stream(torch.cuda.current_stream())
    return tensor


def _upload(batch: Any, device: torch.device, stream: torch.cuda.Stream | None) -> _Made:
    if stream is None:
        return _Made(batch if device.type == "cpu" else map_tensors(batch, lambda tensor: tensor.to(device)))
    with torch.cuda.stream(stream):
        moved = map_tensors(batch, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return _Made(moved, copied=stream.record_event())


def map_tensors(batch: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to all tensors in dataclasses, dicts, lists and tuples; everything else stays."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, function) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{one.name: map_tensors(getattr(batch, one.name), function) for one in fields(batch)})
    return batch

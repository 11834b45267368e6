"""How the time of Sparring's training steps divides, and which operations take it, for `benchmarks/train.py`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_sides import Sparring
from benchmarks.work import wait
from engine.config.timetable import Visit
from engine.data.prefetch import prefetched

AHEAD, WAITING, CACHE, TEACHER = "collation, in its thread", "waiting for a batch", "forward, cached", "forward, ranker"
FORWARD, BACKWARD, OPTIMIZER, WHOLE = "forward", "backward", "optimizer", "step"
MOST_OPERATIONS = 14


class Stopwatch:
    """Seconds by name: on the wall, and of the processor.

    On a GPU every reading waits for the device, so the sum is more than an unwatched step takes.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def on(self, name: str, *, in_thread: bool = False) -> Iterator[None]:
        """Count the body under a name.

        Args:
            name: Of the part.
            in_thread: Count the processor's seconds of this thread alone, and leave the device alone.
        """
        clock = time.thread_time if in_thread else time.process_time
        if not in_thread:
            wait(self._device)
        start, cpu_start = time.perf_counter(), clock()
        yield
        if not in_thread:
            wait(self._device)
        self.seconds[name] += time.perf_counter() - start
        self.cpu_seconds[name] += clock() - cpu_start


class _Watched:
    """An engine whose passes are timed."""

    def __init__(self, model: Any, watch: Stopwatch) -> None:
        self._model, self._watch = model, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        with self._watch.on(FORWARD if torch.is_grad_enabled() else CACHE):
            return self._model(**inputs)

    def backward(self, loss: Any, **options: Any) -> None:
        with self._watch.on(BACKWARD):
            self._model.backward(loss, **options)

    def step(self, lr: float) -> Any:
        with self._watch.on(OPTIMIZER):
            return self._model.step(lr)


def division(side: Sparring, visit: Visit, device: torch.device) -> list[dict[str, Any]]:
    """Take a turn with a watch, and return the milliseconds of a step by what they went to, of both clocks."""
    watch = Stopwatch(device)

    @contextmanager
    def watched_batches(
        prepare: Callable[[int], Any], steps: Sequence[int], where: torch.device
    ) -> Iterator[Iterator[Any]]:
        def timed(step: int) -> Any:
            with watch.on(AHEAD, in_thread=True):
                return prepare(step)

        with prefetched(timed, steps, where) as batches:

            def taken() -> Iterator[Any]:
                for _ in steps:
                    with watch.on(WAITING, in_thread=True):
                        batch = next(batches)
                    yield batch

            yield taken()

    with (
        patch.object(side, "model", _Watched(side.model, watch)),
        patch.object(side, "batches", watched_batches),
        _watched_opponent(side, watch),
        watch.on(WHOLE),
    ):
        side.take(visit)
    for seconds in (watch.seconds, watch.cpu_seconds):
        seconds["rest"] = seconds[WHOLE] - sum(one for name, one in seconds.items() if name not in (WHOLE, AHEAD))
    return [
        {
            "part": name,
            "ms": 1e3 * seconds / visit.phase.steps,
            "share": seconds / watch.seconds[WHOLE],
            "CPU ms": 1e3 * watch.cpu_seconds[name] / visit.phase.steps,
            "share of CPU": watch.cpu_seconds[name] / watch.cpu_seconds[WHOLE],
        }
        for name, seconds in watch.seconds.items()
    ]


@contextmanager
def _watched_opponent(side: Sparring, watch: Stopwatch) -> Iterator[None]:
    if side.opponent is None:
        yield
        return
    forward = side.opponent.forward

    def timed(*words: Any, **options: Any) -> Any:
        with watch.on(TEACHER):
            return forward(*words, **options)

    with patch.object(side.opponent, "forward", timed):
        yield


def operations(side: Sparring, visit: Visit, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Take a turn under torch's profiler, and return the operations that take most of the time, most first.

    Returns:
        Tables by what they are of: the processor, and on a GPU first the device, whose last row is the step's whole
        time: what of it the device's operations do not fill, it waits.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        start = time.perf_counter()
        side.take(visit)
        wait(device)
        seconds = time.perf_counter() - start
    events, steps = found.key_averages(), visit.phase.steps
    tables = {"Operations on the processor": _most(events, steps, lambda event: float(event.self_cpu_time_total))}
    if on_gpu:
        rows = _most(events, steps, lambda event: float(event.self_device_time_total))
        busy = sum(float(event.self_device_time_total) for event in events) / 1e3 / steps
        whole = 1e3 * seconds / steps
        rows += [
            {"operation": "all operations of the device", "ms a step": busy, "share": busy / whole},
            {"operation": "the step, watched", "ms a step": whole, "share": 1.0},
        ]
        tables = {"Operations on the device": rows, **tables}
    return tables


def _most(events: Any, steps: int, own: Callable[[Any], float]) -> list[dict[str, Any]]:
    whole = sum(map(own, events))
    return [
        {
            "operation": event.key,
            "calls a step": event.count / steps,
            "ms a step": own(event) / 1e3 / steps,
            "share": own(event) / whole,
        }
        for event in sorted(events, key=own, reverse=True)[:MOST_OPERATIONS]
    ]

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
FORWARD, BACKWARD, OPTIMIZER, REST = "forward", "backward", "optimizer", "rest"
MOST_OPERATIONS = 14


class Stopwatch:
    """Seconds by name. On a GPU every reading waits for the device, so the sum is more than an unwatched step takes."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def on(self, name: str, *, waits: bool = True) -> Iterator[None]:
        """Count the body under a name."""
        if waits:
            wait(self._device)
        start = time.perf_counter()
        yield
        if waits:
            wait(self._device)
        self.seconds[name] += time.perf_counter() - start


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


def division(side: Sparring, visit: Visit, device: torch.device) -> dict[str, float]:
    """Take a turn with a watch, and return the milliseconds of a step by what they went to."""
    watch = Stopwatch(device)

    @contextmanager
    def watched_batches(
        prepare: Callable[[int], Any], steps: Sequence[int], where: torch.device
    ) -> Iterator[Iterator[Any]]:
        def timed(step: int) -> Any:
            with watch.on(AHEAD, waits=False):
                return prepare(step)

        with prefetched(timed, steps, where) as batches:

            def taken() -> Iterator[Any]:
                for _ in steps:
                    with watch.on(WAITING, waits=False):
                        batch = next(batches)
                    yield batch

            yield taken()

    with (
        patch.object(side, "model", _Watched(side.model, watch)),
        patch.object(side, "batches", watched_batches),
        _watched_opponent(side, watch),
    ):
        start = time.perf_counter()
        side.take(visit)
        wait(device)
        whole = time.perf_counter() - start
    beside = watch.seconds.pop(AHEAD)
    parts = {name: watch.seconds.get(name, 0.0) for name in (WAITING, TEACHER, CACHE, FORWARD, BACKWARD, OPTIMIZER)}
    parts |= {REST: whole - sum(parts.values()), "step": whole, AHEAD: beside}
    return {name: 1e3 * seconds / visit.phase.steps for name, seconds in parts.items()}


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


def operations(side: Sparring, visit: Visit, device: torch.device) -> list[dict[str, Any]]:
    """Take a turn under torch's profiler, and return the operations that take most of the time of all, most first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        side.take(visit)
        wait(device)

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(found.key_averages(), key=own, reverse=True)
    whole = sum(map(own, events))
    return [
        {
            "operation": event.key,
            "calls a step": event.count / visit.phase.steps,
            "ms a step": own(event) / 1e3 / visit.phase.steps,
            "share": own(event) / whole,
        }
        for event in events[:MOST_OPERATIONS]
    ]

"""Batches made ahead: the same ones in the same order, errors where their batch would be, and no thread left behind."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from engine.data.prefetch import AHEAD, map_tensors, prefetched

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_come_in_the_order_of_the_steps() -> None:
    with prefetched(lambda step: step * step, range(3, 9), CPU) as batches:
        assert list(batches) == [9, 16, 25, 36, 49, 64]
    assert threads() == []


def test_the_next_batches_are_made_while_a_step_computes() -> None:
    """Symptom: the device waited for each batch to be collated."""
    made: list[int] = []
    with prefetched(lambda step: made.append(step) or step, range(10), CPU) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(made) < 1 + AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made[: 1 + AHEAD] == list(range(1 + AHEAD))
        time.sleep(0.05)
        assert len(made) <= 2 + AHEAD, "no more than wait, and one on its way: memory is bounded"


def test_an_error_comes_out_where_its_batch_would() -> None:
    def prepare(step: int) -> int:
        if step == 2:
            raise ValueError("a query has too few candidates")
        return step

    taken: list[int] = []

    def take_all() -> None:
        with prefetched(prepare, range(5), CPU) as batches:
            for batch in batches:
                taken.append(batch)

    with pytest.raises(ValueError, match="too few candidates"):
        take_all()
    assert taken == [0, 1]
    assert threads() == []


def test_a_step_that_fails_ends_the_thread() -> None:
    def fail() -> None:
        with prefetched(lambda step: step, range(1000), CPU) as batches:
            next(batches)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert threads() == []


@dataclass(frozen=True)
class Holder:
    name: str
    tensors: dict[str, list[torch.Tensor]]
    pair: tuple[torch.Tensor, int]


def test_tensors_are_found_wherever_they_are() -> None:
    one = torch.ones(2)
    doubled = map_tensors(Holder("a", {"x": [one, one + 1]}, (one, 3)), lambda tensor: tensor * 2)
    assert doubled.name == "a"
    assert [tensor.tolist() for tensor in doubled.tensors["x"]] == [[2, 2], [4, 4]]
    assert (doubled.pair[0].tolist(), doubled.pair[1]) == ([2, 2], 3)

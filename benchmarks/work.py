"""What a computation costs at least: its floating-point operations, and how fast a processor multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_SIZES = {"cpu": 2048, "cuda": 8192}


def flop(config: Any, lengths: Sequence[int]) -> float:
    """Return the operations of an encoder over real tokens: 2 for each weight of a linear layer, and attention."""
    hidden, inner = config.hidden_size, config.intermediate_size
    per_token = 2 * (4 * hidden**2 + 2 * hidden * inner)
    return float(config.num_hidden_layers * sum(per_token * one + 4 * one**2 * hidden for one in lengths))


def matrix_peak(
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the FLOP/s of a product of large matrices, the best of three.

    Args:
        device: The CPU, where it is left out.
        dtype: Of the matrices.
        size: Rows and columns of each; left out, enough for the device.
        clock: What counts the seconds: `time.process_time` for those of the processor, which other work hardly moves.
    """
    device, best = device or torch.device("cpu"), 0.0
    size = size or _SIZES[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        wait(device)
        start = clock()
        torch.mm(left, right)
        wait(device)
        best = max(best, 2 * size**3 / (clock() - start))
    return best


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

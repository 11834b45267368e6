"""Measurements on their way to TensorBoard and metrics.jsonl.

A metric is born with its reduction, so that whoever adds one cannot forget how it is combined over ranks and steps.
Only rank 0 writes; both sinks get the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

Reduction = Literal["mean", "sum", "max"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One value of this rank and how it joins those of other ranks and steps.

    Attributes:
        value: A number, or a scalar tensor that stays on its device until it is logged.
        reduction: `mean` and `max` go over ranks and over the steps since the last point; `sum` adds both.
    """

    value: float | torch.Tensor
    reduction: Reduction = "mean"


@dataclass
class MetricWindow:
    """Gathers the metrics of the steps between two logged points."""

    _values: dict[str, list[float]] = field(default_factory=dict)
    _reductions: dict[str, Reduction] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take in one step's metrics."""
        for name, metric in metrics.items():
            self._values.setdefault(name, []).append(float(metric.value))
            self._reductions[name] = metric.reduction

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Combine over steps and ranks, and start anew. A collective: all ranks hold the same names.

        Args:
            device: Where the collective's backend works.

        Returns:
            Name to value, equal on all ranks.
        """
        reduced: dict[str, float] = {}
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        for reduction, operation in (
            ("mean", dist.ReduceOp.SUM),
            ("sum", dist.ReduceOp.SUM),
            ("max", dist.ReduceOp.MAX),
        ):
            names = sorted(name for name, kind in self._reductions.items() if kind == reduction)
            if not names:
                continue
            over_steps = [_over_steps(self._values[name], reduction) for name in names]
            combined = torch.tensor(over_steps, dtype=torch.float64 if device.type == "cpu" else torch.float32)
            if world_size > 1:
                combined = combined.to(device)
                dist.all_reduce(combined, op=operation)
            if reduction == "mean":
                combined = combined / world_size
            reduced |= dict(zip(names, combined.tolist(), strict=True))
        self._values.clear()
        self._reductions.clear()
        return reduced


class MetricsWriter:
    """Writes TensorBoard events and metrics.jsonl; on ranks other than 0 it does nothing.

    Args:
        folder: Run folder; `tensorboard/` and `metrics.jsonl` are made in it.
        active: Whether this rank writes.
    """

    def __init__(self, folder: Path, *, active: bool) -> None:
        self._board: Any = None
        self._path = folder / "metrics.jsonl"
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write one point.

        Args:
            stage: Name of the stage, kept in metrics.jsonl.
            step: The x-axis: optimizer steps of the model so far, or the iteration.
            values: TensorBoard tag to number.
        """
        if self._board is None or not values:
            return
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)
        self._append({"time": round(time.time(), 3), "stage": stage, "step": step, **values})

    def write_text(self, tag: str, step: int, text: str) -> None:
        """Write a Markdown text to TensorBoard's text panel."""
        if self._board is not None:
            self._board.add_text(tag, text, step)
            self._board.flush()

    def close(self) -> None:
        """Flush what is still in memory."""
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        """Make what was written so far visible to TensorBoard."""
        if self._board is not None:
            self._board.flush()

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _over_steps(values: list[float], reduction: str) -> float:
    if reduction == "mean":
        return sum(values) / len(values)
    return sum(values) if reduction == "sum" else max(values)

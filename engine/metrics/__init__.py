"""Measurements on their way to metrics.jsonl, to TensorBoard and to other trackers.

A metric is born with its reduction, so that whoever adds one cannot forget how it is combined over ranks and steps.
Only rank 0 writes; all sinks get the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.metrics.board import NOT_TAGS, TENSORBOARD, Board, BoardPlan
from engine.metrics.trackers import TrackedRun, Tracker
from shards.files import write_atomically

if TYPE_CHECKING:  # imported where ranks combine theirs
    import torch

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
    """Gathers the metrics of the steps between two logged points.

    Values are combined over ranks first, each step's for itself and in rank order, and then over steps: so a window
    that a checkpoint holds half of (`settle`, `state`) gives the same number, bit by bit, as an undisturbed one.
    """

    _values: dict[str, list[float | torch.Tensor]] = field(default_factory=dict)
    _settled: dict[str, list[float]] = field(default_factory=dict)
    _reductions: dict[str, Reduction] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take in one step's metrics; tensors stay on their device until `settle`, so that no step waits for them."""
        for name, metric in metrics.items():
            self._values.setdefault(name, []).append(metric.value)
            self._reductions[name] = metric.reduction

    def settle(self, device: torch.device) -> None:
        """Combine over ranks what was added since. A collective: all ranks hold the same names, equally often.

        Args:
            device: Where the collective's backend works.
        """
        import torch
        import torch.distributed as dist

        names = sorted(self._values)
        values = [value for name in names for value in self._values[name]]
        values_V = torch.empty(0, dtype=torch.float64)
        if values:
            scalars = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
            values_V = torch.stack(scalars).cpu()
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        parts = [values_V]
        if world_size > 1 and names:
            parts = [torch.empty_like(values_V, device=device) for _ in range(world_size)]
            dist.all_gather(parts, values_V.to(device))
        by_rank = [iter(part.tolist()) for part in parts]
        for name in names:
            for _ in self._values[name]:
                over_ranks = [next(values) for values in by_rank]
                self._settled.setdefault(name, []).append(_combine(over_ranks, self._reductions[name]))
        self._values.clear()

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Combine over ranks and steps, and start anew. A collective, as `settle`.

        Args:
            device: Where the collective's backend works.

        Returns:
            Name to value, equal on all ranks.
        """
        self.settle(device)
        reduced = {name: _combine(values, self._reductions[name]) for name, values in sorted(self._settled.items())}
        self._settled.clear()
        self._reductions.clear()
        return reduced

    def state(self) -> dict[str, Any]:
        """Return what is settled, the same on all ranks, as JSON for a checkpoint."""
        return {name: [self._reductions[name], *values] for name, values in sorted(self._settled.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` returned."""
        for name, (reduction, *values) in state.items():
            self._reductions[name], self._settled[name] = reduction, list(values)


class MetricsWriter:
    """Writes metrics.jsonl, texts.jsonl and TensorBoard events, and tells trackers; only on rank 0 it does anything.

    A run that goes on repeats the points between its last checkpoint and its end: the first point that a stage writes
    again removes those of the earlier start that it repeats. TensorBoard's events, of which a killed process loses the
    newest, are then made anew from the two files, and so always hold the same.

    Args:
        folder: Run folder; `tensorboard/`, `metrics.jsonl` and `texts.jsonl` are made in it.
        active: Whether this rank writes.
        plan: Where measurements are shown, and in which order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        plan: BoardPlan = BoardPlan(),  # noqa: B008 - it is frozen
    ) -> None:
        self._board: Board | None = None
        self._plan, self._has_board = plan, TENSORBOARD in plan.trackers
        self._active, self._folder = active, folder
        self._path, self._texts = folder / "metrics.jsonl", folder / "texts.jsonl"
        self.listeners: list[Callable[[str, int, Mapping[str, float]], None]] = []
        """Told of each point: stage, step, name to value."""
        self._earlier: dict[tuple[str, str], int] = {}
        for line in _read_lines(self._path) if active else []:
            for tag in _tags(line):
                key = (str(line["stage"]), tag)
                self._earlier[key] = max(self._earlier.get(key, 0), int(line["step"]))
        self._waiting = [name for name in plan.trackers if name != TENSORBOARD and active]
        self._tracked = TrackedRun(folder, plan.values)
        self._trackers: list[Tracker] = []

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write one point.

        Args:
            stage: Name of the stage, kept in metrics.jsonl.
            step: The x-axis: optimizer steps of the model so far, or the iteration.
            values: TensorBoard tag to number.
        """
        if not self._active or not values:
            return
        earlier = [self._earlier.pop((stage, tag), -1) for tag in values]
        if max(earlier) >= step:
            self._remove_from(stage, step, frozenset(values))
        board = self._open_board()
        line = {"time": round(time.time(), 3), "stage": stage, "step": step, **values}
        _append(self._path, line)
        if board is not None:
            board.show(line)
        self._trackers += [Tracker(name, self._tracked) for name in self._waiting]
        self._waiting.clear()
        for tracker in self._trackers:
            tracker.log(step, values)
        for listener in self.listeners:
            listener(stage, step, dict(values))

    def write_text(self, tag: str, step: int, text: str) -> None:
        """Write a Markdown text to TensorBoard's text panel."""
        if not self._active:
            return
        board = self._open_board()
        lines = _read_lines(self._texts)
        if any((line["tag"], line["step"]) == (tag, step) for line in lines):
            _write_lines(self._texts, [line for line in lines if (line["tag"], line["step"]) != (tag, step)])
            self._close_board()
            board = self._open_board()
        line = {"time": round(time.time(), 3), "tag": tag, "step": step, "text": text}
        _append(self._texts, line)
        if board is not None:
            board.show_text(line)
            board.flush()

    def close(self) -> None:
        """Flush what is still in memory, and wait for trackers."""
        self._close_board()
        for tracker in self._trackers:
            tracker.finish()
        self._trackers.clear()

    def flush(self) -> None:
        """Make what was written so far visible to TensorBoard."""
        if self._board is not None:
            self._board.flush()

    def _remove_from(self, stage: str, step: int, tags: frozenset[str]) -> None:
        """Remove a stage's points from a step on, those with these tags: they are about to be repeated."""
        lines = _read_lines(self._path)
        kept = [line for line in lines if line["stage"] != stage or line["step"] < step or not tags & _tags(line)]
        _write_lines(self._path, kept)
        self._close_board()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def _open_board(self) -> Board | None:
        """Open TensorBoard's events; what earlier starts have measured is written anew."""
        if self._board is None:
            for path in (self._path, self._texts):
                _drop_cut_line(path)
            if self._has_board:
                self._board = Board(self._folder / "tensorboard", self._plan)
                for line in _read_lines(self._path):
                    self._board.show(line)
                for line in _read_lines(self._texts):
                    self._board.show_text(line)
        return self._board


@dataclass(frozen=True, slots=True)
class Point:
    """What one line of metrics says: the stage, the place on its x-axis, and tag to number."""

    stage: str
    step: int
    values: Mapping[str, float]


class KeptMetrics(MetricsWriter):
    """Keeps points in a file, for the process that writes the run's metrics to take them over.

    Args:
        path: The file; what an earlier start left in it stays.
        active: Only rank 0 writes.
    """

    def __init__(self, path: Path, *, active: bool) -> None:
        super().__init__(path.parent, active=False)
        self._kept, self._keeps = path, active

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Keep one point; arguments as of `MetricsWriter.write`."""
        if self._keeps and values:
            _drop_cut_line(self._kept)
            _append(self._kept, {"time": round(time.time(), 3), "stage": stage, "step": step, **values})


def kept_lines(path: Path) -> list[Point]:
    """Read what `KeptMetrics` kept, of points that an interrupted stage repeated the last ones.

    Args:
        path: The file; nothing where there is none.
    """
    found = {(line["stage"], line["step"], _tags(line)): line for line in _read_lines(path)}
    return [Point(stage, step, {tag: line[tag] for tag in sorted(tags)}) for (stage, step, tags), line in found.items()]


def take_points(source: Path, target: Path, stages: Collection[str]) -> None:
    """Write the points of some stages of one file of metrics into a new one.

    Args:
        source: A run's `metrics.jsonl`; where there is none, none is written.
        target: The new file.
        stages: Whose points are taken.
    """
    if source.exists():
        _write_lines(target, [line for line in _read_lines(source) if line["stage"] in stages])


def _tags(line: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(line) - NOT_TAGS


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines; the last one may have been cut by a kill."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _drop_cut_line(path: Path) -> None:
    if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n") and text:
        _write_lines(path, _read_lines(path))


def _combine(values: list[float], reduction: str) -> float:
    if reduction == "mean":
        return sum(values) / len(values)
    return sum(values) if reduction == "sum" else max(values)

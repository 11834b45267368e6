"""The measurements of a run, `metrics.jsonl`, thinned while they are read: a long run has a hundred thousand lines.

Neighbours are joined to their mean where a curve gets too long, and the least and the greatest of them are kept, so
that a spike is still seen. What is held does not grow with the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ArtifactError

MOST_POINTS = 240
"""Points that a curve keeps at most; more than a chart has room for."""
_MOST_CURVES = 4000
_KEPT_BY_STAGE = frozenset({"encode/slowest_rank"})
"""Tags whose step does not tell the stages apart."""
_NO_TAG = frozenset({"time", "stage", "step"})


@dataclass(slots=True)
class Bin:
    """Neighbouring points of a curve: sums of x and y, and the ends of y."""

    count: int
    x_sum: float
    y_sum: float
    low: float
    high: float

    @property
    def x(self) -> float:
        """The mean x."""
        return self.x_sum / self.count

    @property
    def y(self) -> float:
        """The mean y."""
        return self.y_sum / self.count

    def join(self, other: Bin) -> None:
        """Take another one's points in."""
        self.count, self.x_sum, self.y_sum = (
            *(self.count + other.count, self.x_sum + other.x_sum),
            self.y_sum + other.y_sum,
        )
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(slots=True)
class Curve:
    """A curve of any length in at most `MOST_POINTS` bins.

    Attributes:
        bins: By the order of the file.
        width: Points that a full bin has.
        num_points: All that were read.
    """

    bins: list[Bin] = field(default_factory=list)
    width: int = 1
    num_points: int = 0

    def add(self, x: float, y: float) -> None:
        """Take a point in."""
        self.num_points += 1
        own = Bin(1, x, y, y, y)
        if self.bins and self.bins[-1].count < self.width:
            self.bins[-1].join(own)
            return
        self.bins.append(own)
        if len(self.bins) > MOST_POINTS:
            for place in range(0, len(self.bins) - 1, 2):
                self.bins[place].join(self.bins[place + 1])
            self.bins = self.bins[::2]
            self.width *= 2


@dataclass(slots=True)
class Curves:
    """What `metrics.jsonl` holds.

    Attributes:
        by_tag: Tag -> its curve over the steps of the model, or over the iterations.
        by_stage: Tag -> stage -> the last value, for tags whose step does not tell stages apart.
        not_finite: Tag -> number of values that are no finite numbers, which no curve shows.
        num_lines: Of the file.
        seconds: From the first line to the last, by rank 0's clock.
        left_out: Number of values of tags beyond the most that are read.
    """

    by_tag: dict[str, Curve] = field(default_factory=dict)
    by_stage: dict[str, dict[str, float]] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    num_lines: int = 0
    seconds: float = 0.0
    left_out: int = 0

    def of_measure(self, measure: str) -> dict[str, Curve]:
        """Return the curves of a measure by training phase, such as `retriever` of `retriever/loss`."""
        found = (tag.rpartition("/") for tag in self.by_tag)
        return {
            phase: self.by_tag[f"{phase}/{name}"] for phase, _, name in found if name == measure and self._is(phase)
        }

    @property
    def phases(self) -> list[str]:
        """The training phases, in the order in which they began."""
        return [tag.removesuffix("/loss") for tag in self.by_tag if tag.endswith("/loss") and self._is(tag[:-5])]

    @property
    def measures(self) -> list[str]:
        """What training phases measure, as in the file."""
        return list(dict.fromkeys(tag.rpartition("/")[2] for tag in self.by_tag if self._is(tag.rpartition("/")[0])))

    def _is(self, phase: str) -> bool:
        return f"{phase}/lr" in self.by_tag

    def take(self, line: Mapping[str, object]) -> None:
        """Take in a line whose form is checked."""
        step, stage = line["step"], line["stage"]
        for tag, value in line.items():
            if tag in _NO_TAG or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                self.not_finite[tag] = self.not_finite.get(tag, 0) + 1
            elif tag in _KEPT_BY_STAGE:
                self.by_stage.setdefault(tag, {})[str(stage)] = float(value)
            elif tag in self.by_tag or len(self.by_tag) < _MOST_CURVES:
                self.by_tag.setdefault(tag, Curve()).add(float(step), float(value))  # type: ignore[arg-type]
            else:
                self.left_out += 1


def read_curves(path: Path) -> Curves:
    """Read the measurements of a run.

    Args:
        path: `metrics.jsonl`; where there is none yet, there are no curves. A last line that a kill has cut is left
            out, as the run itself does when it goes on.

    Raises:
        ArtifactError: A line is no measurement; it is named.
    """
    curves, first, last = Curves(), None, 0.0
    if not path.exists():
        return curves
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                break
            line = _parsed(raw)
            if line is None:
                raise ArtifactError(
                    f"the measurements of the run are damaged: line {number} of {path} reads {raw[:80]!r}",
                    expected="a JSON object with time, stage and step",
                    remedy="restore the file from a copy, or take this line out of it: it is only shown, nothing is "
                    "computed from it",
                )
            curves.take(line)
            curves.num_lines, last = number, float(line["time"])  # type: ignore[arg-type]
            first = last if first is None else first
    curves.seconds = last - (first or 0.0)
    return curves


def _parsed(raw: bytes) -> Mapping[str, object] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("stage"), str):
        return None
    numbers = [line.get("time"), line.get("step")]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
        return None
    return line

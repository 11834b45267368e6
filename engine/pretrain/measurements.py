"""The record of what was measured on documents held out: a row for each epoch, whatever the recipe measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from tabulate import tabulate

from engine.log import get_logger
from engine.results import NOT_SHOWN
from engine.run import RunFolder, Stage
from shards.files import read_json, read_record, write_json

log = get_logger(__name__)
STREAM = "held_out"
"""Of the random numbers, which are the same at every measurement; and of the metrics."""
_WHAT = "the held-out losses"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A measurement; a recipe's class adds its numbers, each a float, or None where there is nothing to measure.

    Attributes:
        documents: How many were held out.
        iteration: After which epoch; 0 is before the first step.
    """

    documents: int
    iteration: int = field(metadata=NOT_SHOWN)


M = TypeVar("M", bound=HeldOut)


def record_held_out(stage: Stage, found: HeldOut) -> None:
    """Write a measurement into the metrics and the file; behind the last epoch, show them all. A collective.

    Args:
        stage: That measured.
        found: The same on every rank.
    """
    run = stage.run
    values = {f"{STREAM}/{name}": value for name, value in asdict(found).items() if isinstance(value, float)}
    run.metrics.write(stage.name, found.iteration, values)
    run.coordinator.only_rank_zero(f"{stage.name}: record", lambda: _record(held_out_path(run.folder), found))
    if run.is_main and found.iteration == run.timetable.iterations:
        log.info("held-out documents (%s)\n\n%s\n", held_out_path(run.folder), held_out_table(run.folder))


def held_out_path(folder: RunFolder) -> Path:
    """Return where the measurements of a run are."""
    return folder.results / "held_out.json"


def held_out_table(folder: RunFolder) -> str:
    """Format the measurements of a run as a table: a row for each epoch."""
    path = held_out_path(folder)
    rows = read_json(path, _WHAT) if path.exists() else []
    own = [name for name in (rows[0] if rows else ()) if name not in ("iteration", "documents")]
    names = ("iteration", *own, "documents")
    return tabulate([[row[name] for name in names] for row in rows], headers=names, floatfmt=".4f")


def read_held_out(folder: RunFolder, kind: type[M]) -> list[M]:
    """Read the measurements of a run, by epoch; none where there are none yet.

    Args:
        folder: The run's.
        kind: Of its recipe's measurements.

    Raises:
        ArtifactError: Their file is damaged.
    """
    return _read(held_out_path(folder), kind)


def _read(path: Path, kind: type[M]) -> list[M]:
    return read_record(path, list[kind], _WHAT) if path.exists() else []  # type: ignore[valid-type]


def _record(path: Path, found: HeldOut) -> None:
    """Put a measurement into the file, in the place of an earlier one of the same epoch."""
    rows = [*(one for one in _read(path, type(found)) if one.iteration != found.iteration), found]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(one) for one in sorted(rows, key=lambda one: one.iteration)])

"""`results/summary.json`: a row for each system, iteration and split, and the table made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tabulate import tabulate

from engine.evaluation.systems import BM25, RANKER, RETRIEVER, System, place_of_kind
from engine.run import RunFolder
from shards.files import read_record, write_json


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    system: str
    retriever: str
    """The system that searched the corpus: itself, or what a ranker's documents come from in the end."""
    iteration: int | None
    split: str
    metrics: dict[str, float]
    kind: str = ""
    """As `System.kind`."""
    over: str | None = None
    """The system whose ranking it re-orders."""

    @classmethod
    def of(cls, system: System, split: str, metrics: dict[str, float]) -> Row:
        """Make the row of what was measured."""
        over = system.over.name if system.over else None
        return cls(system.name, system.first_stage.name, system.iteration, split, metrics, system.kind, over)

    def replaces(self, other: Row) -> bool:
        """Tell whether both are of the same system, weights and split."""
        mine, theirs = ((row.system, row.retriever, row.over, row.iteration, row.split) for row in (self, other))
        return mine == theirs


def read_rows(path: Path) -> list[Row]:
    """Read a summary, or no rows where there is none yet.

    Raises:
        ArtifactError: It is damaged.
    """
    rows = read_record(path, list[Row], "the summary of results") if path.exists() else []
    return [row if row.kind else _with_kind(row) for row in rows]


def add_row(path: Path, row: Row) -> None:
    """Put a row into a summary in the place of the one that was measured before, at its end."""
    rows = [old for old in read_rows(path) if not row.replaces(old)]
    write_json(path, [asdict(one) for one in [*rows, row]])


def summary_table(folder: RunFolder) -> str:
    """Format the recorded rows as a table, system by metric: by split, iteration and kind, then as they were added."""
    rows = sorted(read_rows(folder.summary), key=_place)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    table: list[list[object]] = []
    for row in rows:
        place = [row.split, row.iteration, row.system, f"{row.over} top" if row.over else ""]
        table.append([*place, *(row.metrics.get(name) for name in metrics)])
    text: str = tabulate(
        table, headers=["split", "iteration", "system", "re-ranks", *metrics], floatfmt=".3f", missingval=""
    )
    return text


def _place(row: Row) -> tuple[str, int, int, bool]:
    """Order by split, iteration and kind; the state before training stands before the warm-up's."""
    return row.split, row.iteration or 0, place_of_kind(row.kind), row.iteration is not None


def _with_kind(row: Row) -> Row:
    """Complete a row that was recorded when rows named no kind, and all systems were AR2's and its yardsticks."""
    if row.retriever != row.system:
        return replace(row, kind=RANKER, over=row.retriever)
    return replace(row, kind=BM25 if row.system == "BM25" else RETRIEVER)

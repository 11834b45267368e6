"""The matrix of re-rankers over retrievers' lists as tables: means, and differences to one of the re-rankers.

Each cell is a setting of one run or of several seeds (`engine.evaluation.pooled`): tests are over queries, and how far
the seeds lie apart is told beside them.

Source: R2ANKER Table 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from engine.evaluation.pooled import Difference, Pooled, differences
from engine.evaluation.tables import LEVEL, Table, Value

Cells = Mapping[str, Mapping[str, Pooled]]
"""Column -> row -> what was measured; every column has the same rows."""
T = TypeVar("T")


def matrix_tables(
    title: str, cells: Cells, *, metric: str, compared: str | None, seed: int
) -> tuple[list[Table], Table]:
    """Return a matrix as people read it, and the same with a line for each cell.

    Args:
        title: Of both.
        cells: At least one column and one row.
        metric: Its name, for the header.
        compared: The row that all are compared with; None for the best of each column, the first of those that are.
        seed: Of the tests.

    Returns:
        The printed tables (with `compared` a second one, of the differences), and the one for CSV.

    Raises:
        ConfigError: Rows of a column were measured on different queries.
    """
    rest = {column: compared or max(own, key=lambda row: own[row].mean) for column, own in cells.items()}
    found = {
        column: differences(own, rest[column], seed=seed, metric=metric, of_queries=f"the list of {column}")
        for column, own in cells.items()
    }
    rows, by_row = list(transposed(cells)), transposed(cells)
    star = f"*: differs from {compared or 'the best of its column'} (p < {LEVEL:g}, paired randomisation test, Holm)"
    notes = [f"± standard error over queries; {star}", *_seeds(cells)]
    means = tuple((row, *(_shown(one, found[column].get(row)) for column, one in by_row[row].items())) for row in rows)
    printed = [Table(title, ("re-ranker", *cells), means, tuple(notes))]
    if compared is not None:
        told = tuple((row, *(_told(found[column][row]) for column in cells)) for row in rows if row != compared)
        note = "± standard error of the difference over queries, and its p, corrected by Holm's method over the column"
        printed.append(Table(f"{metric} less that of {compared}", ("re-ranker", *cells), told, (note,)))
    lines = tuple(
        _line(row, column, one, rest[column], found[column].get(row))
        for row in rows
        for column, one in by_row[row].items()
    )
    headers = ("re_ranker", "retriever", metric, "standard_error", "num_queries", "num_runs", "spread_of_runs")
    compares = ("compared_with", "difference", "standard_error_of_difference", "p_corrected")
    return printed, Table(title, (*headers, *compares), lines)


def transposed(cells: Mapping[str, Mapping[str, T]]) -> dict[str, dict[str, T]]:
    """Return cells with rows and columns exchanged."""
    return {row: {column: own[row] for column, own in cells.items()} for row in next(iter(cells.values()))}


def _shown(one: Pooled, difference: Difference | None) -> str:
    return f"{one.shown}{'' if difference is None or difference.is_noise else '*'}"


def _told(difference: Difference) -> str:
    error = "" if difference.standard_error != difference.standard_error else f" ±{difference.standard_error:.4f}"
    return f"{difference.mean:+.4f}{error}, p {difference.p:.2g}"


def _line(row: str, column: str, one: Pooled, compared: str, difference: Difference | None) -> tuple[Value, ...]:
    own = row, column, one.mean, one.standard_error, len(one.values), len(one.run_means), one.spread
    if difference is None:
        return *own, compared, None, None, None
    return *own, compared, difference.mean, difference.standard_error, difference.p


def _seeds(cells: Cells) -> list[str]:
    """Say how many runs there are behind a row, where there are several, and how far they lie apart."""
    told = []
    for row, own in transposed(cells).items():
        spreads = [one.spread for one in own.values() if one.spread is not None]
        if spreads:
            count = max(len(one.run_means) for one in own.values())
            told.append(f"{row}: {count} runs, whose means deviate by {min(spreads):.4f} to {max(spreads):.4f}")
    return told

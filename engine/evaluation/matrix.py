"""The matrix of re-rankers over retrievers' lists as tables: means, and differences to one of the re-rankers.

Each cell is a setting of one run or of several seeds (`engine.evaluation.pooled`): tests are over queries, and how far
the seeds lie apart is told beside them. Row and column are paired by their seeds: a seed's re-ranker is over the list
of the same seed's retriever, so that a retriever's own cell is the retriever.

Source: R2ANKER Table 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.evaluation.pooled import Difference, Pooled, Seeded, differences
from engine.evaluation.significance import LEVEL
from engine.evaluation.tables import Table, Value

Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Column -> row -> query id -> metric, of single runs."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cell(Pooled):
    """What the runs of a row come to over the lists of a column's runs.

    Its runs are those of the row, each with its mean over the lists that it is over; where the row has one alone, they
    are those of the column. So a seed counts once, however many lists it is over.

    Attributes:
        num_rows: Runs of the row.
        num_columns: Runs of the column.
        num_pairs: Of one of them and a list.
    """

    num_rows: int
    num_columns: int
    num_pairs: int

    @classmethod
    def of_pairs(cls, pairs: Mapping[tuple[str, str], Mapping[str, float]]) -> Cell:
        """Pool the values, query id -> value, of pairs of a row's run and a column's run; at least one."""
        rows, columns = ({pair[side] for pair in pairs} for side in (0, 1))
        by_run: dict[str, list[Mapping[str, float]]] = {}
        for (row, column), values in pairs.items():
            by_run.setdefault(row if len(rows) > 1 else column, []).append(values)
        pooled = Pooled.of([Pooled.of(own).values for own in by_run.values()])
        counts = len(rows), len(columns), len(pairs)
        return cls(pooled.values, pooled.run_means, pooled.query_sets, *counts)

    @property
    def is_crossed(self) -> bool:
        """Whether runs are over the lists of several, which have not the same seeds."""
        return self.num_pairs > max(self.num_rows, self.num_columns)


Cells = Mapping[str, Mapping[str, Cell]]
"""Column -> row -> what was measured; every column has the same rows."""


def pairs_that_count(columns: Sequence[str], rows: Sequence[str], of: Mapping[str, Seeded]) -> set[tuple[str, str]]:
    """Return over whose lists the rows are measured.

    Where the settings of both have the same seeds, each run is over the list of its own seed: another's would be no
    run of the setting, and a retriever over it no retriever. Otherwise there is nothing to pair them by, and all runs
    are over all lists: every row of a column is over the same lists, so that they can be compared.

    Args:
        columns: Retrievers of single runs, by their labels.
        rows: Re-rankers of single runs.
        of: Label -> setting and seed.

    Returns:
        (column, row).
    """
    of_columns, of_rows = _seeds_of(columns, of), _seeds_of(rows, of)
    return {
        (column, row)
        for column in columns
        for row in rows
        if of[column].seed == of[row].seed or of_columns[of[column].setting] != of_rows[of[row].setting]
    }


def pool_seeds(values: Values, of: Mapping[str, Seeded]) -> dict[str, dict[str, Cell]]:
    """Make one column of the seeds of a retriever, and one row of those of a re-ranker.

    Args:
        values: What was measured of the pairs that count.
        of: Label -> setting and seed.
    """
    pairs: dict[str, dict[str, dict[tuple[str, str], Mapping[str, float]]]] = {}
    for column, rows in values.items():
        own = pairs.setdefault(of[column].setting, {})
        for row, by_query in rows.items():
            own.setdefault(of[row].setting, {})[row, column] = by_query
    return {column: {row: Cell.of_pairs(found) for row, found in own.items()} for column, own in pairs.items()}


def _seeds_of(labels: Iterable[str], of: Mapping[str, Seeded]) -> dict[str, set[int | None]]:
    found: dict[str, set[int | None]] = {}
    for label in labels:
        found.setdefault(of[label].setting, set()).add(of[label].seed)
    return found


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
        note = (
            "± standard error of the difference over queries, its interval of 95 % by a paired bootstrap, and its p, "
        )
        note += "corrected by Holm's method over the column"
        printed.append(Table(f"{metric} less that of {compared}", ("re-ranker", *cells), told, (note,)))
    lines = tuple(
        _line(row, column, one, rest[column], found[column].get(row))
        for row in rows
        for column, one in by_row[row].items()
    )
    headers = ("re_ranker", "retriever", metric, "standard_error")
    counts = ("num_queries", "num_runs", "num_pairs", "spread_of_runs")
    compares = ("compared_with", "difference", "standard_error_of_difference", "low", "high", "p_corrected")
    return printed, Table(title, (*headers, *counts, *compares), lines)


def transposed(cells: Mapping[str, Mapping[str, T]]) -> dict[str, dict[str, T]]:
    """Return cells with rows and columns exchanged."""
    return {row: {column: own[row] for column, own in cells.items()} for row in next(iter(cells.values()))}


def _shown(one: Cell, difference: Difference | None) -> str:
    return f"{one.shown}{'' if difference is None or difference.is_noise else '*'}"


def _told(difference: Difference) -> str:
    known = difference.standard_error == difference.standard_error
    error = f" ±{difference.standard_error:.4f} [{difference.low:+.4f}, {difference.high:+.4f}]" if known else ""
    return f"{difference.mean:+.4f}{error}, p {difference.p:.2g}"


def _line(row: str, column: str, one: Cell, compared: str, difference: Difference | None) -> tuple[Value, ...]:
    counts = len(one.values), len(one.run_means), one.num_pairs
    own = row, column, one.mean, one.standard_error, *counts, one.spread
    if difference is None:
        return *own, compared, None, None, None, None, None
    ends = difference.low, difference.high
    return *own, compared, difference.mean, difference.standard_error, *ends, difference.p


def _seeds(cells: Cells) -> list[str]:
    """Say how many runs are behind a row, where there are several, how far apart they lie, and what is crossed."""
    told = []
    for row, own in transposed(cells).items():
        spreads = [one.spread for one in own.values() if one.spread is not None]
        if spreads:
            apart = f"deviate by {min(spreads):.4f} to {max(spreads):.4f}"
            if (num_rows := max(one.num_rows for one in own.values())) > 1:
                told.append(f"{row}: {num_rows} runs, whose means {apart}")
            else:
                lists = max(one.num_columns for one in own.values())
                told.append(f"{row}: means over the lists of {lists} runs {apart}")
        if crossed := [column for column, one in own.items() if one.is_crossed]:
            told.append(
                f"{row} over {', '.join(crossed)}: not of the same seeds, so each run is over every list; a run's mean "
                "is that over all lists"
            )
    return told

"""Tables of comparisons: made of values query by query, printed, and written as CSV.

A table of a comparison says for each number how far it could be from that of other queries (standard error), and
whether it differs from the one that it is compared with (`engine.evaluation.significance`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from engine.evaluation.significance import LEVEL, against, standard_error
from shards.files import write_atomically

WITHIN_NOISE = "within noise"
Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Table:
    """What is printed and written.

    Attributes:
        title: With all that the numbers depend on: metric, split, queries, depth.
        headers: Of the columns.
        rows: A value for each column.
        notes: What must be known to read it.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the table for a terminal."""
        columns = range(len(self.headers))
        written = [place for place in columns if any(isinstance(row[place], str) for row in self.rows)]
        body: str = tabulate(
            [[None if is_unknown(value) else value for value in row] for row in self.rows],
            headers=list(self.headers),
            floatfmt=".4f",
            missingval="",
            disable_numparse=written,  # texts stay as they are, also where they look like numbers
        )
        return "\n".join([self.title, "", body, *(["", *self.notes] if self.notes else [])])

    def write_csv(self, path: Path) -> None:
        """Write headers and rows, numbers with all their digits; what is not known is empty."""
        with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.headers)
            writer.writerows(["" if is_unknown(value) else value for value in row] for row in self.rows)


def is_unknown(value: Value) -> bool:
    """Tell whether there is no number, such as the standard error over a single query, which is NaN.

    Args:
        value: Of a table.
    """
    return value is None or value != value


def result_of(difference: float, p: float, *, more: str = "better", less: str = "worse") -> str:
    """Return in words what a difference comes to, such as `better, p 0.012` or `within noise, p 0.4`.

    Args:
        difference: Of the means.
        p: Of it, corrected; from the level on it could be chance.
        more: What a system with the larger mean is called.
        less: What one with the smaller mean is called.
    """
    word = WITHIN_NOISE if p >= LEVEL else more if difference > 0 else less
    return f"{word}, p {p:.2g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over queries, and what is known of it.

    Attributes:
        mean: Of the metric.
        standard_error: Of the mean; NaN for a single query.
        num_queries: Over which it is taken.
        p: Of the difference to the one that is compared with, corrected; None for that one itself.
    """

    mean: float
    standard_error: float
    num_queries: int
    p: float | None = None


def compare(values: Mapping[str, Mapping[str, float]], compared: str | None, *, seed: int) -> dict[str, Measured]:
    """Compare systems on the same queries with one of them.

    Args:
        values: System -> query id -> value; the same queries for all.
        compared: With whom; None for the best, the first of those that are.
        seed: Of the tests.

    Returns:
        For each system what was measured; Holm's correction is over all of them.

    Raises:
        ValueError: The systems have other queries than the first, or there are none.
    """
    qids = list(next(iter(values.values())))
    if not qids or any(one.keys() != set(qids) for one in values.values()):
        raise ValueError(f"a comparison of {', '.join(values)} on different queries, or on none")
    by_system = {name: np.array([one[qid] for qid in qids]) for name, one in values.items()}
    best = compared or max(by_system, key=lambda name: float(by_system[name].mean()))
    p_values = against(by_system, best, seed=seed)
    return {
        name: Measured(float(one.mean()), standard_error(one), len(qids), p_values.get(name))
        for name, one in by_system.items()
    }

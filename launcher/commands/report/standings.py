"""Who stands where: the tables of results, the paired differences, and the curves over the iterations.

Standard errors and tests are those of `engine.evaluation.significance`; differences are of the same queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.config.metric_names import compared_by
from engine.config.timetable import WeightsOf
from engine.errors import ConfigError
from engine.evaluation.significance import LEVEL, Floats, bootstrap, holm, randomisation_test, standard_error
from engine.evaluation.summary import Row
from engine.evaluation.systems import BM25, HYBRID, label_of, place_of_kind
from launcher.commands.report.opened import Opened
from launcher.commands.report.rankings import Ranked, read_ranked
from shards.errors import listed

FIGURE_METRICS = ("R@5", "A@5")
"""What AR2's Figure 3 shows: hits in the top 5, which the paper calls R@5 and finds by answers."""
Role = tuple[str, str]
"""What a row is of, whatever its iteration: its model, and that of what it re-ranks; names, where it has no model."""


@dataclass(frozen=True)
class Standing:
    """A run with its rows, each with the values of its queries where they are known."""

    opened: Opened
    ranked: tuple[Ranked, ...]

    @classmethod
    def of(cls, opened: Opened) -> Standing:
        """Read the rankings of a run.

        Raises:
            DataError: One is damaged.
        """
        return cls(opened, read_ranked(opened, sorted(opened.rows, key=_place)))

    @property
    def doubts(self) -> list[str]:
        """Say which rows have no values of queries although the data are there."""
        without = [told(one.row) for one in self.ranked if one.path is None]
        if self.opened.dataset is None or not without:
            return []
        return [
            f"No standard errors for {listed(without, 6)}: their rankings are not in results/, or give other numbers "
            f"than their rows with the queries and judgements in {self.opened.dataset.path}."
        ]

    @cached_property
    def _models(self) -> dict[tuple[str, int | None], str]:
        """(name, iteration) -> the model whose weights a system of the table has."""
        table = self.opened.run.timetable
        models = self.opened.run.config.models
        iterations = {row.iteration for row in self.opened.rows if row.iteration is not None}
        return {(table.name_of(WeightsOf(one, at)), at): one for one in models for at in sorted(iterations)}

    def role(self, row: Row) -> Role:
        """Say what a row is of."""
        over = self._models.get((row.over, row.over_iteration), row.over) if row.over else ""
        return self._models.get((row.system, row.iteration), row.system), over

    def by_role(self, split: str) -> dict[Role, list[Ranked]]:
        """Return the rows of a split over the iterations, ascending, each role's on the most queries that it has.

        Rankers stand behind the retriever of their own iteration; systems without iterations are left out.
        """
        found: dict[Role, dict[int, Ranked]] = {}
        for one in self.ranked:
            row = one.row
            if row.split != split or row.iteration is None or (self._is_mixed(row) and row.over):
                continue
            own = found.setdefault(self.role(row), {})
            if row.iteration not in own or (own[row.iteration].row.num_queries or 0) < (row.num_queries or 0):
                own[row.iteration] = one
        return {role: [own[at] for at in sorted(own)] for role, own in found.items()}

    def _is_mixed(self, row: Row) -> bool:
        """Whether it re-ranks what other weights found than those of its iteration, where these belong together."""
        return self.opened.run.timetable.ends is None and row.over_iteration != row.iteration

    def base_of(self, like: Row) -> Ranked | None:
        """Return the row of what a row re-ranks, on the same queries; None where there is none.

        What several retrievers found in turn is in no order of anybody's: there it is the row that the table names.
        """
        if like.over == HYBRID and like.headline is not None:
            named = (like.headline.to, like.headline.to_iteration)
            alike = self._on_the_queries_of(like)
            return next(
                (one for one in alike if (label_of(one.row.system, one.row.over), one.row.iteration) == named), None
            )
        named = (like.over, like.over_iteration)
        return next((one for one in self._alike(like) if (one.row.system, one.row.iteration) == named), None)

    def bm25(self, like: Row) -> Ranked | None:
        """Return the row of BM25 on the queries of a row; None without one."""
        return next((one for one in self._alike(like) if one.row.kind == BM25), None)

    def _alike(self, like: Row) -> Iterator[Ranked]:
        """Yield the rows of systems that search the corpus themselves, on the same queries."""
        return (one for one in self._on_the_queries_of(like) if one.row.over is None)

    def _on_the_queries_of(self, like: Row) -> Iterator[Ranked]:
        on = (like.split, like.num_queries, like.relevance_threshold)
        for one in self.ranked:
            if (one.row.split, one.row.num_queries, one.row.relevance_threshold) == on:
                yield one


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one row lies above another on the same queries.

    Attributes:
        what: The first.
        than: The second.
        num_queries: Of both.
        mean: Of the differences, the first less the second.
        standard_error: Of that mean; NaN for one query.
        low: Lower end of the paired bootstrap's interval of 95 %; NaN for one query.
        high: Upper end.
        p: Of the paired test, corrected for the number of differences of the table.
    """

    what: str
    than: str
    num_queries: int
    mean: float
    standard_error: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """What p says."""
        if self.p >= LEVEL:
            return "could be chance"
        return "better" if self.mean > 0 else "worse"


def splits_of(standings: Sequence[Standing]) -> list[str]:
    """Return the splits that were measured: test before dev, then others."""
    found = dict.fromkeys(one.row.split for standing in standings for one in standing.ranked)
    return sorted(found, key=lambda split: (split != "test", split != "dev", split))


def main_metric(standings: Sequence[Standing], asked: str | None) -> str | None:
    """Return the metric by which rows are compared; None where nothing was measured.

    Args:
        standings: The runs.
        asked: What the user named; None for `run.keep_best` of the first run that has one, else a usual one.

    Raises:
        ConfigError: No row has the one that was asked for.
    """
    rows = [one.row for standing in standings for one in standing.ranked]
    measured = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if asked is not None and asked not in measured:
        raise ConfigError(
            f"no row of these runs has the metric {asked}",
            expected=f"one of {', '.join(measured)}" if measured else "runs that have measured something",
        )
    best = [standing.opened.run.config.run.keep_best for standing in standings]
    return compared_by(measured, next((name for name in (asked, *best) if name in measured), None))


def error_of(ranked: Ranked, metric: str) -> float | None:
    """Return the standard error of a row's metric; None where its queries are not known, or it is one alone."""
    values = ranked.values.get(metric)
    error = math.nan if values is None else standard_error(list(values.values()))
    return None if math.isnan(error) else error


def told(row: Row) -> str:
    """Name a row's system with its iteration and what it re-ranks."""
    own = row.system if row.iteration is None else f"{row.system} ({row.iteration})"
    over = f" over {row.over}" if row.over else ""
    other = f" ({row.over_iteration})" if row.over and row.over_iteration not in (None, row.iteration) else ""
    return f"{own}{over}{other}"


def differences_of(standings: Sequence[Standing], split: str, metric: str, *, seed: int) -> list[Difference]:
    """Test what a reader asks of a split: last against first, ranker against retriever, run against run.

    Args:
        standings: The runs; the others are compared with the first.
        split: The split.
        metric: By which.
        seed: Of the tests.

    Returns:
        Those whose queries are known and the same; Holm's correction is over all of them.
    """
    pairs: dict[tuple[str, str], tuple[Ranked, Ranked]] = {}
    for standing in standings:
        prefix = f"{standing.opened.name}: " if len(standings) > 1 else ""
        for what, than in _pairs_within(standing, split):
            pairs.setdefault((prefix + told(what.row), prefix + told(than.row)), (what, than))
    lasts = [{role: rows[-1] for role, rows in standing.by_role(split).items()} for standing in standings]
    for standing, own in zip(standings[1:], lasts[1:], strict=True):
        for role, one in own.items():
            if role in lasts[0]:
                names = [
                    f"{s.opened.name}: {told(r.row)}" for s, r in ((standing, one), (standings[0], lasts[0][role]))
                ]
                pairs.setdefault((names[0], names[1]), (one, lasts[0][role]))
    found = {names: both for names, pair in pairs.items() if (both := _paired(*pair, metric)) is not None}
    p_values = holm({" - ".join(names): randomisation_test(*both, seed=seed) for names, both in found.items()})
    return [
        Difference(
            *(*names, len(one), float((one - two).mean()), standard_error(one - two)),
            *bootstrap(one, two, seed=seed),
            p_values[" - ".join(names)],
        )
        for names, (one, two) in found.items()
    ]


def _pairs_within(standing: Standing, split: str) -> Iterator[tuple[Ranked, Ranked]]:
    for rows in standing.by_role(split).values():
        first, last = rows[0], rows[-1]
        if last is not first:
            yield last, first
        other = standing.base_of(last.row) if last.row.over else standing.bm25(last.row)
        if other is not None:
            yield last, other


def _paired(what: Ranked, than: Ranked, metric: str) -> tuple[Floats, Floats] | None:
    """Return the values of both on the same queries; None where these are not known or not the same."""
    one, two = what.values.get(metric), than.values.get(metric)
    if one is None or two is None or one.keys() != two.keys():
        return None
    if what.row.relevance_threshold != than.row.relevance_threshold:
        return None
    return np.array([one[qid] for qid in one]), np.array([two[qid] for qid in one])


def _place(row: Row) -> tuple[str, int, int, int, bool]:
    """Order the rows of a run as its own table does."""
    iteration = row.iteration or 0
    return row.split, -(row.num_queries or 0), iteration, place_of_kind(row.kind), row.iteration is not None

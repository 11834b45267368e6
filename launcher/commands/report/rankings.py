"""What rankings of runs are worth query by query: read from their TREC files, held against the rows of the table.

A row says what was measured; which queries these were is known from the data and the run's seed. Numbers of single
queries are taken only where their mean is the row's own, so that another ranking, other judgements or other answers
than those of the run are not taken for it. Files are read query by query and to a bounded depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config.metric_names import ANSWERED, JUDGED, cutoff_of, family_of
from engine.data.answers import AnswerFinder, haystacks_of
from engine.data.corpus import sample_queries
from engine.data.trec import best_first, run_lines
from engine.errors import DataError
from engine.evaluation.measures import values_by_metric
from engine.evaluation.recorded import ranking_names
from engine.evaluation.summary import Row
from launcher.commands.report.opened import Opened
from shards.records import Query

JUDGED_DEPTH, ANSWERED_DEPTH = 100, 20
"""Metrics that look deeper are shown without a standard error: a report reads no more of a ranking than this."""
_SAME = 1e-6
"""By how much a mean may differ from the row's: it is of the same numbers, added in another order."""
_TOGETHER = 512
Values = Mapping[str, Mapping[str, float]]
"""Metric -> query id -> value."""


@dataclass(frozen=True)
class Ranked:
    """A row of a run's table with what is known of its queries.

    Attributes:
        row: The row.
        path: Its ranking; None where there is none that gives the row's numbers.
        queries: That were measured; empty without a path.
        values: For the metrics that look no deeper than is read; empty without a path.
    """

    row: Row
    path: Path | None = None
    queries: tuple[Query, ...] = ()
    values: Values = field(default_factory=dict)


class RankingReader:
    """Reads the rankings of a run.

    Args:
        opened: The run.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._answer_finder = AnswerFinder(haystacks_of(self._text_of))

    def read(self, row: Row) -> Ranked:
        """Return a row with the values of its queries, as far as they are there.

        Raises:
            DataError: A line of its file is damaged.
            ArtifactError: The shards are.
        """
        dataset = self._opened.dataset
        if dataset is None or row.num_queries is None or not dataset.qrels.get(row.split):
            return Ranked(row)
        limit = None if row.num_queries == row.split_queries else row.num_queries
        queries = tuple(sample_queries(dataset, row.split, limit, self._opened.run.config.run.seed))
        for path in self._paths(row):
            if path.exists() and len(queries) == row.num_queries:
                values = self._values(path, row, queries)
                if values and all(_is_mean(own, row.metrics[name]) for name, own in values.items()):
                    return Ranked(row, path, queries, values)
        return Ranked(row)

    def _paths(self, row: Row) -> list[Path]:
        """Return where the ranking may lie: with the recipe's own, or with those of samples that were asked for."""
        return [self._opened.run.folder.results / name for name in ranking_names(row)]

    def _values(self, path: Path, row: Row, queries: Sequence[Query]) -> dict[str, dict[str, float]]:
        judged = [name for name in row.metrics if family_of(name) in JUDGED and cutoff_of(name) <= JUDGED_DEPTH]
        answered = [name for name in row.metrics if family_of(name) in ANSWERED and cutoff_of(name) <= ANSWERED_DEPTH]
        if self._opened.shards is None:
            answered = []
        values: dict[str, dict[str, float]] = {name: {} for name in (*judged, *answered)}
        left = {query.id: query for query in queries}
        depth = max(map(cutoff_of, values), default=0)
        for found in _together(path, depth):
            if not found.keys() <= left.keys():
                return {}
            own = [left.pop(qid) for qid in found]
            self._measure(values, row, own, found, judged, answered)
        self._measure(values, row, list(left.values()), {}, judged, answered)  # without hits, they have no line
        return {name: own for name, own in values.items() if own}

    def _measure(
        self,
        values: dict[str, dict[str, float]],
        row: Row,
        queries: Sequence[Query],
        found: Mapping[str, Mapping[str, float]],
        judged: Sequence[str],
        answered: Sequence[str],
    ) -> None:
        assert self._opened.dataset is not None
        split = self._opened.dataset.qrels[row.split]
        qrels = {query.id: split[query.id] for query in queries}
        threshold = row.relevance_threshold
        for name, own in values_by_metric(found, qrels, judged, relevance_threshold=threshold).items():
            values[name] |= own
        depth = max(map(cutoff_of, answered), default=0)
        for query in queries if answered else ():
            if query.answers:
                first = self._first_answer(query, best_first(query.id, found.get(query.id, {}))[:depth])
                for name in answered:
                    values[name][query.id] = float(first <= cutoff_of(name))

    def _first_answer(self, query: Query, docids: Sequence[str]) -> float:
        """Return the rank of the first document with an answer, from 1; infinity without one."""
        first = next(self._answer_finder.holding(query.answers, docids), None)
        return math.inf if first is None else docids.index(first) + 1

    def _text_of(self, docid: str) -> str:
        shards = self._opened.shards
        assert shards is not None
        return shards.document(shards.index_of(docid)).text


def rankings_by_query(path: Path, depth: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Read a TREC run file query by query, so that no more than one query's lines are held.

    Args:
        path: The file; the lines of a query stand together, as they are written.
        depth: Documents of a query to read, from the first.

    Yields:
        Query id, and docid -> score in the order of the file.

    Raises:
        DataError: A line has another form, or a query's lines do not stand together.
    """
    seen: set[str] = set()
    qid, scores = "", dict[str, float]()
    for line in run_lines(path, top=depth):
        if line.qid != qid:
            if scores:
                yield qid, scores
            if line.qid in seen:
                raise DataError(
                    f"{path}, line {line.number} comes back to query {line.qid!r}",
                    expected="the lines of a query together, as a run writes them",
                    remedy="measure the system again by `sparring evaluate`",
                )
            seen.add(line.qid)
            qid, scores = line.qid, {}
        scores[line.docid] = line.score
    if scores:
        yield qid, scores


def _together(path: Path, depth: int) -> Iterator[dict[str, dict[str, float]]]:
    """Yield the rankings of some hundred queries at a time."""
    found: dict[str, dict[str, float]] = {}
    for qid, scores in rankings_by_query(path, depth):
        found[qid] = scores
        if len(found) == _TOGETHER:
            yield found
            found = {}
    if found:
        yield found


def _is_mean(values: Mapping[str, float], mean: float) -> bool:
    return abs(math.fsum(values.values()) / len(values) - mean) <= _SAME

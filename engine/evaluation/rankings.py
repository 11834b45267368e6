"""Recorded rankings: read from a run's TREC files, measured query by query, and held against the rows of its table.

A row of a run's summary says what was measured on how many queries; which these were is known from the data and the
run's seed. A ranking is taken for that of a row only where it gives the row's own numbers, so that one of another
split, of queries, judgements or answers that changed since, or of another row is not. Files are read query by query and
no deeper than a metric looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.metric_names import ANSWERED, ENTROPY, ENTROPY_DEPTH, cutoff_of, family_of
from engine.data.answers import AnswerFinder, haystacks_of
from engine.data.corpus import sample_queries
from engine.data.trec import Rankings, best_first, rankings_by_query
from engine.evaluation.measures import query_entropies, values_by_metric
from engine.evaluation.summary import Row
from engine.results import ranking_names
from shards.records import Dataset, Query

Values = Mapping[str, Mapping[str, float]]
"""Metric -> query id -> value."""
_SAME = 1e-6
"""By how much a mean may differ from the row's: it is of the same numbers, added in another order."""
_TOGETHER = 512
"""Queries whose rankings are held at once."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded ranking.

    Attributes:
        row: Of the run's summary.
        path: Its file.
        queries: That were measured.
        values: For the queries over which a metric's mean is taken; without metrics that no query allows.
    """

    row: Row
    path: Path
    queries: tuple[Query, ...]
    values: Values


@dataclass(frozen=True, slots=True)
class Unfit:
    """Why there is no ranking of a row.

    Attributes:
        reason: What was found.
        expected: What should have been.
    """

    reason: str
    expected: str


@dataclass(frozen=True, slots=True)
class Sought:
    """What is asked of a ranking.

    Attributes:
        metrics: Which values; `entropy@15` of a retriever with a model alone.
        relevance_threshold: Grade from which a document is relevant.
        score_scale: Of the model, for its entropy; None for who has none.
    """

    metrics: tuple[str, ...]
    relevance_threshold: int
    score_scale: float | None = None

    @property
    def judged(self) -> list[str]:
        """Metrics by judgements."""
        return [name for name in self.metrics if name != ENTROPY and family_of(name) not in ANSWERED]

    @property
    def answered(self) -> list[str]:
        """Metrics by answers."""
        return [name for name in self.metrics if name != ENTROPY and family_of(name) in ANSWERED]

    @property
    def depth(self) -> int:
        """Documents of a query that are looked at, at most."""
        cutoffs = [cutoff_of(name) for name in (*self.judged, *self.answered)]
        return max([*cutoffs, *[ENTROPY_DEPTH] * (ENTROPY in self.metrics)], default=0)


class RankingReader:
    """Reads rankings of runs on one data set.

    Args:
        dataset: Which the runs were measured on.
        text_of: Docid -> the document's text, for metrics by answers; None where none is asked for.
    """

    def __init__(self, dataset: Dataset, text_of: Callable[[str], str] | None = None) -> None:
        self._dataset = dataset
        self._answer_finder = AnswerFinder(haystacks_of(text_of)) if text_of else None

    def read(self, results: Path, row: Row, seed: int, sought: Sought) -> Recorded | Unfit:
        """Measure the ranking of a row.

        Args:
            results: The folder of the ranking.
            row: Of the summary there.
            seed: The run's, by which a sample of queries was drawn.
            sought: Which values.

        Returns:
            The values; or why none of the files that the ranking may lie in is that of the row.

        Raises:
            DataError: A line of a file is damaged.
        """
        queries = self._queries_of(row, seed)
        if isinstance(queries, Unfit):
            return queries
        names, unfit = ranking_names(asdict(row)), None
        for path in (results / name for name in names):
            if path.is_file():
                values = self._measure(path, row, queries, sought)
                if not isinstance(values, Unfit):
                    return Recorded(row, path, queries, values)
                unfit = unfit or values
        return unfit or Unfit(f"the ranking of {row.system} on {row.split} is not in {results}", names[-1])

    def _queries_of(self, row: Row, seed: int) -> tuple[Query, ...] | Unfit:
        """Return which queries a row was measured on."""
        if row.num_queries is None or row.split_queries is None:
            return Unfit(
                f"the row of {row.system} on {row.split} does not say how many queries it was measured on",
                "rows that say their queries, as they are written now",
            )
        limit = None if row.num_queries == row.split_queries else row.num_queries
        queries = tuple(sample_queries(self._dataset, row.split, limit, seed))
        if len(queries) != row.num_queries:
            return Unfit(
                f"the row of {row.system} on {row.split} was measured on {row.num_queries} queries, of which "
                f"{self._dataset.path} has {len(queries)}",
                "the data that it was measured on",
            )
        return queries

    def _measure(self, path: Path, row: Row, queries: Sequence[Query], sought: Sought) -> Values | Unfit:
        """Return the values of a file, in the order of the queries, where they are those of the row."""
        found: dict[str, dict[str, float]] = {name: {} for name in sought.metrics}
        left = {query.id: query for query in queries}
        for ranking in _together(path, sought.depth):
            if unknown := ranking.keys() - left.keys():
                return Unfit(
                    f"{path} ranks documents for query {min(unknown)!r}, which is none of the {len(queries)} queries "
                    f"of {row.split!r} that its row was measured on",
                    "the ranking that the row was measured on",
                )
            self._add(found, row.split, [left.pop(qid) for qid in ranking], ranking, sought)
        self._add(found, row.split, list(left.values()), {}, sought)  # without hits, they have no line
        values = {
            name: {query.id: own[query.id] for query in queries if query.id in own}
            for name, own in found.items()
            if own
        }
        return _not_of_the_row(path, row, values, sought.relevance_threshold) or values

    def _add(
        self,
        found: dict[str, dict[str, float]],
        split: str,
        queries: Sequence[Query],
        ranking: Rankings,
        sought: Sought,
    ) -> None:
        """Add the values of some queries."""
        qrels = {query.id: self._dataset.qrels[split][query.id] for query in queries}
        threshold = sought.relevance_threshold
        by_judgements = values_by_metric(ranking, qrels, sought.judged, relevance_threshold=threshold)
        for name, own in by_judgements.items():
            found[name] |= own
        if sought.score_scale is not None and ENTROPY in found:
            found[ENTROPY] |= query_entropies(ranking, sought.score_scale)
        depth = max(map(cutoff_of, sought.answered), default=0)
        for query in queries if sought.answered else ():
            if query.answers:
                first = self._first_answer(query, best_first(query.id, ranking.get(query.id, {}))[:depth])
                for name in sought.answered:
                    found[name][query.id] = float(first <= cutoff_of(name))

    def _first_answer(self, query: Query, docids: Sequence[str]) -> float:
        """Return the rank of the first document with an answer, from 1; infinity without one."""
        if self._answer_finder is None:
            raise ValueError("a metric by answers without the documents' texts")
        first = next(self._answer_finder.holding(query.answers, docids), None)
        return math.inf if first is None else docids.index(first) + 1


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


def _not_of_the_row(path: Path, row: Row, values: Values, threshold: int) -> Unfit | None:
    """Say which mean is another than the row's; None where all are the same."""
    for name, own in values.items():
        if name not in row.metrics or (family_of(name) not in ANSWERED and row.relevance_threshold != threshold):
            continue
        mean = math.fsum(own.values()) / len(own)
        if abs(mean - row.metrics[name]) > _SAME:
            return Unfit(
                f"{path} has {name} {mean:.6f}, and its row in the summary beside it {row.metrics[name]:.6f}",
                "the ranking that the row was measured on, and the same judgements and answers",
            )
    return None

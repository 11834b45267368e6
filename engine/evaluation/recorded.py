"""What runs have measured already: the rankings in their results, query by query, without running any model.

A row of a run's summary says what was measured on how many queries; its TREC file has the ranking. Which queries these
were is known from the data and the run's seed. What is read is checked against the row's own numbers, so that a ranking
of another split, of queries that changed since, or of another row is not taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.metric_names import ANSWERED, ENTROPY, ENTROPY_DEPTH, cutoff_of, family_of
from engine.config.timetable import iteration_name
from engine.data.answers import AnswerFinder, haystacks_of
from engine.data.corpus import sample_queries
from engine.data.trec import Rankings, best_first, read_trec
from engine.errors import ArtifactError, ConfigError
from engine.evaluation.chosen import taken_iteration
from engine.evaluation.measures import answer_values, query_entropies, query_values
from engine.evaluation.mixture import fitted_system
from engine.evaluation.summary import Row, read_rows
from engine.evaluation.systems import BM25, RANKER, System, behind, trained_systems
from engine.run import Run
from shards.records import Dataset, Query

_SAME = 1e-6
"""By how much a mean may differ from the row's: it is the mean of the same numbers, added in another order."""
RETRIEVER_ROLE, RANKER_ROLE, FUSED_ROLE = "retriever", "ranker", "fused"


def final_systems(run: Run) -> dict[str, System]:
    """Return what a run leaves behind, by the part that it plays: first retriever, ranker over it, others, mixture.

    Args:
        run: A finished one.

    Returns:
        Role -> system; a further retriever's role is its name, and so is a second ranker's. The mixture is among them
        whether or not it was measured.
    """
    fused = fitted_system(run.folder, run.config, taken=taken_iteration(run, run.timetable.iterations))
    systems: dict[str, System] = {}
    for part in fused.parts:
        if part.kind == BM25:
            continue
        role = RANKER_ROLE if part.kind == RANKER else RETRIEVER_ROLE
        alone = behind(run.config, fused.parts[0], part) if part.kind == RANKER else part
        systems[part.name if role in systems else role] = alone
    return systems | {FUSED_ROLE: fused}


def systems_by_iteration(run: Run) -> dict[str, dict[int, System]]:
    """Return the models of a run whose models go through iterations together, after each: role -> iteration -> system.

    Empty for a run without iterations.
    """
    found: dict[str, dict[int, System]] = {}
    if run.timetable.ends is None and run.timetable.iterations:
        for iteration in (0, *run.iterations()):
            own: dict[str, System] = {}
            for system in trained_systems(run.config, [iteration]):
                role = RANKER_ROLE if system.kind == RANKER else RETRIEVER_ROLE
                own.setdefault(role, system)
            for role, system in own.items():
                found.setdefault(role, {})[iteration] = system
    return found


def row_of(
    rows: Sequence[Row], system: System, split: str, relevance_threshold: int, num_queries: int | None = None
) -> Row | None:
    """Return the row of a system on a split, that of the most queries where there are several; None without.

    Args:
        rows: Of a run's summary.
        system: Which one, behind what it re-orders.
        split: The split's name.
        relevance_threshold: Of rows on the same queries, the one of this grade is preferred.
        num_queries: Rows of so many queries alone; None for any.
    """
    over = system.over
    found = [
        row
        for row in rows
        if (row.system, row.iteration, row.split) == (system.name, system.iteration, split)
        and (row.over, row.over_iteration) == ((over.name, over.iteration) if over else (None, None))
        and num_queries in (None, row.num_queries)
    ]
    found.sort(key=lambda row: (row.num_queries or 0, row.relevance_threshold == relevance_threshold))
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded ranking.

    Attributes:
        row: Of the run's summary.
        values: Metric -> query id -> value, for the queries over which its mean is taken.
    """

    row: Row
    values: Mapping[str, Mapping[str, float]]


class Recordings:
    """Reads recorded rankings of a split.

    Args:
        dataset: Which the runs were trained on.
        split: Its name.
        metrics: What is measured; `entropy@15` for retrievers with a model.
        relevance_threshold: Grade from which a document is relevant.
        num_queries: Take the rankings of so many queries; None for those of the most queries that a run has.
        text_of: Docid -> the document's text, for metrics by answers.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        metrics: Sequence[str],
        relevance_threshold: int,
        *,
        num_queries: int | None = None,
        text_of: Callable[[str], str] | None = None,
    ) -> None:
        self._dataset, self._split, self._metrics = dataset, split, tuple(metrics)
        self._threshold, self._num_queries = relevance_threshold, num_queries
        self._answer_finder = AnswerFinder(haystacks_of(text_of)) if text_of else None

    def find(self, run: Run, system: System) -> Row | None:
        """Return the row of a system on the split (`row_of`).

        Raises:
            ArtifactError: The summary is damaged.
        """
        return row_of(read_rows(run.folder.summary), system, self._split, self._threshold, self._num_queries)

    def read(self, run: Run, system: System) -> Recorded | None:
        """Measure the recorded ranking of a system; None where the run has no row of it.

        Raises:
            ConfigError: The ranking is not as deep as a metric looks, or the row does not say its queries.
            ArtifactError: The ranking is missing or damaged, or not the one that the row was measured on.
        """
        row = self.find(run, system)
        if row is None:
            return None
        judged = [name for name in self._metrics if name != ENTROPY]
        depth = max([cutoff_of(name) for name in judged] + [ENTROPY_DEPTH])
        if deeper := [name for name in judged if cutoff_of(name) > run.config.evaluation.search_depth]:
            raise ConfigError(
                f"the rankings of {run.folder.path} have {run.config.evaluation.search_depth} documents of a query, "
                f"and {deeper[0]} looks deeper",
                expected="metrics that look no deeper than what was recorded",
                remedy="leave it out of --metric",
            )
        path, queries = ranking_file(run.folder.results, row), self._queries(run, row)
        ranking = read_trec(path, top=depth)
        if unknown := ranking.keys() - {query.id for query in queries}:
            raise ArtifactError(
                f"{path} ranks documents for query {min(unknown)!r}, which is none of the {len(queries)} queries of "
                f"{self._split!r} that its row in {run.folder.summary} was measured on",
                expected="the ranking that the row was measured on",
                remedy=_measure_again(run, self._split),
            )
        values = {name: self._values(ranking, queries, name) for name in judged}
        if ENTROPY in self._metrics and system.weights is not None and system.over is None:
            values[ENTROPY] = query_entropies(ranking, run.config.models[system.weights.model].score_scale)
        self._require_same_means(run, row, path, values)
        return Recorded(row, values)

    def _queries(self, run: Run, row: Row) -> list[Query]:
        if row.num_queries is None or row.split_queries is None:
            raise ConfigError(
                f"the row of {row.system} on {self._split} in {run.folder.summary} does not say how many queries it "
                f"was measured on",
                expected="rows that say their queries, as they are written now",
                remedy=_measure_again(run, self._split),
            )
        limit = None if row.num_queries == row.split_queries else row.num_queries
        return sample_queries(self._dataset, self._split, limit, run.config.run.seed)

    def _values(self, ranking: Rankings, queries: Sequence[Query], metric: str) -> dict[str, float]:
        if family_of(metric) in ANSWERED:
            return answer_values(ranking, self._answered(ranking, queries, cutoff_of(metric)), metric)
        qrels = {query.id: self._dataset.qrels[self._split][query.id] for query in queries}
        return query_values(ranking, qrels, metric, relevance_threshold=self._threshold)

    def _answered(self, ranking: Rankings, queries: Sequence[Query], depth: int) -> dict[str, set[str]]:
        if self._answer_finder is None:
            raise ValueError("a metric by answers without the documents' texts")
        found: dict[str, set[str]] = {}
        for query in queries:
            if not query.answers:
                continue
            top = best_first(query.id, ranking.get(query.id, {}))[:depth]
            found[query.id] = set(self._answer_finder.holding(query.answers, top))
        return found

    def _require_same_means(self, run: Run, row: Row, path: Path, values: Mapping[str, Mapping[str, float]]) -> None:
        """Refuse a ranking that gives other numbers than its row has."""
        for name, own in values.items():
            if name not in row.metrics or (
                family_of(name) not in ANSWERED and row.relevance_threshold != self._threshold
            ):
                continue
            mean = math.fsum(own.values()) / len(own)
            if abs(mean - row.metrics[name]) > _SAME:
                raise ArtifactError(
                    f"{path} has {name} {mean:.6f}, and its row in {run.folder.summary} {row.metrics[name]:.6f}",
                    expected="the ranking that the row was measured on, and the same judgements and answers",
                    remedy=_measure_again(run, self._split),
                )


def ranking_names(row: Row) -> list[str]:
    """Return the names that the TREC file of a row may have (`System.run_file_name`), those that say most first."""

    def parts(name: str, iteration: int | None) -> list[str]:
        return [name, *([] if iteration is None else [iteration_name(iteration)])]

    own = [row.split, *parts(row.system, row.iteration)]
    stems = [[*own, "over", *parts(row.over, row.over_iteration)]] if row.over else []
    if not row.over or row.over_iteration == row.iteration:
        stems.append(own)
    return ["-".join([*stem, *end]) + ".trec" for stem in stems for end in ([f"{row.num_queries}-queries"], [])]


def ranking_file(results: Path, row: Row) -> Path:
    """Return the TREC file of a row.

    Args:
        results: The folder of both.
        row: Of the summary there.

    Raises:
        ArtifactError: There is none.
    """
    names = ranking_names(row)
    for name in names:
        if (results / name).is_file():
            return results / name
    raise ArtifactError(
        f"the ranking of {row.system} on {row.split} is not in {results}",
        expected=names[-1],
        remedy="measure it again by `sparring evaluate`, or restore the file",
    )


def _measure_again(run: Run, split: str) -> str:
    return f"measure it again: sparring evaluate {run.folder.path} --split {split}"

"""What runs have measured already: which systems they leave behind, by role, and the values of these query by query.

No model is run: rows of the runs' summaries say what was measured, and the rankings beside them are read and held
against these (`engine.evaluation.rankings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.config.metric_names import cutoff_of
from engine.errors import ArtifactError, ConfigError
from engine.evaluation.chosen import taken_iteration
from engine.evaluation.measures import require_relevant
from engine.evaluation.mixture import fitted_system
from engine.evaluation.rankings import RankingReader, Recorded, Sought, Unfit
from engine.evaluation.summary import Row, read_rows
from engine.evaluation.systems import BM25, RANKER, System, behind, trained_systems
from engine.run import Run
from shards.records import Dataset

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


def rerank_depth_of(run: Run, row: Row) -> int | None:
    """Return how many documents of a query a row's system re-ordered at most; None for who searches.

    Args:
        run: Whose row it is; its recipe has the depth of rows that do not say it.
        row: Of its summary.
    """
    if row.over is None:
        return None
    return row.rerank_depth if row.rerank_depth is not None else run.config.evaluation.rerank_depth


def command_that_measures(run: Run, row: Row) -> str:
    """Return the command that measures a run's systems on the queries of a row again.

    Args:
        run: Whose row it is.
        row: Of its summary.
    """
    command = f"sparring evaluate {run.folder.path} --split {row.split}"
    if row.num_queries is None or row.split_queries is None:
        return command
    usual = min(run.config.evaluation.most_queries(row.split) or row.split_queries, row.split_queries)
    return command if row.num_queries == usual else f"{command} --max-queries {row.num_queries}"


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
        self._dataset, self._split, self.metrics = dataset, split, tuple(metrics)
        self._threshold, self._num_queries = relevance_threshold, num_queries
        self._reader = RankingReader(dataset, text_of)

    def read(self, run: Run, system: System) -> Recorded | None:
        """Measure the recorded ranking of a system; None where the run has no row of it.

        Raises:
            ConfigError: The ranking is not as deep as a metric looks.
            ArtifactError: The ranking is missing, or not the one that the row was measured on, the row does not say its
                queries, or the summary is damaged.
            DataError: A line of the ranking is damaged, or no judgement reaches the threshold of relevance.
        """
        rows = read_rows(run.folder.summary)
        row = row_of(rows, system, self._split, self._threshold, self._num_queries)
        if row is None:
            return None
        sought = Sought(self.metrics, self._threshold, self._score_scale(run, system))
        depth = run.config.evaluation.search_depth
        if deeper := [name for name in (*sought.judged, *sought.answered) if cutoff_of(name) > depth]:
            raise ConfigError(
                f"the rankings of {run.folder.path} have {depth} documents of a query, and {deeper[0]} looks deeper",
                expected="metrics that look no deeper than what was recorded",
                remedy="leave it out of --metric",
            )
        found = self._reader.read(run.folder.results, row, run.config.run.seed, sought)
        if isinstance(found, Unfit):
            raise ArtifactError(
                found.reason, expected=found.expected, remedy=f"measure it again: {command_that_measures(run, row)}"
            )
        if sought.judged:
            qrels = {query.id: self._dataset.qrels[self._split][query.id] for query in found.queries}
            require_relevant(qrels, self._threshold)
        return found

    @staticmethod
    def _score_scale(run: Run, system: System) -> float | None:
        """Return what the scores of a system that searches with a model are multiplied by; None of others."""
        if system.weights is None or system.over is not None:
            return None
        return run.config.models[system.weights.model].score_scale

"""Whether a game paid: the retriever after it against the one that went into it, on dev, and whether that is chance.

Every iteration from 1 on is tested against the warm-up, query by query, by the rankings that the run has recorded; the
p-values are corrected for the number of iterations (`engine.evaluation.significance`), since the best of many is ahead
by chance more often than one is. The test split takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from engine.config.metric_names import ANSWERED, family_of
from engine.data.corpus import Data
from engine.data.trec import read_trec
from engine.evaluation.chosen import on_dev, ranker_of, taken_iteration
from engine.evaluation.duel import Difference, Duel
from engine.evaluation.evaluate import answered_in, split_queries
from engine.evaluation.measures import counts_in_means, query_values
from engine.evaluation.significance import against, bootstrap, standard_error
from engine.evaluation.systems import System, WeightsOf, trained_systems
from engine.run import Stage
from shards.files import write_json
from shards.records import Dataset


@dataclass(frozen=True, slots=True)
class Taken:
    """Result of the stage that takes an iteration."""

    iteration: int
    """Which one."""
    why: str
    """By what."""
    verdict: str = ""
    """Whether the game paid; empty where nothing was measured on dev."""

    def shown(self) -> dict[str, str]:
        """Return what the log tells; iteration 0, the warm-up, is one as well."""
        return {"iteration": str(self.iteration), "why": self.why}


def take_iteration(stage: Stage, data: Data) -> Taken:
    """Choose the iteration that the run leaves behind, judge the game on dev, and keep the verdict for the table.

    Args:
        stage: Where this runs; all iterations are finished.
        data: The run's own.
    """
    run, last = stage.run, stage.run.timetable.iterations
    measured = on_dev(run, run.timetable.encoder)
    taken = taken_iteration(run, last)
    if not measured.values:
        return Taken(taken, "the last: dev has no queries to choose by")
    why = f"best on dev by {measured.metric}" if run.config.evaluation.iteration == "best" else "the last"
    if not {0, taken} <= measured.values.keys() or len(measured.values) < 2:
        return Taken(taken, why)
    duel = judge(stage, data, taken)
    run.coordinator.only_rank_zero(f"{stage.name}: verdict", lambda: write_json(run.folder.duel, asdict(duel)))
    return Taken(taken, why, duel.told)


def judge(stage: Stage, data: Data, taken: int) -> Duel:
    """Test every iteration of the game against its warm-up.

    Args:
        stage: Where this runs; all ranks take part.
        data: The run's own.
        taken: The iteration that is exported.
    """
    run, table = stage.run, stage.run.timetable
    measured = on_dev(run, table.encoder)
    iterations = sorted(measured.values)

    def values_of(model: str) -> dict[int, dict[str, float]]:
        found = {t: _system(trained_systems(run.config, [t]), model) for t in iterations}
        return {t: _values(stage, data, system, measured.metric) for t, system in found.items()}

    def names_of(model: str) -> list[str]:
        return [table.name_of(WeightsOf(model, t)) for t in (0, iterations[-1])]

    by_retriever, ranker = values_of(table.encoder), ranker_of(run.config)
    if ranker is not None and not any(phase.steps for phase in table.phases_of(ranker) if not phase.is_warmup):
        ranker = None  # what its ranking gains and loses is the retriever's
    return Duel(
        taken,
        measured.metric,
        len(by_retriever[0]),
        _differences(by_retriever, stage.seed),
        names_of(table.encoder),
        _differences(values_of(ranker), stage.seed) if ranker is not None else [],
        names_of(ranker) if ranker is not None else [],
        num_left=max(0, _num_measurable(data.dataset, measured.metric) - len(by_retriever[0])),
    )


def _num_measurable(dataset: Dataset, metric: str) -> int:
    """Count the queries of dev that a metric is a mean over: those with answers, or those with a relevant document."""
    judged = dataset.qrels.get("dev", {})
    if family_of(metric) in ANSWERED:
        return sum(bool(dataset.queries[qid].answers) for qid in judged)
    return sum(map(counts_in_means, judged.values()))


def _system(systems: list[System], model: str) -> System:
    return next(one for one in systems if one.weights is not None and one.weights.model == model)


def _differences(values: Mapping[int, Mapping[str, float]], seed: int) -> list[Difference]:
    """Compare each iteration with the warm-up, on the queries of both."""
    qids = list(values[0])
    arrays = {str(t): np.array([found[qid] for qid in qids]) for t, found in values.items()}
    p_values = against(arrays, "0", seed=seed)
    differences = []
    for name, p in p_values.items():
        apart = arrays[name] - arrays["0"]
        if len(apart) == 1:
            differences.append(Difference(int(name), float(apart.mean()), None, p))
            continue
        low, high = bootstrap(arrays[name], arrays["0"], seed=seed)
        differences.append(Difference(int(name), float(apart.mean()), standard_error(apart), p, low, high))
    return differences


def _values(stage: Stage, data: Data, system: System, metric: str) -> dict[str, float]:
    """Measure the recorded ranking of a system on dev, query by query, over the queries of the table's mean."""
    run, settings = stage.run, stage.run.config.evaluation
    qids = [query.id for query in split_queries(run, data, "dev")]
    found = read_trec(run.folder.results / system.run_file_name("dev"), top=settings.search_depth)
    ranking = {qid: found.get(qid, {}) for qid in qids}  # a file has no line of a query without hits
    if family_of(metric) in ANSWERED:
        answered = answered_in(stage, data, ranking, system.name, [metric])
        return {qid: float(bool(documents)) for qid, documents in answered.items()}
    qrels = {qid: data.dataset.qrels["dev"][qid] for qid in qids}
    return query_values(ranking, qrels, metric, relevance_threshold=settings.relevance_threshold)

"""How surely a row of the table is above the one that it builds on: measured when its ranking is recorded.

    a ranker, a mixture   against the ranking that it re-orders
    hybrid                the lists of several retrievers in turn: against the first retriever's
    what re-orders these  against the ranker over the first retriever alone
    G                     against G0: a model against the first state of its training
    G0                    against the model before any training (`zero-shot`)
    a distilled student   against the retriever that was not distilled (D2)

Rank 0 does this alone, since what it compares with lies in the results as a file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.config.metric_names import ANSWERED, compared_by, cutoff_of, family_of
from engine.config.recipe import Config
from engine.data.corpus import Data
from engine.data.trec import Rankings, best_first, read_trec
from engine.evaluation.measures import answer_values, query_values
from engine.evaluation.significance import bootstrap, randomisation_test, standard_error
from engine.evaluation.summary import Headline, read_rows
from engine.evaluation.systems import HYBRID, RANKER, System, behind, label_of, over_first, system_of, yardsticks
from engine.run import RunFolder, Stage


def built_on(config: Config, system: System) -> System | None:
    """Return the system that another should be above, as listed on top; None for a yardstick.

    Args:
        config: With the timetable, which says what a model's first state is.
        system: The other.
    """
    if system.over is not None and system.orders_hybrid:
        retriever = system.over.parts[0]
        return behind(config, retriever, system) if system.kind == RANKER else over_first(config, system)
    if system.over is not None:
        return system.over
    if system.kind == HYBRID:
        return system.parts[0]
    if system.weights is None or system.weights.iteration is None:
        return None
    first = config.timetable.states(system.weights.model)[0]
    if rival := config.timetable.rivals.get(system.weights):
        return system_of(config, rival)
    if first != system.weights:
        return system_of(config, first)
    untrained = (one for one in yardsticks(config) if one.weights and one.weights.model == system.weights.model)
    return next(untrained, None)


def headline_of(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    ranking: Rankings,
    system: System,
    split: str,
    sample: int | None,
    metrics: Mapping[str, float],
) -> Headline | None:
    """Compare a ranking with that of the system that it builds on, where that was measured on the same queries.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        folder: With the other's row and file.
        ranking: Of the queries that are measured; has all of them.
        system: Whose.
        split: Of the queries.
        sample: Number of queries, where they are others than those of the recipe.
        metrics: What was measured of it.

    Returns:
        Standard error and difference; None where nothing was measured.
    """
    metric = compared_by(metrics, stage.run.config.run.keep_best)
    if metric is None:
        return None
    settings = stage.run.config.evaluation
    values = _values(data, ranking, ranking, split, metric, settings.relevance_threshold)
    alone = Headline(metric, _error(list(values.values())))
    other = built_on(stage.run.config, system)
    path = None if other is None else folder.results / other.run_file_name(split, sample)
    if other is None or path is None or not path.exists():
        return alone
    rows = [
        row
        for row in read_rows(folder.summary)
        if (row.system, row.iteration, row.split) == (other.name, other.iteration, split)
        and (row.num_queries, row.relevance_threshold) == (len(ranking), settings.relevance_threshold)
        and metric in row.metrics  # candidates in no order have their recall alone
    ]
    if not rows:
        return alone
    theirs = read_trec(path, top=cutoff_of(metric))
    if not theirs.keys() <= ranking.keys():
        return alone  # of other queries: the settings have changed since
    others = _values(data, theirs, ranking, split, metric, settings.relevance_threshold)
    first_Q, second_Q = (np.array([one[qid] for qid in values]) for one in (values, others))
    return Headline(
        *(metric, alone.standard_error, label_of(other.name, other.over.name if other.over else None)),
        *(other.iteration, float((first_Q - second_Q).mean())),
        _error((first_Q - second_Q).tolist()),
        randomisation_test(first_Q, second_Q, seed=stage.seed),
        *(bootstrap(first_Q, second_Q, seed=stage.seed) if len(first_Q) > 1 else (None, None)),
    )


def _values(
    data: Data, ranking: Rankings, queries: Rankings, split: str, metric: str, threshold: int
) -> dict[str, float]:
    """Measure a ranking query by query over the queries of the mean."""
    if family_of(metric) not in ANSWERED:
        qrels = {qid: data.dataset.qrels[split][qid] for qid in queries}
        return query_values(ranking, qrels, metric, relevance_threshold=threshold)
    answered: dict[str, set[str]] = {}
    for qid in queries:
        if answers := data.dataset.queries[qid].answers:
            top = best_first(qid, ranking.get(qid, {}))[: cutoff_of(metric)]
            answered[qid] = set(data.answer_finder.holding(answers, top))
    return answer_values(ranking, answered, metric)


def _error(values: list[float]) -> float | None:
    return standard_error(values) if len(values) > 1 else None

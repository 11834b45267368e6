"""How good a ranking is: recall, reciprocal rank, nDCG and average precision by judgements, hits by answer match.

All numbers come from ir_measures, so that they are those of trec_eval. Two things are settled here, because they
change published numbers without a word elsewhere:

- A query without a ranking counts as 0; it is not left out of the mean. Neither is one whose documents all have grades
  below the threshold of relevance.
- Documents with equal scores keep the order in which the run holds them. trec_eval would sort them by document id, and
  would compare scores as single-precision numbers, so that a ranking by an exact score could be measured as another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import ir_measures
import numpy as np
from ir_measures import AP, RR, Measure, R, Success, nDCG

from engine.config.metric_names import ANSWERED, DEFAULT_METRICS, ENTROPY_DEPTH, JUDGED, cutoff_of, family_of
from engine.config.sections import EvaluationConfig
from engine.data.trec import Rankings, best_first
from engine.errors import ConfigError, DataError
from shards.records import Dataset


def score_run(
    run: Rankings,
    qrels: Mapping[str, Mapping[str, int]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    relevance_threshold: int = 1,
) -> dict[str, float]:
    """Measure a ranking by judgements.

    Args:
        run: Rankings; queries that have no judgements are ignored.
        qrels: Query id -> document id -> grade. Queries without a grade above 0 are left out, since no ranking could
            find anything for them.
        metrics: Names as in `evaluation.metrics`; those by answers are passed over.
        relevance_threshold: Grade from which a document is relevant, at least 1.

    Returns:
        For each of these metrics, in their order, the mean over all judged queries, 0..1: `R@k` is the share of a
        query's relevant documents in its top k, `MRR@k` one over the rank of the first relevant one (0 beyond k),
        `nDCG@k` has the grades as gains, whatever the threshold; `MAP@k` sums the precision at the ranks of the
        relevant documents in the top k and divides by the number of all relevant ones.

    Raises:
        DataError: A metric is by judgements, and no query has a relevant document.

    Source: AR2 section 4.1, Table 2. TREC Deep Learning 2019 and 2020 take threshold 2.
    """
    named = {name: _judged_measure(name, relevance_threshold) for name in metrics if family_of(name) in JUDGED}
    if not named:
        return {}  # by answers alone: judgements may be whatever they are, as `require_measurable` has it
    require_relevant(qrels, relevance_threshold)
    return _means(named, run, _judged(qrels))


def query_values(
    run: Rankings, qrels: Mapping[str, Mapping[str, int]], metric: str, *, relevance_threshold: int = 1
) -> dict[str, float]:
    """Measure a ranking by judgements, query by query: the mean of what is returned is what `score_run` returns.

    Args:
        run: As of `score_run`, and so are `qrels` and `relevance_threshold`.
        qrels: Judgements.
        metric: One that is by judgements, such as `MRR@10`.
        relevance_threshold: Grade from which a document is relevant.

    Returns:
        Query id -> value 0..1, for the queries over which the mean is taken, in the order of the judgements.

    Raises:
        DataError: No query has a relevant document.
    """
    require_relevant(qrels, relevance_threshold)
    return values_of_any(run, qrels, metric, relevance_threshold=relevance_threshold)


def values_of_any(
    run: Rankings, qrels: Mapping[str, Mapping[str, int]], metric: str, *, relevance_threshold: int = 1
) -> dict[str, float]:
    """Measure as `query_values`, any part of the queries: they may be none, or none of them have a relevant document.

    Args:
        run: As of `score_run`, and so are `qrels` and `relevance_threshold`.
        qrels: Judgements.
        metric: One that is by judgements.
        relevance_threshold: Grade from which a document is relevant.
    """
    judged = _judged(qrels)
    values = dict.fromkeys(judged, 0.0)
    if not judged:
        return values
    for one in ir_measures.iter_calc([_judged_measure(metric, relevance_threshold)], judged, _by_rank(run, judged)):
        values[one.query_id] = float(one.value)
    return values


def values_by_metric(
    run: Rankings, qrels: Mapping[str, Mapping[str, int]], metrics: Sequence[str], *, relevance_threshold: int = 1
) -> dict[str, dict[str, float]]:
    """Measure as `values_of_any` by several metrics, in one pass over the ranking.

    Args:
        run: As of `values_of_any`, and so are `qrels` and `relevance_threshold`.
        qrels: Judgements.
        metrics: Those that are by judgements.
        relevance_threshold: Grade from which a document is relevant.

    Returns:
        Metric -> query id -> value.
    """
    judged = _judged(qrels)
    names = {_judged_measure(name, relevance_threshold): name for name in metrics}
    values = {name: dict.fromkeys(judged, 0.0) for name in metrics}
    if judged and names:
        for one in ir_measures.iter_calc(list(names), judged, _by_rank(run, judged)):
            values[names[one.measure]][one.query_id] = float(one.value)
    return values


def answer_measures(
    run: Rankings, answered: Mapping[str, Set[str]], metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, float]:
    """Measure a ranking by answer match: how often one of the top k documents contains an answer.

    Args:
        run: Rankings.
        answered: For every query that is to count, the retrieved documents that contain one of its answers; an empty
            set where none does.
        metrics: Names as in `evaluation.metrics`; those by judgements are passed over.

    Returns:
        `A@k` for each of these, a mean over the queries of `answered`, 0..1. (The papers on open-domain question
        answering, AR2 among them, call this R@k.)

    Raises:
        DataError: `answered` has no query.

    Source: AR2 section 4.1 (Natural Questions, TriviaQA).
    """
    if not answered:
        raise DataError("No query has answers to look for", expected="at least one query with answers")
    judged = _judged_by_answers(answered)
    named = {name: Success @ cutoff_of(name) for name in metrics if family_of(name) in ANSWERED}
    return _means(named, run, judged)


def answer_values(run: Rankings, answered: Mapping[str, Set[str]], metric: str) -> dict[str, float]:
    """Measure a ranking by answer match, query by query: the mean of what is returned is that of `answer_measures`.

    Args:
        run: As of `answer_measures`, and so is `answered`.
        answered: Query id -> the documents with an answer.
        metric: One that is by answers, such as `A@20`.
    """
    values, judged = dict.fromkeys(answered, 0.0), _judged_by_answers(answered)
    for one in ir_measures.iter_calc([Success @ cutoff_of(metric)], judged, _by_rank(run, judged)):
        values[one.query_id] = float(one.value)
    return values


def query_entropies(run: Rankings, score_scale: float) -> dict[str, float]:
    """Measure how even a retriever's distribution is over its best documents, query by query.

    Args:
        run: Rankings of a model that searches.
        score_scale: By which the model's scores are multiplied in its softmax.

    Returns:
        Query id -> entropy of the softmax over the top 15, in nats; without queries for which nothing was found.

    Source: AR2 section 4.4, Table 6.
    """
    entropies: dict[str, float] = {}
    for qid, scores in run.items():
        if scores:
            top = np.sort(np.array(list(scores.values())))[::-1][:ENTROPY_DEPTH] * score_scale
            p = np.exp(top - top.max())
            p /= p.sum()
            entropies[qid] = float(-(p * np.log(np.maximum(p, 1e-30))).sum())
    return entropies


def require_measurable(dataset: Dataset, split: str, qids: Sequence[str], settings: EvaluationConfig) -> None:
    """Refuse queries on which nothing of what is asked for can be measured, before any work is done.

    Args:
        dataset: With this split.
        split: Its name.
        qids: Its queries that are going to be measured.
        settings: With the metrics and the threshold of relevance.

    Raises:
        ConfigError: All metrics are by answers and no query has any, or all by judgements and none is judged.
        DataError: No judgement reaches the threshold.
    """
    qrels = {qid: dataset.qrels[split][qid] for qid in qids}
    by_judgements = any(family_of(name) in JUDGED for name in settings.metrics)
    by_answers = any(family_of(name) in ANSWERED for name in settings.metrics)
    judged, answered = any(qrels.values()), any(dataset.queries[qid].answers for qid in qrels)
    if by_judgements and judged:
        require_relevant(qrels, settings.relevance_threshold)
    elif not (by_answers and answered):
        lacks, has = ("judgements", "answers") if by_judgements else ("answers", "judgements")
        raise ConfigError(
            f"the split {split!r} of {dataset.path} has no {lacks}, which {', '.join(settings.metrics)} are made of",
            expected=f"a metric by {has}, such as {'A@20' if has == 'answers' else 'MRR@10'}",
            remedy="name one in evaluation.metrics, or leave evaluation.metrics out",
        )


def require_relevant(qrels: Mapping[str, Mapping[str, int]], threshold: int) -> None:
    """Refuse judgements of which none reaches the threshold of relevance.

    Args:
        qrels: Query id -> document id -> grade.
        threshold: Grade from which a document is relevant.

    Raises:
        DataError: All lie below.
    """
    highest = max((grade for grades in qrels.values() for grade in grades.values()), default=0)
    if highest < threshold:
        raise DataError(
            f"None of {len(qrels)} queries has a relevant document: the highest grade is {highest}",
            expected=f"a grade of at least {threshold} for a document of at least one query",
            remedy="check the qrels file of this split"
            if highest < 1
            else f"lower evaluation.relevance_threshold to at most {highest}",
        )


def _judged_by_answers(answered: Mapping[str, Set[str]]) -> dict[str, dict[str, int]]:
    return {qid: dict.fromkeys(documents, 1) for qid, documents in answered.items()}


def counts_in_means(grades: Mapping[str, int]) -> bool:
    """Tell whether a query is one of those over which the mean of a metric by judgements is taken: has a grade above 0.

    Args:
        grades: The query's, by document.
    """
    return any(grade > 0 for grade in grades.values())


def _judged(qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the judgements of the queries over which a mean is taken."""
    return {qid: dict(grades) for qid, grades in qrels.items() if counts_in_means(grades)}


def _judged_measure(name: str, threshold: int) -> Measure:
    family, cutoff = family_of(name), cutoff_of(name)
    measures: dict[str, Measure] = {
        "R": R(rel=threshold),
        "MRR": RR(rel=threshold),
        "nDCG": nDCG,
        "MAP": AP(rel=threshold),
    }
    return measures[family] @ cutoff


def _means(named: Mapping[str, Measure], run: Rankings, judged: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    if not named:
        return {}
    values = ir_measures.calc_aggregate(list(named.values()), judged, _by_rank(run, judged))
    return {name: float(values[measure]) for name, measure in named.items()}


def _by_rank(run: Rankings, judged: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Replace scores by minus the rank, which has no ties and is exact in single precision."""
    return {
        qid: {docid: -float(rank) for rank, docid in enumerate(best_first(qid, scores))}
        for qid, scores in run.items()
        if qid in judged and scores
    }

"""Evaluation: the retriever alone, the ranker over what the retriever found, and BM25 as the yardstick.

Source: AR2 section 4.1, Tables 2, 3 and 7. The dev split is used inside the loop; the test split once at the end or
on command. All ranks take part, each with its share of the queries; every ranking is kept as a TREC run file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.config.metric_names import ANSWERED, ENTROPY, compared_by, cutoff_of, family_of
from engine.config.recipe import Config
from engine.data.corpus import Data, sample_queries
from engine.data.trec import best_first, read_trec, write_trec
from engine.errors import ConfigError, ModelError
from engine.evaluation.examples import show_examples
from engine.evaluation.headline import headline_of
from engine.evaluation.measures import answer_measures, query_entropies, require_measurable, score_run
from engine.evaluation.pairs import PairScorer
from engine.evaluation.summary import Row, add_row
from engine.evaluation.systems import RETRIEVER, System
from engine.log import get_logger
from engine.reliability.progress import progress_bar
from engine.results import Measured, Score
from engine.retrievers.choice import Choice
from engine.retrievers.kinds import build, build_lost, forget_what_is_lost, open_searcher
from engine.retrievers.prior import build_prior
from engine.retrievers.scattered import answered
from engine.run import Run, RunFolder, Stage
from engine.search import Rescorer, Searcher, finds_too_little, search_others, searched_depth
from shards.partition import split_range
from shards.records import Dataset, Query

log = get_logger(__name__)
Ranking = dict[str, dict[str, float]]
"""Query id to docid to score."""
_SEARCHED_BY = {RETRIEVER: "dense"}
"""Kinds of systems whose retriever has another name in `engine.retrievers.kinds`."""
RERANKED_TOGETHER = 8
"""Queries whose pairs a ranker scores in one call."""


def evaluate_iteration(stage: Stage, data: Data, systems: Sequence[System]) -> Measured:
    """Measure what an iteration made on the dev split; its retrievers have their indexes, or get them again.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        systems: A system that re-orders another's ranking stands behind it.
    """
    folder = stage.run.folder
    build_lost(stage.run, data, folder, searchers_of(systems))
    scores = [score for system in systems for score in evaluate_system(stage, data, folder, system, "dev")]
    if scores:
        for system in systems:
            if system.over is not None:
                show_examples(stage.run, data, split_queries(stage.run, data, "dev"), system.over, system)
    return Measured(tuple(scores))


def evaluate_systems(
    stage: Stage, data: Data, folder: RunFolder, split: str, systems: Sequence[System], sample: int | None = None
) -> Measured:
    """Measure systems on a split, and build what their retrievers search with where it is not there.

    Args:
        stage: Where this runs.
        data: The run's own data, or another corpus.
        folder: Takes indexes and results: the run's own folder, or one below it for another corpus.
        split: Usually `test`, scored once at the end or on command.
        systems: A system that re-orders another's ranking stands behind it.
        sample: Number of queries, where they are others than those of the recipe; the rankings have it in their names.
    """
    scores = []
    forget_what_is_lost(stage.run, folder, searchers_of(systems))
    for system in systems:
        if system.over is None:
            build(stage.run, data, folder, retriever_of(system))
        scores += evaluate_system(stage, data, folder, system, split, sample=sample)
    return Measured(tuple(scores))


def evaluate_system(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    system: System,
    split: str,
    choice: Choice | None = None,
    *,
    sample: int | None = None,
) -> list[Score]:
    """Measure one system on a split and record its row, its ranking and its points of the curves.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        folder: Holds index and results; weights are the run's.
        system: What is measured. The ranking of the one that it re-orders has been recorded on this split.
        split: `dev` or `test`.
        choice: The retriever, where the system's fields do not say it (`retriever_of`), such as a run file's path.
        sample: As of `evaluate_systems`.

    Returns:
        The score; nothing where the split has no queries.
    """
    run, queries = stage.run, split_queries(stage.run, data, split)
    if not queries:
        return []
    if system.over is None:
        searcher = open_searcher(run, data, folder, choice or retriever_of(system))
        ranking = retrieve(stage, data, searcher, queries, system.name)
        if system.weights is not None:
            entropies = query_entropies(ranking, run.config.models[system.weights.model].score_scale).values()
            value = sum(entropies) / max(1, len(entropies))
            run.metrics.write(stage.name, system.iteration or 0, {f"{split}/{system.curve}/{ENTROPY}": value})
    else:
        found = read_trec(folder.results / system.over.run_file_name(split, sample))
        ranking = rerank(stage, data, system, queries, found, folder=folder)
    return [record_ranking(stage, data, folder, ranking, system, split, sample)]


def retriever_of(system: System) -> Choice:
    """Return which retriever searches for a system that searches the corpus itself."""
    return Choice(_SEARCHED_BY.get(system.kind, system.kind), system.weights)


def searchers_of(systems: Sequence[System]) -> list[Choice]:
    """Return which retrievers search for those of some systems that search the corpus themselves."""
    return [retriever_of(system) for system in systems if system.over is None]


def split_queries(run: Run, data: Data, split: str) -> list[Query]:
    """Return the queries that a split is measured on."""
    return data.queries_of(split, run.config.evaluation.most_queries(split), run.config.run.seed)


def require_measurable_splits(config: Config, dataset: Dataset, splits: Sequence[str]) -> None:
    """Refuse data on whose splits nothing of `evaluation.metrics` can be measured, before any work is done.

    Args:
        config: With metrics, the threshold of relevance, and the sizes of samples.
        dataset: The data.
        splits: Those that are going to be measured; one that the data lack is passed over.

    Raises:
        ConfigError: All metrics are by answers and no query has any, or all by judgements and none is judged; or
            `run.keep_best` cannot be measured on dev.
        DataError: No judgement of a split's queries reaches the threshold.
    """
    for split in splits:
        if queries := sample_queries(dataset, split, config.evaluation.most_queries(split), config.run.seed):
            require_measurable(dataset, split, [query.id for query in queries], config.evaluation)
            if split == "dev" and config.run.keep_best is not None:
                _require_best(config.run.keep_best, dataset, queries)


def _require_best(metric: str, dataset: Dataset, queries: Sequence[Query]) -> None:
    """Refuse to choose the best iteration by a metric that is not measured on dev."""
    by_answers = family_of(metric) in ANSWERED
    if not any(query.answers if by_answers else dataset.qrels["dev"][query.id] for query in queries):
        raise ConfigError(
            f"run.keep_best is {metric}, and no dev query of {dataset.path} has "
            f"{'answers' if by_answers else 'judgements'}, which it is made of",
            expected=f"a metric by {'judgements, such as MRR@10' if by_answers else 'answers, such as A@20'}",
            remedy="name one of these, or leave run.keep_best out",
        )


def retrieve(stage: Stage, data: Data, searcher: Searcher, queries: Sequence[Query], label: str) -> Ranking:
    """Search queries on all ranks.

    Returns:
        The ranking of every query, on every rank; empty for a query without hits.
    """
    coordinator, depth = stage.run.coordinator, stage.run.config.evaluation.search_depth
    share = split_range(len(queries), coordinator.rank, coordinator.world_size)
    own = [queries[place] for place in share]
    ranking: Ranking = {}
    num_documents, name = data.shards.num_documents, f"{stage.name}: search {label}"
    deep = searched_depth(depth, data.own_documents, num_documents=num_documents)
    with (
        answered(coordinator, searcher, queries, deep, stage.run.folder.searches, name=name) as prepared,
        coordinator.agreement(name),
    ):
        hits = search_others(prepared, own, depth, data.own_documents, num_documents=num_documents) if own else None
        for place, query in enumerate(own):
            documents, scores = hits.documents_QK[place], hits.scores_QK[place]  # type: ignore[union-attr]
            ranking[query.id] = {
                data.shards.docids[document]: float(score)
                for document, score in zip(documents.tolist(), scores.tolist(), strict=True)
                if document >= 0
            }
    whole = _together(stage, f"ranking {label}", ranking)
    num_without = sum(not found for found in whole.values())
    if stage.run.is_main and (warning := finds_too_little(label, num_without, len(whole))):
        log.warning("%s", warning)
    return whole


def rerank(
    stage: Stage,
    data: Data,
    system: System,
    queries: Sequence[Query],
    found: Ranking,
    *,
    folder: RunFolder | None = None,
    known: Ranking | None = None,
) -> Ranking:
    """Re-order the top of a ranking by a ranker, on all ranks; what lies deeper keeps its order below.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        system: The ranker.
        queries: Whose ranking.
        found: The ranking that it re-orders; a file has no line of a query without hits.
        folder: Holds the vectors of a retriever whose score is in the ranker's; the run's, unless it is said.
        known: Scores that this ranker has given before, which are taken as they are.

    Returns:
        The new ranking of every query, on every rank.
    """
    if system.weights is None:
        raise ValueError(f"{system.name} re-orders a ranking without the weights of a ranker")
    build_prior(stage.run, data, folder)
    scorer = PairScorer.open(stage.run, data, system.weights.model, system.weights.state, folder)
    return rerank_by(stage, data, scorer, queries, found, system.name, known=known)


def rerank_by(
    stage: Stage,
    data: Data,
    scorer: Rescorer,
    queries: Sequence[Query],
    found: Ranking,
    label: str,
    *,
    depth: int | None = None,
    known: Ranking | None = None,
) -> Ranking:
    """Re-order the top of a ranking by any scores, on all ranks; arguments and result as of `rerank`.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        scorer: Gives the scores.
        queries: Whose ranking.
        found: The ranking that is re-ordered.
        label: Who re-orders, for messages.
        depth: How many documents of a query, from the first; `evaluation.rerank_depth` unless it is said.
        known: Scores that need not be computed, by the same scorer.
    """
    coordinator, depth = stage.run.coordinator, depth or stage.run.config.evaluation.rerank_depth
    # A retriever passes over its index for as many queries as it is searched with.
    together = scorer.block_size if isinstance(scorer, Searcher) else RERANKED_TOGETHER
    blocks = [queries[start : start + together] for start in range(0, len(queries), together)]
    own = [blocks[place] for place in split_range(len(blocks), coordinator.rank, coordinator.world_size)]
    ranking: Ranking = {}
    with (
        coordinator.agreement(f"{stage.name}: rerank {label}"),
        progress_bar(f"{stage.name} {label}", sum(map(len, own)), "query", shown=stage.run.is_main) as bar,
    ):
        for block in own:
            docids = [best_first(query.id, found.get(query.id, {})) for query in block]
            tops = [one[:depth] for one in docids]
            scores = _scores_of(scorer, data, block, tops, known or {})
            for query, whole, top, own_scores in zip(block, docids, tops, scores, strict=True):
                _require_finite(label, query, top, own_scores)
                below = min(own_scores, default=0.0)
                ranking[query.id] = dict(zip(top, own_scores, strict=True)) | {
                    docid: below - place for place, docid in enumerate(whole[len(top) :], start=1)
                }
            bar.update(len(block))
    return _together(stage, f"ranking {label}", ranking)


def _scores_of(
    scorer: Rescorer, data: Data, queries: Sequence[Query], tops: Sequence[Sequence[str]], known: Ranking
) -> list[list[float]]:
    """Return the scores of some documents of each query, of which those that are not known are computed together."""
    said = [known.get(query.id, {}) for query in queries]
    open_ = [[docid for docid in top if docid not in own] for top, own in zip(tops, said, strict=True)]
    asked = [place for place, docids in enumerate(open_) if docids or not known]
    documents = [[data.shards.index_of(docid) for docid in open_[place]] for place in asked]
    computed = scorer.score([queries[place] for place in asked], documents) if asked else []
    for place, scores in zip(asked, computed, strict=True):
        said[place] = {**said[place], **dict(zip(open_[place], scores, strict=True))}
    return [[own[docid] for docid in top] for top, own in zip(tops, said, strict=True)]


def _require_finite(label: str, query: Query, docids: Sequence[str], scores: Sequence[float]) -> None:
    for docid, score in zip(docids, scores, strict=True):
        if not math.isfinite(score):
            raise ModelError(
                f"{label} gives document {docid!r} the score {score} for query {query.id!r}",
                expected="finite scores, which can be ordered",
                remedy="look at the losses of its training, which may have diverged, and at its precision: float16 "
                "holds numbers up to 65504",
            )


def record_ranking(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    ranking: Ranking,
    system: System,
    split: str,
    sample: int | None,
    names: Sequence[str] | None = None,
) -> Score:
    """Measure a ranking and write its row, its file and its points of the curves; all ranks call it alike.

    Args:
        stage: Where this runs.
        data: Corpus and queries.
        folder: Takes row and file.
        ranking: Of the queries that are measured, on every rank.
        system: Whose.
        split: Of the queries.
        sample: As of `evaluate_systems`.
        names: Metrics; None for those of the recipe.

    Returns:
        The score.
    """
    config, qrels = stage.run.config, {qid: data.dataset.qrels[split][qid] for qid in ranking}
    settings, metrics = config.evaluation, {}
    names = settings.metrics if names is None else names
    if any(qrels.values()):  # some splits have answers, no judgements
        metrics = score_run(ranking, qrels, names, relevance_threshold=settings.relevance_threshold)
    answered = answered_in(stage, data, ranking, system.name, names)
    if answered:
        metrics |= answer_measures(ranking, answered, names)
    row = Row.of(
        *(system, split, {name: metrics[name] for name in names if name in metrics}),
        num_queries=len(ranking),
        split_queries=len(data.dataset.qrels[split]),
        relevance_threshold=settings.relevance_threshold,
        rerank_depth=settings.rerank_depth,
    )

    def write() -> None:
        folder.results.mkdir(parents=True, exist_ok=True)
        path = folder.results / system.run_file_name(split, sample)
        write_trec(path, ranking, tag=system.name)
        headline = headline_of(stage, data, folder, ranking, system, split, sample, row.metrics)
        add_row(folder.summary, replace(row, headline=headline))

    stage.run.coordinator.only_rank_zero(f"{stage.name}: record {system.name}", write)
    shown = row.metrics | {"num_queries": len(ranking)}
    values = {f"{split}/{system.curve}/{name}": value for name, value in shown.items()}
    stage.run.metrics.write(stage.name, system.iteration or 0, values)
    model = system.weights.model if system.weights else None
    metric = compared_by(row.metrics, config.run.keep_best)
    return Score.of(system.name, system.kind, model, system.iteration, row.metrics, metric)


def answered_in(stage: Stage, data: Data, ranking: Ranking, label: str, names: Sequence[str]) -> dict[str, set[str]]:
    """Find the documents that hold an answer, as deep as a metric looks, for the queries that have answers.

    Args:
        stage: Where this runs; all ranks take part.
        data: Corpus and queries.
        ranking: The same on every rank.
        label: Whose, for messages.
        names: Metrics; those by judgements look at nothing.

    Returns:
        Query id -> documents of its top that hold an answer, on every rank.
    """
    coordinator = stage.run.coordinator
    by_answers = [name for name in names if family_of(name) in ANSWERED]
    depth = max(map(cutoff_of, by_answers), default=0)
    qids = [qid for qid in ranking if data.dataset.queries[qid].answers] if by_answers else []
    found: dict[str, list[str]] = {}
    with coordinator.agreement(f"{stage.name}: answers {label}"):
        for place in split_range(len(qids), coordinator.rank, coordinator.world_size):
            qid = qids[place]
            top = best_first(qid, ranking[qid])[:depth]
            found[qid] = list(data.answer_finder.holding(data.dataset.queries[qid].answers, top))
    return {qid: set(docids) for qid, docids in _together(stage, f"answers {label}", found).items()}


def _together(stage: Stage, what: str, own: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in stage.run.coordinator.gather(f"{stage.name}: {what}", own):
        whole |= part
    return whole

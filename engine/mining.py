"""Mining: search the training queries and keep what may serve as negatives.

Source: AR2 section 3.1 (negatives are drawn from the top of what the retriever finds) and, for answers, the filter of
its released code. Positives and documents that contain an answer are taken out, and the search goes deeper for queries
that keep too little.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from engine.answers import AnswerMatcher
from engine.batches import query_rows
from engine.corpus import Data
from engine.errors import DataError
from engine.log import get_logger, progress_bar
from engine.negatives import Candidates, merge, remove_known
from engine.retrievers import Searcher
from engine.run import Run, Stage
from shards.embeddings import Stamp
from shards.partition import split_range
from shards.records import Query

log = get_logger(__name__)
_BLOCK = 512
"""Queries searched at once."""


def mine(
    stage: Stage,
    data: Data,
    searcher: Searcher,
    rows: np.ndarray,
    stamp: Stamp,
    *,
    top_k: int,
    needed: int,
    name: str,
) -> dict[str, Any]:
    """Search training queries, each rank its share, and publish what is left as candidates.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        searcher: Any retriever.
        rows: Training rows to search, int64 [Q].
        stamp: Iteration, weights and corpus that the searcher stands for.
        top_k: Candidates kept for a query.
        needed: Candidates that a query must keep, at most `top_k`.
        name: Of the candidates in the run folder.

    Returns:
        Counts of queries, positives and answers taken out.

    Raises:
        DataError: A query keeps fewer than `needed` of the whole corpus.
    """
    coordinator, folder = stage.run.coordinator, stage.run.folder.candidates(name)
    part_of = [folder.with_name(f".{name}.part-{rank:05d}") for rank in range(coordinator.world_size)]
    own = rows[list(split_range(len(rows), coordinator.rank, coordinator.world_size))]
    with (
        coordinator.agreement(f"{stage.name}: search"),
        progress_bar(stage.name, len(own), "query", shown=stage.run.is_main) as bar,
    ):
        blocks = []
        for start in range(0, max(1, len(own)), _BLOCK):
            block = own[start : start + _BLOCK]
            blocks.append(_mine_block(stage, data, searcher, block, stamp, top_k, needed))
            bar.update(len(block))
        merge(blocks).save(part_of[coordinator.rank])

    def publish() -> dict[str, Any]:
        whole = merge([Candidates.load(part, stamp) for part in part_of])
        whole.save(folder)
        for part in part_of:
            shutil.rmtree(part)
        return {
            "queries": len(whole),
            "removed_positives": whole.num_removed_positives,
            "removed_answers": whole.num_removed_answers,
        }

    counts: dict[str, Any] = coordinator.only_rank_zero(f"{stage.name}: publish", publish)
    iteration = int(name) if name.isdigit() else 0
    stage.run.metrics.write(stage.name, iteration, {f"candidates/{key}": float(n) for key, n in counts.items()})
    return counts


def upcoming_rows(run: Run, iteration: int, num_queries: int) -> np.ndarray:
    """Return the training rows that the phases fed by an iteration's candidates will draw, sorted, each once."""
    game, warmup = run.config.ar2, run.config.warmup_ranker
    ranker_iteration = iteration if game.order == "paper" else iteration + 1
    phases = [("warmup_ranker", warmup.batch_size, warmup.steps, 1)] if iteration == 0 else []
    if 1 <= ranker_iteration <= game.iterations:
        phases.append(("ranker", game.ranker.batch_size, game.ranker.steps, ranker_iteration))
    if iteration + 1 <= game.iterations:
        phases.append(("retriever", game.retriever.batch_size, game.retriever.steps, iteration + 1))
    drawn = [np.empty(0, dtype=np.int64)]
    for stream, batch_size, steps, number in phases:
        start = (number - 1) * steps * batch_size
        drawn.append(query_rows(run.config.run.seed, stream, start, steps * batch_size, num_queries))
    return np.unique(np.concatenate(drawn))


def answer_predicate(data: Data, rows: np.ndarray) -> Callable[[int, int], bool]:
    """Return a function (place in `rows`, document) -> whether the document contains an answer of that query."""
    matchers = [AnswerMatcher(data.train.queries[row].answers) for row in rows.tolist()]

    @lru_cache(maxsize=200_000)
    def text(document: int) -> str:
        return data.shards.document(document).text

    return lambda place, document: matchers[place].has(text(document))


def _mine_block(
    stage: Stage, data: Data, searcher: Searcher, rows: np.ndarray, stamp: Stamp, top_k: int, needed: int
) -> Candidates:
    """Search, filter, and fetch deeper for the queries that keep fewer than `needed` documents.

    An answer such as "a" stands in every document, and then its filter says nothing about relevance: a query that
    keeps too little of the whole corpus is taken once more with only its positives removed, and counted.
    """
    queries = [data.train.queries[row] for row in rows.tolist()]
    positives = [set(data.train.positives[row].tolist()) for row in rows.tolist()]
    with_answers = stage.run.config.ar2.remove_answers and any(query.answers for query in queries)
    has_answer = answer_predicate(data, rows) if with_answers else None
    documents_QK = np.full((len(rows), top_k), -1, dtype=np.int64)
    scores_QK = np.full((len(rows), top_k), -np.inf, dtype=np.float32)
    # Counted anew where a query is searched again, so that none counts twice.
    num_positives_Q, num_answers_Q = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    num_documents = data.shards.num_documents
    extra = max((len(known) for known in positives), default=0) + (top_k // 4 if with_answers else 0)
    depths = [min(num_documents, top_k + extra)]
    while depths[-1] < num_documents:
        depths.append(min(num_documents, depths[-1] * 4))
    passes = [(depth, has_answer) for depth in depths] + ([(num_documents, None)] if with_answers else [])
    pending = np.arange(len(rows))
    for depth, predicate in passes:
        if not len(pending):
            break
        hits = searcher.search([queries[place] for place in pending], depth)
        place_of = pending.tolist()
        found, scores, num_positives_Q[pending], num_answers_Q[pending] = remove_known(
            hits.documents_QK,
            hits.scores_QK,
            [positives[place] for place in place_of],
            _at_places(predicate, place_of) if predicate else None,
            top_k,
        )
        documents_QK[pending], scores_QK[pending] = found, scores
        pending = pending[(found >= 0).sum(1) < needed]
        if len(pending) and depth == num_documents and predicate is not None:
            log.warning("%d queries have an answer that almost every document contains: not filtered", len(pending))
    if len(pending):
        _refuse_short(queries[pending[0]], int((documents_QK[pending[0]] >= 0).sum()), needed, num_documents)
    qids = [query.id for query in queries]
    removed = int(num_positives_Q.sum()), int(num_answers_Q.sum())
    return Candidates(searcher.source, stamp, qids, documents_QK, scores_QK, *removed)


def _at_places(predicate: Callable[[int, int], bool], places: list[int]) -> Callable[[int, int], bool]:
    return lambda row, document: predicate(places[row], document)


def _refuse_short(query: Query, num_left: int, needed: int, num_documents: int) -> None:
    raise DataError(
        f"query {query.id!r} has {num_left} documents left after its positives are taken out of all {num_documents}",
        expected=f"at least the {needed} negatives that a step draws",
        remedy="lower num_negatives, or use a larger corpus",
    )

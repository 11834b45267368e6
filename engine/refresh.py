"""Index refresh: encode the corpus with the current retriever, index it, and retrieve fresh candidates.

Source: AR2 section 3.3 and Algorithm 1 lines 3-4 and 11. Three stages with an artifact each, so that a run that
stopped between them goes on with what is there: embeddings, index, candidates, all stamped with the iteration and the
hash of the weights that made them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.answers import AnswerMatcher
from engine.batches import query_rows
from engine.corpus import Data
from engine.encode import encode_documents, encode_queries
from engine.errors import DataError
from engine.index import DenseIndex, build_index, plan_index
from engine.log import get_logger, progress_bar
from engine.negatives import Candidates, merge, remove_known
from engine.retrievers import Searcher
from engine.retrievers.bm25 import BM25Searcher, build_bm25
from engine.retrievers.dense import DenseSearcher
from engine.run import Run, RunFolder, Stage
from engine.weights import ZERO_SHOT, frozen_retriever, iteration_name, weights_sha256
from shards.embeddings import EmbeddingStore, Stamp
from shards.partition import assign, split_range
from shards.records import Query
from shards.writer import render

log = get_logger(__name__)
_BLOCK = 512
"""Queries searched at once."""


def refresh_index(run: Run, data: Data, *, iteration: int) -> Candidates:
    """Rebuild the index with the retriever of an iteration and retrieve candidates for the training queries.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        iteration: Whose retriever; 0 is the warm-up.

    Returns:
        Candidates without positives and answers.

    Raises:
        IndexQualityError: The index finds too little of what exact search finds.
        DataError: A query has too few documents left to draw n negatives from.
    """
    name = iteration_name(iteration)
    make_index(run, data, run.folder, name)
    run.once(f"candidates/{name}", retrieve_candidates, data, iteration=iteration)
    return Candidates.load(run.folder.candidates(name), stamp_of(run.folder, data, name))


def make_index(run: Run, data: Data, folder: RunFolder, name: str) -> None:
    """Encode and index a corpus with the run's retriever weights of an iteration.

    Args:
        run: Whose weights are used.
        data: The corpus.
        folder: Takes the index: the run's own folder, or one below it for another corpus.
        name: Iteration's name.
    """
    prefix = "" if folder == run.folder else f"{folder.path.name}/"
    run.once(f"{prefix}encode/{name}", encode_corpus, data, folder, name)
    run.once(f"{prefix}index/{name}", index_corpus, data, folder, name)


def stamp_of(folder: RunFolder, data: Data, name: str) -> Stamp:
    """Return what embeddings, index and candidates of an iteration must carry."""
    return Stamp(name, weights_sha256(folder.weights("retriever", name)), data.shards.manifest.sha256)


def encode_corpus(stage: Stage, data: Data, folder: RunFolder, name: str) -> dict[str, Any]:
    """Encode this rank's share of the shards; shards that are there already are not encoded again.

    Args:
        stage: Where this runs.
        data: The corpus.
        folder: Takes the embeddings.
        name: Iteration's name; its published weights encode.
    """
    run, config = stage.run, stage.run.config
    stamp = stamp_of(run.folder, data, name)
    retriever = frozen_retriever(config, run.folder.weights("retriever", name), run.device)
    entries = data.shards.manifest.shards
    own = assign([entry.num_documents for entry in entries], run.coordinator.rank, run.coordinator.world_size)
    total = sum(entries[number].num_documents for number in own)
    with progress_bar(stage.name, total, "doc", shown=run.is_main) as bar:
        encode_documents(
            retriever.encode_documents,
            data.retriever_text.template,
            data.shards,
            data.retriever_text.stream,
            own,
            folder.index(name) / "embeddings",
            stamp,
            max_length=config.retriever.max_length,
            tokens_per_batch=config.evaluation.tokens_per_batch,
            dtype=config.index.embedding_dtype,
            device=run.device,
            progress=lambda documents, _tokens: _advance(bar, documents),
        )
    return {"documents": data.shards.num_documents}


def _advance(bar: Any, documents: int) -> None:
    bar.update(documents)


def index_corpus(stage: Stage, data: Data, folder: RunFolder, name: str) -> dict[str, Any]:
    """Train, fill and merge the index over all ranks, and measure its recall against exact search."""
    run, settings = stage.run, stage.run.config.index
    store = EmbeddingStore.open(
        folder.index(name) / "embeddings", data.shards.manifest, stamp_of(run.folder, data, name)
    )
    plan = plan_index(
        settings.kind,
        num_documents=store.num_documents,
        dimension=store.dimension,
        factory=settings.factory,
        nprobe=settings.nprobe,
        refine_factor=settings.refine_factor,
        train_size=settings.train_documents,
        num_iterations=settings.kmeans_iterations,
    )
    audit = _audit_queries(stage, data, run.folder.weights("retriever", name))
    built = build_index(
        run.coordinator,
        store,
        data.shards.manifest,
        plan,
        folder.index(name),
        seed=stage.seed,
        audit_queries_QD=audit,
        audit_k=min(settings.audit_top_k, store.num_documents),
        recall_floor=settings.recall_floor,
    )
    run.metrics.write(stage.name, _step_of(name), {"index/recall": built["recall"]})
    return built


def retrieve_candidates(stage: Stage, data: Data, *, iteration: int) -> dict[str, Any]:
    """Search the training queries, each rank its share, and take out positives and documents with an answer."""
    run, name = stage.run, iteration_name(iteration)
    rows = (
        np.arange(len(data.train)) if run.config.ar2.mine == "all" else _upcoming_rows(run, iteration, len(data.train))
    )
    stamp = stamp_of(run.folder, data, name)
    searcher = open_searcher(run, data, run.folder, name)
    needed = run.config.ar2.num_negatives
    if iteration == 0:
        needed = max(needed, run.config.warmup_ranker.num_negatives)
    counts = _mine(stage, data, searcher, rows, stamp, top_k=run.config.ar2.top_k, needed=needed, name=name)
    if run.is_main:
        _drop_old_indexes(run, iteration)
    return counts


def bm25_candidates(run: Run, data: Data) -> Candidates:
    """Return BM25's candidates for the training queries that the retriever's warm-up draws."""
    run.once("bm25", build_bm25_index, data, run.folder)
    run.once("candidates/bm25", _retrieve_bm25_candidates, data)
    return Candidates.load(run.folder.candidates("bm25"), _bm25_stamp(data))


def build_bm25_index(stage: Stage, data: Data, folder: RunFolder) -> dict[str, Any]:
    """Index the corpus's text for BM25."""

    def build() -> None:
        texts = (render(data.shards.manifest.template, document) for document in data.dataset.documents())
        build_bm25(texts, folder.bm25, metadata={"corpus_sha256": data.shards.manifest.sha256})

    stage.run.coordinator.only_rank_zero(f"{stage.name}: build", build)
    return {"documents": data.shards.num_documents}


def open_bm25(data: Data, folder: RunFolder) -> BM25Searcher:
    """Open the BM25 index of a corpus."""
    return BM25Searcher.open(folder.bm25, metadata={"corpus_sha256": data.shards.manifest.sha256})


def open_searcher(run: Run, data: Data, folder: RunFolder, name: str) -> DenseSearcher:
    """Open the dense searcher of an iteration: the run's retriever over the index in `folder`.

    Raises:
        ArtifactError: Index or embeddings are missing, damaged, or of other weights.
    """
    config = run.config
    store = EmbeddingStore.open(
        folder.index(name) / "embeddings", data.shards.manifest, stamp_of(run.folder, data, name)
    )
    return DenseSearcher(
        frozen_retriever(config, run.folder.weights("retriever", name), run.device),
        data.retriever_text,
        DenseIndex.open(folder.index(name), store),
        max_length=config.retriever.query_max_length,
        tokens_per_batch=config.evaluation.tokens_per_batch,
        device=run.device,
    )


def answer_predicate(data: Data, rows: np.ndarray) -> Callable[[int, int], bool]:
    """Return a function (place in `rows`, document) -> whether the document contains an answer of that query."""
    matchers = [AnswerMatcher(data.train.queries[row].answers) for row in rows.tolist()]

    @lru_cache(maxsize=200_000)
    def text(document: int) -> str:
        return data.shards.document(document).text

    return lambda place, document: matchers[place].has(text(document))


def _mine(
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
    stage.run.metrics.write(
        stage.name, _step_of(name), {f"candidates/{key}": float(value) for key, value in counts.items()}
    )
    return counts


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
    num_positives = num_answers = 0
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
        found, scores, removed, answered = remove_known(
            hits.documents_QK,
            hits.scores_QK,
            [positives[place] for place in place_of],
            _at_places(predicate, place_of) if predicate else None,
            top_k,
        )
        documents_QK[pending], scores_QK[pending] = found, scores
        num_positives, num_answers = num_positives + removed, num_answers + answered
        pending = pending[(found >= 0).sum(1) < needed]
        if len(pending) and depth == num_documents and predicate is not None:
            log.warning("%d queries have an answer that almost every document contains: not filtered", len(pending))
    if len(pending):
        _refuse_short(queries[pending[0]], int((documents_QK[pending[0]] >= 0).sum()), needed, num_documents)
    qids = [query.id for query in queries]
    return Candidates(searcher.source, stamp, qids, documents_QK, scores_QK, num_positives, num_answers)


def _at_places(predicate: Callable[[int, int], bool], places: list[int]) -> Callable[[int, int], bool]:
    return lambda row, document: predicate(places[row], document)


def _refuse_short(query: Query, num_left: int, needed: int, num_documents: int) -> None:
    raise DataError(
        f"query {query.id!r} has {num_left} documents left after its positives are taken out of all {num_documents}",
        expected=f"at least the {needed} negatives that a step draws",
        remedy="lower num_negatives, or use a larger corpus",
    )


def _retrieve_bm25_candidates(stage: Stage, data: Data) -> dict[str, Any]:
    config = stage.run.config.warmup_retriever
    rows = np.arange(len(data.train))
    if stage.run.config.ar2.mine == "sampled":
        count = config.steps * config.batch_size
        rows = np.unique(query_rows(stage.seed, "warmup_retriever", 0, count, len(data.train)))
    searcher = open_bm25(data, stage.run.folder)
    stamp, needed = _bm25_stamp(data), config.hard_negatives
    return _mine(stage, data, searcher, rows, stamp, top_k=config.bm25_depth, needed=needed, name="bm25")


def _bm25_stamp(data: Data) -> Stamp:
    return Stamp("bm25", "0" * 64, data.shards.manifest.sha256)


def _upcoming_rows(run: Run, iteration: int, num_queries: int) -> np.ndarray:
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


def _audit_queries(stage: Stage, data: Data, weights: Path) -> np.ndarray:
    """Encode a sample of real queries, the same on every rank: [A, D]."""
    run, count = stage.run, stage.run.config.index.audit_queries
    queries = data.train.queries or list(data.dataset.queries.values())
    chosen = np.random.default_rng(stage.seed).permutation(len(queries))[:count]
    return encode_queries(
        frozen_retriever(run.config, weights, run.device).encode_queries,
        data.retriever_text.template,
        data.retriever_text.tokenize_queries([queries[row] for row in chosen.tolist()]),
        max_length=run.config.retriever.query_max_length,
        tokens_per_batch=run.config.evaluation.tokens_per_batch,
        device=run.device,
    )


def _step_of(name: str) -> int:
    return int(name) if name.isdigit() else 0


def _drop_old_indexes(run: Run, iteration: int) -> None:
    """Remove indexes beyond `run.keep_indexes`; zero-shot's and the warm-up's stay for the last table."""
    keep = {ZERO_SHOT, iteration_name(0)}
    keep |= {iteration_name(iteration - back) for back in range(run.config.run.keep_indexes)}
    for folder in (run.folder.path / "index").iterdir():
        if folder.is_dir() and folder.name not in keep:
            shutil.rmtree(folder)

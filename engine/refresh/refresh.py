"""Index refresh: encode the corpus with the current retriever, index it, and retrieve fresh candidates.

Source: AR2 section 3.3 and Algorithm 1 lines 3-4 and 11. Three stages with an artifact each, so that a run that
stopped between them goes on with what is there: embeddings, index, candidates, all stamped with the iteration and the
hash of the weights that made them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.recipe import Config
from engine.config.timetable import ZERO_SHOT, iteration_name
from engine.data.batches import rows_drawn
from engine.data.candidates import Candidates
from engine.data.corpus import Data
from engine.data.tokenization import BM25_FOLDER
from engine.errors import ArtifactError
from engine.index.build import build_index
from engine.index.dense import DenseIndex
from engine.index.plan import IndexPlan, plan_index
from engine.log import get_logger
from engine.models.encode import encode_documents, encode_queries
from engine.models.weights import frozen_retriever, weights_sha256
from engine.refresh.mining import mine
from engine.refresh.pace import Pace, slow_ranks, slowest_share
from engine.refresh.reuse import adopt_twin
from engine.reliability.progress import progress_bar
from engine.retrievers.bm25 import BM25Searcher, build_bm25
from engine.retrievers.dense import DenseSearcher
from engine.run import Run, RunFolder, Stage
from engine.search import Searcher
from shards.embeddings import EmbeddingStore, Stamp, part_is_complete
from shards.writer import render

_log = get_logger(__name__)


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
    """Encode the corpus with all ranks; shards that are encoded already, or by the same weights before, are not again.

    Args:
        stage: Where this runs.
        data: The corpus.
        folder: Takes the embeddings.
        name: Iteration's name; its published weights encode.
    """
    run, config, stream = stage.run, stage.run.config, data.texts["retriever"].stream
    stamp, store = stamp_of(run.folder, data, name), folder.index(name) / "embeddings"

    def plan() -> list[int]:
        adopt_twin(folder.index(name), stamp)
        missing = [entry for entry in data.shards.manifest.shards if not part_is_complete(store, entry, stamp)]
        # The longest first, so that no rank is left with a long one at the end.
        return [entry.number for entry in sorted(missing, key=lambda entry: (-entry.num_tokens[stream], entry.number))]

    missing: list[int] = run.coordinator.only_rank_zero(f"{stage.name}: plan", plan)
    num_missing = sum(data.shards.manifest.shards[number].num_documents for number in missing)
    start, own = time.monotonic(), Pace()
    with (
        run.coordinator.agreement(f"{stage.name}: encode"),
        progress_bar(stage.name, num_missing, "doc", shown=run.is_main) as bar,
    ):
        if missing:
            encode_documents(
                frozen_retriever(
                    config.retriever, run.folder.weights("retriever", name), run.device
                ).document_encoder(),
                data.texts["retriever"].template,
                data.shards,
                stream,
                own.timed(_with_progress(run.coordinator.hand_out(stage.name, missing), missing, data, bar)),
                store,
                stamp,
                max_length=config.retriever.max_length,
                tokens_per_batch=config.evaluation.tokens_per_batch,
                dtype=config.index.embedding_dtype,
                device=run.device,
                progress=own.count,
            )
    paces = [Pace(*one) for one in run.coordinator.gather(f"{stage.name}: pace", astuple(own))]
    seconds = max(time.monotonic() - start, 1e-9)
    tokens = sum(pace.tokens for pace in paces)
    speed = {"documents_per_second": num_missing / seconds, "tokens_per_second": tokens / seconds}
    if missing:
        measured = speed if (share := slowest_share(paces)) is None else speed | {"slowest_rank": share}
        run.metrics.write(stage.name, _step_of(name), {f"encode/{key}": value for key, value in measured.items()})
        if run.is_main and (slow := slow_ranks(paces, run.coordinator.hosts)):
            _log.warning("%s: %s", stage.name, slow)
    return {"documents": data.shards.num_documents, "encoded": num_missing} | (speed if missing else {})


def _with_progress(handed_out: Iterator[int], order: Sequence[int], data: Data, bar: Any) -> Iterator[int]:
    """Yield what is handed out; all that stands before it in the order has been taken, by whichever rank."""
    sizes = [data.shards.manifest.shards[number].num_documents for number in order]
    taken_before = dict(zip(order, accumulate(sizes, initial=0), strict=False))
    for number in handed_out:
        bar.update(taken_before[number] - bar.n)
        yield number


def index_corpus(stage: Stage, data: Data, folder: RunFolder, name: str) -> dict[str, Any]:
    """Train, fill and merge the index over all ranks, and tune its search by recall against exact search."""
    run, settings = stage.run, stage.run.config.index
    store = EmbeddingStore.open(
        folder.index(name) / "embeddings", data.shards.manifest, stamp_of(run.folder, data, name)
    )
    plan = index_plan(run.config, store.num_documents, store.dimension)
    audit = _audit_queries(stage, data, run.folder.weights("retriever", name))
    built = build_index(
        run.coordinator,
        store,
        plan,
        folder.index(name),
        seed=stage.seed,
        audit_queries_QD=audit,
        recall_k=settings.recall_k,
        recall_floor=settings.recall_floor,
        device=run.device,
    )
    measured = {key: built[key] for key in ("recall", "nprobe", "refine_factor", "milliseconds_per_query")}
    run.metrics.write(
        stage.name, _step_of(name), {f"index/{key}": float(value) for key, value in measured.items() if value}
    )
    return built


def retrieve_candidates(stage: Stage, data: Data, *, iteration: int) -> dict[str, Any]:
    """Search the training queries, each rank its share, and take out positives and documents with an answer."""
    run, name = stage.run, iteration_name(iteration)
    stamp = stamp_of(run.folder, data, name)
    counts = _mine(stage, data, open_searcher(run, data, run.folder, name), stamp, name)
    if run.is_main:
        _drop_old_indexes(run, iteration)
    return counts


def bm25_candidates(run: Run, data: Data) -> Candidates:
    """Return BM25's candidates for the training queries that the retriever's warm-up draws."""
    run.once("bm25", build_bm25_index, data, run.folder)
    run.once("candidates/bm25", _retrieve_bm25_candidates, data)
    return Candidates.load(run.folder.candidates("bm25"), _bm25_stamp(data))


def index_plan(config: Config, num_documents: int, dimension: int) -> IndexPlan:
    """Plan the index of a corpus; called early too, so that one that cannot be built stops the run before any work.

    Raises:
        ConfigError: FAISS refuses the factory string, the corpus is too small for it, or it does not fit where it must.
    """
    settings = config.index
    return plan_index(
        settings.factory,
        num_documents=num_documents,
        dimension=dimension,
        memory_gib=settings.memory_gib,
        placement=settings.placement,
        nprobe=settings.nprobe,
        refine_factor=settings.refine_factor,
        train_size=settings.train_documents,
        num_iterations=settings.kmeans_iterations,
        recall_target=settings.recall_target,
        recall_floor=settings.recall_floor,
    )


def build_bm25_index(stage: Stage, data: Data, folder: RunFolder) -> dict[str, Any]:
    """Index the corpus's text for BM25, unless an index of it is there, in the run or beside prepared shards."""

    def build() -> bool:
        try:
            open_bm25(data, folder)
            return True
        except ArtifactError:
            texts = (render(data.shards.manifest.template, document) for document in data.dataset.documents())
            build_bm25(texts, folder.bm25, metadata={"corpus_sha256": data.shards.manifest.sha256})
            return False

    reused = stage.run.coordinator.only_rank_zero(f"{stage.name}: build", build)
    return {"documents": data.shards.num_documents, "reused": reused}


def open_bm25(data: Data, folder: RunFolder) -> BM25Searcher:
    """Open the BM25 index of a corpus: the one that was prepared beside its shards, else the run's.

    Raises:
        ArtifactError: There is none, or it is damaged or of another corpus.
    """
    prepared = data.shards.folder / BM25_FOLDER
    return BM25Searcher.open(
        prepared if prepared.is_dir() else folder.bm25, metadata={"corpus_sha256": data.shards.manifest.sha256}
    )


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
        frozen_retriever(config.retriever, run.folder.weights("retriever", name), run.device),
        data.texts["retriever"],
        DenseIndex.open(folder.index(name), store, device=run.device),
        max_length=config.retriever.query_max_length,
        tokens_per_batch=config.evaluation.tokens_per_batch,
        device=run.device,
    )


def _retrieve_bm25_candidates(stage: Stage, data: Data) -> dict[str, Any]:
    return _mine(stage, data, open_bm25(data, stage.run.folder), _bm25_stamp(data), "bm25")


def _mine(stage: Stage, data: Data, searcher: Searcher, stamp: Stamp, name: str) -> dict[str, Any]:
    """Mine what the timetable says of these candidates."""
    table, rows = stage.run.timetable, np.arange(len(data.train))
    if not table.mine_all:
        rows = rows_drawn(table.drawing_from(name), stage.seed, len(data.train))
    return mine(
        stage, data, searcher, rows, stamp, top_k=table.mining(name).top_k, needed=table.needed(name), name=name
    )


def _bm25_stamp(data: Data) -> Stamp:
    return Stamp("bm25", "0" * 64, data.shards.manifest.sha256)


def _audit_queries(stage: Stage, data: Data, weights: Path) -> np.ndarray:
    """Encode a sample of real queries, the same on every rank: [A, D]."""
    run, count = stage.run, stage.run.config.index.audit_queries
    queries = data.train.queries or list(data.dataset.queries.values())
    chosen = np.random.default_rng(stage.seed).permutation(len(queries))[:count]
    return encode_queries(
        frozen_retriever(run.config.retriever, weights, run.device).query_encoder(),
        data.texts["retriever"].template,
        data.texts["retriever"].tokenize_queries([queries[row] for row in chosen.tolist()]),
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

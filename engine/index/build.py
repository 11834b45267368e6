"""Builds an index with all ranks: plan, train once, fill the parts, merge them, tune the search, publish.

The unit of work is the part, a fixed range of documents, handed to whoever is free. A part that is finished is not made
again after a crash, the trained index neither, and the bytes of the result do not depend on the number of ranks.

Shapes: Q queries, D embedding dimension.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError, IndexQualityError
from engine.index.dense import MANIFEST, DenseIndex, IndexManifest, document_parts, open_files
from engine.index.estimate import IndexEstimate, estimate_index, measured_gigaflops
from engine.index.exact import Floats, check_queries
from engine.index.files import TRAINED, IndexFile, part_is_complete, read_index
from engine.index.merge import check_parts, merge_parts
from engine.index.plan import IndexPlan, Placement
from engine.index.train import fill_part, train_once
from engine.index.tune import Trial, exact_truth, recall_of, tune
from engine.log import get_logger
from engine.search import Hits
from shards.embeddings import EmbeddingStore
from shards.files import parse_record

__all__ = ["BuiltIndex", "build_index", "require_recall"]

log = get_logger(__name__)
_PATIENCE = 4
"""Ranks wait so many times as long for work as it was estimated to take."""


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """Result of a stage `index/ITERATION`; fields as of `IndexPlan` and `IndexManifest`."""

    factory: str
    placement: Placement
    num_lists: int
    nprobe: int
    refine_factor: int
    recall: float
    """Of exact search: 1.0."""
    recall_k: int
    milliseconds_per_query: float | None
    tuning_seconds: float
    num_documents: int
    index_bytes: int
    """Of all files."""
    reused: bool
    """Whether the index was there already."""


def build_index(
    coordinator: Coordinator,
    store: EmbeddingStore,
    plan: IndexPlan,
    folder: Path,
    *,
    seed: int,
    audit_queries_QD: Floats,
    recall_k: int,
    recall_floor: float,
    device: torch.device | str = "cpu",
) -> BuiltIndex:
    """Build an index with all ranks: one trains, all fill, one merges, all search exactly, one tunes and publishes.

    All ranks call it alike. An index that is there already, of the same embeddings, plan and seed, is kept, and so is
    what an interrupted build left behind: the trained index and the finished parts.

    Args:
        coordinator: Between the ranks.
        store: The embeddings of the whole corpus.
        plan: From `plan_index`.
        folder: The index's folder, the same for all ranks.
        seed: Of the training.
        audit_queries_QD: Queries on which the search is tuned and its recall measured; float32 [Q, D], Q at least 1,
            rank 0's are used.
        recall_k: Depth of that recall; cut to the size of the corpus.
        recall_floor: Recall below which the index is not published, 0 to 1.
        device: Where exact search, the yardstick of recall, computes its products.

    Returns:
        What it is and how well it searches.

    Raises:
        IndexQualityError: The recall is below the floor; on the other ranks a `CoordinationError` quotes it.
        ArtifactError: A file of the build is damaged or does not fit, or an embedding is not finite.
        DiskFullError: There is no space for a file of the build; what is finished is kept.
    """
    name = f"index@{store.stamp.iteration}"
    k = min(recall_k, store.num_documents)
    reused = coordinator.only_rank_zero(f"{name}: look for it", lambda: _keep_or_clear(folder, store, plan, seed))
    if not reused:
        announced = coordinator.only_rank_zero(f"{name}: plan", lambda: asdict(_announce(name, store, plan)))
        estimate = parse_record(announced, IndexEstimate, f"the estimate of {name}")
        queries_QD = np.array(coordinator.broadcast(f"{name}: queries", audit_queries_QD.tolist()), dtype=np.float32)
        files: list[IndexFile] = []
        truth = None
        if not plan.exact:
            queries_QD = check_queries(queries_QD, store.dimension, k)
            files = _fill_and_merge(coordinator, name, store, plan, folder, seed, estimate)
            parts = document_parts(store.manifest)
            depth = min(2 * k, store.num_documents)  # beyond k, so that documents that tie with the k-th are known
            truth = exact_truth(
                *(coordinator, f"{name}: exact search", store, queries_QD, depth, parts), device=str(device)
            )

        def publish() -> None:
            draft = IndexManifest(
                *(plan, seed, store.stamp, store.num_documents, store.dimension, tuple(files)),
                *(plan.nprobe or 1, plan.refine_factor or 1, 1.0, k, None, 0.0),
            )
            _tune_and_save(folder, store, draft, queries_QD, truth, recall_floor)

        coordinator.only_rank_zero(f"{name}: tune", publish, _patience(coordinator, estimate.add_minutes))
    described = coordinator.only_rank_zero(
        f"{name}: report", lambda: asdict(_describe(folder, recall_floor, reused=reused))
    )
    return parse_record(described, BuiltIndex, f"the description of {name}")


def require_recall(recall: float, k: int, floor: float, tried: str) -> None:
    """Stop where an index finds too little.

    Args:
        recall: What was measured, 0 to 1.
        k: Its depth.
        floor: What is asked for, 0 to 1.
        tried: How was searched, in words.

    Raises:
        IndexQualityError: The recall is below the floor.
    """
    if recall < floor:
        raise IndexQualityError(
            f"the index finds {recall:.3f} of the {k} best documents of exact search at best; tried: {tried}",
            expected=f"at least {floor} (index.recall_floor)",
            remedy="leave index.nprobe and index.refine_factor out, name an index.factory with more bytes a document, "
            "or set index.factory=Flat",
        )


def _announce(name: str, store: EmbeddingStore, plan: IndexPlan) -> IndexEstimate:
    estimate = estimate_index(
        plan,
        num_documents=store.num_documents,
        dimension=store.dimension,
        num_parts=len(document_parts(store.manifest)),
        embedding_bytes=np.dtype(store.dtype).itemsize,
        gigaflops=measured_gigaflops(),
    )
    log.info(
        "%s: %d documents of %d dimensions\n  %s",
        *(name, store.num_documents, store.dimension, "\n  ".join(estimate.lines(plan))),
    )
    return estimate


def _fill_and_merge(
    coordinator: Coordinator,
    name: str,
    store: EmbeddingStore,
    plan: IndexPlan,
    folder: Path,
    seed: int,
    estimate: IndexEstimate,
) -> list[IndexFile]:
    """Train, fill and merge; return the files that the index is made of."""
    parts = document_parts(store.manifest)
    trained: str = coordinator.only_rank_zero(
        f"{name}: train", lambda: train_once(folder, store, plan, seed), _patience(coordinator, estimate.train_minutes)
    )

    def missing() -> list[int]:
        there = [part_is_complete(folder, number, parts[number], trained, store.stamp) for number in range(len(parts))]
        return [number for number, complete in enumerate(there) if not complete]

    numbers: list[int] = coordinator.only_rank_zero(f"{name}: parts", missing)
    seconds = _patience(coordinator, estimate.add_minutes / len(parts))
    with coordinator.agreement(f"{name}: fill", seconds):
        if numbers:
            read_index(folder / TRAINED, trained)  # every rank looks at the bytes that it fills
        for number in coordinator.hand_out(f"{name}: fill", numbers, seconds):
            fill_part(folder, trained, store, number, parts[number])

    def merge() -> list[Any]:
        if plan.placement == "parts":
            markers = check_parts(folder, parts, trained, store.stamp)
            size = (folder / TRAINED).stat().st_size
            files = [IndexFile(TRAINED, size, trained), *(marker.file for marker in markers)]
        else:
            files = [merge_parts(folder, plan.factory, parts, trained, store.stamp)]
        return [asdict(file) for file in files]

    minutes = estimate.merge_minutes
    merged = coordinator.only_rank_zero(f"{name}: merge", merge, _patience(coordinator, minutes))
    return parse_record(merged, list[IndexFile], f"the files of {name}")


def _tune_and_save(
    folder: Path,
    store: EmbeddingStore,
    draft: IndexManifest,
    queries_QD: Floats,
    truth: Hits | None,
    recall_floor: float,
) -> None:
    """Tune the search, measure it, write the manifest and take away what is not searched."""
    manifest = draft
    if truth is not None:
        start = time.perf_counter()
        probed = open_files(folder, draft.files, draft.plan, verify=False)
        best, trials = tune(probed, store.dimension, draft.plan, queries_QD, truth, draft.recall_k)
        tuned = time.perf_counter()
        manifest = replace(draft, nprobe=best.nprobe, refine_factor=best.refine_factor, tuning_seconds=tuned - start)
        hits = DenseIndex(manifest, store, probed).search(queries_QD, draft.recall_k)
        milliseconds = 1000 * (time.perf_counter() - tuned) / len(queries_QD)
        recall = recall_of(hits.scores_QK, truth, draft.recall_k)
        manifest = replace(manifest, recall=recall, milliseconds_per_query=milliseconds)
        require_recall(recall, draft.recall_k, recall_floor, _describe_trials(draft.plan, trials))
        _log_choice(manifest, best)
    manifest.save(folder)
    kept = {file.name for file in draft.files}
    leftovers = [*folder.glob("part-*.lists"), *folder.glob("part-*.json"), *folder.glob("index.*")]
    for path in [*leftovers, *folder.glob(".*.tmp-*")]:
        if path.name not in kept and f"{path.stem}.lists" not in kept:
            path.unlink()


def _log_choice(manifest: IndexManifest, best: Trial) -> None:
    plan = manifest.plan
    log.info(
        "the search visits %d of %d lists and re-scores %d * top_k candidates: recall@%d %.3f, %.2f ms a query, "
        "tuned in %.1f s",
        *(best.nprobe, plan.num_lists, best.refine_factor, manifest.recall_k, manifest.recall),
        *(manifest.milliseconds_per_query, manifest.tuning_seconds),
    )
    if best.safe_recall < plan.recall_target:
        log.warning(
            "no way to search that was tried reaches index.recall_target %g for sure: the best finds %.3f +- %.3f",
            *(plan.recall_target, best.recall, best.error),
        )


def _describe_trials(plan: IndexPlan, trials: list[Trial]) -> str:
    best = {trial.nprobe: trial for trial in sorted(trials, key=lambda trial: trial.recall)}
    ways = [f"{n} lists and {best[n].refine_factor} * k candidates: {best[n].recall:.3f}" for n in sorted(best)]
    return f"{plan.factory} with {plan.num_lists} lists, visiting " + "; ".join(ways)


def _describe(folder: Path, recall_floor: float, *, reused: bool) -> BuiltIndex:
    built = IndexManifest.load(folder)
    tried = f"{built.nprobe} of {built.plan.num_lists} lists of {built.plan.factory}, {built.refine_factor} * k scored"
    require_recall(built.recall, built.recall_k, recall_floor, tried)
    return BuiltIndex(
        factory=built.plan.factory,
        placement=built.plan.placement,
        num_lists=built.plan.num_lists,
        nprobe=built.nprobe,
        refine_factor=built.refine_factor,
        recall=built.recall,
        recall_k=built.recall_k,
        milliseconds_per_query=built.milliseconds_per_query,
        tuning_seconds=built.tuning_seconds,
        num_documents=built.num_documents,
        index_bytes=sum(file.num_bytes for file in built.files),
        reused=reused,
    )


def _keep_or_clear(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> bool:
    """Tell whether the folder holds this index already; if not, take away the manifest, and so any other index."""
    try:
        manifest = DenseIndex.open(folder, store, verify=True).manifest
        if (manifest.plan, manifest.seed) == (plan, seed):
            return True
    except ArtifactError:
        pass  # whatever is wrong with what lies there, it is built again
    (folder / MANIFEST).unlink(missing_ok=True)
    return False


def _patience(coordinator: Coordinator, minutes: float) -> float:
    """Return how many seconds ranks wait for work that was estimated to take so long."""
    return max(coordinator.timeout_seconds, 60 * _PATIENCE * minutes)

"""Builds an index with all ranks: plan, train once, fill the parts, merge them, tune the search, publish.

The unit of work is the part, a fixed range of documents, handed to whoever is free. A part that is finished is not made
again after a crash, the trained index neither, and the bytes of the result do not depend on the number of ranks.

Shapes: Q queries, D embedding dimension.
"""

from __future__ import annotations

import time
from dataclasses import asdict
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
from engine.index.plan import IndexPlan
from engine.index.train import fill_part, train_once
from engine.index.tune import Trial, exact_truth, recall_of, tune
from engine.log import get_logger
from engine.search import Hits
from shards.embeddings import EmbeddingStore

__all__ = ["build_index", "require_recall"]

log = get_logger(__name__)
_PATIENCE = 4
"""Ranks wait so many times as long for work as it was estimated to take."""


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
) -> dict[str, Any]:
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
        `factory`, `placement`, `num_lists`, `nprobe`, `refine_factor`, `recall` (of exact search: 1.0), `recall_k`,
        `milliseconds_per_query`, `tuning_seconds`, `num_documents`, `index_bytes`, `reused`.

    Raises:
        IndexQualityError: The recall is below the floor; on the other ranks a `CoordinationError` quotes it.
        ArtifactError: A file of the build is damaged or does not fit, or an embedding is not finite.
        DiskFullError: There is no space for a file of the build; what is finished is kept.
    """
    name = f"index@{store.stamp.iteration}"
    k = min(recall_k, store.num_documents)
    reused = coordinator.only_rank_zero(f"{name}: look for it", lambda: _keep_or_clear(folder, store, plan, seed))
    if not reused:
        estimate = IndexEstimate(
            **coordinator.only_rank_zero(f"{name}: plan", lambda: asdict(_announce(name, store, plan)))
        )
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
    result: dict[str, Any] = coordinator.only_rank_zero(
        f"{name}: report", lambda: _report(folder, recall_floor) | {"reused": reused}
    )
    return result


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

    def merge() -> list[dict[str, Any]]:
        if plan.placement == "parts":
            markers = check_parts(folder, parts, trained, store.stamp)
            size = (folder / TRAINED).stat().st_size
            return [asdict(IndexFile(TRAINED, size, trained)), *(asdict(marker.file) for marker in markers)]
        return [asdict(merge_parts(folder, plan.factory, parts, trained, store.stamp))]

    minutes = estimate.merge_minutes
    merged = coordinator.only_rank_zero(f"{name}: merge", merge, _patience(coordinator, minutes))
    return [IndexFile(**file) for file in merged]


def _tune_and_save(
    folder: Path,
    store: EmbeddingStore,
    draft: IndexManifest,
    queries_QD: Floats,
    truth: Hits | None,
    recall_floor: float,
) -> None:
    """Tune the search, measure it, write the manifest and take away what is not searched."""
    values = asdict(draft) | {"plan": draft.plan, "stamp": draft.stamp, "files": draft.files}
    if truth is not None:
        start = time.perf_counter()
        probed = open_files(folder, draft.files, draft.plan, verify=False)
        best, trials = tune(probed, store.dimension, draft.plan, queries_QD, truth, draft.recall_k)
        values |= {"nprobe": best.nprobe, "refine_factor": best.refine_factor}
        tuned = time.perf_counter()
        hits = DenseIndex(IndexManifest(**values), store, probed).search(queries_QD, draft.recall_k)
        values["milliseconds_per_query"] = 1000 * (time.perf_counter() - tuned) / len(queries_QD)
        values["tuning_seconds"] = tuned - start
        values["recall"] = recall_of(hits.scores_QK, truth, draft.recall_k)
        require_recall(values["recall"], draft.recall_k, recall_floor, _told(draft.plan, trials))
        _log_choice(draft.plan, best, values)
    IndexManifest(**values).save(folder)
    kept = {file.name for file in draft.files}
    leftovers = [*folder.glob("part-*.lists"), *folder.glob("part-*.json"), *folder.glob("index.*")]
    for path in [*leftovers, *folder.glob(".*.tmp-*")]:
        if path.name not in kept and f"{path.stem}.lists" not in kept:
            path.unlink()


def _log_choice(plan: IndexPlan, best: Trial, values: dict[str, Any]) -> None:
    log.info(
        "the search visits %d of %d lists and re-scores %d * top_k candidates: recall@%d %.3f, %.2f ms a query, "
        "tuned in %.1f s",
        *(best.nprobe, plan.num_lists, best.refine_factor, values["recall_k"], values["recall"]),
        *(values["milliseconds_per_query"], values["tuning_seconds"]),
    )
    if best.safe_recall < plan.recall_target:
        log.warning(
            "no way to search that was tried reaches index.recall_target %g for sure: the best finds %.3f +- %.3f",
            *(plan.recall_target, best.recall, best.error),
        )


def _told(plan: IndexPlan, trials: list[Trial]) -> str:
    best = {trial.nprobe: trial for trial in sorted(trials, key=lambda trial: trial.recall)}
    ways = [f"{n} lists and {best[n].refine_factor} * k candidates: {best[n].recall:.3f}" for n in sorted(best)]
    return f"{plan.factory} with {plan.num_lists} lists, visiting " + "; ".join(ways)


def _report(folder: Path, recall_floor: float) -> dict[str, Any]:
    built = IndexManifest.load(folder)
    tried = f"{built.nprobe} of {built.plan.num_lists} lists of {built.plan.factory}, {built.refine_factor} * k scored"
    require_recall(built.recall, built.recall_k, recall_floor, tried)
    facts = {name: getattr(built.plan, name) for name in ("factory", "placement", "num_lists")}
    names = ("nprobe", "refine_factor", "recall", "recall_k", "milliseconds_per_query", "tuning_seconds")
    facts |= {name: getattr(built, name) for name in (*names, "num_documents")}
    return facts | {"index_bytes": sum(file.num_bytes for file in built.files)}


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

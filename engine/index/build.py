"""Builds an index with all ranks: plan, train once, fill the parts, merge them, tune the search, publish.

The unit of work of filling is the part, a fixed range of documents, handed to whoever is free. A part that is finished
is not made again after a crash, the trained index neither, and the bytes of the result do not depend on the number of
ranks. An index may begin from the last one's lists (`engine.index.warm`); it is measured as any other, and where it
finds too little it is built again from nothing before that stops the run.

Shapes: Q queries, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError
from engine.index.dense import MANIFEST, DenseIndex, IndexManifest, document_parts
from engine.index.estimate import IndexEstimate, estimate_index, measured_gigaflops
from engine.index.exact import Floats, check_queries
from engine.index.files import TRAINED, IndexFile, part_is_complete, read_index
from engine.index.held.rows import collect_rows
from engine.index.held.store import homes_of
from engine.index.merge import check_parts, merge_parts
from engine.index.plan import IndexPlan, Placement
from engine.index.publish import AUDIT, Draft, require_recall
from engine.index.sample import evenly
from engine.index.steps import Steps
from engine.index.train import TrainedIndex, fill_part, train_once, trained_of
from engine.index.tune import exact_truth
from engine.index.warm import START, Audit, Start, WarmStart, find_start
from engine.log import get_logger
from shards.embeddings import EmbeddingStore
from shards.files import parse_record

__all__ = ["BuiltIndex", "build_index", "require_recall"]

log = get_logger(__name__)
_PATIENCE = 4
"""Ranks wait so many times as long for work as it was estimated to take."""
_AUDITED_DOCUMENTS = 2**14
"""Documents whose spread over the lists stands for the corpus's."""


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
    warm_start: bool = False
    """Whether its lists began from another index's."""
    train_iterations: int = 0
    """Of the k-means of its lists."""
    centroid_movement: float = 0.0
    """How far the lists' centroids went from the other index's, or in the last iteration, relative to their length."""


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
    warm_start: bool = False,
    last: Sequence[Path] = (),
) -> BuiltIndex:
    """Build an index with all ranks: all search exactly, train and fill, one merges, tunes and publishes.

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
        device: This rank's: where exact search, the yardstick of recall, computes its products, and where FAISS works
            if it can.
        warm_start: Leave the lists to the next index.
        last: Folders of earlier indexes, the newest first, of which the first that fits is begun from: it was built
            with `warm_start`, of the same documents and by the same plan. Where none does, the log says why.

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
        announced = coordinator.only_rank_zero(f"{name}: plan", lambda: asdict(_announce(name, store, plan, last)))
        estimate = parse_record(announced, IndexEstimate, f"the estimate of {name}")
        queries_QD = np.array(coordinator.broadcast(f"{name}: queries", audit_queries_QD.tolist()), dtype=np.float32)
        build = _Build(coordinator, name, store, plan, folder, seed, estimate, queries_QD, k, recall_floor)
        if plan.exact:
            coordinator.only_rank_zero(f"{name}: publish", lambda: build.draft([]).save(folder))
        else:
            warm = build.start_from(last) if last else None
            if not build.once(str(device), warm, keep=warm_start):
                build.once(str(device), None, keep=warm_start)
    described = coordinator.only_rank_zero(
        f"{name}: report", lambda: asdict(_describe(folder, recall_floor, reused=reused))
    )
    return parse_record(described, BuiltIndex, f"the description of {name}")


def _announce(name: str, store: EmbeddingStore, plan: IndexPlan, last: Sequence[Path]) -> IndexEstimate:
    """Say what is planned and what it takes: in one line where an earlier index was planned alike."""
    estimate = estimate_index(
        plan,
        num_documents=store.num_documents,
        dimension=store.dimension,
        num_parts=len(document_parts(store.manifest)),
        embedding_bytes=np.dtype(store.dtype).itemsize,
        gigaflops=measured_gigaflops(),
    )
    size = f"{name}: {store.num_documents} documents of {store.dimension} dimensions"
    if any(_planned_alike(folder, plan, store) for folder in last):
        log.info("%s, as planned for the last index: %s, placement %s", size, plan.factory, plan.placement)
    else:
        log.info("%s\n  %s", size, "\n  ".join(estimate.lines(plan)))
    return estimate


def _planned_alike(folder: Path, plan: IndexPlan, store: EmbeddingStore) -> bool:
    try:
        manifest = IndexManifest.load(folder)
    except ArtifactError:  # what is wrong with it is said where it is asked for lists to begin from
        return False
    return manifest.plan == plan and manifest.num_documents == store.num_documents


@dataclass(frozen=True, slots=True)
class _Build:
    """What the ranks know alike while they build an index."""

    coordinator: Coordinator
    name: str
    store: EmbeddingStore
    plan: IndexPlan
    folder: Path
    seed: int
    estimate: IndexEstimate
    queries_QD: Floats
    k: int
    recall_floor: float

    def once(self, device: str, warm: WarmStart | None, *, keep: bool) -> bool:
        """Build the index; return whether it was published, which one that begins from nothing always is."""
        parts = document_parts(self.store.manifest)
        queries_QD = check_queries(self.queries_QD, self.store.dimension, self.k)
        depth = min(
            2 * self.k, self.store.num_documents
        )  # beyond k, so that documents that tie with the k-th are known
        truth = exact_truth(
            *(self.coordinator, f"{self.name}: exact search", self.store, queries_QD, depth, parts),
            device=device,
            homes=homes_of(self.store, parts),
        )
        spread = evenly(self.store.num_documents, _AUDITED_DOCUMENTS)
        best = np.unique(truth.documents_QK[:, : self.k])
        rows = collect_rows(
            *(self.coordinator, f"{self.name}: rows of the audit", self.store, np.concatenate([best, spread])),
            self.folder / AUDIT,
        )
        audit = Audit(self.store, queries_QD, truth, self.k, spread, device, rows)
        minutes = self.estimate.train_minutes + self.estimate.rotate_minutes
        steps = Steps(self.coordinator, self.name, _patience(self.coordinator, minutes), device)
        trained = train_once(steps, self.folder, self.store, self.plan, self.seed, warm, audit)
        if self.coordinator.rank == 0:
            _log_training(self.name, trained)
        files = self._fill_and_merge(parts, trained.sha256, device)
        draft = Draft(self.name, self.folder, self.draft(files), self.store, audit)
        patience = _patience(self.coordinator, self.estimate.add_minutes)
        self.coordinator.only_rank_zero(f"{self.name}: tune", draft.tune, patience)
        draft.search(self.coordinator)

        def publish() -> bool:
            return draft.publish(trained, self.recall_floor, may_fail=warm is not None, keep=keep)

        published: bool = self.coordinator.only_rank_zero(f"{self.name}: publish", publish, patience)
        return published

    def start_from(self, last: Sequence[Path]) -> WarmStart | None:
        """Look for an index to begin from, on rank 0."""

        def look() -> list[Any]:
            reasons = []
            for place, folder in enumerate(last):
                found = find_start(folder, self.store, self.plan)
                if isinstance(found, WarmStart):
                    return [place, asdict(found.start)]
                reasons.append(f"not from {folder}: {found}")
            log.info("%s: the lists are trained from nothing, %s", self.name, "; ".join(reasons[:1]))
            return []

        told = self.coordinator.only_rank_zero(f"{self.name}: start", look)
        if not told:
            return None
        return WarmStart(last[told[0]], parse_record(told[1], Start, "what an index leaves to the next"))

    def draft(self, files: list[IndexFile]) -> IndexManifest:
        """Return the manifest of an index that is not tuned."""
        return IndexManifest(
            *(self.plan, self.seed, self.store.stamp, self.store.num_documents, self.store.dimension, tuple(files)),
            *(self.plan.nprobe or 1, self.plan.refine_factor or 1, 1.0, self.k, None, 0.0),
        )

    def _fill_and_merge(self, parts: list[range], trained: str, device: str) -> list[IndexFile]:
        """Fill and merge; return the files that the index is made of."""
        coordinator, name, store, folder = self.coordinator, self.name, self.store, self.folder

        def missing() -> list[int]:
            numbers = range(len(parts))
            there = [part_is_complete(folder, number, parts[number], trained, store.stamp) for number in numbers]
            return [number for number, complete in enumerate(there) if not complete]

        numbers: list[int] = coordinator.only_rank_zero(f"{name}: parts", missing)
        homes = homes_of(store, parts)
        own = None if homes is None else [homes[number] for number in numbers]
        seconds = _patience(coordinator, self.estimate.add_minutes / len(parts))
        with coordinator.agreement(f"{name}: fill", seconds):
            if numbers:
                read_index(folder / TRAINED, trained)  # every rank looks at the bytes that it fills
            for number in coordinator.hand_out(f"{name}: fill", numbers, seconds, homes=own):
                fill_part(folder, trained, store, number, parts[number], device)

        def merge() -> list[Any]:
            if self.plan.placement == "parts":
                markers = check_parts(folder, parts, trained, store.stamp)
                size = (folder / TRAINED).stat().st_size
                files = [IndexFile(TRAINED, size, trained), *(marker.file for marker in markers)]
            else:
                files = [merge_parts(folder, self.plan.factory, parts, trained, store.stamp)]
            return [asdict(file) for file in files]

        minutes = self.estimate.merge_minutes
        merged = coordinator.only_rank_zero(f"{name}: merge", merge, _patience(coordinator, minutes))
        return parse_record(merged, list[IndexFile], f"the files of {name}")


def _log_training(name: str, trained: TrainedIndex) -> None:
    begun, since = "from nothing", "in the last one"
    if trained.goal.start:
        begun, since = "from the last index's", "from the last index's"
    score = f", mean score of a row with its centroid {trained.score:.4g}" if trained.num_iterations else ""
    log.info(
        "%s: lists %s, iterations of k-means: %d, centroids moved by %.3g of their length %s%s, empty lists split: %d",
        *(name, begun, trained.num_iterations, trained.movement, since, score, trained.num_split),
    )


def _describe(folder: Path, recall_floor: float, *, reused: bool) -> BuiltIndex:
    built, trained = IndexManifest.load(folder), trained_of(folder)
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
        warm_start=trained is not None and bool(trained.goal.start),
        train_iterations=trained.num_iterations if trained else 0,
        centroid_movement=trained.movement if trained else 0.0,
    )


def _keep_or_clear(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> bool:
    """Tell whether the folder holds this index already; if not, take away the manifest, and so any other index."""
    try:
        manifest = DenseIndex.open(folder, store, verify=True).manifest
        if (manifest.plan, manifest.seed) == (plan, seed):
            return True
    except ArtifactError:
        pass  # whatever is wrong with what lies there, it is built again
    for name in (MANIFEST, START):
        (folder / name).unlink(missing_ok=True)
    return False


def _patience(coordinator: Coordinator, minutes: float) -> float:
    """Return how many seconds ranks wait for work that was estimated to take so long."""
    return max(coordinator.timeout_seconds, 60 * _PATIENCE * minutes)

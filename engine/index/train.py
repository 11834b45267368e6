"""Trains an index with all ranks, once, and fills its parts.

The trained, empty index is the contract between the ranks: each reads the same bytes, adds the embeddings of the parts
that it is handed under their global document indices, and writes each part with the hash of those bytes. A part is a
function of the corpus and the trained index, whoever makes it. `engine.index.build` calls these in order.

Training goes through a folder of its own, `training`, from which one that was killed goes on, and which is gone at its
end: rank 0 trains OPQ or PCA, all write the sample (`engine.index.sample`), cluster the lists (`engine.index.lists`)
and the product quantizer's codebooks (`engine.index.codebooks`), and rank 0 puts the index together. The trained index
is a function of the embeddings, the plan, the seed and the index that it begins from (`engine.index.warm`), for any
number of ranks.

Inner product throughout, the score of AR2 Eq. 4. Shapes: N documents, D embedding dimension, L lists.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from engine.errors import ArtifactError
from engine.index.codebooks import CodebookShape, read_codebooks, train_codebooks
from engine.index.estimate import WARM_SHARE
from engine.index.exact import Floats, stream
from engine.index.files import (
    TRAINED,
    IndexFile,
    faiss_threads,
    parse_index,
    read_index,
    write_index,
    write_part,
)
from engine.index.gpu import from_gpu, on_gpu
from engine.index.held.rows import Rows, collect_rows, deal_rows
from engine.index.kmeans import movement_of, normalized
from engine.index.lists import ListTraining
from engine.index.plan import IndexPlan, empty_index
from engine.index.sample import Sample, draw, evenly, require_finite
from engine.index.scratch import write_scratch
from engine.index.steps import Steps
from engine.index.transforms import cores_for, train_transforms, transform_of
from engine.index.warm import Audit, ListsAudit, Start, WarmStart, save_labels
from engine.log import get_logger
from shards.embeddings import EmbeddingStore, Stamp
from shards.files import parse_record, read_record, sha256_file, write_json

log = get_logger(__name__)
_ADD_BYTES = 64 * 2**20
"""Embeddings read at a time when a part is filled."""
_RECORD, _GOAL, _WORK, _BASE = "trained.json", "goal.json", "training", "base.faiss"
_TRANSFORM_ROWS = _ENCODER_ROWS = 2**16
"""Rows that train OPQ or PCA, of which FAISS takes as many itself, and encoders that do not ask for a number."""


@dataclass(frozen=True, slots=True)
class TrainingGoal:
    """What a trained index is made from."""

    factory: str
    train_size: int
    num_iterations: int
    seed: int
    stamp: Stamp
    start: str
    """Hash of the trained index that it begins from; empty where it begins from nothing."""


@dataclass(frozen=True, slots=True)
class TrainedIndex:
    """The record of a trained index."""

    goal: TrainingGoal
    sha256: str
    sample_seed: int
    labels: IndexFile
    """The lists of the sample's rows."""
    num_iterations: int
    """Of the k-means of the lists."""
    movement: float
    """How far the centroids went from those of the index it begins from, or in the last iteration, by their length."""
    score: float
    """Mean inner product of a row of the sample with its centroid before the last iteration's update; 0 without one."""
    num_split: int
    """Lists that had lost all their rows, over all iterations."""


def train_once(
    steps: Steps,
    folder: Path,
    store: EmbeddingStore,
    plan: IndexPlan,
    seed: int,
    warm: WarmStart | None = None,
    audit: Audit | None = None,
) -> TrainedIndex:
    """Train the index with all ranks, or take the trained one that an interrupted build left behind.

    Args:
        steps: Of the training; all ranks call this alike.
        folder: The index's folder, the same for all ranks.
        store: The embeddings.
        plan: With an index.
        seed: Draws the sample and the first centroids.
        warm: What to begin from; from nothing if None.
        audit: Needed for a warm start; rank 0's is used.

    Returns:
        What was trained; the index is in the folder.

    Raises:
        ArtifactError: An embedding of the sample is not finite; on the other ranks a `CoordinationError` quotes it.
        DiskFullError: There is no space for a file of the training.
    """
    start = warm.start.trained_sha256 if warm else ""
    goal = TrainingGoal(plan.factory, plan.train_size, plan.num_iterations, seed, store.stamp, start)
    found = steps.alone("look for a trained index", lambda: _find(folder, goal))
    if found is None:
        found = asdict(train_index(steps, folder, store, plan, goal, warm, audit))
    return parse_record(found, TrainedIndex, "the record of the trained index")


def train_index(
    steps: Steps,
    folder: Path,
    store: EmbeddingStore,
    plan: IndexPlan,
    goal: TrainingGoal,
    warm: WarmStart | None,
    audit: Audit | None,
) -> TrainedIndex:
    """Train an index; see `train_once`, which calls it where there is none."""
    steps.alone("begin the training", lambda: _begin(folder, goal))
    work, sample_seed = folder / _WORK, warm.start.sample_seed if warm else goal.seed
    sample = Sample(work, draw(store.num_documents, plan.train_size, sample_seed))
    base = warm.folder / TRAINED if warm else work / _BASE
    base_sha256 = goal.start or _base_once(steps, base, store, plan, sample)
    transform = transform_of(read_index(base, base_sha256))
    _sample_once(steps, sample, store, transform)

    def first() -> Floats:
        if warm:
            return centroids_of(read_index(base, base_sha256))
        return _first_centroids(sample, plan.num_lists, goal.seed)

    lists, num_iterations = ListTraining(steps, sample, work, first), plan.num_iterations
    if warm and audit:
        num_iterations = max(1, num_iterations // WARM_SHARE)
        _follow(steps, lists, warm, audit, transform, num_iterations)
    while not warm and lists.state.num_iterations < num_iterations:
        lists.iterate()
    shape = _codebook_shape(plan.factory, store.dimension)
    if shape is not None:
        start_MCS = codebooks_of(read_index(base, base_sha256)) if warm else None
        centroids_LD = lists.centroids()
        train_codebooks(*(steps, sample, work, shape, centroids_LD, num_iterations, goal.seed, start_MCS))

    def put_together() -> dict[str, object]:
        index = read_index(base, base_sha256)
        before_LD = centroids_of(index) if warm else None
        _assemble(index, sample, lists.centroids(), shape)
        labels = save_labels(warm.labels() if warm and not lists.state.num_iterations else lists.labels(), folder)
        return asdict(_publish(folder, index, _describe(goal, sample_seed, labels, lists, before_LD)))

    trained = steps.alone("put it together", put_together)
    return parse_record(trained, TrainedIndex, "the record of the trained index")


def fill_part(
    folder: Path,
    trained_sha256: str,
    store: EmbeddingStore,
    number: int,
    documents: range,
    device: torch.device | str = "cpu",
) -> None:
    """Add documents to the trained index and write them as a part.

    Args:
        folder: The index's folder, with the trained index.
        trained_sha256: Its hash, which has been checked.
        store: The embeddings.
        number: The part's number.
        documents: Its documents.
        device: The rank's, on which FAISS fills where it can.

    Raises:
        ArtifactError: An embedding is not finite, or has another dimension than the trained index.
        DiskFullError: There is no space for the part.
    """
    index = parse_index(folder / TRAINED)  # anew for each part, so that none depends on what was filled before
    if index.d != store.dimension:
        raise ArtifactError(
            f"the trained index {folder / TRAINED} takes embeddings of {index.d} dimensions, these have "
            f"{store.dimension}",
            remedy=f"delete {folder / TRAINED} and build the index again",
        )
    filled = on_gpu(index, device)
    with faiss_threads(torch.get_num_threads()):
        for first, rows_ND in stream(store, documents, max(1, _ADD_BYTES // (4 * store.dimension))):
            here = range(first, first + len(rows_ND))
            require_finite(rows_ND, here)
            filled.add_with_ids(rows_ND, np.arange(here.start, here.stop, dtype=np.int64))
    if filled is not index:
        index = from_gpu(filled)
    write_part(folder, number, faiss.extract_index_ivf(index).invlists, documents, trained_sha256, store.stamp)


def leave_start(folder: Path, audit: Audit, trained: TrainedIndex, nprobe: int, num_threads: int) -> None:
    """Leave an index's lists to the next one, with what they are measured to be; see `engine.index.warm`.

    Args:
        folder: Of the index.
        audit: What they are measured by.
        trained: Of this folder, by all ranks.
        nprobe: Lists that a query visits.
        num_threads: Of the measuring.
    """
    index, store = read_index(folder / TRAINED, trained.sha256), audit.store
    found = audit.measure(centroids_of(index), transform_of(index), nprobe, num_threads)
    goal = trained.goal
    Start(
        *(goal.factory, store.dimension, store.stamp.corpus_sha256, goal.train_size, trained.sample_seed),
        *(trained.sha256, trained.labels, found),
    ).save(folder)


def trained_of(folder: Path) -> TrainedIndex | None:
    """Read the record of the trained index in a folder; None where there is none."""
    try:
        return read_record(folder / _RECORD, TrainedIndex, "the record of the trained index")
    except ArtifactError:
        return None


def centroids_of(index: faiss.Index) -> Floats:
    """Return the centroids of a trained index's lists: float32 [L, D behind its transforms]."""
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    centroids_LD: Floats = faiss.downcast_index(ivf.quantizer).reconstruct_n(0, int(ivf.nlist))
    return centroids_LD


def codebooks_of(index: faiss.Index) -> Floats:
    """Return the codebooks of a trained index's product quantizer: float32 [M, C, S] (see `engine.index.codebooks`)."""
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    books: Floats = faiss.vector_to_array(ivf.pq.centroids).reshape(ivf.pq.M, ivf.pq.ksub, ivf.pq.dsub)
    return books


def _find(folder: Path, goal: TrainingGoal) -> dict[str, object] | None:
    """Return the record of the trained index that is wanted, where it is there and whole."""
    try:
        record = read_record(folder / _RECORD, TrainedIndex, "the record of the trained index")
        if record.goal == goal:
            read_index(folder / TRAINED, record.sha256)
            record.labels.check(folder, fully=True)
            shutil.rmtree(folder / _WORK, ignore_errors=True)
            return asdict(record)
    except ArtifactError:
        pass  # there is none to go on with
    (folder / _RECORD).unlink(missing_ok=True)
    return None


def _begin(folder: Path, goal: TrainingGoal) -> None:
    """Keep the folder of an interrupted training towards the same goal, and clear that of any other."""
    path = folder / _WORK / _GOAL
    try:
        if read_record(path, TrainingGoal, "the goal of a training") == goal:
            return
    except ArtifactError:
        pass  # there is none to go on with
    shutil.rmtree(folder / _WORK, ignore_errors=True)
    path.parent.mkdir(parents=True)
    write_scratch(path, asdict(goal))


def _base_once(steps: Steps, path: Path, store: EmbeddingStore, plan: IndexPlan, sample: Sample) -> str:
    """Write the index with its transforms trained and nothing else, unless it is there; return its hash."""
    index = empty_index(plan.factory, store.dimension)
    is_transformed = isinstance(faiss.downcast_index(index), faiss.IndexPreTransform)
    documents = sample.documents[evenly(len(sample), _TRANSFORM_ROWS)]
    rows: Rows = store
    if is_transformed:
        label, folder = f"{steps.name}: rows for the rotation", sample.folder / "rotation"
        rows = collect_rows(steps.coordinator, label, store, documents, folder, steps.seconds)

    def make() -> str:
        if not path.exists():
            if is_transformed:
                rows_ND = rows.rows(documents)
                require_finite(rows_ND, documents)
                train_transforms(index, rows_ND, plan.num_iterations)
            write_index(index, path)
        return sha256_file(path)

    sha256: str = steps.alone("rotation", make)
    return sha256


def _sample_once(steps: Steps, sample: Sample, store: EmbeddingStore, transform: Callable[[Floats], Floats]) -> None:
    """Write the units of the sample that are not there, each on a host that has its embeddings or most of them."""
    missing: list[int] = steps.alone("sample", sample.missing)
    homes, source = deal_rows(
        *(steps.coordinator, f"{steps.name}: rows of other hosts", store),
        [sample.documents_of(unit) for unit in missing],
        sample.folder / "others",
        steps.seconds,
    )
    with steps.shared("sample", missing, homes) as units:
        for unit in units:
            sample.write(unit, source, transform)


def _first_centroids(sample: Sample, num_lists: int, seed: int) -> Floats:
    """Draw rows of the sample as the first centroids."""
    places = draw(len(sample), num_lists, seed)
    here = [(unit, sample.places_in(unit, places)) for unit in range(len(sample.units))]
    return np.concatenate([normalized(sample.rows(unit)[own]) for unit, own in here if len(own)])


def _follow(
    steps: Steps,
    lists: ListTraining,
    warm: WarmStart,
    audit: Audit,
    transform: Callable[[Floats], Floats],
    most: int,
) -> None:
    """Let the lists follow the embeddings from the last index's, by as few iterations as it takes."""
    lists.recompute(warm.labels)
    last = warm.start.audit

    def measured() -> dict[str, object]:
        return asdict(audit.measure(lists.centroids(), transform, last.nprobe, steps.num_threads))

    while (done := lists.state.num_iterations) < most:
        found = parse_record(steps.alone("audit of the lists", measured), ListsAudit, "the audit of the lists")
        if steps.coordinator.rank == 0:
            log.info(
                "%s: lists made anew from the last index's, iterations: %d; %d of them hold %.3f of the best "
                "documents (%.3f at the last index) and %.2f %% of the corpus (%.2f %%)",
                *(steps.name, done, last.nprobe, found.recall, last.recall, 100 * found.visited, 100 * last.visited),
            )
        if found.holds(last):
            break
        lists.iterate()


def _codebook_shape(factory: str, dimension: int) -> CodebookShape | None:
    index = empty_index(factory, dimension)  # kept alive: what is extracted from it does not own it
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    if not isinstance(ivf, faiss.IndexIVFPQ):
        return None
    quantizer: Any = ivf.pq
    return CodebookShape(int(quantizer.M), int(quantizer.ksub), bool(ivf.by_residual))


def _assemble(index: faiss.Index, sample: Sample, centroids_LD: Floats, shape: CodebookShape | None) -> None:
    """Put what was trained into an index that has its transforms."""
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    quantizer: Any = faiss.downcast_index(ivf.quantizer)
    quantizer.reset()
    with faiss_threads(1):  # a graph over the centroids depends on which thread adds first
        if not quantizer.is_trained:
            quantizer.train(centroids_LD)
        quantizer.add(centroids_LD)
    if shape is not None:
        faiss.copy_array_to_vector(read_codebooks(sample.folder, shape).ravel(), ivf.pq.centroids)
    else:
        places = evenly(len(sample), int(ivf.train_encoder_num_vectors()) or _ENCODER_ROWS)
        units = range(len(sample.units))
        rows_ND = np.concatenate([sample.rows(unit)[sample.places_in(unit, places)] for unit in units])
        with faiss_threads(cores_for(rows_ND)):
            ivf.train(rows_ND)
    ivf.is_trained = index.is_trained = True


def _describe(
    goal: TrainingGoal, sample_seed: int, labels: IndexFile, lists: ListTraining, before_LD: Floats | None
) -> TrainedIndex:
    state = lists.state
    movement = state.movements[-1] if before_LD is None else movement_of(before_LD, lists.centroids())
    score = state.scores[-1] if state.scores else 0.0
    return TrainedIndex(goal, "", sample_seed, labels, state.num_iterations, movement, score, sum(state.num_split))


def _publish(folder: Path, index: faiss.Index, record: TrainedIndex) -> TrainedIndex:
    """Write the trained index and after it its record, and take the folder of the training away."""
    record = replace(record, sha256=write_index(index, folder / TRAINED).sha256)
    write_json(folder / _RECORD, asdict(record))
    shutil.rmtree(folder / _WORK)
    return record

"""Trains an index once and fills its parts.

The trained, empty index is the contract between the ranks: each reads the same bytes, adds the embeddings of the parts
that it is handed under their global document indices, and writes each part with the hash of those bytes. A part is a
function of the corpus and the trained index, whoever makes it. `engine.index.build` calls these in order.

Inner product throughout, the score of AR2 Eq. 4. Shapes: N documents, D embedding dimension.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import torch

from engine.errors import ArtifactError
from engine.index.exact import Floats, stream
from engine.index.files import TRAINED, faiss_threads, on_gpu, parse_index, read_index, write_index, write_part
from engine.index.plan import IndexPlan, empty_index
from shards.embeddings import EmbeddingStore, Stamp, read_rows
from shards.files import read_record, write_json

_ADD_BYTES = 64 * 2**20
"""Embeddings read at a time when a part is filled."""
_ROTATIONS_AN_ITERATION = 2
"""Steps of OPQ for each iteration of k-means; each trains its codebooks anew."""
_WORK_FOR_ALL_CORES = 10**9
_RECORD = "trained.json"


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a trained index was made from, and its hash."""

    factory: str
    train_size: int
    num_iterations: int
    seed: int
    stamp: Stamp
    sha256: str = ""


def train_once(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> str:
    """Train the index, or take the trained one that an interrupted build left behind.

    Args:
        folder: The index's folder.
        store: The embeddings.
        plan: With an index.
        seed: As in `train_index`.

    Returns:
        The hash of the trained index.

    Raises:
        ArtifactError: An embedding of the sample is not finite.
        DiskFullError: There is no space for the trained index.
    """
    wanted = _Trained(plan.factory, plan.train_size, plan.num_iterations, seed, store.stamp)
    try:
        record = read_record(folder / _RECORD, _Trained, "the record of the trained index")
        if replace(record, sha256="") == wanted:
            read_index(folder / TRAINED, record.sha256)
            return record.sha256
    except ArtifactError:
        pass  # there is none to go on with
    (folder / _RECORD).unlink(missing_ok=True)
    sha256 = write_index(train_index(store, plan, seed), folder / TRAINED).sha256
    write_json(folder / _RECORD, asdict(replace(wanted, sha256=sha256)))
    return sha256


def train_index(store: EmbeddingStore, plan: IndexPlan, seed: int) -> faiss.Index:
    """Train lists and codebooks on a random sample of the embeddings.

    Args:
        store: The embeddings; only the sample is in memory.
        plan: With an index.
        seed: Draws the sample and the first centroids; the same seed and threads' library give the same index.

    Returns:
        The trained, empty index; of interleaved 4-bit codes, the plain one (see `empty_index`).

    Raises:
        ArtifactError: An embedding of the sample is not finite.
    """
    index: faiss.Index = empty_index(plan.factory, store.dimension)
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    for parameters in (ivf.cp, ivf.pq.cp) if hasattr(ivf, "pq") else (ivf.cp,):
        parameters.niter, parameters.seed = plan.num_iterations, seed % 2**31
        parameters.min_points_per_centroid = 1  # FAISS would write a warning to stderr; the plan has been checked
    if hasattr(ivf, "do_polysemous_training"):
        # It reorders codebooks for Hamming filtering, which nothing here does, and takes over nine tenths of the time.
        ivf.do_polysemous_training = False
    rotation, codebooks = _prepare_rotation(index, ivf, plan.num_iterations)
    _cluster_on_gpu(ivf)
    # The other ranks wait meanwhile, so all cores are free; little work is not worth waking them.
    work = plan.train_size * plan.num_lists * store.dimension * plan.num_iterations
    with faiss_threads(len(os.sched_getaffinity(0)) if work > _WORK_FOR_ALL_CORES else torch.get_num_threads()):
        index.train(_sample(store, plan.train_size, seed))
    if codebooks is not None:
        rotation.pq = None  # it does not own them
    return index


def fill_part(folder: Path, trained_sha256: str, store: EmbeddingStore, number: int, documents: range) -> None:
    """Add documents to the trained index and write them as a part.

    Args:
        folder: The index's folder, with the trained index.
        trained_sha256: Its hash, which has been checked.
        store: The embeddings.
        number: The part's number.
        documents: Its documents.

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
    filled = on_gpu(index)
    with faiss_threads(torch.get_num_threads()):
        for first, rows_ND in stream(store, documents, max(1, _ADD_BYTES // (4 * store.dimension))):
            _require_finite(rows_ND, first)
            filled.add_with_ids(rows_ND, np.arange(first, first + len(rows_ND), dtype=np.int64))
    if filled is not index:
        index = getattr(faiss, "index_gpu_to_cpu")(filled)  # noqa: B009 - the CPU build has no such name
    write_part(folder, number, faiss.extract_index_ivf(index).invlists, documents, trained_sha256, store.stamp)


def _sample(store: EmbeddingStore, size: int, seed: int) -> Floats:
    """Read a random sample of the embeddings: float32 [size, D]."""
    chosen = np.sort(np.random.default_rng(seed).choice(store.num_documents, size=size, replace=False))
    rows_ND = np.empty((size, store.dimension), dtype=np.float32)
    done = 0
    for first, part_ND in store.parts():
        here = chosen[done : np.searchsorted(chosen, first + len(part_ND))] - first
        rows_ND[done : done + len(here)] = read_rows(part_ND, here)
        done += len(here)
    bad = np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))
    if bad.size:
        _require_finite(rows_ND[bad[:1]], int(chosen[bad[0]]))
    return rows_ND


def _prepare_rotation(index: faiss.Index, ivf: Any, num_iterations: int) -> tuple[Any, Any]:
    """Let OPQ train with codebooks of the index's own size; return it and them, which must live until it has."""
    if not (isinstance(index, faiss.IndexPreTransform) and hasattr(ivf, "pq")):
        return None, None
    rotation: Any = faiss.downcast_VectorTransform(cast(Any, index).chain.at(0))
    if not isinstance(rotation, faiss.OPQMatrix):
        return None, None
    codebooks = faiss.ProductQuantizer(ivf.d, ivf.pq.M, ivf.pq.nbits)
    codebooks.cp.min_points_per_centroid = 1
    rotation.niter, rotation.pq = _ROTATIONS_AN_ITERATION * num_iterations, codebooks
    return rotation, codebooks


def _require_finite(rows_ND: Floats, first: int) -> None:
    """Refuse what FAISS would count and then keep in no list."""
    bad = np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))
    if bad.size:
        raise ArtifactError(
            f"the embedding of document {first + int(bad[0])} is not finite, as are {bad.size - 1} more near it",
            expected="finite numbers, which a search can compare",
            remedy="look for a training run that diverged, and encode the corpus again",
        )


def _cluster_on_gpu(ivf: Any) -> None:
    """Run the k-means of the lists, nearly all of the training's work, on a GPU where this FAISS has one."""
    if faiss.get_num_gpus() > 0:
        ivf.clustering_index = on_gpu(faiss.IndexFlatIP(ivf.d))

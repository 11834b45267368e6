"""Makes a document index out of stored embeddings: plan its size, train it once, fill it on all ranks, merge.

The trained, empty index is the contract between the ranks: each reads the same bytes, adds its own shards' embeddings
under their global document indices and writes a part. FAISS merges parts of different codebooks without a word, so
`merge_parts` compares every part with those bytes. `engine.index` calls these in order and searches.

Inner product throughout, the score of AR2 Eq. 4. Shapes: N documents, D embedding dimension.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import torch

from engine.errors import ArtifactError, ConfigError
from shards.embeddings import EmbeddingStore
from shards.files import sha256_file, write_atomically

_POINTS_PER_LIST = 39
"""Training points a centroid of k-means needs at least, by FAISS's guideline."""
_SCANNED_DOCUMENTS = 16384
"""A default plan visits lists with about so many documents: some 0.3 ms a query with 4-bit codes."""
_LARGE = ((100_000_000, "IVF262144_HNSW32", 12), (10_000_000, "IVF65536_HNSW32", 8), (1_000_000, "IVF16384", 12))
"""(documents from which it holds, lists, dimensions a sub-quantizer), after FAISS's guidelines."""
_ADD_BYTES = 64 * 2**20
"""Embeddings read at a time when an index is filled."""


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """How an index is built and searched."""

    kind: Literal["ivfpq", "flat"]
    """`flat` has no index at all: the stored embeddings are searched exactly."""
    factory: str
    """FAISS factory string."""
    num_lists: int
    """Inverted lists."""
    nprobe: int
    """Lists visited for a query."""
    refine_factor: int
    """`refine_factor * top_k` candidates are re-scored exactly."""
    train_size: int
    """Embeddings that train it."""
    num_iterations: int
    """Iterations of k-means."""


def plan_index(
    kind: Literal["ivfpq", "flat"],
    *,
    num_documents: int,
    dimension: int,
    factory: str | None = None,
    nprobe: int | None = None,
    refine_factor: int = 4,
    train_size: int | None = None,
    num_iterations: int = 10,
) -> IndexPlan:
    """Choose what is left open, by the size of the corpus, and check what is given.

    Below a million documents the choice is 4-bit codes, one for two dimensions: they train in seconds on one core
    (8-bit ones take ten times as long), take D/4 bytes a document and are scanned by vector instructions. The lists
    visited hold some 16,000 documents, so that a small corpus is scanned whole and only the codes lose recall.

    Args:
        kind: IVF-PQ, or exact search.
        num_documents: N, at least 1.
        dimension: D.
        factory: FAISS factory string with an `IVF`; chosen if None.
        nprobe: Lists visited for a query, cut to their number; chosen if None.
        refine_factor: Candidates re-scored for each document asked for.
        train_size: Embeddings that train it, cut to N; chosen if None.
        num_iterations: Iterations of k-means.

    Returns:
        The plan.

    Raises:
        ConfigError: FAISS refuses the factory string, it has no inverted lists, it is given for exact search, or the
            corpus (or `train_size`) is smaller than the number of lists or of a codebook's entries.

    Source:
        FAISS wiki, "Guidelines to choose an index".
    """
    if kind == "flat":
        if factory is not None:
            raise ConfigError(
                f"index.factory is {factory!r} while index.kind is flat, which has no FAISS index",
                remedy="leave the factory out, or set index.kind=ivfpq",
            )
        return IndexPlan("flat", "Flat", 1, 1, 1, 0, 0)
    factory = factory or choose_factory(num_documents, dimension)
    num_lists, num_codes = _sizes(factory, dimension)
    points = 64 if num_documents < 1_000_000 else _POINTS_PER_LIST + 1
    available = min(num_documents, train_size or points * max(num_lists, num_codes))
    for needed, what in ((num_lists, "inverted lists"), (num_codes, "entries in a codebook")):
        if available < needed:
            raise ConfigError(
                f"the index {factory} has {needed} {what}, but {available} embeddings to train them "
                f"(the corpus has {num_documents} documents)",
                expected=f"at least {needed}, better {_POINTS_PER_LIST * needed}",
                remedy="set index.kind=flat, leave index.factory and index.train_documents out, or name smaller ones",
            )
    if nprobe is None:
        least = 32 if num_documents < 1_000_000 else 64 if num_documents < 10_000_000 else 128
        nprobe = max(least, math.ceil(num_lists * _SCANNED_DOCUMENTS / num_documents))
    return IndexPlan(kind, factory, num_lists, min(nprobe, num_lists), refine_factor, available, num_iterations)


def choose_factory(num_documents: int, dimension: int) -> str:
    """Return the FAISS factory string for a corpus of N documents and D dimensions."""
    for least, lists, width in _LARGE:
        if num_documents >= least:
            num_codes = _largest_divisor(dimension, dimension // width)
            return f"OPQ{num_codes},{lists},PQ{num_codes}"
    num_lists = max(1, min(4 * math.isqrt(num_documents), num_documents // _POINTS_PER_LIST))
    return f"IVF{num_lists},PQ{_largest_divisor(dimension, dimension // 2)}x4fs"


def train_index(store: EmbeddingStore, plan: IndexPlan, seed: int) -> faiss.Index:
    """Train lists and codebooks on a random sample of the embeddings.

    Args:
        store: The embeddings; only the sample is loaded.
        plan: Of kind `ivfpq`.
        seed: Draws the sample and the first centroids; the same seed and threads' library give the same index.

    Returns:
        The trained, empty index.
    """
    sample = np.random.default_rng(seed).choice(store.num_documents, size=plan.train_size, replace=False)
    sample_ND = store.rows(np.sort(sample).astype(np.int64))
    index = _empty_index(plan.factory, store.dimension)
    ivf = faiss.extract_index_ivf(index)
    ivf.nprobe = plan.nprobe
    typed: Any = faiss.downcast_index(ivf)
    for parameters in (ivf.cp, typed.pq.cp) if hasattr(typed, "pq") else (ivf.cp,):
        parameters.niter, parameters.seed = plan.num_iterations, seed % 2**31
        parameters.min_points_per_centroid = 1  # FAISS would write a warning to stderr; `plan_index` has checked
    if hasattr(typed, "do_polysemous_training"):
        # It reorders codebooks for Hamming filtering, which nothing here does, and takes over nine tenths of the time.
        typed.do_polysemous_training = False
    _cluster_on_gpu(ivf)
    # The other ranks wait meanwhile, so all cores are free.
    with faiss_threads(len(os.sched_getaffinity(0))):
        index.train(sample_ND)
    return index


def add_part(
    trained_path: Path, trained_sha256: str, store: EmbeddingStore, shard_numbers: Sequence[int], out_path: Path
) -> str:
    """Add shards' embeddings to the trained index, under their global document indices.

    Args:
        trained_path: What `write_index` wrote of `train_index`.
        trained_sha256: Its hash.
        store: The embeddings.
        shard_numbers: The shards of this rank; may be none.
        out_path: The part.

    Returns:
        The part's hash.

    Raises:
        ArtifactError: The trained index is missing or damaged.
    """
    index = read_index(trained_path, trained_sha256)
    rows = max(1, _ADD_BYTES // (4 * store.dimension))
    with faiss_threads(torch.get_num_threads()):
        for number in shard_numbers:
            documents = store.manifest.shards[number].documents
            for first in range(documents.start, documents.stop, rows):
                ids_N = np.arange(first, min(first + rows, documents.stop), dtype=np.int64)
                index.add_with_ids(store.rows(ids_N), ids_N)
    return write_index(index, out_path)


def merge_parts(
    trained_path: Path, trained_sha256: str, parts: Mapping[Path, str], out_path: Path, num_documents: int
) -> str:
    """Merge the parts of all ranks into one index.

    Args:
        trained_path: The trained index that the parts were made from.
        trained_sha256: Its hash.
        parts: Hash of each part's file, by path.
        out_path: The merged index.
        num_documents: N: documents 0 to N-1 must each be there once.

    Returns:
        The merged index's hash.

    Raises:
        ArtifactError: A part is missing, damaged, or made from another trained index; a document is missing or
            occurs twice. Nothing is written then.
    """
    merged = read_index(trained_path, trained_sha256)
    for path, sha256 in parts.items():
        part = read_index(path, sha256)
        try:
            faiss.merge_into(merged, part, False)
            # Merging empties the part, and what is left must be the trained index, byte for byte: FAISS compares
            # metric and centroids of the lists, but not what the codes mean.
            same = fingerprint(part) == trained_sha256
        except RuntimeError:
            same = False
        if not same:
            raise ArtifactError(
                f"the index part {path} was made from another trained index than {trained_path}",
                expected="parts of one training, whose codes mean the same",
                remedy=f"delete {path.parent / 'trained.faiss'} and {path}, and build the index again",
            )
    _check_ids(merged, num_documents, out_path)
    return write_index(merged, out_path)


def write_index(index: faiss.Index, path: Path) -> str:
    """Write an index atomically and return its hash, which `read_index` asks for."""
    with write_atomically(path) as temporary:
        faiss.write_index(index, str(temporary))
        sha256 = sha256_file(temporary)
    return sha256


def read_index(path: Path, sha256: str) -> faiss.Index:
    """Read an index that `write_index` wrote.

    Args:
        path: The file.
        sha256: The hash that it must have; FAISS itself notices no flipped bit.

    Returns:
        The index.

    Raises:
        ArtifactError: The file is missing, damaged, or not the one that the hash names.
    """
    remedy = f"delete {path} and build the index again"
    if not path.is_file():
        raise ArtifactError(f"the index file {path} is missing", remedy="build the index again")
    found = sha256_file(path)
    if found != sha256:
        raise ArtifactError(f"the index file {path} has sha256 {found}", expected=f"sha256 {sha256}", remedy=remedy)
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ArtifactError(f"FAISS cannot read the index file {path}: {error}", remedy=remedy) from error


def fingerprint(index: faiss.Index) -> str:
    """Return the SHA-256 of an index's bytes, the same as that of the file `write_index` makes of it."""
    return hashlib.sha256(faiss.serialize_index(index).tobytes()).hexdigest()


@contextmanager
def faiss_threads(num_threads: int) -> Iterator[None]:
    """Let FAISS use so many threads: its pool is its own, which `torch.set_num_threads` does not reach."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _empty_index(factory: str, dimension: int) -> faiss.Index:
    return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)


def _sizes(factory: str, dimension: int) -> tuple[int, int]:
    """Return the number of inverted lists and of entries in a codebook (0 without product quantizer)."""
    try:
        index = _empty_index(factory, dimension)  # kept alive: what is extracted from it does not own it
        ivf = faiss.extract_index_ivf(index)
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"FAISS cannot make {factory!r} for embeddings of {dimension} dimensions: {detail}",
            expected="a factory string with inverted lists, such as IVF128,PQ48x4fs or OPQ64,IVF16384,PQ64, in which "
            "the PQ number divides the dimensions",
            remedy="correct index.factory, or leave it out",
        ) from error
    quantizer = getattr(faiss.downcast_index(ivf), "pq", None)
    return int(ivf.nlist), int(quantizer.ksub) if quantizer is not None else 0


def _largest_divisor(dimension: int, at_most: int) -> int:
    return next(number for number in range(max(1, at_most), 0, -1) if dimension % number == 0)


def _cluster_on_gpu(ivf: Any) -> None:
    """Run the k-means of the lists, nearly all of the training's work, on a GPU where this FAISS has one."""
    if faiss.get_num_gpus() > 0:
        resources = getattr(faiss, "StandardGpuResources")()  # noqa: B009 - the CPU build has no such name
        ivf.clustering_index = getattr(faiss, "index_cpu_to_gpu")(resources, 0, faiss.IndexFlatIP(ivf.d))  # noqa: B009


def _check_ids(index: faiss.Index, num_documents: int, path: Path) -> None:
    """Check that the inverted lists hold the documents 0..N-1, each once; `ntotal` also counts what got lost."""
    lists: Any = faiss.extract_index_ivf(index).invlists
    ids: list[npt.NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            ids.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy())
    found_N = np.sort(np.concatenate(ids))
    if np.array_equal(found_N, np.arange(num_documents)) and index.ntotal == num_documents:
        return
    once, counts = np.unique(found_N, return_counts=True)
    missing, twice = np.setdiff1d(np.arange(num_documents), once), once[counts > 1]
    raise ArtifactError(
        f"the parts of {path} hold {len(found_N)} documents in all; {len(missing)} are missing (the first is "
        f"{missing[0] if len(missing) else 'none'}), {len(twice)} occur more than once (the first is "
        f"{twice[0] if len(twice) else 'none'})",
        expected=f"the documents 0 to {num_documents - 1}, each once",
        remedy=f"delete the parts in {path.parent} and build the index again",
    )

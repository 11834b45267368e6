"""What stands before the lists of an index: OPQ or PCA, trained by one rank, and applied by all.

OPQ learns from 65,536 rows at most, whatever the corpus, in steps that each need the one before; all ranks share what
grows with the corpus, the lists' k-means (`engine.index.lists`).

Shapes: N rows, D embedding dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import faiss
import numpy as np

from engine.index.exact import Floats
from engine.index.files import faiss_threads

_WORK_FOR_ALL_CORES = 10**8
"""Rows times dimensions squared from which the waiting ranks' cores are worth waking."""
_ROTATIONS_AN_ITERATION = 2
"""Steps of OPQ for each iteration of k-means; each trains its codebooks anew."""


def train_transforms(index: Any, rows_ND: Floats, num_iterations: int) -> None:
    """Train what stands before an index's lists, such as OPQ or PCA, in place; with all cores of this process.

    Args:
        index: Empty.
        rows_ND: Embeddings, float32 [N, D].
        num_iterations: Of k-means, in OPQ.
    """
    if not isinstance(index, faiss.IndexPreTransform):
        return
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    rotation, codebooks = _prepare_rotation(index, ivf, num_iterations)
    chain: Any = cast(Any, index).chain
    with faiss_threads(cores_for(rows_ND)):
        for place in range(chain.size()):
            transform: Any = faiss.downcast_VectorTransform(chain.at(place))
            if not transform.is_trained:
                transform.train(rows_ND)
            rows_ND = transform.apply(rows_ND)
    if codebooks is not None:
        rotation.pq = None  # it does not own them


def cores_for(rows_ND: Floats) -> int:
    """Return how many threads rank 0 takes for work on rows, float32 [N, D], for which the other ranks wait."""
    is_much = rows_ND.size * rows_ND.shape[1] > _WORK_FOR_ALL_CORES
    return len(os.sched_getaffinity(0)) if is_much else 1


def transform_of(index: Any) -> Callable[[Floats], Floats]:
    """Return what takes embeddings, float32 [N, D], to what an index's lists cluster; it keeps the index alive."""
    outer: Any = faiss.downcast_index(index)
    if not isinstance(outer, faiss.IndexPreTransform):
        return np.ascontiguousarray

    def apply(rows_ND: Floats) -> Floats:
        rows_ND = np.ascontiguousarray(rows_ND)
        chain: Any = cast(Any, faiss.downcast_index(index)).chain
        for place in range(chain.size()):
            rows_ND = faiss.downcast_VectorTransform(chain.at(place)).apply(rows_ND)
        return rows_ND

    return apply


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

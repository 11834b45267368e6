"""Trains the codebooks of an index's product quantizer by all ranks: each sub-quantizer is a k-means of its own.

Sub-quantizers know nothing of each other, so ranks are handed some of them, and FAISS clusters each in one thread. What
they learn from, residuals where the index codes these, is written by all ranks before, sub-quantizer by sub-quantizer,
so that a rank reads what it needs alone. A training that is killed here begins them anew: they take seconds.

Shapes: N rows of a unit, D dimensions, M sub-quantizers, C entries of a codebook, S = D / M dimensions of an entry.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from engine.index.exact import Floats
from engine.index.kmeans import Assigner
from engine.index.sample import Sample, evenly
from engine.index.scratch import save_scratch
from engine.index.steps import Steps

_POINTS_PER_ENTRY = 256
"""Rows that train an entry of a codebook at most, as in FAISS."""
_AT_A_TIME = 8
"""Sub-quantizers handed out at a time."""


@dataclass(frozen=True, slots=True)
class CodebookShape:
    """Of a product quantizer."""

    num_codes: int
    """M."""
    num_entries: int
    """C."""
    residual: bool
    """Whether it codes what is left of a row when its list's centroid is taken away."""


def train_codebooks(
    steps: Steps,
    sample: Sample,
    folder: Path,
    shape: CodebookShape,
    centroids_LD: Floats,
    num_iterations: int,
    seed: int,
    start_MCS: Floats | None = None,
) -> None:
    """Train all codebooks; `read_codebooks` reads them.

    Args:
        steps: Of the training.
        sample: Written.
        folder: Of the training.
        shape: Of the product quantizer.
        centroids_LD: Of the lists, float32 [L, D].
        num_iterations: Of k-means.
        seed: Draws the first entries.
        start_MCS: Codebooks to begin with, float32 [M, C, S]; drawn from the rows if None.
    """
    places = evenly(len(sample), _POINTS_PER_ENTRY * shape.num_entries)

    places_of = {unit: sample.places_in(unit, places) for unit in range(len(sample.units))}
    held = [unit for unit, own in places_of.items() if len(own)]
    with steps.shared("rows of the codebooks", held) as units:
        assigner = Assigner(centroids_LD, steps.num_threads, steps.device) if shape.residual else None
        for unit in units:
            _write_rows(folder, sample.rows(unit)[places_of[unit]], unit, shape, assigner, centroids_LD)
    del assigner
    with steps.shared("codebooks", range(0, shape.num_codes, _AT_A_TIME)) as firsts:
        for first in firsts:
            rows_KNS = np.concatenate(
                [np.load(_rows_path(folder, unit), mmap_mode="r")[first : first + _AT_A_TIME] for unit in held], axis=1
            )
            start_KCS = None if start_MCS is None else start_MCS[first : first + _AT_A_TIME]
            books = _cluster(rows_KNS, shape.num_entries, num_iterations, seed, start_KCS, steps.num_threads)
            save_scratch(_book_path(folder, first), books)


def read_codebooks(folder: Path, shape: CodebookShape) -> Floats:
    """Read what `train_codebooks` made: float32 [M, C, S]."""
    return np.concatenate([np.load(_book_path(folder, first)) for first in range(0, shape.num_codes, _AT_A_TIME)])


def _write_rows(
    folder: Path, rows_ND: Floats, unit: int, shape: CodebookShape, assigner: Assigner | None, centroids_LD: Floats
) -> None:
    """Write what the sub-quantizers learn from in a unit, float32 [M, N, S]."""
    if assigner is not None:
        rows_ND = rows_ND - centroids_LD[assigner.nearest(rows_ND)[0]]
    save_scratch(_rows_path(folder, unit), rows_ND.reshape(len(rows_ND), shape.num_codes, -1).transpose(1, 0, 2))


def _cluster(
    rows_KNS: Floats, num_entries: int, num_iterations: int, seed: int, start_KCS: Floats | None, num_threads: int
) -> Floats:
    """Cluster the rows of some sub-quantizers, each in one thread: float32 [K, C, S]."""

    def one(number: int) -> Floats:
        faiss.omp_set_num_threads(1)  # of the calling thread alone
        width = rows_KNS.shape[2]
        clustering: Any = faiss.Clustering(width, num_entries)
        clustering.niter, clustering.seed = num_iterations, seed % 2**31
        clustering.min_points_per_centroid = 1  # FAISS would write a warning to stderr; the plan has been checked
        if start_KCS is not None:
            faiss.copy_array_to_vector(np.ascontiguousarray(start_KCS[number]).ravel(), clustering.centroids)
        clustering.train(np.ascontiguousarray(rows_KNS[number]), faiss.IndexFlatL2(width))
        return faiss.vector_to_array(clustering.centroids).reshape(num_entries, width)

    with ThreadPoolExecutor(min(num_threads, len(rows_KNS))) as pool:
        return np.stack(list(pool.map(one, range(len(rows_KNS)))))


def _rows_path(folder: Path, unit: int) -> Path:
    return folder / f"coded-{unit:05d}.npy"


def _book_path(folder: Path, first: int) -> Path:
    return folder / f"codebooks-{first:05d}.npy"

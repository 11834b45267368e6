"""K-means of rows that lie in units, with sums that are the same in whatever order and by whomever they are added.

Spherical, as FAISS clusters for inner products: a row belongs to the centroid of the highest inner product, and a
centroid is the sum of its rows, scaled to length one. FAISS searches the centroids; nothing else is its work, since its
own k-means takes all rows at once, in one process.

Before they are added, numbers are rounded to a multiple of a power of two that is so large that float64 holds every sum
of them exactly, and so small that a float32 of the size of a row's norm loses nothing. Exact sums have no order. Rows
are searched in blocks of a fixed size, a thread each, so that neither ranks nor threads change a bit.

Shapes: N rows, D dimensions, L lists.
"""

from __future__ import annotations

import heapq
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from engine.index.exact import Floats, blocks
from engine.index.gpu import on_gpu

Labels = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]

_BLOCK_ROWS = 1024
"""Rows that one thread searches at a time; another number would round otherwise."""
_TWIN = 1 / 1024
"""By how much the two halves of a list that is split move apart, as in FAISS."""
_EXACT_BITS = 52
"""Bits of a sum: those of a float64's mantissa, one to spare."""


def quantum_of(largest_norm: float, num_rows: int) -> float:
    """Return the power of two to whose multiples numbers are rounded before they are added.

    Args:
        largest_norm: Of a row, and so at least the magnitude of any of its numbers and of any inner product with a
            centroid.
        num_rows: N, as many numbers as are added at most, at least 1.
    """
    return math.ldexp(1.0, math.frexp(largest_norm)[1] + max(1, (num_rows - 1).bit_length()) - _EXACT_BITS)


class Assigner:
    """Finds the list of each row.

    Args:
        centroids_LD: float32 [L, D].
        num_threads: Threads that share the rows, at least 1.
        device: The rank's; FAISS searches on it where it can.
    """

    def __init__(self, centroids_LD: Floats, num_threads: int, device: torch.device | str = "cpu") -> None:
        index = faiss.IndexFlatIP(centroids_LD.shape[1])
        index.add(np.ascontiguousarray(centroids_LD))
        self._index, self._num_threads = on_gpu(index, device), num_threads
        self._on_cpu = self._index is index

    def nearest(self, rows_ND: Floats) -> tuple[Labels, Floats]:
        """Return the centroid of the highest inner product, the first of equal ones, and that product.

        Args:
            rows_ND: float32 [N, D], finite.

        Returns:
            int32 [N] and float32 [N].
        """
        labels_N, scores_N = np.empty(len(rows_ND), dtype=np.int32), np.empty(len(rows_ND), dtype=np.float32)

        def search(rows: slice) -> None:
            faiss.omp_set_num_threads(1)  # of the calling thread alone
            scores_N1, labels_N1 = self._index.search(rows_ND[rows], 1)
            labels_N[rows], scores_N[rows] = labels_N1[:, 0], scores_N1[:, 0]

        cut = list(blocks(len(rows_ND), _BLOCK_ROWS))
        # A thread of its own in any case: the number of threads that FAISS may use is the caller's.
        with ThreadPoolExecutor(min(self._num_threads, len(cut)) if self._on_cpu and cut else 1) as pool:
            list(pool.map(search, cut))
        return labels_N, scores_N

    def best(self, rows_ND: Floats, depth: int) -> npt.NDArray[np.int64]:
        """Return the `depth` best lists of each row, best first: int64 [N, depth]."""
        found: Any = self._index.search(np.ascontiguousarray(rows_ND), depth)
        lists_NV: npt.NDArray[np.int64] = found[1]
        return lists_NV


class ListSums:
    """What rows add up to, list by list.

    Args:
        num_lists: L.
        dimension: D.
        quantum: From `quantum_of`, for all rows that will ever be added to this or to what this is added to.
    """

    def __init__(self, num_lists: int, dimension: int, quantum: float) -> None:
        self.sums_LD: Sums = np.zeros((num_lists, dimension), dtype=np.float64)
        self.counts_L: Counts = np.zeros(num_lists, dtype=np.int64)
        self.score = 0.0
        """Sum of the rows' inner products with their centroids."""
        self._quantum = quantum

    def add(self, rows_ND: Floats, labels_N: Labels, scores_N: Floats | None = None) -> None:
        """Add rows to their lists.

        Args:
            rows_ND: float32 [N, D], none longer than the norm that the quantum was made for.
            labels_N: Their lists, int32 [N].
            scores_N: Their inner products with the centroids, float32 [N]; left out, 0.
        """
        if not len(rows_ND):
            return
        order_N = np.argsort(labels_N, kind="stable")
        touched, starts, counts = np.unique(labels_N[order_N], return_index=True, return_counts=True)
        self.sums_LD[touched] += np.add.reduceat(self._rounded(rows_ND[order_N]), starts, axis=0)
        self.counts_L[touched] += counts
        if scores_N is not None:
            self.score += float(self._rounded(scores_N).sum())

    def _rounded(self, numbers: Floats) -> Sums:
        # Near 1.5 * 2^52 quanta the numbers of float64 lie one quantum apart, so that adding these rounds.
        shift = 1.5 * 2**_EXACT_BITS * self._quantum
        rounded: Sums = numbers.astype(np.float64)
        rounded += shift
        rounded -= shift
        return rounded


def normalized(rows_ND: npt.NDArray[Any]) -> Floats:
    """Return rows of length one, float32 [N, D]; a row of zeros stays what it is."""
    rows_ND = rows_ND.astype(np.float64, copy=False)
    norms_N = np.sqrt(np.square(rows_ND).sum(axis=1))
    return (rows_ND / np.where(norms_N > 0, norms_N, 1.0)[:, None]).astype(np.float32)


def split_empty(centroids_LD: Floats, counts_L: Counts) -> int:
    """Give each list that lost all its rows one half of the list that has most, in place.

    As FAISS does, but for which list is split: FAISS draws it, with a chance that grows with its rows. Here it is the
    largest, the first of equal ones, and its halves count half of its rows each when the next one is looked for.

    Args:
        centroids_LD: float32 [L, D]; those of empty lists may be anything.
        counts_L: Rows of each list, int64 [L]; changed, too.

    Returns:
        The number of lists that were empty.
    """
    empty = np.flatnonzero(counts_L == 0)
    largest = [(-int(count), number) for number, count in enumerate(counts_L.tolist()) if count]
    heapq.heapify(largest)
    sign_D = np.where(np.arange(centroids_LD.shape[1]) % 2 == 0, 1.0, -1.0).astype(np.float32)
    for number in empty.tolist():
        count, donor = heapq.heappop(largest)
        centroids_LD[number] = centroids_LD[donor] * (1 + _TWIN * sign_D)
        centroids_LD[donor] *= 1 - _TWIN * sign_D
        counts_L[number] = -count // 2
        counts_L[donor] -= counts_L[number]
        for half in (number, donor):
            heapq.heappush(largest, (-int(counts_L[half]), half))
        centroids_LD[[number, donor]] = normalized(centroids_LD[[number, donor]])
    return len(empty)


def movement_of(before_LD: Floats, after_LD: Floats) -> float:
    """Return how far centroids went, relative to their length: a root mean square, 0 for no movement."""
    moved = length = 0.0
    for rows in blocks(len(before_LD), _BLOCK_ROWS):
        old_LD = before_LD[rows].astype(np.float64)
        moved += float(np.square(after_LD[rows] - old_LD).sum())
        length += float(np.square(old_LD).sum())
    return math.sqrt(moved / length) if length else 0.0

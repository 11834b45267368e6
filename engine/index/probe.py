"""Probes inverted lists: of one index in memory or mapped from disk, or of parts that were never merged.

A query visits the `nprobe` lists nearest to it, and more where these hold too few documents: callers count on getting
top_k, and an empty list next to a query is no reason for having fewer negatives. Which lists are visited follows from
the sizes over all parts, so whoever searches some of the parts visits the same ones. Parts find what one index would;
only which of several documents with equal codes is the last of the candidates may differ.

Shapes: Q queries, D embedding dimension, C candidates, L inverted lists, V visited lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import faiss
import numpy as np
import numpy.typing as npt
import torch

from engine.index.exact import Floats, blocks, merge_hits
from engine.index.files import MappedLists, faiss_threads, list_sizes
from engine.index.gpu import MOST_SELECTED, on_gpu
from engine.search import Hits

_QUERIES_AT_A_TIME = 1024


class ProbedIndex:
    """An index whose lists are visited.

    Args:
        index: With its lists; or the trained, empty one where `parts` has them.
        parts: The lists of parts that were not merged.
        in_memory: Whether the lists are loaded, so that a GPU may take them.
        device: The rank's, on which FAISS then searches where it can.
    """

    def __init__(
        self,
        index: faiss.Index,
        parts: Sequence[MappedLists] = (),
        *,
        in_memory: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        self._ivf, self._parts = ivf, list(parts)
        self._index, self._outer = index, cast(Any, faiss.downcast_index(index))  # the first owns the others
        copy = on_gpu(index, device) if in_memory else index
        self._gpu = None if copy is index else copy
        self.num_lists = int(ivf.nlist)
        every = [part.lists for part in self._parts] or [ivf.invlists]
        self._sizes_L = np.sum([list_sizes(lists) for lists in every], axis=0)

    @property
    def num_documents(self) -> int:
        """Documents in all parts."""
        return int(self._sizes_L.sum())

    @property
    def num_parts(self) -> int:
        """Parts that can be searched one by one; 1 for a merged index."""
        return max(1, len(self._parts))

    def search(
        self, queries_QD: Floats, depth: int, *, nprobe: int, needed: int, parts: Sequence[int] | None = None
    ) -> Hits:
        """Find candidates by their codes.

        Args:
            queries_QD: float32 [Q, D].
            depth: Candidates a query.
            nprobe: Lists visited at least.
            needed: Documents that the visited lists of a query must hold, over all parts; at most those of the index.
            parts: Search only these; all if None.

        Returns:
            Hits [Q, depth] with the scores of the codes, padded where the visited lists hold fewer.
        """
        found = Hits(
            np.full((len(queries_QD), depth), -1, dtype=np.int64),
            np.full((len(queries_QD), depth), -np.inf, dtype=np.float32),
        )
        numbers = range(self.num_parts) if parts is None else parts
        if not len(numbers):
            return found
        with faiss_threads(torch.get_num_threads()):
            for block in blocks(len(queries_QD), _QUERIES_AT_A_TIME):
                rows_D = self._transformed(queries_QD[block])
                for places, lists_QV, scores_QV in self._visits(rows_D, nprobe, needed):
                    hits: Hits | None = None
                    for number in numbers:
                        new = self._scan(number, rows_D[places], queries_QD[block][places], depth, lists_QV, scores_QV)
                        hits = new if hits is None else merge_hits([hits, new], depth)
                    assert hits
                    found.documents_QK[block.start + places] = hits.documents_QK
                    found.scores_QK[block.start + places] = hits.scores_QK
        return found

    def visited(self, queries_QD: Floats, *, nprobe: int, needed: int) -> float:
        """Return how many documents the visited lists of a query hold, on average over the queries."""
        with faiss_threads(torch.get_num_threads()):
            rows_QD = self._transformed(queries_QD)
            return sum(
                float(self._held(lists_QV).sum()) for _, lists_QV, _ in self._visits(rows_QD, nprobe, needed)
            ) / max(1, len(queries_QD))

    def _transformed(self, queries_QD: Floats) -> Floats:
        rows_QD: Floats = np.ascontiguousarray(queries_QD)
        if isinstance(self._outer, faiss.IndexPreTransform):
            chain: Any = self._outer.chain
            for place in range(chain.size()):
                rows_QD = faiss.downcast_VectorTransform(chain.at(place)).apply(rows_QD)
        return rows_QD

    def _held(self, lists_QV: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of documents in each query's lists: int64 [Q]."""
        held: npt.NDArray[np.int64] = np.where(lists_QV >= 0, self._sizes_L[lists_QV], 0).sum(axis=1)
        return held

    def _visits(
        self, rows_QD: Floats, nprobe: int, needed: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]]:
        """Yield (places of queries [Q], their lists [Q, V], the lists' scores [Q, V]), V growing from `nprobe`."""
        pending = np.arange(len(rows_QD))
        while pending.size:
            scores_QV, lists_QV = self._ivf.quantizer.search(rows_QD[pending], nprobe)
            done = (self._held(lists_QV) >= needed) | (nprobe >= self.num_lists)
            if done.any():
                yield pending[done], lists_QV[done], scores_QV[done]
            pending = pending[~done]
            nprobe = min(2 * nprobe, self.num_lists)

    def _scan(
        self,
        number: int,
        rows_QD: Floats,
        queries_QD: Floats,
        depth: int,
        lists_QV: npt.NDArray[np.int64],
        scores_QV: Floats,
    ) -> Hits:
        """Scan a part's visited lists; on a GPU, FAISS finds the lists anew. Beyond its limits, the CPU scans."""
        if self._gpu is not None and max(depth, lists_QV.shape[1]) <= MOST_SELECTED:
            getattr(faiss, "GpuParameterSpace")().set_index_parameter(  # noqa: B009 - the CPU build has no such name
                self._gpu, "nprobe", lists_QV.shape[1]
            )
            scores_QC, documents_QC = self._gpu.search(queries_QD, depth)
            scores_QC[documents_QC < 0] = -np.inf
            return Hits(documents_QC, scores_QC)
        if self._parts:
            self._ivf.replace_invlists(self._parts[number].lists, False)
        self._ivf.nprobe = lists_QV.shape[1]
        scores_QC, documents_QC = self._ivf.search_preassigned(rows_QD, depth, lists_QV, scores_QV)
        scores_QC[documents_QC < 0] = -np.inf
        return Hits(documents_QC, scores_QC)

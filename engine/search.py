"""What every first-stage retriever offers: queries in, the best documents of the whole corpus out.

BM25, dense and learned-sparse retrievers answer in the same form, so that mining negatives, evaluation and the search
command ask any of them in the same words. Shapes: Q queries, K = `top_k` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shards.records import Query

__all__ = ["Hits", "PartedSearcher", "Searcher", "top_of_row"]


@dataclass(frozen=True, slots=True)
class Hits:
    """The best documents of each query, by score descending, then by document index ascending.

    Attributes:
        documents_QK: Global document indices, int64 [Q, K]; -1 where the corpus has fewer than K documents.
        scores_QK: Their scores, float32 [Q, K]; -inf where the document is -1.
    """

    documents_QK: NDArray[np.int64]
    scores_QK: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.documents_QK.ndim != 2 or self.documents_QK.shape != self.scores_QK.shape:
            raise ValueError(
                f"documents have shape {self.documents_QK.shape} and scores {self.scores_QK.shape}; both are [Q, K]"
            )

    def __len__(self) -> int:
        return int(self.documents_QK.shape[0])


@runtime_checkable
class Searcher(Protocol):
    """A retriever with its index, ready to answer.

    Attributes:
        source: Who found the documents, such as `bm25` or `dense`; recorded with the candidates.
        block_size: How many queries are best searched in one call: enough to be fast, few enough to repeat.
    """

    source: str
    block_size: int

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Find the best documents of each query.

        Args:
            queries: Q queries.
            top_k: Documents per query, at least 1.

        Returns:
            Hits [Q, top_k].
        """
        ...


@runtime_checkable
class PartedSearcher(Searcher, Protocol):
    """A searcher whose index is in parts that ranks can search one by one.

    Attributes:
        num_parts: Number of parts; 1 where it is searched as one.
    """

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        ...

    def encode(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Encode queries: [Q, D]."""
        ...

    def search_parts(self, queries_QD: NDArray[np.float32], top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts: [Q, C]."""
        ...

    def finish(self, queries_QD: NDArray[np.float32], found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what `search_parts` found in all parts: [Q, top_k], the same as `search` returns."""
        ...


def top_of_row(scores_N: NDArray[Any], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Select the best entries of one row of scores; equal scores go by index, also across the cut.

    A plain partition keeps an arbitrary one of several documents that tie for the last place, so two machines, or two
    versions of a library, would mine different negatives.

    Args:
        scores_N: One finite score for each document [N].
        top_k: How many to return, at least 1.

    Returns:
        Document indices int64 [top_k] and scores float32 [top_k], padded with -1 and -inf where N < top_k.
    """
    documents_K = np.full(top_k, -1, dtype=np.int64)
    best_K = np.full(top_k, -np.inf, dtype=np.float32)
    num_kept = min(top_k, len(scores_N))
    if num_kept == 0:
        return documents_K, best_K
    cut = np.partition(scores_N, len(scores_N) - num_kept)[len(scores_N) - num_kept]
    above = np.flatnonzero(scores_N > cut)
    at_cut = np.flatnonzero(scores_N == cut)[: num_kept - len(above)]
    chosen = np.concatenate([above, at_cut])
    chosen = chosen[np.lexsort((chosen, -scores_N[chosen]))]
    documents_K[:num_kept] = chosen
    best_K[:num_kept] = scores_N[chosen]
    return documents_K, best_K

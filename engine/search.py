"""What every first-stage retriever offers: queries in, the best documents of the whole corpus out.

BM25, dense and learned-sparse retrievers answer in the same form, so that mining negatives, evaluation and the search
command ask any of them in the same words. What is a hit is the same for all: a document that shares no word with the
query is none to a lexical retriever (`engine.index.postings`), and neither is the document that is the query itself
(`search_others`). So a query may have fewer hits than were asked for, or none. Shapes: Q queries, K = `top_k` ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shards.records import Query

__all__ = [
    "Hits",
    "PartedSearcher",
    "Rescorer",
    "Searcher",
    "finds_too_little",
    "search_others",
    "searched_depth",
    "top_of_row",
]


@dataclass(frozen=True, slots=True)
class Hits:
    """The best documents of each query, by score descending, then by document index ascending.

    Attributes:
        documents_QK: Global document indices, int64 [Q, K]; -1 behind the last hit of a query that has fewer than K.
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

    @property
    def num_found_Q(self) -> NDArray[np.int64]:
        """How many hits each query has, int64 [Q]."""
        found_Q: NDArray[np.int64] = (self.documents_QK >= 0).sum(1)
        return found_Q

    def without(self, documents_Q: NDArray[np.int64], top_k: int) -> Hits:
        """Take one document out of each query's hits; those below it move up.

        Args:
            documents_Q: Global document index for each query, int64 [Q]; -1 for none.
            top_k: Hits to keep of each query, at most K.

        Returns:
            Hits [Q, top_k].
        """
        kept_QK = self.documents_QK != documents_Q[:, None]
        order_QK = np.argsort(~kept_QK, axis=1, kind="stable")[:, :top_k]
        return Hits(
            np.take_along_axis(np.where(kept_QK, self.documents_QK, -1), order_QK, 1),
            np.take_along_axis(np.where(kept_QK, self.scores_QK, np.float32(-np.inf)), order_QK, 1),
        )


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
            Hits [Q, top_k]. Fewer than `top_k` of a query mean that there are no more: a deeper search finds none.
        """
        ...


E = TypeVar("E")


@runtime_checkable
class Rescorer(Protocol):
    """What gives its own scores to documents that somebody else found: a ranker, or a retriever in its place."""

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents for queries.

        Args:
            queries: Any queries.
            documents: Global document indices for each of them.

        Returns:
            Scores for each query, in the order of its documents; higher is better.
        """
        ...


@runtime_checkable
class PartedSearcher(Searcher, Protocol[E]):
    """A searcher whose index is in parts that ranks can search one by one.

    What it makes of queries is its own affair: a dense array [Q, D], or a sparse one of scipy's [Q, V]. Either takes an
    array of rows as its index, and `engine.refresh.part_search` stores either.

    Attributes:
        num_parts: Number of parts; 1 where it is searched as one.
    """

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        ...

    def encode(self, queries: Sequence[Query]) -> E:
        """Encode queries: a row each."""
        ...

    def search_parts(self, queries: E, top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts: [Q, C]."""
        ...

    def finish(self, queries: E, found: Sequence[Hits], top_k: int) -> Hits:
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


def search_others(
    searcher: Searcher, queries: Sequence[Query], top_k: int, own_documents: Mapping[str, int], *, num_documents: int
) -> Hits:
    """Search, and leave the document out that is the query itself; the search is one deeper, so that none is missing.

    Args:
        searcher: Any retriever.
        queries: Q queries.
        top_k: Documents per query, at least 1.
        own_documents: Query id -> global index of the document that is the query (`Data.own_documents`).
        num_documents: Of the corpus; a search goes no deeper.

    Returns:
        Hits [Q, top_k], or [Q, num_documents] where the corpus is smaller.
    """
    searched = searched_depth(top_k, own_documents, num_documents=num_documents)
    if not own_documents:
        return searcher.search(queries, searched)
    # As deep for queries without such a document, so that what a rank finds does not depend on whom it searches with.
    own_Q = np.array([own_documents.get(query.id, -1) for query in queries], dtype=np.int64)
    return searcher.search(queries, searched).without(own_Q, min(top_k, num_documents))


def searched_depth(top_k: int, own_documents: Mapping[str, int], *, num_documents: int) -> int:
    """Return how deep `search_others` searches; arguments as there."""
    return min(top_k + bool(own_documents), num_documents)


def finds_too_little(who: str, num_without: int, num_queries: int) -> str | None:
    """Say so where most queries have no hit at all, which no retriever does that reads their language.

    Args:
        who: The retriever, for the message.
        num_without: Queries without a hit.
        num_queries: All queries.

    Returns:
        A warning, or None.
    """
    if 2 * num_without <= num_queries:
        return None
    return (
        f"{who} finds nothing for {num_without} of {num_queries} queries: no document shares a word with them. Are "
        f"queries and documents in one language, and are its words found (bm25.language, bm25.tokens)?"
    )

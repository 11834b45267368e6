"""Exact search over postings, term at a time, for a group of queries at once.

A score is the inner product of two sparse vectors: products of float32 weights, exact in float64, are added up in the
order of the terms and rounded once, to float32. So a score has the same bits whatever is searched with it, in whichever
part, by whichever code (`engine.index.scan`), on one rank or many. A document that shares no term with a query is no
hit. Equal scores go by document.

What it takes of memory does not grow with the corpus: 12 bytes for each hit that is returned (queries x `top_k`); for
each thread 12 bytes for each of `_SCORES_AT_A_TIME` pairs of query and document; 14 bytes for each of `_WAITING`
documents that may be among the best, and for `top_k` of each of 512 queries; with scipy 12 bytes for each posting of a
block. The block itself is mapped from its file.

A block may have a few terms of a large vocabulary (words, for BM25): then a query's terms are brought to the block's.

Shapes: Q queries, V terms of the vocabulary, N documents of a block, K = `top_k` ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse  # type: ignore[import-untyped]
import torch

from engine.index.exact import blocks, merge_hits
from engine.index.plan import cut_parts
from engine.index.scan import Found, Scan, fastest_scan
from engine.search import Hits, top_of_row
from shards.postings import Block

_QUERIES_AT_A_TIME = 512
_SCORES_AT_A_TIME = 2**19
"""Pairs of query and document that a thread scores before it keeps the best of them."""
_WAITING = 2**21
"""Documents of these queries that a block may leave for later to choose from; of more, the best are taken at once."""
_FEWEST_CHOSEN = 256
"""Documents a query that must wait, and `top_k` at least, before the best are taken of them: often costs more."""


class Postings(Protocol):
    """Postings on disk, in files of neighbouring documents."""

    @property
    def sizes(self) -> list[int]:
        """Documents of each file."""
        ...

    @property
    def firsts(self) -> list[int]:
        """Global index of each file's first document."""
        ...

    @property
    def num_terms(self) -> int:
        """Terms of the vocabulary."""
        ...

    def blocks(self, files: range | None = None, /) -> Iterator[Block]:
        """Map the blocks of some files, or of all, in the order of the corpus."""
        ...


class PostingsIndex:
    """Finds the documents with the highest inner product from the postings of a query's terms.

    Args:
        store: The postings.
        parts: Numbers of the files that each part has, which ranks may search one by one; left out, chosen by size.
        scan: What adds them up; left out, the fastest. The results are the same.
    """

    def __init__(
        self, store: Postings, *, parts: Sequence[range] | None = None, scan: type[Scan] | None = None
    ) -> None:
        self.store, self._scan = store, scan or fastest_scan()
        self._parts = cut_parts(store.sizes) if parts is None else parts

    @property
    def num_parts(self) -> int:
        """Parts that ranks may search one by one: a function of the corpus alone."""
        return len(self._parts)

    def search(self, queries_QV: sparse.csr_array, top_k: int) -> Hits:
        """Search all parts; arguments and result as of `search_parts`."""
        return self.search_parts(queries_QV, top_k, range(self.num_parts))

    def search_parts(self, queries_QV: sparse.csr_array, top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts.

        Args:
            queries_QV: float32 [Q, V], finite, no weight below 0.
            top_k: Documents a query, at least 1.
            parts: Numbers below `num_parts`, each once.

        Returns:
            Hits [Q, top_k], padded where fewer documents share a term with a query.

        Raises:
            ArtifactError: A part is damaged.
            ValueError: The queries have another vocabulary than the postings, or `top_k` is below 1.
        """
        if queries_QV.ndim != 2 or queries_QV.shape[1] != self.store.num_terms or top_k < 1:
            raise ValueError(
                f"queries of shape {queries_QV.shape} and top_k {top_k}; expected [Q, {self.store.num_terms}] and 1 up"
            )
        queries_QV = sparse.csr_array(queries_QV, dtype=np.float64)
        queries_QV.sort_indices()
        num_queries = queries_QV.shape[0]
        hits = Hits(
            np.full((num_queries, top_k), -1, dtype=np.int64),
            np.full((num_queries, top_k), -np.inf, dtype=np.float32),
        )
        with ThreadPoolExecutor(torch.get_num_threads(), "search") as threads:
            for group in blocks(num_queries, _QUERIES_AT_A_TIME):
                best = _Best(Hits(hits.documents_QK[group], hits.scores_QK[group]))
                self._search_group(queries_QV[group], best, sorted(parts), threads)
                best.settle()
        return hits

    def _search_group(
        self, queries_QV: sparse.csr_array, best: _Best, parts: Sequence[int], threads: ThreadPoolExecutor
    ) -> None:
        """Go through parts, block by block, so that documents come in their order."""
        num_queries, share = queries_QV.shape[0], -(-queries_QV.shape[0] // torch.get_num_threads())
        for part in parts:
            for block in self.store.blocks(self._parts[part]):
                scan = self._scan(block, _of_block(block, queries_QV))
                size = max(1, min(_SCORES_AT_A_TIME // block.num_documents, share))
                most = _WAITING * size // num_queries

                def search(rows: slice, scan: Scan = scan, first: int = block.first_document, most: int = most) -> None:
                    best.add(rows, first, scan.find(rows, best.least(rows)), most)

                for _ in threads.map(search, blocks(num_queries, size)):
                    pass  # an error of a thread is raised where its result is asked for
                best.settle(num_queries * max(_FEWEST_CHOSEN, best.top_k))

    def score(self, queries_QV: sparse.csr_array, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents that somebody else found, in one pass for all queries over the files that have them.

        Args:
            queries_QV: As of `search_parts`.
            documents: Global document indices for each query.

        Returns:
            Scores for each query, in the order of its documents, with the bits that a search gives them; 0 for a
            document that shares no term with its query.

        Raises:
            ArtifactError: A part is damaged.
        """
        queries_QV = sparse.csr_array(queries_QV, dtype=np.float64)
        queries_QV.sort_indices()
        wanted = [np.unique(np.array(own, dtype=np.int64), return_inverse=True) for own in documents]
        scores = [np.zeros(len(own_N), dtype=np.float64) for own_N, _ in wanted]
        for block in self._blocks_with([document for own_N, _ in wanted for document in own_N.tolist()]):
            ends, own_QV = [block.first_document, block.first_document + block.num_documents], None
            for row, (own_N, _) in enumerate(wanted):
                start, stop = np.searchsorted(own_N, ends).tolist()
                if start < stop:
                    own_QV = _of_block(block, queries_QV) if own_QV is None else own_QV
                    terms = slice(*own_QV.indptr[row : row + 2].tolist())
                    query_T = (own_QV.indices[terms], own_QV.data[terms])
                    _add_scores(block, query_T, own_N[start:stop] - block.first_document, scores[row][start:stop])
        return [
            own_scores.astype(np.float32)[places].tolist()
            for own_scores, (_, places) in zip(scores, wanted, strict=True)
        ]

    def _blocks_with(self, documents: Sequence[int]) -> Iterator[Block]:
        """Read the blocks of the files that have some of these documents, in the order of the corpus."""
        files_N = np.searchsorted(self.store.firsts, np.array(documents, dtype=np.int64), side="right") - 1
        for number in np.unique(files_N).tolist():
            yield from self.store.blocks(range(number, number + 1))

    def finish(self, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what `search_parts` found in all parts: [Q, top_k], the same as `search` returns."""
        return merge_hits(found, top_k)


def _of_block(block: Block, queries_QV: sparse.csr_array) -> sparse.csr_array:
    """Return queries with the block's own numbers of terms; those that it does not have add nothing to a score."""
    if block.terms_V is None:
        return queries_QV
    terms_V, num_terms = block.terms_V, len(block.terms_V)
    places = np.searchsorted(terms_V, queries_QV.indices).clip(max=max(0, num_terms - 1))
    has = terms_V[places] == queries_QV.indices if num_terms else np.zeros(len(places), dtype=bool)
    bounds_Q = np.concatenate([[0], np.cumsum(has)])[queries_QV.indptr]
    return sparse.csr_array((queries_QV.data[has], places[has], bounds_Q), shape=(queries_QV.shape[0], num_terms))


def _add_scores(
    block: Block,
    query_T: tuple[npt.NDArray[np.integer], npt.NDArray[np.float64]],
    places_N: npt.NDArray[np.int64],
    scores_N: npt.NDArray[np.float64],
) -> None:
    """Add to the scores of documents at ascending places of a block what they share with a query, term by term."""
    for term, weight in zip(*query_T, strict=True):
        span = slice(*block.starts_V[term : term + 2].tolist())
        documents_P = block.documents_P[span]
        if len(documents_P):
            found_N = np.searchsorted(documents_P, places_N).clip(max=len(documents_P) - 1)
            has_N = documents_P[found_N] == places_N
            scores_N[has_N] += weight * block.weights_P[span][found_N[has_N]].astype(np.float64)


class _Best:
    """The best documents of each query so far, where documents are looked at in ascending order.

    Of equal scores the earlier document is better. Where documents of one query are put together here, they stand so
    that of two with equal scores the earlier comes first; a choice by place is a choice by document then.
    """

    def __init__(self, hits: Hits) -> None:
        self._hits, self.top_k = hits, hits.scores_QK.shape[1]
        self._waiting: list[tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []

    def least(self, rows: slice) -> npt.NDArray[np.float32]:
        """Return what a score must exceed to be kept, float32 [Q]; one that is equal is of a later document."""
        least_Q: npt.NDArray[np.float32] = np.maximum(self._hits.scores_QK[rows, -1], np.float32(0))
        return least_Q

    def add(self, rows: slice, first_document: int, found: Found, most: int) -> None:
        """Take what was found in a block for some queries, all of it above `least`; threads may call it.

        Args:
            rows: Which queries.
            first_document: Of the block.
            found: Places in the block, and scores.
            most: Of these documents that wait as they are; of more, the best of each query are taken at once.
        """
        bounds_Q, places, scores = found
        lengths_Q = np.diff(bounds_Q)
        if len(scores) > most:
            kept = []
            for start, stop in pairwise(bounds_Q.tolist()):
                best_K, _ = top_of_row(scores[start:stop], self.top_k)
                kept.append(start + best_K[best_K >= 0])
            lengths_Q = np.array([len(one) for one in kept])
            places, scores = places[np.concatenate(kept)], scores[np.concatenate(kept)]
        numbers = np.repeat(np.arange(rows.start, rows.stop, dtype=np.uint16), lengths_Q)
        self._waiting.append((numbers, places + np.int64(first_document), np.array(scores)))

    def settle(self, fewest: int = 0) -> None:
        """Take the best of what waits, where that is so much."""
        if not self._waiting or sum(len(numbers) for numbers, _, _ in self._waiting) < fewest:
            return
        numbers, documents, scores = (np.concatenate(pieces) for pieces in zip(*self._waiting, strict=True))
        self._waiting = []
        order = np.argsort(numbers, kind="stable")
        bounds_Q = np.searchsorted(numbers[order], np.arange(len(self._hits) + 1))
        for row, (start, stop) in enumerate(pairwise(bounds_Q.tolist())):
            if start == stop:
                continue
            best_K, documents_K, own = self._hits.scores_QK[row], self._hits.documents_QK[row], order[start:stop]
            places_K, scores_K = top_of_row(np.concatenate([best_K, scores[own]]), len(best_K))
            documents_K[:] = np.concatenate([documents_K, documents[own]])[places_K]
            best_K[:] = scores_K

"""Adds up the postings of a block for some queries: by numba's compiled code where it is installed, else without.

All give the same bits: a product of two float32 numbers is exact in float64, and the products of a document are added
in the order of the terms. Compiled code adds in place; scipy multiplies two sparse matrices, and makes a list of what a
query meets; numpy adds in place, term by term, which is faster than scipy where a query has a few terms.

Shapes: Q queries, V terms of the vocabulary, T terms that the queries have, N documents of a block, P postings.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse  # type: ignore[import-untyped]

from engine.log import get_logger
from shards.postings import Block

log = get_logger(__name__)
_FEW_TERMS = 1024
"""Of all queries together; beyond as many, a whole block is converted faster than it is cut."""

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Where each query's finds begin and the last one's end, int64 [Q + 1]; their documents, ascending for a query, as
places in the block; their scores."""


class Scan(Protocol):
    """A block, ready to be searched for the queries that it was made with."""

    def __init__(self, block: Block, queries_QV: sparse.csr_array) -> None: ...

    def find(self, rows: slice, least_Q: npt.NDArray[np.float32]) -> Found:
        """Return the documents that score above a bound, for some of the queries.

        Args:
            rows: Which queries.
            least_Q: Of each, at least 0, float32 [Q].
        """
        ...


class ProductScan:
    """Scores by a product of sparse matrices; see `Scan`.

    Args:
        block: The postings.
        queries_QV: float64 [Q, V], the terms of a query ascending.
    """

    def __init__(self, block: Block, queries_QV: sparse.csr_array) -> None:
        if queries_QV.nnz > _FEW_TERMS:
            postings_VN = (block.weights_P.astype(np.float64), block.documents_P.astype(np.int32), block.starts_V)
            self._queries_QT, num_terms = queries_QV, len(block.starts_V) - 1
        else:  # the postings of these terms alone are brought into scipy's types
            terms_T, places = np.unique(queries_QV.indices, return_inverse=True)
            spans = [slice(*span) for span in zip(block.starts_V[terms_T], block.starts_V[terms_T + 1], strict=True)]
            postings_VN = (
                np.concatenate([np.empty(0), *(block.weights_P[span] for span in spans)], dtype=np.float64),
                np.concatenate([np.empty(0, np.int32), *(block.documents_P[span] for span in spans)]),
                np.cumsum([0, *(span.stop - span.start for span in spans)]),
            )
            num_terms = len(terms_T)
            self._queries_QT = sparse.csr_array(
                (queries_QV.data, places, queries_QV.indptr), shape=(queries_QV.shape[0], num_terms)
            )
        self._postings_TN = sparse.csr_array(postings_VN, shape=(num_terms, block.num_documents))

    def find(self, rows: slice, least_Q: npt.NDArray[np.float32]) -> Found:
        """Return the documents that score above a bound; see `Scan.find`."""
        scores_QN = self._queries_QT[rows] @ self._postings_TN
        scores = scores_QN.data.astype(np.float32)
        kept = scores > np.repeat(least_Q, np.diff(scores_QN.indptr))
        bounds_Q = np.concatenate([[0], np.cumsum(kept)])[scores_QN.indptr]
        found = sparse.csr_array((scores[kept], scores_QN.indices[kept], bounds_Q), shape=scores_QN.shape)
        found.sort_indices()
        return bounds_Q, found.indices, found.data


class FewTermsScan:
    """Scores term by term, in place, by numpy; see `Scan`.

    Args:
        block: The postings.
        queries_QV: float64 [Q, V], the terms of a query ascending.
    """

    def __init__(self, block: Block, queries_QV: sparse.csr_array) -> None:
        self._num_documents, self._queries_QV = block.num_documents, queries_QV
        # Brought once into the types that numpy adds up by: doing it for each query takes as long again as the adding.
        self._postings = {
            term: (block.documents_P[span].astype(np.intp), block.weights_P[span].astype(np.float64))
            for term, span in _spans(block, queries_QV)
        }

    def find(self, rows: slice, least_Q: npt.NDArray[np.float32]) -> Found:
        """Return the documents that score above a bound; see `Scan.find`."""
        queries_QV = self._queries_QV[rows]
        scores_N = np.empty(self._num_documents)
        documents, scores = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        for query, least in enumerate(least_Q):
            scores_N[:] = 0.0
            terms = slice(*queries_QV.indptr[query : query + 2].tolist())
            for term, value in zip(queries_QV.indices[terms].tolist(), queries_QV.data[terms].tolist(), strict=True):
                documents_P, weights_P = self._postings[term]
                np.add.at(scores_N, documents_P, weights_P if value == 1 else value * weights_P)
            above = np.flatnonzero(scores_N > least)
            rounded = scores_N[above].astype(np.float32)
            kept = rounded > least  # rounding may take one down to the bound
            documents.append(above[kept].astype(np.int32))
            scores.append(rounded[kept])
        bounds_Q = np.cumsum([0, *map(len, documents[1:])])
        return bounds_Q, np.concatenate(documents), np.concatenate(scores)


def _spans(block: Block, queries_QV: sparse.csr_array) -> Iterator[tuple[int, slice]]:
    """Yield the terms that some query has, and where their postings are."""
    for term in np.unique(queries_QV.indices).tolist():
        yield term, slice(*block.starts_V[term : term + 2].tolist())


class CompiledScan:
    """Scores by compiled code, in place; see `Scan`.

    Args:
        block: The postings.
        queries_QV: float64 [Q, V], the terms of a query ascending.
    """

    def __init__(self, block: Block, queries_QV: sparse.csr_array) -> None:
        self._block, self._queries_QV = block, queries_QV
        # numba reads no float16 on a CPU.
        self._weights_P = np.asarray(block.weights_P, dtype=np.float32)

    def find(self, rows: slice, least_Q: npt.NDArray[np.float32]) -> Found:
        """Return the documents that score above a bound; see `Scan.find`."""
        queries_QV, block = self._queries_QV[rows], self._block
        most = len(least_Q) * block.num_documents
        bounds_Q = np.zeros(len(least_Q) + 1, dtype=np.int64)
        documents, scores = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.float32)
        self._compiled()(
            block.starts_V,
            self._weights_P,
            block.documents_P,
            queries_QV.indptr,
            queries_QV.indices,
            queries_QV.data,
            least_Q,
            np.empty(block.num_documents),
            bounds_Q,
            documents,
            scores,
        )
        return bounds_Q, documents[: bounds_Q[-1]], scores[: bounds_Q[-1]]

    @staticmethod
    @cache
    def _compiled() -> Callable[..., None]:
        compiled: Callable[..., None] = importlib.import_module("numba").njit(add_postings, nogil=True)
        return compiled


def fastest_scan(without: type[Scan] = ProductScan) -> type[Scan]:
    """Return the kind of scan that is fastest with what is installed; the results are the same.

    Args:
        without: What is taken where numba is not installed.
    """
    if importlib.util.find_spec("numba") is None:
        return without
    try:
        importlib.import_module("numba")
    except ImportError as error:
        log.warning("numba is installed and cannot be used (%s): postings are searched without, slower", error)
        return without
    return CompiledScan


def add_postings(
    starts_V: Any,
    weights_P: Any,
    documents_P: Any,
    bounds_Q: Any,
    terms: Any,
    values: Any,
    least_Q: Any,
    scores_N: Any,
    found_bounds_Q: Any,
    found_documents: Any,
    found_scores: Any,
) -> None:
    """Add up the postings of each query, and list what scores above its bound; made to be compiled.

    Args:
        starts_V: As in `Block`.
        weights_P: As in `Block`, float32.
        documents_P: As in `Block`.
        bounds_Q: Where each query's terms begin and the last one's end [Q + 1].
        terms: Of the queries, ascending for each.
        values: Their weights, float64.
        least_Q: A query's bound, float32.
        scores_N: Room for the scores of a query, float64.
        found_bounds_Q: Takes where the finds of a query begin and end, its first entry 0 [Q + 1].
        found_documents: Takes places in the block, int32 [Q * N].
        found_scores: Takes scores, float32 [Q * N].
    """
    num_found = 0
    for query in range(len(least_Q)):
        scores_N[:] = 0.0
        for place in range(bounds_Q[query], bounds_Q[query + 1]):
            value = values[place]
            for posting in range(starts_V[terms[place]], starts_V[terms[place] + 1]):
                scores_N[documents_P[posting]] += value * weights_P[posting]
        for document in range(len(scores_N)):
            score = np.float32(scores_N[document])
            if score > least_Q[query]:
                found_documents[num_found] = document
                found_scores[num_found] = score
                num_found += 1
        found_bounds_Q[query + 1] = num_found

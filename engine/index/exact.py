"""Exact search over stored embeddings, and the exact scores of given candidates.

AR2's published numbers come from exact search. Here it is also the yardstick of an approximate index's recall, and
its scores replace those of compressed codes. A score is summed in one fixed order, and so is the same whatever other
queries are searched with it and on whichever rank; a matrix product's last bits change with the shape of the block.

Shapes: Q queries, N documents, D embedding dimension, K = `top_k` ranks, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.search import Hits
from shards.embeddings import EmbeddingStore, read_rows

_RESCORE_BYTES = 64 * 2**20
"""Embeddings of candidates held at a time while they are re-scored."""
_EXACT_ROWS, _EXACT_QUERIES = 16384, 1024
"""Documents and queries multiplied at a time in exact search: 64 MiB of scores."""
_SPARE = 32
"""Candidates that exact search takes beyond top_k, since a matrix product rounds otherwise than the final score."""

Floats = npt.NDArray[np.float32]


def exact_search(
    store: EmbeddingStore,
    queries_QD: Floats,
    top_k: int,
    *,
    documents: range | None = None,
    device: torch.device | str = "cpu",
) -> Hits:
    """Find the documents with the highest inner product by looking at all of them.

    The corpus is streamed once for all queries, so many queries in one call cost less than many calls.

    Args:
        store: The embeddings.
        queries_QD: float32 [Q, D], finite.
        top_k: Documents a query, at least 1.
        documents: Look only at these, a range without steps; all if None.
        device: Where the products are computed.

    Returns:
        Hits [Q, top_k], padded where there are fewer documents.
    """
    queries_QD = check_queries(queries_QD, store.dimension, top_k)
    documents = range(store.num_documents) if documents is None else documents
    depth = max(1, min(top_k + _SPARE, len(documents)))
    scores_QC = torch.full((len(queries_QD), depth), -torch.inf, device=device)
    documents_QC = torch.full((len(queries_QD), depth), -1, dtype=torch.int64, device=device)
    for first, rows_ND in stream(store, documents, _EXACT_ROWS):
        chunk_ND = torch.from_numpy(rows_ND).to(device)
        for block in blocks(len(queries_QD), _EXACT_QUERIES):
            product_QN = torch.from_numpy(queries_QD[block]).to(device) @ chunk_ND.T
            new = torch.topk(product_QN, min(depth, len(chunk_ND)), dim=1)
            best = torch.topk(torch.cat([scores_QC[block], new.values], dim=1), depth, dim=1)
            found = torch.cat([documents_QC[block], new.indices + first], dim=1)
            scores_QC[block], documents_QC[block] = best.values, found.gather(1, best.indices)
    return rescore(store, queries_QD, documents_QC.cpu().numpy(), top_k)


def rescore(store: EmbeddingStore, queries_QD: Floats, documents_QC: npt.NDArray[np.int64], top_k: int) -> Hits:
    """Score candidates from the stored embeddings and keep the best.

    Args:
        store: The embeddings.
        queries_QD: float32 [Q, D].
        documents_QC: Each query's candidates, without repeats, int64 [Q, C]; -1 is none.
        top_k: Documents kept of each query.

    Returns:
        Hits [Q, top_k], padded where there are fewer candidates.
    """
    num_queries, num_candidates = documents_QC.shape
    hits = Hits(
        np.full((num_queries, top_k), -1, dtype=np.int64), np.full((num_queries, top_k), -np.inf, dtype=np.float32)
    )
    for block in blocks(num_queries, max(1, _RESCORE_BYTES // (4 * num_candidates * store.dimension))):
        found_QC = documents_QC[block]
        rows_QCD = np.zeros((*found_QC.shape, store.dimension), dtype=np.float32)
        rows_QCD[found_QC >= 0] = store.rows(found_QC[found_QC >= 0])  # of nothing else: others may lie on other hosts
        # Unlike a matrix product, this sums each pair in an order that does not depend on the shape of the block.
        scores_QC = np.einsum("qcd,qd->qc", rows_QCD, queries_QD[block])
        scores_QC[found_QC < 0] = -np.inf
        best = best_of(found_QC, scores_QC, top_k)
        hits.documents_QK[block], hits.scores_QK[block] = best.documents_QK, best.scores_QK
    return hits


def score_pairs(rows_KD: Floats, queries_KD: Floats) -> Floats:
    """Score documents for a query each, with the bits that `rescore` gives them: float32 [K].

    Args:
        rows_KD: Embeddings of documents, float32 [K, D].
        queries_KD: The query of each, float32 [K, D].
    """
    scores_K: Floats = np.einsum("qcd,qd->qc", rows_KD[:, None], queries_KD)[:, 0]
    return scores_K


def best_of(documents_QC: npt.NDArray[np.int64], scores_QC: Floats, top_k: int) -> Hits:
    """Keep the best of each query's candidates, by score descending, then by document ascending.

    Args:
        documents_QC: Candidates without repeats, int64 [Q, C]; -1 is none.
        scores_QC: Their scores, float32 [Q, C]; -inf where there is none.
        top_k: Documents kept of each query.

    Returns:
        Hits [Q, top_k], padded where there are fewer candidates.
    """
    order_QK = np.lexsort((documents_QC, -scores_QC), axis=-1)[:, :top_k]
    kept, shape = order_QK.shape[1], (len(documents_QC), top_k)
    hits = Hits(np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32))
    hits.documents_QK[:, :kept] = np.take_along_axis(documents_QC, order_QK, axis=1)
    hits.scores_QK[:, :kept] = np.take_along_axis(scores_QC, order_QK, axis=1)
    return hits


def merge_hits(hits: Sequence[Hits], top_k: int) -> Hits:
    """Merge what was found in different parts of a corpus.

    Args:
        hits: At least one, of the same queries, none with a document of another.
        top_k: Documents kept of each query.

    Returns:
        Hits [Q, top_k], by score descending, then by document ascending.
    """
    documents_QC = np.concatenate([one.documents_QK for one in hits], axis=1)
    scores_QC = np.concatenate([one.scores_QK for one in hits], axis=1)
    return best_of(documents_QC, scores_QC, top_k)


def stream(store: EmbeddingStore, documents: range, num_rows: int) -> Iterator[tuple[int, Floats]]:
    """Read embeddings in order with plain reads, whose pages do not count as this process's memory.

    Args:
        store: The embeddings.
        documents: Which, a range without steps.
        num_rows: Rows read at a time. The pieces are a function of the corpus and these arguments.

    Yields:
        (document of the first row, float32 [at most num_rows, D]).

    Raises:
        ArtifactError: A part is shorter than it was when the store was opened.
    """
    for first, part_ND in store.parts(documents):
        start, stop = max(0, documents.start - first), min(len(part_ND), documents.stop - first)
        for rows in blocks(stop - start, num_rows):
            piece = slice(start + rows.start, start + rows.stop)
            yield first + piece.start, read_rows(part_ND, np.arange(piece.start, piece.stop))


def check_queries(queries_QD: Floats, dimension: int, top_k: int) -> Floats:
    """Return queries [Q, D] as FAISS takes them: float32, contiguous.

    Raises:
        ValueError: They have another dimension than the embeddings, or `top_k` is below 1.
    """
    if queries_QD.ndim != 2 or queries_QD.shape[1] != dimension or top_k < 1:
        raise ValueError(f"queries of shape {queries_QD.shape} and top_k {top_k}; expected [Q, {dimension}] and 1 up")
    return np.ascontiguousarray(queries_QD, dtype=np.float32)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Cut 0..length-1 into slices of at most `size`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))

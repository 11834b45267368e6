"""Turns token ids into sparse vectors over a vocabulary: the corpus shard by shard into postings, queries into rows.

As `engine.models.encode` does for embeddings, with the same batches. A lexical encoder gives a weight for each term of
its vocabulary, nearly all of them 0. The dense rows of a batch are made sparse at once, where they were computed: a
shard of 10,000 documents with 30,522 numbers each would take 1.2 GB; with 150 terms each its postings take 9 MB.

Shapes: N documents, Q queries, V terms of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse  # type: ignore[import-untyped]
import torch
from torch import Tensor

from engine.errors import TrainingError
from engine.models.encode import Encoder, TokenIds, encode_batches, encode_shards
from engine.models.template import InputTemplate
from shards.embeddings import Stamp
from shards.postings import postings_are_complete, write_postings
from shards.reader import CorpusShards


def encode_documents_sparsely(
    encoder: Encoder,
    template: InputTemplate,
    shards: CorpusShards,
    stream: str,
    shard_numbers: Iterable[int],
    folder: Path,
    stamp: Stamp,
    *,
    max_length: int,
    tokens_per_batch: int,
    dtype: Literal["float16", "float32"],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Encode shards into a store of postings, those that are there already excepted.

    Args:
        encoder: The document tower, in evaluation mode, on `device`; it gives float32 [N, V], 0 where a document lacks
            a term.
        template: Adds the special tokens and pads.
        shards: The corpus.
        stream: The model's token stream.
        shard_numbers: The shards that this rank encodes, asked for as `engine.models.encode.encode_shards` says.
        folder: The store's folder.
        stamp: What the encoder's weights and the corpus are.
        max_length: Tokens of a document, special tokens included.
        tokens_per_batch: As of `engine.models.encode.encode_documents`.
        dtype: Type of the stored weights.
        device: Where the encoder is.
        progress: Called with (documents, tokens without padding) after each forward, and with (documents, 0) for a
            shard that was there already.

    Raises:
        ArtifactError: A shard is damaged, or a weight is below 0 or not finite in `dtype`.
    """
    encode_shards(
        shards,
        stream,
        shard_numbers,
        is_complete=lambda entry: postings_are_complete(folder, entry, stamp),
        encode=lambda ids, tell: _encode(encoder, template, ids, max_length, tokens_per_batch, device, tell),
        write=lambda entry, weights_NV: write_postings(folder, entry, weights_NV, stamp, dtype=dtype),
        progress=progress,
    )


def encode_queries_sparsely(
    encoder: Encoder,
    template: InputTemplate,
    query_ids: Sequence[Sequence[int]],
    *,
    max_length: int,
    tokens_per_batch: int,
    device: torch.device,
) -> sparse.csr_array:
    """Encode queries.

    Args:
        encoder: The query tower, in evaluation mode, on `device`; it gives float32 [Q, V].
        template: Adds the special tokens and pads.
        query_ids: Token ids of each query, without special tokens; at least one query.
        max_length: Tokens of a query, special tokens included.
        tokens_per_batch: As of `engine.models.encode.encode_queries`.
        device: Where the encoder is.

    Returns:
        float32 [Q, V], in the order of `query_ids`, the terms of each ascending.

    Raises:
        TrainingError: A weight is below 0 or not finite.
        ValueError: There is no query, so that V is unknown.
    """
    if not query_ids:
        raise ValueError("there is no query to encode")
    ids = [np.asarray(row, dtype=np.uint32) for row in query_ids]
    queries_QV = _encode(encoder, template, ids, max_length, tokens_per_batch, device, lambda _queries, _tokens: None)
    bad = np.flatnonzero(~(np.isfinite(queries_QV.data) & (queries_QV.data >= 0)))
    if bad.size:
        query = int(np.searchsorted(queries_QV.indptr, bad[0], "right")) - 1
        raise TrainingError(
            f"query {query} of {len(query_ids)} has the weight {queries_QV.data[bad[0]]:g} for a term, and "
            f"{bad.size - 1} more weights are not finite or below 0",
            expected="finite weights from 0 up, which a search can add up",
            remedy="look for a training run that diverged: lower the learning rate or start from an earlier checkpoint",
        )
    return queries_QV


def _encode(
    encoder: Encoder,
    template: InputTemplate,
    ids: Sequence[TokenIds],
    max_length: int,
    tokens_per_batch: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> sparse.csr_array:
    """Return sparse vectors [N, V] in the order of the inputs, the terms of each ascending."""
    rows, terms, weights = (list[npt.NDArray[Any]]() for _ in range(3))
    widths: set[int] = set()

    def keep(places: list[int], found_NV: Tensor) -> None:
        rows_P, terms_P = found_NV.indices().numpy().astype(np.int32)
        rows.append(np.array(places, dtype=np.int32)[rows_P])
        terms.append(terms_P)
        weights.append(found_NV.values().numpy())
        widths.add(found_NV.shape[1])

    encode_batches(
        encoder,
        template,
        ids,
        lambda dense_NV: dense_NV.to_sparse(),
        keep,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        device=device,
        progress=progress,
    )
    joined = np.concatenate(weights), (np.concatenate(rows), np.concatenate(terms))
    vectors_NV = sparse.coo_array(joined, shape=(len(ids), widths.pop())).tocsr()
    vectors_NV.sort_indices()
    return vectors_NV

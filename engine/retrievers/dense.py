"""Dense retrieval: a frozen retriever's query tower over a document index (AR2 Eq. 1, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.data.corpus import ModelText
from engine.index.dense import DenseIndex
from engine.index.exact import Floats
from engine.models.encode import encode_queries
from engine.models.retriever import Retriever
from engine.search import Hits
from shards.records import Query


class DenseSearcher:
    """Searches a document index with queries encoded by the retriever that made it.

    Args:
        retriever: Frozen weights, on `device`.
        text: Its tokenizer and template.
        index: Built from embeddings of the same weights.
        max_length: Tokens of a query, special tokens included.
        tokens_per_batch: Padded tokens in one forward.
        device: Where the retriever is.
    """

    source = "dense"
    block_size = 512

    def __init__(
        self,
        retriever: Retriever,
        text: ModelText,
        index: DenseIndex,
        *,
        max_length: int,
        tokens_per_batch: int,
        device: torch.device,
    ) -> None:
        self._encoder, self._text, self._index = retriever.query_encoder(), text, index
        self._max_length, self._tokens_per_batch, self._device = max_length, tokens_per_batch, device

    @property
    def num_parts(self) -> int:
        """Parts of the index that ranks can search one by one."""
        return self._index.num_parts

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return the `top_k` documents of each query, best first: [Q, top_k]."""
        return self._index.search(self.encode(queries), top_k)

    def encode(self, queries: Sequence[Query]) -> Floats:
        """Encode queries with the retriever's query tower: float32 [Q, D]."""
        return encode_queries(
            self._encoder,
            self._text.template,
            self._text.tokenize_queries(queries),
            max_length=self._max_length,
            tokens_per_batch=self._tokens_per_batch,
            device=self._device,
        )

    def candidates(self, queries_QD: Floats, top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts of the index; see `DenseIndex.candidates`."""
        return self._index.candidates(queries_QD, top_k, parts)

    def finish(self, queries_QD: Floats, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what was found in all parts; see `DenseIndex.finish`."""
        return self._index.finish(queries_QD, found, top_k)

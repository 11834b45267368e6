"""Dense retrieval: a frozen retriever's query tower over a document index (AR2 Eq. 1, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.corpus import ModelText
from engine.encode import encode_queries
from engine.index import DenseIndex
from engine.models.retriever import Retriever
from engine.retrievers import Hits
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
        self._retriever, self._text, self._index = retriever, text, index
        self._max_length, self._tokens_per_batch, self._device = max_length, tokens_per_batch, device

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return the `top_k` documents of each query, best first: [Q, top_k]."""
        queries_QD = encode_queries(
            self._retriever.encode_queries,
            self._text.template,
            self._text.tokenize_queries(queries),
            max_length=self._max_length,
            tokens_per_batch=self._tokens_per_batch,
            device=self._device,
        )
        return self._index.search(queries_QD, top_k)

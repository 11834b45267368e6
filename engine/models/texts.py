"""A retriever and a ranker for texts as they are given, outside of any corpus: what serves a model needs no run.

Both are opened from a folder that a run published or exported: lengths, template and prompts lie beside the weights
(`sparring.json`), so that a text given here becomes the very input that it would be as a query or document of a run.

Shapes: N texts, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import ModelError
from engine.models.dual import DOCUMENT, QUERY
from engine.models.encode import Encoder, encode_queries
from engine.models.loading import load_tokenizer
from engine.models.packed import Scorer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.score import score_inputs
from engine.models.source import added_to_logit, read_metadata
from engine.models.template import Collator, InputTemplate
from engine.models.wording import Wording
from shards.records import Document
from shards.writer import render

SIDES = (QUERY, DOCUMENT)
TOKENS_PER_BATCH = 4096
"""Padded tokens of a forward where nobody says another number; on a CPU fewer are taken, which is faster."""


@dataclass(frozen=True, slots=True)
class _Side:
    """How the texts of one side become vectors."""

    encoder: Encoder
    template: InputTemplate
    wording: Wording
    max_length: int


class TextEncoder:
    """A dense retriever that encodes texts.

    Args:
        retriever: Frozen weights, on `device`.
        tokenizer: A Hugging Face tokenizer.
        lengths: Side (`query`, `document`) to tokens of an input, special tokens included.
        device: Where the retriever is.
        tokens_per_batch: Padded tokens in one forward.
    """

    def __init__(
        self,
        retriever: Retriever,
        tokenizer: Any,
        lengths: dict[str, int],
        *,
        device: torch.device,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        template = InputTemplate.from_tokenizer(tokenizer, retriever.prompts)
        self._tokenizer, self._device, self._tokens_per_batch = tokenizer, device, tokens_per_batch
        query, document = template.for_queries(), template.for_documents()
        self._sides = {
            QUERY: _Side(retriever.query_encoder(), query, template.queries, lengths[QUERY]),
            DOCUMENT: _Side(retriever.document_encoder(), document, template.documents, lengths[DOCUMENT]),
        }
        self.dimension = retriever.dimension
        """D, the length of a vector."""

    @classmethod
    def open(
        cls,
        folder: Path,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> TextEncoder:
        """Load the weights that a run published or exported.

        Args:
            folder: Such as `RUN/weights/retriever/001` or `RUN/export/retriever`.
            device: Where it computes.
            dtype: Numeric type of its weights.
            tokens_per_batch: Padded tokens in one forward.

        Raises:
            ArtifactError: The folder has no description, or a damaged one.
            ModelError: It holds no dense retriever.
        """
        metadata = read_metadata(folder, "retriever")
        retriever = Retriever.open(folder)
        retriever.to(device=device, dtype=dtype).requires_grad_(False)
        lengths = {QUERY: int(metadata["query_max_length"]), DOCUMENT: int(metadata["max_length"])}
        tokenizer = load_tokenizer(str(folder))
        return cls(retriever, tokenizer, lengths, device=device, tokens_per_batch=tokens_per_batch)

    def encode(self, texts: Sequence[str], side: str = QUERY) -> npt.NDArray[np.float32]:
        """Encode texts; their ends are cut where they do not fit (`too_long`).

        Args:
            texts: At least one.
            side: `query` or `document`; the towers may differ, and so may prompts and lengths.

        Returns:
            float32 [N, D], whose inner products are the retriever's scores.

        Raises:
            TrainingError: A vector is not finite.
        """
        one = self._sides[side]
        return encode_queries(
            one.encoder,
            one.template,
            one.wording.token_ids(self._tokenizer, texts),
            max_length=one.max_length,
            tokens_per_batch=self._tokens_per_batch,
            device=self._device,
        )

    def too_long(self, texts: Sequence[str], side: str = QUERY) -> str | None:
        """Say which text is longer than the model reads; None where none is."""
        one = self._sides[side]
        ids = one.wording.token_ids(self._tokenizer, texts)
        return _too_long(ids, one.max_length - one.template.num_special_single)


class TextRanker:
    """A ranker that scores pairs of texts.

    Args:
        scorer: `Ranker.scorer()`.
        collator: `Ranker.collator()`.
        tokenizer: A Hugging Face tokenizer.
        document_template: How title and text become one string.
        max_length: Tokens of a pair, special tokens included.
        max_query_tokens: Tokens of a query, special tokens not counted.
        device: Where the scorer is.
        tokens_per_batch: Padded tokens in one forward.
    """

    def __init__(
        self,
        scorer: Scorer,
        collator: Collator,
        tokenizer: Any,
        *,
        document_template: str,
        max_length: int,
        max_query_tokens: int,
        device: torch.device,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        self._scorer, self._collator, self._tokenizer = scorer, collator, tokenizer
        self._document_template, self._max_length = document_template, max_length
        self._max_query_tokens, self._device, self._tokens_per_batch = max_query_tokens, device, tokens_per_batch

    @classmethod
    def open(cls, folder: Path, device: torch.device) -> TextRanker:
        """Load the weights that a run exported.

        Args:
            folder: Such as `RUN/export/ranker`.
            device: Where it computes.

        Raises:
            ArtifactError: The folder has no description, or a damaged one.
            ModelError: It holds no ranker; or a part of its score is a retriever's, which is not in the folder.
        """
        metadata = read_metadata(folder, "ranker")
        if added := added_to_logit(metadata):
            raise ModelError(
                f"the score of the ranker in {folder} is its logit and {' and '.join(added)}, which an export does not "
                "hold",
                expected="a ranker that scores alone, or the run's folder, which has both",
                remedy="name the run's folder; or the exported retriever's, for vectors alone",
            )
        ranker = Ranker.open(folder)
        ranker.to(device).requires_grad_(False)
        return cls.of(ranker, folder, document_template=str(metadata.get("template", "{text}")), device=device)

    @classmethod
    def of(
        cls,
        ranker: Ranker,
        folder: Path,
        *,
        document_template: str,
        device: torch.device,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> TextRanker:
        """Make one of a ranker that is loaded already.

        Args:
            ranker: Frozen weights, on `device`.
            folder: Where they were loaded from, with tokenizer and lengths.
            document_template: How title and text become one string.
            device: Where the ranker is.
            tokens_per_batch: Padded tokens in one forward.

        Raises:
            ArtifactError: The folder has no description, or a damaged one.
        """
        metadata, tokenizer = read_metadata(folder, "ranker"), load_tokenizer(str(folder))
        template = InputTemplate.from_tokenizer(tokenizer, pair_words=metadata.get("pair_template"))
        return cls(
            ranker.scorer(),
            ranker.collator(template),
            tokenizer,
            document_template=document_template,
            max_length=int(metadata["max_length"]),
            max_query_tokens=int(metadata["query_max_length"]) - template.num_special_single,
            device=device,
            tokens_per_batch=tokens_per_batch,
        )

    def rendered(self, document: Document) -> str:
        """Return the one string that is read of a document."""
        return render(self._document_template, document)

    def score(self, queries: Sequence[str], documents: Sequence[Sequence[Document]]) -> list[list[float]]:
        """Score documents for queries; their ends are cut where they do not fit (`too_long`).

        Args:
            queries: Any texts.
            documents: Of each query its documents; their ids mean nothing here.

        Returns:
            Raw logits for each query, in the order of its documents.

        Source: AR2 Eq. 4.
        """
        inputs, template = [], self._collator.template
        for query, own in zip(queries, documents, strict=True):
            (kept,) = template.queries.token_ids(self._tokenizer, [query], self._max_query_tokens)
            read = template.documents.token_ids(self._tokenizer, [self.rendered(document) for document in own])
            inputs += [template.pair(kept, ids, self._max_length) for ids in read]
        if not inputs:
            return [[] for _ in documents]
        scores = iter(
            score_inputs(
                self._scorer, self._collator, inputs, tokens_per_batch=self._tokens_per_batch, device=self._device
            ).tolist()
        )
        return [[next(scores) for _ in own] for own in documents]

    def too_long(self, query: str, documents: Sequence[Document]) -> str | None:
        """Say which text is longer than the model reads; None where none is."""
        template = self._collator.template
        (query_ids,) = template.queries.token_ids(self._tokenizer, [query])
        if len(query_ids) > self._max_query_tokens:
            return f"the query has {len(query_ids)} tokens, of which {self._max_query_tokens} are read"
        room = self._max_length - template.num_special_pair - len(query_ids)
        read = template.documents.token_ids(self._tokenizer, [self.rendered(document) for document in documents])
        return _too_long(read, room)


def _too_long(ids: Sequence[Sequence[int]], room: int) -> str | None:
    place = next((place for place, own in enumerate(ids) if len(own) > room), None)
    return None if place is None else f"text {place} has {len(ids[place])} tokens, of which {room} are read"

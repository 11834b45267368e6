"""Two spans of a document, each with some of its tokens masked.

What is drawn is a function of (seed, stream, epoch, document): any number of ranks draws alike, and a resumed run goes
on as an undisturbed one would.

Shapes: L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.corpus import Data
from engine.data.negatives import step_rng
from engine.models.bottleneck import MaskedInputs
from engine.models.template import Collator
from engine.models.tokenizer_checks import require_mask_token
from engine.pretrain.documents import Reading, masked_inputs
from engine.pretrain.masking import num_masked, ordinary_ids
from shards.reader import CorpusShards

Span = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class SpanRates:
    """How spans are drawn.

    Attributes:
        mask: Share of a span's tokens that are masked.
        shortest: Tokens of a span at least, where the document has as many for both.
    """

    mask: float
    shortest: int


@dataclass(frozen=True, slots=True)
class MaskedSpans:
    """What is read of documents: two spans of each, one behind the other.

    Attributes:
        inputs: The spans, with tokens masked.
        num_tokens: Of all, padding left out.
    """

    inputs: MaskedInputs
    num_tokens: int


def draw_spans(ids_L: NDArray[np.uint32], shortest: int, longest: int, rng: np.random.Generator) -> tuple[Span, Span]:
    """Draw two spans of a document that have no token in common: what is before a place, and what is behind it.

    Of a document that is longer than two spans, a window of two is drawn first. One of less than two tokens is both of
    its spans.

    Args:
        ids_L: The document's tokens.
        shortest: Tokens of a span at least; half of the document's where it has fewer than twice as many.
        longest: Tokens of a span at most; what is farther from the place is left out.
        rng: Random numbers.

    Source: Gao and Callan 2022 (arXiv 2108.05540), section 3.2: two spans at random of each document. Theirs are made
        of whole sentences; that these cover a short document, and are cut at any token, is ours.
    """
    if len(ids_L) < 2:
        return ids_L, ids_L
    window = min(len(ids_L), 2 * longest)
    start = int(rng.integers(len(ids_L) - window + 1))
    least = min(shortest, window // 2)
    place = start + int(rng.integers(least, window - least + 1))
    return ids_L[max(start, place - longest) : place], ids_L[place : min(start + window, place + longest)]


class SpanBuilder:
    """Makes a Condenser's inputs of documents.

    Args:
        shards: The corpus.
        stream: Its token stream that fits the model.
        tokenizer: The model's, for the mask token and for what is never masked.
        collate: Makes batches in the form that the model takes.
        rates: How spans are drawn and masked.
        max_length: Tokens of a span, special tokens included.
        document_length: Tokens of a document of which spans are drawn; what the shards hold beyond is not looked at, so
            that deeper ones give the same spans.
        seed: Of the run.

    Raises:
        ModelError: The tokenizer has no mask token.
    """

    def __init__(
        self,
        shards: CorpusShards,
        stream: str,
        tokenizer: Any,
        collate: Collator,
        rates: SpanRates,
        *,
        max_length: int,
        document_length: int,
        seed: int,
    ) -> None:
        self._shards, self._stream, self._collate, self._rates = shards, stream, collate, rates
        self._template, self._max_length, self._seed = collate.template, max_length, seed
        self._document_length = document_length
        self._mask_id, self._ordinary_V = require_mask_token(tokenizer), ordinary_ids(tokenizer)

    @classmethod
    def of(
        cls, data: Data, name: str, collate: Collator, rates: SpanRates, *, lengths: tuple[int, int], seed: int
    ) -> SpanBuilder:
        """Build for a model of a recipe.

        Args:
            data: The corpus, and how the models read it.
            name: The model.
            collate: As in the class.
            rates: As in the class.
            lengths: `max_length` and `document_length`.
            seed: As in the class.
        """
        text = data.texts[name]
        return cls(
            data.shards,
            text.stream,
            text.tokenizer,
            collate,
            rates,
            max_length=lengths[0],
            document_length=lengths[1],
            seed=seed,
        )

    def __call__(self, readings: Sequence[Reading], stream: str) -> MaskedSpans:
        """Draw two spans of each document, mask them and join them, a document's spans one behind the other.

        Args:
            readings: Documents and epochs, at least one.
            stream: Of the random numbers, such as the phase's name.
        """
        inputs, places = [], []
        room = self._max_length - self._template.num_special_single
        for reading in readings:
            rng = step_rng(self._seed, f"spans/{stream}", reading.epoch, reading.document)
            ids_L = self._shards.tokens(reading.document, self._stream)[: self._document_length]
            for span in draw_spans(ids_L, self._rates.shortest, room, rng):
                one = self._template.single(span, self._max_length)
                ordinary = np.flatnonzero(self._ordinary_V[np.asarray(one.ids, dtype=np.int64)])
                count = num_masked(len(ordinary), self._rates.mask)
                inputs.append(one)
                places.append(np.sort(rng.permutation(ordinary)[:count]))
        masked = masked_inputs(inputs, places, self._mask_id, self._collate)
        return MaskedSpans(masked, sum(len(one.ids) for one in inputs))

    def num_tokens(self, reading: Reading) -> int:
        """Count the tokens of a document's two inputs at most; where its spans are cut is not drawn for it."""
        length = min(self._shards.num_tokens(reading.document, self._stream), self._document_length)
        special = self._template.num_special_single
        return min(max(length, 2) + 2 * special, 2 * self._max_length)

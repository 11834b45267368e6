"""Which tokens of a document the encoder and the decoder do not see.

A pure function of (seed, stream, step, document): any number of ranks masks alike, a resumed run goes on as an
undisturbed one would, and a document is masked anew at every step that takes it. Special tokens, unknown ones among
them, are never masked: neither those that the template puts around a document nor those within its text.

Shapes: L tokens of a document, special tokens included; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.negatives import step_rng


@dataclass(frozen=True, slots=True)
class MaskRates:
    """How much of a document is masked.

    Attributes:
        encoder: Share of its tokens, special ones not counted, that the encoder does not see.
        decoder: Share that the decoder does not see, at least the encoder's.
    """

    encoder: float
    decoder: float


@dataclass(frozen=True, slots=True)
class Masks:
    """What is masked of one document.

    Attributes:
        encoder: Places of the tokens that the encoder does not see, ascending, int64.
        decoder: Places that the decoder does not see: the encoder's and further ones.
    """

    encoder: NDArray[np.int64]
    decoder: NDArray[np.int64]


def draw_masks(ordinary_L: NDArray[np.bool_], rates: MaskRates, rng: np.random.Generator) -> Masks:
    """Draw what is masked of a document, for its encoder and its decoder.

    Exactly the rates' shares are masked, rounded, and at least one token of a document that has any. The decoder's are
    the encoder's and further ones: what the encoder had to guess itself, the decoder cannot read off its own input.

    Args:
        ordinary_L: Which tokens of the input may be masked, bool [L].
        rates: Shares.
        rng: From `mask_rng`.

    Source: SimLM section 3.1 (30 % and 50 %); that one contains the other, as in the authors' code, which draws whole
        words, the further ones with (.5 - .3) / (1 - .3). Here it is tokens, and as many as the rates say.
    """
    order = rng.permutation(np.flatnonzero(ordinary_L))
    encoder, decoder = (num_masked(len(order), rate) for rate in (rates.encoder, rates.decoder))
    return Masks(np.sort(order[:encoder]), np.sort(order[:decoder]))


def ordinary_ids(tokenizer: Any) -> NDArray[np.bool_]:
    """Return which token ids may be masked, bool [V]: all but a tokenizer's special ones."""
    ordinary_V = np.ones(1 + max(tokenizer.get_vocab().values()), dtype=np.bool_)
    ordinary_V[list(tokenizer.all_special_ids)] = False
    return ordinary_V


def num_masked(num_tokens: int, rate: float) -> int:
    """Return how many of a document's ordinary tokens are masked at a rate."""
    return min(num_tokens, max(1, round(rate * num_tokens)))


def mask_rng(seed: int, stream: str, step: int, document: int) -> np.random.Generator:
    """Return the random numbers by which a document is masked at a step.

    Args:
        seed: Of the run.
        stream: Names the phase.
        step: Number of the step in the phase's schedule.
        document: Its index in the corpus.
    """
    return step_rng(seed, f"masks/{stream}", step, document)

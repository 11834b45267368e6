"""What is masked: how much, never a special token, the encoder's within the decoder's, and the same whoever asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.pretrain.masking import MaskRates, Masks, draw_masks, mask_rng, num_masked, ordinary_ids

IDS = np.array([2, *range(10, 30), 3, *range(40, 60), 3])
"""Forty ordinary tokens, and a special one within the text."""
SPECIAL = (0, 1, 2, 3, 4)
ORDINARY = ~np.isin(IDS, SPECIAL)
PAPER = MaskRates(0.3, 0.5)


def drawn(step: int = 0, document: int = 0, seed: int = 42, stream: str = "edmlm") -> Masks:
    return draw_masks(ORDINARY, PAPER, mask_rng(seed, stream, step, document))


def test_as_many_ordinary_tokens_are_masked_as_the_rates_say() -> None:
    masks = drawn()
    assert (len(masks.encoder), len(masks.decoder)) == (12, 20)
    assert not set(IDS[masks.decoder]) & set(SPECIAL)
    assert set(masks.encoder) < set(masks.decoder)
    assert len(set(masks.decoder)) == 20


def test_every_ordinary_token_is_masked_equally_often() -> None:
    counts = np.zeros((2, len(IDS)))
    for step in range(2000):
        masks = drawn(step)
        counts[0, masks.encoder] += 1
        counts[1, masks.decoder] += 1
    assert not counts[:, ~ORDINARY].any()
    for share, rate in zip(counts[:, ORDINARY] / 2000, (0.3, 0.5), strict=True):
        assert np.abs(share - rate).max() < 5 * (rate * (1 - rate) / 2000) ** 0.5


@pytest.mark.parametrize("other", [{"step": 1}, {"document": 1}, {"seed": 43}, {"stream": "held_out"}])
def test_masks_are_a_function_of_seed_stream_step_and_document(other: dict[str, int]) -> None:
    same, others = drawn(), drawn(**other)  # type: ignore[arg-type]
    np.testing.assert_array_equal(drawn().decoder, same.decoder)
    assert same.decoder.tolist() != others.decoder.tolist()


@pytest.mark.parametrize(
    ("tokens", "rate", "expected"), [(0, 0.5, 0), (1, 0.3, 1), (3, 0.3, 1), (5, 0.5, 2), (9, 1.0, 9)]
)
def test_a_document_with_any_token_has_one_masked(tokens: int, rate: float, expected: int) -> None:
    assert num_masked(tokens, rate) == expected


def test_of_a_document_of_special_tokens_nothing_is_masked() -> None:
    masks = draw_masks(np.array([False, False]), PAPER, mask_rng(0, "edmlm", 0, 0))
    assert len(masks.encoder) == len(masks.decoder) == 0


def test_special_and_unknown_tokens_are_no_ordinary_ones(tokenizer: Any) -> None:
    ordinary_V = ordinary_ids(tokenizer)
    assert len(ordinary_V) == len(tokenizer)
    named = {tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    assert set(np.flatnonzero(~ordinary_V).tolist()) == named | {tokenizer.mask_token_id}

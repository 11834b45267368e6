"""The search for the largest micro-batches: what it tries next, and what it makes of a record."""

from __future__ import annotations

import pytest

from engine.training.micro_batches import bytes_per_token, next_tokens

FIXED, SLOPE = 4_000_000_000, 500_000
LIMIT, WHOLE = 70_000_000_000, 10_000_000


def searched(limit: int, whole: int, fixed: int = FIXED, slope: int = SLOPE, rest: int = FIXED // 2) -> dict[int, int]:
    """Search where the need is a straight line."""
    tried: dict[int, int] = {}
    tokens: int | None = 8192
    while tokens is not None:
        tried[tokens] = fixed + slope * tokens
        tokens = next_tokens(tried, limit, rest, whole)
    return tried


def test_the_limit_is_reached_and_never_passed() -> None:
    tried = searched(LIMIT, WHOLE)
    assert max(tried.values()) <= LIMIT
    assert max(tried) >= 0.9 * (LIMIT - FIXED) / SLOPE
    assert len(tried) <= 4


def test_a_share_that_fits_whole_ends_the_search() -> None:
    assert max(searched(LIMIT, 20_000)) == 20_000


def test_a_first_trial_beyond_the_limit_ends_the_search() -> None:
    assert list(searched(FIXED, WHOLE)) == [8192]


def test_the_growth_is_taken_from_the_largest_trials() -> None:
    assert bytes_per_token({10: 100}, 50) == 5
    assert bytes_per_token({10: 100, 20: 130, 40: 170}, 50) == pytest.approx(2)


def test_a_need_that_does_not_grow_is_not_divided_by() -> None:
    assert next_tokens({8192: 10**9, 16384: 10**9}, 2 * 10**9, 0, 100_000) == 100_000

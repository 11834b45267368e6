"""Every unit has exactly one owner, for any number of ranks and units."""

from __future__ import annotations

import itertools

import pytest

from shards.partition import split_range


@pytest.mark.parametrize(("world_size", "n"), list(itertools.product(range(1, 8), (*range(10), 1000))))
def test_split_range_pieces_are_the_whole_in_order(world_size: int, n: int) -> None:
    pieces = [split_range(n, rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*pieces)) == list(range(n))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="not one of a world"):
        split_range(3, rank, world_size)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        split_range(-1, 0, 1)

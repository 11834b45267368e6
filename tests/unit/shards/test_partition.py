"""Every unit has exactly one owner, for any number of ranks and units."""

from __future__ import annotations

import itertools
import random

import pytest

from shards.partition import assign, split_range

WORLDS = range(1, 8)
UNITS = range(10)


@pytest.mark.parametrize(("world_size", "num_units"), list(itertools.product(WORLDS, UNITS)))
def test_assign_covers_everything_once(world_size: int, num_units: int) -> None:
    rng = random.Random(num_units)
    for units in (num_units, [rng.randrange(100) for _ in range(num_units)], [0] * num_units):
        shares = [assign(units, rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*shares)) == list(range(num_units))
        assert all(share == sorted(share) for share in shares)
    equal = [len(assign(num_units, rank, world_size)) for rank in range(world_size)]
    assert max(equal) - min(equal) <= 1


def test_assign_gives_the_longest_first_to_the_least_loaded() -> None:
    sizes = [2, 7, 3, 5, 1]
    # 7 -> rank 0 (7); 5 -> rank 1 (5); 3 -> rank 1 (8); 2 -> rank 0 (9); 1 -> rank 1 (9)
    assert assign(sizes, 0, 2) == [0, 1]
    assert assign(sizes, 1, 2) == [2, 3, 4]


def test_assign_stays_within_four_thirds_of_the_best_split() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randrange(1, 30) for _ in range(8)]
        best = min(
            max(sum(s for s, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(2))
            for owners in itertools.product(range(2), repeat=8)
        )
        worst = max(sum(sizes[unit] for unit in assign(sizes, rank, 2)) for rank in range(2))
        assert worst <= best * 4 / 3


def test_empty_units_spread_over_the_ranks_too() -> None:
    assert [len(assign([0] * 6, rank, 3)) for rank in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(("world_size", "n"), list(itertools.product(WORLDS, (*UNITS, 1000))))
def test_split_range_pieces_are_the_whole_in_order(world_size: int, n: int) -> None:
    pieces = [split_range(n, rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*pieces)) == list(range(n))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="not one of a world"):
        assign(3, rank, world_size)
    with pytest.raises(ValueError, match="not one of a world"):
        split_range(3, rank, world_size)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        assign([1, -1], 0, 1)
    with pytest.raises(ValueError, match="negative"):
        assign(-1, 0, 1)
    with pytest.raises(ValueError, match="negative"):
        split_range(-1, 0, 1)

"""Who does what: how units of work are dealt to ranks, so that all are done and none is done twice.

Both functions are pure, so every rank works out its own share without a message, and the shares of all ranks
cover everything exactly once for any number of ranks, also when ranks outnumber units.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(units: int | Sequence[int], rank: int, world_size: int) -> list[int]:
    """Deal units of work to ranks, the longest first to the least loaded rank.

    Args:
        units: The size of each unit (>= 0; any measure of work), or the number of equal units.
        rank: Who asks, 0 <= rank < world_size.
        world_size: Number of ranks, >= 1.

    Returns:
        This rank's unit numbers, ascending; may be empty. No load exceeds 4/3 of the best possible one.

    Raises:
        ValueError: A rank or size outside its range.

    Source:
        Graham, Bounds on multiprocessing timing anomalies (1969): the longest-processing-time rule.
    """
    _check(rank, world_size)
    sizes = [1] * _count(units) if isinstance(units, int) else list(units)
    if any(size < 0 for size in sizes):
        raise ValueError(f"a unit's size must not be negative: {min(sizes)}")
    # The count of units breaks ties of load, so that empty units spread as well; the rank makes it deterministic.
    loads = [(0, 0, one_rank) for one_rank in range(world_size)]
    mine = []
    for unit in sorted(range(len(sizes)), key=lambda unit: (-sizes[unit], unit)):
        load, count, owner = loads[0]
        heapq.heapreplace(loads, (load + sizes[unit], count + 1, owner))
        if owner == rank:
            mine.append(unit)
    return sorted(mine)


def split_range(n: int, rank: int, world_size: int) -> range:
    """Cut 0..n-1 into one contiguous piece a rank; the pieces' lengths differ by at most one.

    Args:
        n: Length of the whole, >= 0.
        rank: Who asks, 0 <= rank < world_size.
        world_size: Number of ranks, >= 1.

    Returns:
        This rank's piece; may be empty. The pieces in rank order are the whole in order.

    Raises:
        ValueError: A rank or length outside its range.
    """
    _check(rank, world_size)
    n = _count(n)
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def _check(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of a world of {world_size}")


def _count(n: int) -> int:
    if n < 0:
        raise ValueError(f"a number of units must not be negative: {n}")
    return n

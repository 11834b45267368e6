"""Who does what: how a range is cut into one piece a rank, so that all is done and nothing twice.

The function is pure, so every rank works out its own piece without a message, and the pieces of all ranks cover
everything exactly once for any number of ranks, also when ranks outnumber units.
"""

from __future__ import annotations


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
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of a world of {world_size}")
    if n < 0:
        raise ValueError(f"a number of units must not be negative: {n}")
    return range(n * rank // world_size, n * (rank + 1) // world_size)

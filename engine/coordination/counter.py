"""A counter that all ranks share, so that units of work go to whoever is free next.

Rank 0 hosts it in a store of torch's, whose server is a thread of its own that needs neither Python nor MPI: it answers
at once, also while rank 0 computes. That is what the messages of `engine.coordination.star` cannot do, since they are
answered only where rank 0 comes to the same point.
"""

from __future__ import annotations

from engine.coordination.listening import meet_at_store
from engine.errors import CoordinationError

_SPENT = 2**40
"""Added to a counter that is to give nothing more."""


class SharedCounter:
    """Counts up from 0 under any number of names; every number goes to one rank.

    Args:
        rank: This process, 0 to world_size - 1.
        world_size: Number of ranks.
        address: Rank 0's, as the other ranks reach it.
        port: Where rank 0 listens; 0 on rank 0 lets the system choose, and `port` then tells which it is.
        timeout_seconds: How long a rank waits for rank 0's answer.

    Raises:
        CoordinationError: Rank 0 cannot listen, or cannot be reached.
    """

    def __init__(self, rank: int, world_size: int, address: str, port: int, timeout_seconds: float) -> None:
        self._rank, self._place = rank, f"{address}:{port}"
        try:
            self._store = meet_at_store(rank, world_size, address, port, timeout_seconds)
        except (RuntimeError, OSError) as error:
            raise self._unreachable(error) from error
        self.port: int = self._store.port

    def next(self, name: str) -> int:
        """Take the next number under a name: 0, 1, ... over all ranks.

        Raises:
            CoordinationError: Rank 0 is gone, or does not answer in time.
        """
        return self._add(name, 1) - 1

    def end(self, name: str) -> None:
        """Make every further number under a name larger than any list of units is long."""
        self._add(name, _SPENT)

    def _add(self, name: str, amount: int) -> int:
        try:
            return int(self._store.add(name, amount))
        except (RuntimeError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> CoordinationError:
        return CoordinationError(
            f"rank {self._rank} cannot {'reach' if self._rank else 'open'} the counter of rank 0 at {self._place}: "
            f"{str(error).splitlines()[0]}",
            remedy="look at rank 0, which hands out the work: it has ended, or its host cannot be reached",
        )

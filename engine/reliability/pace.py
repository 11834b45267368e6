"""Which ranks are slower than the others, seen where each works by itself.

In training all ranks wait for the slowest at every step, and nothing there says which one it is. In a pass over the
corpus each takes work when it is free, so that its own pace shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from shards.errors import listed

_LEAST_SECONDS = 2.0
"""Of work, before a rank is called slow: less than that is a first call's, or chance."""
_SLOW = 0.5
"""Of the median of the others."""
_NAMED = 4


@dataclass(slots=True)
class Pace:
    """What a rank has done in a pass, and how long that took it; waiting for the others is not counted.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens, padding left out.
        seconds: From getting the first unit of work to the end of the last.
    """

    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def count(self, documents: int, tokens: int) -> None:
        """Add work that is done."""
        self.documents += documents
        self.tokens += tokens

    @contextmanager
    def timed(self, units: Iterator[int]) -> Iterator[Iterator[int]]:
        """Give units of work to the body, and count the time from the first to the body's end.

        Units are dealt out, so nobody waits for one; several may be at work at a time, so each has no time of its own.
        """
        begun: list[float] = []

        def noted() -> Iterator[int]:
            for unit in units:
                begun.append(time.monotonic())
                yield unit

        yield noted()
        if begun:
            self.seconds += time.monotonic() - begun[0]

    @property
    def tokens_per_second(self) -> float:
        """0 for a rank that had nothing to do."""
        return self.tokens / self.seconds if self.seconds else 0.0


def _shares(paces: Sequence[Pace]) -> list[tuple[float, int, float]]:
    """Return (tokens a second as a share of the others', rank, median of the others), the slowest rank first.

    A rank that had nothing to do is left out, and is none of the others.
    """
    speeds = {rank: pace.tokens_per_second for rank, pace in enumerate(paces) if pace.tokens_per_second}
    if len(speeds) < 2:
        return []
    usual = {rank: median(speeds[other] for other in speeds if other != rank) for rank in speeds}
    return sorted((speed / usual[rank], rank, usual[rank]) for rank, speed in speeds.items())


def slowest_share(paces: Sequence[Pace]) -> float | None:
    """Return the slowest rank's tokens a second as a share of the others' median; None where fewer than two worked."""
    return next((share for share, _, _ in _shares(paces)), None)


def slow_ranks(paces: Sequence[Pace], hosts: Sequence[str]) -> str | None:
    """Say which ranks are at less than half the others' pace.

    Args:
        paces: Every rank's, in order of rank.
        hosts: Every rank's host.

    Returns:
        Names of ranks and hosts, with tokens a second and the median of the others; None where all keep pace, or
        worked for too short a time to tell.
    """
    slow = [
        f"rank {rank} on {hosts[rank]} ({paces[rank].tokens_per_second:.0f} tokens a second, the others {usual:.0f})"
        for share, rank, usual in _shares(paces)
        if share < _SLOW and paces[rank].seconds >= _LEAST_SECONDS
    ]
    if not slow:
        return None
    return (
        f"slow: {listed(slow, _NAMED)}. A pass gives such a rank less to do, but in training all wait for it at "
        "every step. Remedy: look at that host (other jobs, cores, clocks, temperature, its disk), or start without it."
    )

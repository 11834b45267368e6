"""When the index of a game is made anew."""

from __future__ import annotations

from dataclasses import dataclass

OF_REFRESH = ("encode", "index", "candidates", "negatives", "evaluate")
"""Kinds of stages that an iteration has with its refresh alone."""


@dataclass(frozen=True, slots=True)
class Refreshes:
    """In which iterations of a game the retriever's index and candidates are made anew.

    Between two refreshes all draw from what the last one found. Where a measurement may end them, what a refresh finds
    is mined for all that draw from it in that case, so that the end changes nothing of what was mined before.

    Attributes:
        iterations: With a refresh, ascending: the warm-up, 0, and the last one always.
        may_end: Whether a measurement may end them; the last one is made all the same.
    """

    iterations: tuple[int, ...]
    may_end: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every iteration has one, whatever is measured."""
        return not self.may_end and len(self.iterations) == self.iterations[-1] + 1

    @classmethod
    def of(cls, last: int, every: int, *, may_end: bool = False, ended: int | None = None) -> Refreshes:
        """Lay out the refreshes of a game.

        Args:
            last: Number of its last iteration, whose models are measured whatever was left out before.
            every: Iterations between two refreshes.
            may_end: As of the class.
            ended: The refresh after which they ended; None while they have not.
        """
        planned = range(0, last + 1, every)
        kept = (iteration for iteration in planned if ended is None or iteration <= ended)
        return cls(tuple(sorted({*kept, last})), may_end)

    def newest(self, iteration: int) -> int:
        """Return the newest refresh up to an iteration."""
        return max(one for one in self.iterations if one <= iteration)

    def may_stand_for(self, iteration: int) -> tuple[int, ...]:
        """Return the refreshes whose candidates are drawn from in place of those of one if they end before it."""
        if not self.may_end or iteration == self.iterations[-1]:  # the last is made in any case
            return ()
        # They never end with the warm-up's, which has none before it to be compared with.
        return tuple(one for one in self.iterations if 0 < one < iteration)

"""The verdict on a game: how far its models are from those of the warm-up, and whether that is chance.

The record that `engine.evaluation.verdict` makes and that the table shows.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.evaluation.significance import LEVEL
from shards.errors import counted


@dataclass(frozen=True, slots=True)
class Difference:
    """A model after an iteration against the same after its warm-up, on the same queries."""

    iteration: int
    """Of the model."""
    mean: float
    """Of the differences over the queries; above 0 where the iteration is better."""
    standard_error: float | None
    """Of this mean; None for a single query."""
    p: float
    """Of the randomisation test with two sides, corrected for the iterations that were tested with it."""
    low: float | None = None
    """Lower end of the bootstrap's interval of 95 %; None for a single query, and in records without it."""
    high: float | None = None
    """Upper end."""

    @property
    def is_gain(self) -> bool:
        """Whether it is above 0 by more than chance."""
        return self.mean > 0 and self.p < LEVEL

    def told_of(self, before: str, what: str = "") -> str:
        """Write where it is, how far and how surely: `above G0 by .012 +- .004 (95 % .004 to .020, p .004)`.

        Args:
            before: What the table calls the model after the warm-up.
            what: Is differed in, behind the numbers.
        """
        if not self.mean:
            return f"level with {before}" + (f" by{what}" if what else "")
        error = "" if self.standard_error is None else f" +- {_short(self.standard_error)}"
        side = "above" if self.mean > 0 else "below"
        interval = ""
        if self.low is not None and self.high is not None:
            ends = (self.low, self.high) if self.mean > 0 else (-self.high, -self.low)
            interval = "95 % {} to {}, ".format(*map(_short, ends))
        return f"{side} {before} by {_short(abs(self.mean))}{error}{what} ({interval}p {_short(self.p)})"


@dataclass(frozen=True, slots=True)
class Duel:
    """What became of a game on dev."""

    taken: int
    """The iteration that is exported and measured at the end."""
    metric: str
    """By which it is judged."""
    num_queries: int
    """Of dev, over which the differences are."""
    retriever: list[Difference]
    """Each iteration from 1 on."""
    retriever_names: list[str]
    """What the table calls it after the warm-up, and later: G0, G."""
    ranker: list[Difference]
    """Each iteration from 1 on, over its own retriever; none without a ranker that learns in the iterations."""
    ranker_names: list[str]
    """What the table calls it after the warm-up, and later: D0, D; none without such a ranker."""
    num_left: int = 0
    """Of dev, queries that the metric could be measured on, and was not."""

    @property
    def paid(self) -> bool:
        """Whether the iteration that is taken has a better retriever than the warm-up, by more than chance."""
        return any(one.is_gain for one in self.retriever if one.iteration == self.taken)

    @property
    def told(self) -> str:
        """What stands below the table."""
        # Of a warm-up that is taken, the best of what came after it is told.
        shown = self.taken or max(self.retriever, key=lambda one: one.mean).iteration
        difference = next(one for one in self.retriever if one.iteration == shown)
        before, after = self.retriever_names
        by = difference.told_of(before, f" {self.metric} on {counted(self.num_queries, 'dev query')}")
        what = "duel" if self.ranker_names else "training after the warm-up"
        if self.paid:
            text = f"The {what} paid: {after} of iteration {shown} is {by}."
        elif self.taken and difference.mean > 0:
            text = f"The {what} is NOT shown to have paid: {after} of iteration {shown} is {by}, which may be chance."
            if self.num_left:
                text += f" {counted(self.num_left, 'more dev query')} would tell more (evaluation.max_dev_queries)."
        else:
            gains = any(one.is_gain for one in self.retriever)
            ahead = "is taken although another iteration" if gains else "is taken, and no iteration"
            name = f"{after} of iteration {self.taken}" if self.taken else before
            text = f"The {what} did NOT pay: {name} {ahead} is above {before} by more than chance; "
            text += f"{after} of iteration {shown} is {by}."
        for one in self.ranker:
            if one.iteration == shown:
                first, later = (f"{d} over {g}" for d, g in zip(self.ranker_names, self.retriever_names, strict=True))
                text += f" {later} of iteration {shown} is {one.told_of(first)}."
        return text


def _short(value: float) -> str:
    """Write a number below 1 with three digits behind the point, or as many as show its first two."""
    text = f"{value + 0.0:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text

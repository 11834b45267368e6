"""Samplers: how likely each candidate of a query is to be drawn as a negative.

A sampler weighs one retriever's list. Lists are then mixed as if they were laid end to end (R2ANKER appendix B): a
retriever counts by the number of its candidates, and inside it the sampler's weights hold. So with equal weights a
document that k retrievers found is k times as likely. Draws are without replacement, one after the other.

Names of shapes: K candidates of one retriever, E entries of all lists, D documents, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config.negatives import NegativesConfig, RankWindowConfig, SimAnsConfig, UniformConfig


class Sampler(Protocol):
    """Weighs the candidates of one retriever."""

    def usable(self, ranks_E: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which entries may be drawn at all.

        Args:
            ranks_E: Their ranks in the lists, from 1, int64 [E].
        """
        ...

    def log_weights(self, scores_K: NDArray[np.float64], positive: float | None, n: int) -> NDArray[np.float64]:
        """Weigh the usable candidates of one retriever.

        Args:
            scores_K: The retriever's scores, best first, float64 [K].
            positive: Its score of the positive; None where it did not find it.
            n: Negatives that are to be drawn.

        Returns:
            Logarithms of weights, float64 [K], in any scale; -inf for what is not drawn.
        """
        ...


@dataclass(frozen=True, slots=True)
class RankWindow:
    """Uniform over ranks: from 1 to k, or any window (AR2 section 3.1; R2ANKER appendix B)."""

    first_rank: int
    last_rank: int | None

    def usable(self, ranks_E: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Take what lies in the window."""
        last = np.inf if self.last_rank is None else self.last_rank
        return (ranks_E >= self.first_rank) & (ranks_E <= last)

    def log_weights(self, scores_K: NDArray[np.float64], positive: float | None, n: int) -> NDArray[np.float64]:
        """Weigh all alike."""
        return np.zeros(len(scores_K))


@dataclass(frozen=True, slots=True)
class SimAns:
    """Candidates that score like the positive are the likeliest; see `engine.config.negatives.SimAnsConfig`.

    Source: Zhou et al. 2022, "SimANS: Simple Ambiguous Negatives Sampling"; the forms and the last n candidates where
        the positive was not found are those of the released code.
    """

    form: str
    a: float
    b: float

    def usable(self, ranks_E: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Take all."""
        return np.ones(len(ranks_E), dtype=np.bool_)

    def log_weights(self, scores_K: NDArray[np.float64], positive: float | None, n: int) -> NDArray[np.float64]:
        """Weigh by the distance from the positive's score; without it, the last n alike."""
        if positive is None:
            return np.where(np.arange(len(scores_K)) < len(scores_K) - n, -np.inf, 0.0)
        if self.form == "absolute":
            return -self.a * np.abs(scores_K - positive)
        distances_K: NDArray[np.float64] = -self.a * (scores_K - positive + self.b) ** 2
        return distances_K


def sampler_of(settings: NegativesConfig) -> Sampler:
    """Return the sampler that a configuration names."""
    sampler = settings.sampler
    if isinstance(sampler, SimAnsConfig):
        return SimAns(sampler.form, sampler.a, sampler.b)
    if isinstance(sampler, RankWindowConfig):
        return RankWindow(sampler.first_rank, sampler.last_rank)
    assert isinstance(sampler, UniformConfig)
    return RankWindow(1, sampler.top_k)


def normalised(log_weights_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale weights so that they sum to 1; in logarithms, so that none vanishes.

    Args:
        log_weights_K: At least one finite.

    Returns:
        Logarithms, float64 [K].
    """
    total: NDArray[np.float64] = log_weights_K - np.logaddexp.reduce(log_weights_K)
    return total


def draw_weighted(log_weights_D: NDArray[np.float64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw one after the other without replacement, each time by the weights of what is left.

    Args:
        log_weights_D: Logarithms of weights, float64 [D]; -inf is never drawn.
        n: How many at most.
        rng: From `engine.data.negatives.step_rng`.

    Returns:
        Places, int64, in the order drawn: n, or as many as have a weight.

    Source: Yellott 1977: the order of log-weights with Gumbel noise is that of such draws.
    """
    keys_D = log_weights_D + rng.gumbel(size=len(log_weights_D))
    order_D = np.argsort(-keys_D, kind="stable")[:n]
    drawn: NDArray[np.int64] = order_D[np.isfinite(keys_D[order_D])]
    return drawn

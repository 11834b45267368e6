"""Weights of a mixture of systems: which are best on some queries, and whether they are better than no mixture at all.

All points of a grid over the simplex are tried, which is exhaustive, the same everywhere, and cheap, since the systems
have scored the documents already. What is best on the queries that it was chosen by looks better than it is. So the
mixture is also measured on queries that its weights have not seen, in five parts in turn: where it is not clearly above
the order of one part there, that part is taken alone. These values are tested against the best part.

Shapes: Q queries, P points of the grid, M parts of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from engine.config.recipe import Config
from engine.evaluation.significance import LEVEL, randomisation_test, standard_error
from engine.evaluation.systems import HYBRID, RANKER, System, fused_system, label_of
from engine.reliability.run_folder import RunFolder
from shards.errors import counted
from shards.files import read_record

Floats = npt.NDArray[np.float64]
STEPS = 10
"""Steps of the grid from 0 to 1: on a few thousand queries, finer weights differ by less than a standard error."""
FOLDS = 5
"""Parts of the queries, each measured by the weights that are best on the others."""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One system of a mixture."""

    system: str
    """Its name in the table of results, such as `G`."""
    kind: str
    """As `System.kind`."""
    weights_sha256: str
    """Of its weights, or of its settings where it has none."""
    weight: float
    """Its share of the mixture, 0..1."""
    value: float
    """The metric of its own ranking on the queries of the fit, as the table has it."""
    standard_error: float | None
    """Of that value; None for one query."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """A fitted mixture: `results/fusion.json`."""

    version: int
    iteration: int | None
    """Whose weights the first part has."""
    split: str
    """Whose queries the weights were fitted on: dev."""
    metric: str
    """What they were fitted to."""
    relevance_threshold: int
    """Grade from which a document was relevant."""
    rerank_depth: int
    """Documents of a query that were fused at most."""
    num_queries: int
    """Queries that were judged."""
    parts: tuple[Part, ...]
    """The first found the documents; weights sum to 1."""
    value: float
    """The metric by these weights, on the queries that they were fitted on."""
    standard_error: float | None
    """Of that value; None for one query."""
    held_out_value: float
    """The metric where each fifth of the queries has the weights that are best on the others."""
    best_part: str
    """The part with the largest value."""
    p: float
    """Of the paired test of the held-out values against those of the best part."""
    candidates: str = "retriever"
    """As `evaluation.fusion_candidates`; of mixtures that were fitted without it, what the first part found."""

    @property
    def weights(self) -> dict[str, float]:
        """System -> weight."""
        return {part.system: part.weight for part in self.parts}

    @property
    def beats_its_parts(self) -> bool:
        """Whether it is better than its best part by more than chance."""
        return self.held_out_value > self._best.value and self.p < LEVEL

    @property
    def told(self) -> str:
        """What a table says of it."""
        error = "" if self.standard_error is None else f" +- {self.standard_error:.3f}"
        value = f"{self.metric} {self.value:.3f}{error}"
        queries = f"{counted(self.num_queries, 'query')} of {self.split}"
        verdict = "NOT better by more than chance than"
        if self.p < LEVEL:
            verdict = "better than" if self.beats_its_parts else "WORSE than"
        held_out = (
            f"{self.held_out_value:.3f} on queries held out, {verdict} {self._best_part} alone "
            f"({self._best.value:.3f}, p {self.p:.2g})"
        )
        if self.num_queries == 1:
            held_out = "none of which can be held out"
        fused = "fused" if self.iteration is None else f"fused of iteration {self.iteration}"
        mixed = [part for part in self.parts if part.weight]
        if len(mixed) == 1:
            alone = f"{mixed[0].system} alone{self._over}"
            fitted = "" if self.num_queries == 1 else "the weights of a fit have "
            return f"{fused} = {alone}: {value} on {queries}; {fitted}{held_out}"
        weights = " + ".join(f"{part.weight:g} {part.system}" for part in mixed)
        return f"{fused} = {weights}{self._over}, fitted on {queries}: {value}; {held_out}"

    @property
    def _over(self) -> str:
        searching = [part.system for part in self.parts if part.kind != RANKER]
        return f" over what {' and '.join(searching)} found" if self.candidates == HYBRID else ""

    @property
    def _best_part(self) -> str:
        joined = self.candidates == HYBRID and self._best.kind == RANKER
        return label_of(self.best_part, HYBRID if joined else None)

    @property
    def _best(self) -> Part:
        return next(part for part in self.parts if part.system == self.best_part)


@dataclass(frozen=True, slots=True)
class MeasuredPart:
    """A part before the fit.

    Attributes:
        system: Its name.
        kind: Its kind.
        weights_sha256: Of its weights or settings.
        values_Q: The metric of its own ranking, query by query [Q].
    """

    system: str
    kind: str
    weights_sha256: str
    values_Q: Floats


def simplex(num_parts: int, steps: int = STEPS) -> list[tuple[float, ...]]:
    """Return the points of a grid over all weights that sum to 1, the simplest first.

    Args:
        num_parts: M, at least 1.
        steps: From 0 to 1, at least 1.

    Returns:
        P points of M weights: fewer parts before more of them, then more weight on earlier parts first. The first M
        points are the parts alone, in their order.
    """
    counts = [point for point in product(range(steps + 1), repeat=num_parts) if sum(point) == steps]
    counts.sort(key=lambda point: (sum(map(bool, point)), [-count for count in point]))
    return [tuple(count / steps for count in point) for point in counts]


def best_point(values_PQ: Floats) -> int:
    """Return the first of the points with the largest mean over queries.

    Args:
        values_PQ: A metric of each query by each point [P, Q]; of no queries, the first point is taken.

    Returns:
        Its number. Sums are exact, so that points that are equally good are seen to be.
    """
    sums = [math.fsum(row) for row in values_PQ]
    return sums.index(max(sums))


def held_out_values(values_PQ: Floats, folds: int = FOLDS) -> Floats:
    """Return the metric of each query by the weights that are best on the queries of the other folds.

    Args:
        values_PQ: As of `best_point`.
        folds: Query number q is in fold q modulo folds.

    Returns:
        Values [Q].
    """
    fold_Q = np.arange(values_PQ.shape[1]) % folds
    held_out_Q = np.empty(values_PQ.shape[1])
    for fold in np.unique(fold_Q):
        own_Q = fold_Q == fold
        held_out_Q[own_Q] = values_PQ[best_point(values_PQ[:, ~own_Q]), own_Q]
    return held_out_Q


def fit(
    values_PQ: Floats,
    points: Sequence[Sequence[float]],
    parts: Sequence[MeasuredPart],
    *,
    iteration: int | None,
    split: str,
    metric: str,
    relevance_threshold: int,
    rerank_depth: int,
    seed: int,
    candidates: str = "retriever",
) -> Fusion:
    """Choose the weights of a mixture, and tell what they are worth.

    Args:
        values_PQ: The metric of each query by each point [P, Q].
        points: Of the grid, the simplest first [P][M].
        parts: What is mixed, M of them.
        iteration: Whose weights the first part has.
        split: Of the queries.
        metric: What is measured.
        relevance_threshold: Grade from which a document was relevant.
        rerank_depth: Documents of a query that were fused at most.
        candidates: Whose they are, as `Fusion.candidates`.
        seed: Draws the signs of the test.

    Returns:
        The mixture with the largest mean, of several the simplest; the best order by one part alone unless the mixture
        is above that by a standard error on queries that it has not seen: of choices within one standard error the
        simplest, as Breiman et al. (1984) prune trees.
    """
    held_out_Q, alone = held_out_values(values_PQ), best_point(values_PQ[: len(parts)])
    gained_Q = held_out_Q - values_PQ[alone]
    chosen = best_point(values_PQ) if _mean(gained_Q) > (_error(gained_Q) or 0.0) else alone
    means = [_mean(part.values_Q) for part in parts]
    best = parts[means.index(max(means))]
    return Fusion(
        _VERSION,
        iteration,
        split,
        metric,
        relevance_threshold,
        rerank_depth,
        values_PQ.shape[1],
        tuple(
            Part(part.system, part.kind, part.weights_sha256, weight, mean, _error(part.values_Q))
            for part, weight, mean in zip(parts, points[chosen], means, strict=True)
        ),
        _mean(values_PQ[chosen]),
        _error(values_PQ[chosen]),
        _mean(held_out_Q),
        best.system,
        randomisation_test(held_out_Q, best.values_Q, seed=seed),
        candidates,
    )


def fitted_system(folder: RunFolder, config: Config, *, taken: int) -> System:
    """Return a run's mixture over the candidates that its weights were fitted on.

    Args:
        folder: The run's; without weights, the candidates are those of the settings.
        config: The recipe.
        taken: The iteration that is taken.

    Raises:
        ArtifactError: The record of the weights is damaged.
    """
    fusion = recorded_fusion(folder)
    return fused_system(config, taken=taken, candidates=fusion.candidates if fusion else None)


def recorded_fusion(folder: RunFolder) -> Fusion | None:
    """Read the mixture that a run has fitted, whatever its models are now; None without one.

    Args:
        folder: The run's.

    Raises:
        ArtifactError: The record is damaged.
    """
    return read_record(folder.fusion, Fusion, "the weights of the mixture") if folder.fusion.exists() else None


def _mean(values_Q: Floats) -> float:
    return math.fsum(values_Q) / len(values_Q)


def _error(values_Q: Floats) -> float | None:
    return standard_error(values_Q) if len(values_Q) > 1 else None

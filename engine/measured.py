"""What an evaluation measured, as the ledger keeps it."""

from __future__ import annotations

from dataclasses import dataclass

_HEADLINES = ("MRR@10", "R@1", "A@1")


@dataclass(frozen=True, slots=True)
class Score:
    """How good one system is."""

    system: str
    """Its name in the table."""
    kind: str
    """Which sort of system it is, as in `engine.evaluation.systems.System`."""
    iteration: int | None
    """Whose weights it has; None for the state before training, and for a system without weights."""
    metrics: dict[str, float]

    @classmethod
    def of(cls, system: str, kind: str, iteration: int | None, metrics: dict[str, float]) -> Score:
        """Keep the few metrics that a line of the log has room for; the summary has all."""
        kept = {name: metrics[name] for name in _HEADLINES if name in metrics}
        return cls(system, kind, iteration, kept)


@dataclass(frozen=True, slots=True)
class Measured:
    """Result of a stage that evaluates; without scores where the split has no queries."""

    scores: tuple[Score, ...] = ()

    def shown(self) -> dict[str, float]:
        """Return what the log tells: each metric by the system's name and its own."""
        return {f"{score.system} {name}": value for score in self.scores for name, value in score.metrics.items()}

    def value_of(self, kind: str, metric: str) -> float | None:
        """Return a metric of the first system of a kind; None where it was not measured.

        Args:
            kind: Such as `retriever` or `ranker`.
            metric: Such as `MRR@10`.
        """
        return next((score.metrics.get(metric) for score in self.scores if score.kind == kind), None)

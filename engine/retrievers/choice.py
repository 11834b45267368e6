"""Which retriever: a kind, and what tells one of a kind from another."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.timetable import WeightsOf


@dataclass(frozen=True, slots=True)
class Choice:
    """Names one retriever."""

    kind: str
    """A name in `engine.retrievers.kinds.KINDS`."""
    weights: WeightsOf | None = None
    """Whose weights a trained one searches with."""
    path: str = ""
    """Of the file that a run file is."""
    proposed_by: str = ""
    """Of the data's own negatives, who proposed those that are taken; all of them where it is empty."""

    @property
    def trained(self) -> WeightsOf:
        """The weights of a trained one.

        Raises:
            ValueError: It has none.
        """
        if self.weights is None:
            raise ValueError(f"a {self.kind} retriever is named without the weights that it searches with")
        return self.weights

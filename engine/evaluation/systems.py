"""Systems: what has a row in the table of results, described by fields and not by its name.

bm25 = System("BM25", BM25, None)
retriever = System("G", RETRIEVER, WeightsOf("retriever", 3))
ranker = System("D", RANKER, WeightsOf("ranker", 3), over=retriever)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.models.weights import ZERO_SHOT, iteration_name

BM25, RUN_FILE, RETRIEVER, RANKER = "bm25", "run_file", "retriever", "ranker"
_ORDER = (BM25, RUN_FILE, RETRIEVER, RANKER)


@dataclass(frozen=True, slots=True)
class WeightsOf:
    """Which published weights a system has."""

    model: str
    """`retriever` or `ranker`."""
    iteration: int | None
    """0 is the warm-up; None the state before any training."""

    @property
    def state(self) -> str:
        """How artifacts made with these weights are named."""
        return ZERO_SHOT if self.iteration is None else iteration_name(self.iteration)


@dataclass(frozen=True, slots=True)
class System:
    """Something that ranks documents, and is measured."""

    name: str
    """As the table shows it; it means nothing to the code."""
    kind: str
    """Which sort it is, such as `bm25`, `retriever`, `ranker` or `run_file`."""
    weights: WeightsOf | None
    """None where it has none."""
    over: System | None = None
    """The system whose ranking it re-orders; None for one that searches the corpus itself."""

    @property
    def iteration(self) -> int | None:
        """Whose weights it has; None for the state before training, and for a system without weights."""
        return self.weights.iteration if self.weights else None

    @property
    def first_stage(self) -> System:
        """The system that searched the corpus: this one, or the one at the bottom of what it re-orders."""
        return self.over.first_stage if self.over else self

    @property
    def curve(self) -> str:
        """The name of its points in TensorBoard: systems of a kind are one curve over the iterations (Figure 3)."""
        return self.name if self.iteration is None else self.kind

    def run_file_name(self, split: str) -> str:
        """Return the name of the TREC file with its ranking of a split."""
        suffix = "" if self.iteration is None else f"-{iteration_name(self.iteration)}"
        return f"{split}-{self.name}{suffix}.trec"


def yardsticks(*, zero_shot: bool) -> list[System]:
    """Return what trained systems are compared with: BM25, and the retriever before any training if asked for."""
    untrained = System("zero-shot", RETRIEVER, WeightsOf("retriever", None))
    return [System("BM25", BM25, None), *([untrained] if zero_shot else [])]


def game_systems(iterations: Sequence[int]) -> list[System]:
    """Return both players of AR2's game after each of some iterations, the retriever first, the ranker over it.

    Args:
        iterations: 0 is the warm-up, whose players the paper calls G0 and D0.
    """
    systems = []
    for iteration in iterations:
        suffix = "0" if iteration == 0 else ""
        retriever = System(f"G{suffix}", RETRIEVER, WeightsOf("retriever", iteration))
        systems += [retriever, System(f"D{suffix}", RANKER, WeightsOf("ranker", iteration), over=retriever)]
    return systems


def every_system(*, zero_shot: bool, last: int) -> list[System]:
    """Return the rows of the last table: the yardsticks, and the players after the warm-ups and the last iteration.

    Args:
        zero_shot: Include the retriever before any training.
        last: The newest finished iteration.
    """
    return [*yardsticks(zero_shot=zero_shot), *game_systems(sorted({0, last}))]


def place_of_kind(kind: str) -> int:
    """Return where systems of a kind stand in the table; kinds that are not known here come last."""
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)

"""Systems: what has a row in the table of results, described by fields and not by its name.

bm25 = System("BM25", BM25, None)
retriever = System("G", RETRIEVER, WeightsOf("retriever", 3))
ranker = System("D", RANKER, WeightsOf("ranker", 3), over=retriever)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.recipe import Config
from engine.config.timetable import ZERO_SHOT, iteration_name

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

    def run_file_name(self, split: str, sample: int | None = None) -> str:
        """Return the name of the TREC file with its ranking of a split.

        Args:
            split: The split's name.
            sample: Number of queries of a sample that was asked for; None for what the recipe measures.
        """
        parts = [split, *self._name_parts]
        if self.over is not None and self.over.iteration != self.iteration:
            parts += ["over", *self.over._name_parts]
        if sample is not None:
            parts.append(f"{sample}-queries")
        return "-".join(parts) + ".trec"

    @property
    def _name_parts(self) -> list[str]:
        return [self.name, *([] if self.iteration is None else [iteration_name(self.iteration)])]


def yardsticks(config: Config) -> list[System]:
    """Return what trained systems are compared with: BM25, and the retriever before any training if asked for."""
    untrained = System("zero-shot", RETRIEVER, WeightsOf(config.timetable.encoder, None))
    return [System("BM25", BM25, None), *([untrained] if config.evaluation.zero_shot else [])]


def trained_systems(config: Config, iterations: Sequence[int]) -> list[System]:
    """Return the models of a recipe after each of some iterations; rankers stand behind the retriever they re-rank.

    Args:
        config: Its models, and by which names the timetable calls them.
        iterations: 0 is the warm-up.
    """
    systems = []
    for iteration in iterations:
        first: System | None = None
        for model, kind in _models(config).items():
            name = config.timetable.name_of(model, iteration)
            over = first if kind == RANKER else None
            systems.append(System(name, kind, WeightsOf(model, iteration), over=over))
            first = first or systems[-1]
    return systems


def every_system(config: Config, *, last: int) -> list[System]:
    """Return the rows of the last table: the yardsticks, and the models after the warm-ups and the last iteration.

    Args:
        config: The recipe.
        last: The newest finished iteration.
    """
    return [*yardsticks(config), *trained_systems(config, sorted({0, last}))]


def pairs_of(config: Config, retrievers: Sequence[int], rankers: Sequence[int]) -> list[list[System]]:
    """Return rankers of some iterations over retrievers of others, such as D over G0 (AR2 Table 3).

    Args:
        config: Its models; the retriever is the one that searches the corpus.
        retrievers: Iterations; 0 is the warm-up.
        rankers: Iterations, each over every one of these retrievers.

    Returns:
        For each retriever the systems that need its index: itself, and the rankers behind it.
    """
    table, groups = config.timetable, []
    for iteration in retrievers:
        first = System(table.name_of(table.encoder, iteration), RETRIEVER, WeightsOf(table.encoder, iteration))
        behind = [
            System(table.name_of(model, other), RANKER, WeightsOf(model, other), over=first)
            for other in rankers
            for model, kind in _models(config).items()
            if kind == RANKER
        ]
        groups.append([first, *behind])
    return groups


def _models(config: Config) -> dict[str, str]:
    """Return the kinds of all models by name, retrievers first."""
    kinds = {name: section.kind for name, section in config.models.items()}
    return dict(sorted(kinds.items(), key=lambda item: item[1] == RANKER))


def place_of_kind(kind: str) -> int:
    """Return where systems of a kind stand in the table; kinds that are not known here come last."""
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)

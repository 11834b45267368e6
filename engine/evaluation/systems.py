"""Systems: what has a row in the table of results, described by fields and not by its name.

bm25 = System("BM25", BM25, None)
retriever = System("G", RETRIEVER, WeightsOf("retriever", 3))
ranker = System("D", RANKER, WeightsOf("ranker", 3), over=retriever)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.config.recipe import Config
from engine.config.timetable import Timetable, WeightsOf, iteration_name

__all__ = ["System", "WeightsOf"]
BM25, RUN_FILE, RETRIEVER, LEXICAL, RANKER = "bm25", "run_file", "retriever", "lexical", "ranker"
FUSED = "fused"
"""Mixtures of the scores of several systems (`engine.evaluation.fusion`)."""
HYBRID = "hybrid"
"""What several retrievers found, a document of each in turn: its parts."""
CANDIDATES = "candidates"
"""Sets of documents that somebody else chose for re-ranking, in no order."""
_ORDER = (BM25, RUN_FILE, CANDIDATES, RETRIEVER, LEXICAL, HYBRID, RANKER, FUSED)


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
    names_over: bool = False
    """Whether its file names that system although it is of its own iteration, since it re-orders others as well."""
    parts: tuple[System, ...] = ()
    """The systems whose scores a fused one mixes, or whose lists a hybrid one joins; the first retriever is first."""

    @property
    def iteration(self) -> int | None:
        """Whose weights it has; None for the state before training, and for a system without weights.

        A fused or hybrid one has that of the first retriever.
        """
        if self.parts:
            return self.parts[0].iteration
        return self.weights.iteration if self.weights else None

    @property
    def first_stage(self) -> System:
        """The system that searched the corpus: this one, or the one at the bottom of what it re-orders."""
        return self.over.first_stage if self.over else self

    @property
    def orders_hybrid(self) -> bool:
        """Whether it re-orders what several retrievers found in turn."""
        return self.over is not None and self.over.kind == HYBRID

    @property
    def curve(self) -> str:
        """The name of its points in TensorBoard: systems of a kind are one curve over the iterations (Figure 3)."""
        if self.kind == RANKER and self.orders_hybrid:
            return f"{self.kind}_over_{HYBRID}"
        return self.name if self.iteration is None else self.kind

    def run_file_name(self, split: str, sample: int | None = None) -> str:
        """Return the name of the TREC file with its ranking of a split.

        Args:
            split: The split's name.
            sample: Number of queries, where they are others than those of the recipe; None for these.
        """
        parts = [split, *self._name_parts]
        if self.over is not None and (self.names_over or self.over.iteration != self.iteration):
            parts += ["over", *self.over._name_parts]
        if sample is not None:
            parts.append(f"{sample}-queries")
        return "-".join(parts) + ".trec"

    @property
    def _name_parts(self) -> list[str]:
        return [self.name, *([] if self.iteration is None else [iteration_name(self.iteration)])]


def yardsticks(config: Config) -> list[System]:
    """Return what trained systems are compared with: BM25, and the models that search before any training, as asked.

    Where there are several of these, they have their models' names.
    """
    systems, encoders = bm25_of(config), config.timetable.encoders
    if config.evaluation.zero_shot:
        systems += [
            System(
                "zero-shot" if len(encoders) == 1 else f"zero-shot-{model}",
                config.models[model].kind,
                WeightsOf(model, None),
            )
            for model in encoders
        ]
    return systems


def bm25_of(config: Config) -> list[System]:
    """Return BM25; nothing where the recipe leaves it out."""
    return [System("BM25", BM25, None)] if config.bm25.enabled else []


def system_of(config: Config, weights: WeightsOf, over: System | None = None, *, names_over: bool = False) -> System:
    """Return the system that a state of a model is.

    Args:
        config: Its kind, and what the timetable calls it.
        weights: The state.
        over: What it re-orders; None where it searches the corpus itself.
        names_over: As of `System`.
    """
    name, kind = config.timetable.name_of(weights), config.models[weights.model].kind
    return System(name, kind, weights, over, names_over)


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
            over = first if kind == RANKER else None
            systems.append(system_of(config, WeightsOf(model, iteration), over))
            first = first or systems[-1]
    return systems


def measured_systems(config: Config, states: Sequence[WeightsOf]) -> list[System]:
    """Return some states of models as systems, each ranker over everything that the timetable has rankers re-order.

    Args:
        config: The recipe.
        states: In the order of the table; what rankers re-order has been measured, or stands among them before.

    Returns:
        Systems; a ranker's first stages are not repeated.
    """
    table, systems = config.timetable, []
    for weights in states:
        if config.models[weights.model].kind != RANKER:
            systems.append(system_of(config, weights))
            continue
        systems += [
            system_of(config, weights, first_stage_of(config, name), names_over=True) for name in table.reranked or ()
        ]
    return systems


def first_stage_of(config: Config, mining: str) -> System:
    """Return the system whose hits a mining of the timetable takes negatives from."""
    found = config.timetable.mining(mining)
    if found.weights is not None:
        return system_of(config, found.weights)
    return System("BM25", BM25, None) if found.retriever == BM25 else System(found.name, found.retriever, None)


def every_system(config: Config, *, taken: int) -> list[System]:
    """Return the rows of the last table: the yardsticks, and the models after the warm-ups and the iteration taken.

    Where models do not go through iterations together, all states that the timetable says are measured.

    Args:
        config: The recipe.
        taken: The iteration that is taken (`engine.evaluation.chosen`).
    """
    measured = config.timetable.measured
    if measured is not None:
        return [*yardsticks(config), *measured_systems(config, measured)]
    return [*yardsticks(config), *trained_systems(config, sorted({0, taken}))]


def fused_system(config: Config, *, taken: int, candidates: str | None = None) -> System:
    """Return the mixture of what a run leaves behind: first retriever, rankers, further retrievers, and BM25.

    Args:
        config: The recipe.
        taken: The iteration that is taken, for models that go through iterations together.
        candidates: As `evaluation.fusion_candidates`, in its place.

    Returns:
        A system that re-orders what the first part found, or what all that search found; every part scores that. A
        recipe without BM25 has none in it, and nothing to join where one model alone searches.
    """
    table = config.timetable
    states = end_states(table, list(config.models), taken)
    first, *further = (system_of(config, states[model]) for model in table.encoders)
    searching, found = (first, *further, *bm25_of(config)), first
    if (candidates or config.evaluation.fusion_candidates) == HYBRID and len(searching) > 1:
        found = System(HYBRID, HYBRID, None, parts=searching)
    rankers = [
        system_of(config, states[model], found, names_over=found is not first or table.reranked is not None)
        for model, kind in _models(config).items()
        if kind == RANKER
    ]
    return System("fused", FUSED, None, found, parts=(first, *rankers, *searching[1:]))


def over_first(config: Config, system: System) -> System:
    """Return the last stage of the search that a mixture is measured against: its ranker over its first retriever.

    Args:
        config: The recipe.
        system: The mixture; without a ranker it is the first retriever.
    """
    rankers = (part for part in system.parts if part.kind == RANKER)
    return next((behind(config, system.parts[0], ranker) for ranker in rankers), system.parts[0])


def behind(config: Config, retriever: System, ranker: System) -> System:
    """Return a ranker as the recipe's own table has it behind its retriever, whatever it re-orders elsewhere."""
    return replace(ranker, over=retriever, names_over=config.timetable.reranked is not None)


def pairs_of(config: Config, retrievers: Sequence[WeightsOf], rankers: Sequence[WeightsOf]) -> list[list[System]]:
    """Return some states of rankers over some of retrievers, such as D over G0 (AR2 Table 3) or R over D1.

    Args:
        config: Its models.
        retrievers: States of models that search the corpus.
        rankers: States of rankers, each over every one of these retrievers.

    Returns:
        For each retriever the systems that need its index: itself, and the rankers behind it.
    """
    groups, names_over = [], config.timetable.reranked is not None
    for retriever in retrievers:
        first = system_of(config, retriever)
        groups.append([first, *(system_of(config, ranker, first, names_over=names_over) for ranker in rankers)])
    return groups


def end_states(table: Timetable, models: Sequence[str], iteration: int) -> dict[str, WeightsOf]:
    """Return the states that a run leaves behind, by model, for whoever exports or loads them.

    Args:
        table: The recipe's.
        models: Their names.
        iteration: The one that is taken, for models that go through iterations together.
    """
    if table.ends is None:
        return {model: WeightsOf(model, iteration) for model in models}
    return {weights.model: weights for weights in table.ends}


def _models(config: Config) -> dict[str, str]:
    """Return the kinds of all models by name, retrievers first."""
    kinds = {name: section.kind for name, section in config.models.items()}
    return dict(sorted(kinds.items(), key=lambda item: item[1] == RANKER))


def label_of(system: str, over: str | None) -> str:
    """Name a system as the table's differences do: with what it re-orders, where it re-orders anything."""
    return system if over is None else f"{system} over {over}"


def place_of_kind(kind: str) -> int:
    """Return where systems of a kind stand in the table; kinds that are not known here come last."""
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)

"""The timetable of a recipe: which phase trains which model, on what, for how long.

One table, made of a configuration by its algorithm's section (`Config.timetable`). Training, mining, resuming, status,
preflight and plan read it, and none of them knows which algorithm runs or computes a step's number of its own.

    phase              model      iterations  candidates  steps  batch  negatives
    warmup_retriever   retriever  0           bm25         1000    128          1
    warmup_ranker      ranker     0           000          2000     64         15
    retriever          retriever  1 to 10     000 to 009   1500     64         15
    ranker             ranker     1 to 10     001 to 010    500     64         15

A phase that the algorithm comes back to is one row with several visits. Its optimizer, its schedule and its order of
queries go on from visit to visit; those of another phase of the same model are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.config.training import OptimConfig

ZERO_SHOT = "zero-shot"
"""The name of the state before any training, where others are named by their iteration."""
AUTO: Literal["auto"] = "auto"
"""A number that is found where the recipe runs."""
Pool = Literal["none", "rank", "world"]
"""Whose documents are negatives of a query besides its own: nobody's, those of its rank, those of all ranks."""


def iteration_name(iteration: int) -> str:
    """Return how artifacts of an iteration are named: `000` for the warm-up, then `001` and on."""
    return f"{iteration:03d}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates over the whole life of an optimizer, which may span several visits.

    Attributes:
        optim: Peak rate, shape and share of warm-up.
        total_steps: Steps after which a linear schedule reaches 0.
    """

    optim: OptimConfig
    total_steps: int

    def lr(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0 over all visits."""
        warmup = round(self.optim.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.optim.lr * (step + 1) / (warmup + 1)
        if self.optim.schedule == "constant":
            return self.optim.lr
        return self.optim.lr * max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))


@dataclass(frozen=True, slots=True)
class Phase:
    """One row: a phase of training.

    Attributes:
        name: Of its stages, of its metrics, and of the order in which it draws the training queries.
        section: Key of its numbers in the configuration, for messages.
        model: Whom it trains.
        steps: Optimizer steps of one visit.
        batch_size: Queries of a step over all ranks.
        micro_batch_size: Queries that a rank computes at once.
        micro_batch_tokens: Tokens that it computes at once, in place of that; None where queries are counted, `auto`
            where trials find out how many fit.
        num_negatives: Negatives of a query (n).
        optim: Its optimizer.
        candidates: From which each visit draws its negatives, one name a visit.
        first_iteration: Of the first visit; the next ones follow. 0 is the warm-up, which has one visit.
        opponent: Model whose frozen weights score the same documents; None without one.
        pool: Whose documents are negatives of a query besides its own n: nobody's, those of the rank, of all ranks.
    """

    name: str
    section: str
    model: str
    steps: int
    batch_size: int
    micro_batch_size: int
    num_negatives: int
    optim: OptimConfig
    candidates: tuple[str, ...]
    first_iteration: int = 0
    micro_batch_tokens: int | Literal["auto"] | None = None
    opponent: str | None = None
    pool: Pool = "none"

    @property
    def is_warmup(self) -> bool:
        """Whether it comes before the iterations."""
        return self.first_iteration == 0

    @property
    def total_steps(self) -> int:
        """Of all visits."""
        return self.steps * len(self.candidates)

    @property
    def schedule(self) -> Schedule:
        """Its learning rates."""
        return Schedule(self.optim, self.total_steps)

    @property
    def visits(self) -> tuple[Visit, ...]:
        """All of them, in order."""
        return tuple(Visit(self, number) for number in range(len(self.candidates)))

    def visit(self, iteration: int) -> Visit:
        """Return the visit of an iteration.

        Raises:
            KeyError: It has none.
        """
        number = iteration - self.first_iteration
        if not 0 <= number < len(self.candidates):
            raise KeyError(f"{self.name} has no visit in iteration {iteration}")
        return Visit(self, number)


@dataclass(frozen=True, slots=True)
class Visit:
    """One stage of training: a phase in one iteration.

    Attributes:
        phase: The row.
        number: Counted from 0 within the phase.
    """

    phase: Phase
    number: int

    @property
    def iteration(self) -> int:
        """0 in a warm-up."""
        return self.phase.first_iteration + self.number

    @property
    def stage(self) -> str:
        """The stage's name in the ledger."""
        return self.phase.name if self.phase.is_warmup else f"{self.phase.name}/{self.iteration}"

    @property
    def candidates(self) -> str:
        """What its negatives are drawn from."""
        return self.phase.candidates[self.number]

    @property
    def first_step(self) -> int:
        """Steps of the schedule that earlier visits took."""
        return self.number * self.phase.steps

    @property
    def places(self) -> range:
        """What it takes of the phase's endless order of training queries."""
        first = self.first_step * self.phase.batch_size
        return range(first, first + self.phase.steps * self.phase.batch_size)


@dataclass(frozen=True, slots=True)
class Mining:
    """Candidates that are retrieved for the training queries.

    Attributes:
        name: Of the candidates: an iteration's, or its own.
        retriever: Kind of the retriever that finds them.
        model: Name of the model whose weights the retriever needs; None where it needs none.
        top_k: Candidates kept for a query.
        section: Key of that number in the configuration, for messages.
    """

    name: str
    retriever: str
    model: str | None
    top_k: int
    section: str


@dataclass(frozen=True, slots=True)
class Timetable:
    """All rows of a recipe.

    Attributes:
        phases: In the order in which they are first visited.
        minings: In the order in which they are made.
        iterations: How often the game is played; the warm-up is not counted.
        in_each_iteration: Kinds of the stages that every iteration has, in their order.
        mine_all: Whether all training queries are searched, or those that are drawn.
        remove_answers: Whether documents that contain an answer are no candidates.
        letters: What the table of results calls a model; its name where nothing is said.
    """

    phases: tuple[Phase, ...]
    minings: tuple[Mining, ...]
    iterations: int
    in_each_iteration: tuple[str, ...]
    mine_all: bool
    remove_answers: bool
    letters: Mapping[str, str] = field(default_factory=dict)

    @property
    def visits(self) -> Iterator[Visit]:
        """All visits of all phases."""
        return (visit for phase in self.phases for visit in phase.visits)

    @property
    def encoder(self) -> str:
        """The model whose weights search the corpus."""
        return next(mining.model for mining in self.minings if mining.model is not None)

    @property
    def most_negatives(self) -> int:
        """The largest n of all phases."""
        return max((phase.num_negatives for phase in self.phases), default=0)

    def name_of(self, model: str, iteration: int) -> str:
        """Return what the table of results calls a model: the warm-up's with a 0, as in AR2's G0 and D0."""
        return self.letters.get(model, model) + "0" * (iteration == 0)

    def phase(self, name: str) -> Phase:
        """Return a row."""
        return next(phase for phase in self.phases if phase.name == name)

    def phases_of(self, model: str) -> list[Phase]:
        """Return the rows that train a model."""
        return [phase for phase in self.phases if phase.model == model]

    def mining(self, name: str) -> Mining:
        """Return what is known of candidates by their name."""
        return next(mining for mining in self.minings if mining.name == name)

    def drawing_from(self, candidates: str) -> list[Visit]:
        """Return the visits whose negatives come from some candidates."""
        return [visit for visit in self.visits if visit.candidates == candidates]

    def needed(self, candidates: str) -> int:
        """Return how many candidates a query must keep, for the largest n that is drawn from them."""
        return max((visit.phase.num_negatives for visit in self.drawing_from(candidates)), default=0)

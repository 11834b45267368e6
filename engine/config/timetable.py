"""The timetable of a recipe: which phase trains which model, on what, for how long.

One table, made of a configuration by its algorithm's section (`Config.timetable`). Training, mining, resuming, status,
preflight and plan read it, and none of them knows which algorithm runs or computes a step's number of its own.

    phase              model      iterations  candidates  steps  batch  negatives
    warmup_retriever   retriever  0           bm25         1000    128          1
    warmup_ranker      ranker     0           000          2000     64         15
    retriever          retriever  1 to 10     000 to 009   1500     64         15
    ranker             ranker     1 to 10     001 to 010    500     64         15

A phase that the algorithm comes back to is one row with several visits. Its optimizer, its schedule and its order of
queries go on from visit to visit (where it restarts, the order alone); those of another phase of the model are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.config.negatives import Joint
from engine.config.refreshes import OF_REFRESH, Refreshes
from engine.config.schedule import Schedule
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


@dataclass(frozen=True, slots=True, order=True)
class WeightsOf:
    """Which published weights of a model."""

    model: str
    """Its name in the recipe."""
    iteration: int | None
    """0 is the warm-up; None the state before any training."""

    @property
    def state(self) -> str:
        """How artifacts made with these weights are named, beside the model's name."""
        return ZERO_SHOT if self.iteration is None else iteration_name(self.iteration)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of the data a timetable depends on, where phases are counted in epochs.

    Attributes:
        queries: Training queries that have a positive.
        documents: Of the corpus.
    """

    queries: int
    documents: int


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
        single: Whether it is visited once and for all, outside of iterations, so that its one stage has its name.
        restarts: State that every visit begins from, with its own optimizer and schedule; None for where the model is.
        opponent: Model whose frozen weights score the same documents; None without one.
        pool: Whose documents are negatives of a query besides its own n: nobody's, those of the rank, of all ranks.
        objective: Whose objective its model has, where that is not the one of its kind.
        rescored_by: Of each visit, the weights that score its candidates anew before it draws; None where they found
            them. Left out, none are scored anew.
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
    single: bool = False
    restarts: str | None = None
    objective: Literal["", "irgan"] = ""
    rescored_by: tuple[WeightsOf | None, ...] = ()

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
        """Its learning rates: over all visits, or over one where each begins again."""
        return Schedule(self.optim, self.total_steps if self.restarts is None else self.steps)

    @property
    def visits(self) -> tuple[Visit, ...]:
        """All of them, in order."""
        return tuple(Visit(self, number) for number in range(len(self.candidates)))


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
        alone = self.phase.is_warmup or self.phase.single
        return self.phase.name if alone else f"{self.phase.name}/{self.iteration}"

    @property
    def candidates(self) -> str:
        """What its negatives are drawn from."""
        return self.phase.candidates[self.number]

    @property
    def rescored_by(self) -> WeightsOf | None:
        """The weights that score its candidates anew before it draws; None where that is not done."""
        return self.phase.rescored_by[self.number] if self.phase.rescored_by else None

    @property
    def rescored(self) -> str:
        """Name of its candidates with their new scores, such as `000@001`; empty where they have none."""
        return f"{self.candidates}@{self.rescored_by.state}" if self.rescored_by is not None else ""

    @property
    def first_step(self) -> int:
        """Steps that earlier visits took."""
        return self.number * self.phase.steps

    @property
    def first_of_schedule(self) -> int:
        """Steps of its schedule that earlier visits took."""
        return self.first_step if self.phase.restarts is None else 0

    @property
    def places(self) -> range:
        """What it takes of the phase's endless order of training queries."""
        first = self.first_step * self.phase.batch_size
        return range(first, first + self.phase.steps * self.phase.batch_size)


@dataclass(frozen=True, slots=True)
class Mining:
    """Candidates that are retrieved for the training queries.

    Attributes:
        name: Of the candidates; those of a trained model are named as its index is (`Timetable.artifact`).
        retriever: Kind of the retriever that finds them.
        weights: What the retriever searches with; None where it needs no weights.
        top_k: Candidates kept for a query.
        section: Key of that number in the configuration, for messages.
        path: Of a run file, where that is the retriever.
        proposed_by: Of the data's own negatives, who proposed those that are taken; all of them where it is empty.
    """

    name: str
    retriever: str
    weights: WeightsOf | None
    top_k: int
    section: str
    path: str = ""
    proposed_by: str = ""

    @property
    def model(self) -> str | None:
        """Name of the model that searches; None where it needs none."""
        return self.weights.model if self.weights else None

    @property
    def is_of_start(self) -> bool:
        """Whether a model searches as it came, before any training."""
        return self.weights is not None and self.weights.iteration is None


@dataclass(frozen=True, slots=True)
class Timetable:
    """All rows of a recipe.

    Attributes:
        phases: In the order in which they are first visited.
        minings: In the order in which they are made.
        iterations: How often the game is played; the warm-up is not counted. 0 where there are none.
        in_each_iteration: Kinds of the stages that every iteration has, in their order.
        mine_all: Whether all training queries are searched, or those that are drawn.
        remove_answers: Whether documents that contain an answer are no candidates.
        search_deeper: Times the number of candidates to which a query is searched that keeps fewer; 1 for no deeper.
        names: What the table of results calls the models' states; a model's own name where nothing is said.
        held_out: Documents of the corpus that no step takes.
        several_search: Whether more than one model may search the corpus, so that artifacts have a model's name.
        joint: What of the drawn candidates is no plain mining: the name that visits have of it, which may be that of
            the mining that it is mostly made of, to what it is made of.
        ends: The states that the recipe leaves behind, one a model; None where all models go through the iterations
            together, and leave the last.
        measured: The states that have rows in the last table, where these are not the warm-up's and the last.
        reranked: What rankers re-order in the last table, by the names of the minings that find it; None for what the
            corpus' encoder finds in the ranker's own iteration.
        refreshes: When an iteration's index and candidates are made anew, where that is not in each.
        beside: Kinds of stages that run beside the ranker's phase of their iteration.
        rivals: Of a state, the other model's that it is to be above, where that is not the first state of its own.
    """

    phases: tuple[Phase, ...]
    minings: tuple[Mining, ...]
    iterations: int
    in_each_iteration: tuple[str, ...]
    mine_all: bool
    remove_answers: bool
    search_deeper: int = 1
    names: Mapping[WeightsOf, str] = field(default_factory=dict)
    held_out: int = 0
    several_search: bool = False
    joint: Mapping[str, Joint] = field(default_factory=dict)
    ends: tuple[WeightsOf, ...] | None = None
    measured: tuple[WeightsOf, ...] | None = None
    reranked: tuple[str, ...] | None = None
    refreshes: Refreshes | None = None
    beside: tuple[str, ...] = ()
    rivals: Mapping[WeightsOf, WeightsOf] = field(default_factory=dict)

    @property
    def encodes_beside(self) -> bool:
        """Whether the corpus is encoded beside the ranker's phase, by devices that are kept for that."""
        return "encode" in self.beside

    @property
    def visits(self) -> Iterator[Visit]:
        """All visits of all phases."""
        return (visit for phase in self.phases for visit in phase.visits)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The models whose weights search the corpus for negatives, in the order in which they first do."""
        return tuple(dict.fromkeys(mining.model for mining in self.minings if mining.model is not None))

    @property
    def encoder(self) -> str:
        """The first model whose weights search the corpus."""
        return self.encoders[0]

    @property
    def most_negatives(self) -> int:
        """The largest n of all phases."""
        return max((phase.num_negatives for phase in self.phases), default=0)

    @property
    def starts(self) -> tuple[str, ...]:
        """The models that are needed as they came, once they have learnt: searched with, or begun from again."""
        begun = [phase.model for phase in self.phases if phase.restarts == ZERO_SHOT]
        searched = [mining.weights.model for mining in self.minings if mining.weights and mining.is_of_start]
        return tuple(dict.fromkeys([*searched, *begun]))

    def artifact(self, weights: WeightsOf) -> str:
        """Return how an index or candidates made with weights are named, such as `001` or `dense-001`."""
        return f"{weights.model}-{weights.state}" if self.several_search else weights.state

    def name_of(self, weights: WeightsOf) -> str:
        """Return what the table of results calls a state, such as AR2's G0 and D."""
        return self.names.get(weights, weights.model)

    def states(self, model: str) -> list[WeightsOf]:
        """Return what the visits to a model's phases leave behind, in order."""
        return [WeightsOf(model, visit.iteration) for phase in self.phases_of(model) for visit in phase.visits]

    def phase(self, name: str) -> Phase:
        """Return a row."""
        return next(phase for phase in self.phases if phase.name == name)

    def visit(self, stage: str) -> Visit:
        """Return a visit by its stage."""
        return next(visit for visit in self.visits if visit.stage == stage)

    def phases_of(self, model: str) -> list[Phase]:
        """Return the rows that train a model."""
        return [phase for phase in self.phases if phase.model == model]

    def mining(self, name: str) -> Mining:
        """Return what is known of candidates by their name."""
        return next(mining for mining in self.minings if mining.name == name)

    def is_refreshed(self, iteration: int) -> bool:
        """Tell whether an iteration has an index of its own, and so candidates and a measurement on dev."""
        return self.refreshes is None or iteration in self.refreshes.iterations

    def refreshed_before(self, iteration: int) -> int:
        """Return the refresh before that of an iteration, which is not the warm-up's."""
        return iteration - 1 if self.refreshes is None else self.refreshes.newest(iteration - 1)

    def iterations_with(self, kind: str) -> int:
        """Return in how many iterations there is a stage of some kind; the warm-up is not counted."""
        if kind not in OF_REFRESH:
            return self.iterations
        return sum(self.is_refreshed(iteration) for iteration in range(1, self.iterations + 1))

    def steps_between(self, model: str, before: int, until: int) -> int:
        """Return the optimizer steps that lie between a model's states of two iterations."""
        visits = (visit for phase in self.phases_of(model) for visit in phase.visits)
        return sum(visit.phase.steps for visit in visits if before < visit.iteration <= until)

    def drawn_by(self, name: str) -> list[Visit]:
        """Return the visits that draw from candidates or a pool of that name, or will if it is the last refresh."""
        return [visit for visit in self.visits if name in self._may_draw_from(visit)]

    def drawing_from(self, candidates: str) -> list[Visit]:
        """Return the visits whose negatives come from some candidates, alone or in a pool, or are kept to them.

        Those too that will draw from them if their refresh turns out to be the last one.
        """
        return [
            visit
            for visit in self.visits
            if any(candidates in self._members(name) for name in self._may_draw_from(visit))
        ]

    @property
    def rescored(self) -> dict[str, list[Visit]]:
        """Candidates that are scored anew, by the name that they have then, and the visits that draw from these."""
        found: dict[str, list[Visit]] = {}
        for visit in self.visits:
            if visit.rescored:
                found.setdefault(visit.rescored, []).append(visit)
        return found

    def _may_draw_from(self, visit: Visit) -> tuple[str, ...]:
        name = visit.candidates
        if self.refreshes is None or not name.isdigit():
            return (name,)
        return (name, *map(iteration_name, self.refreshes.may_stand_for(int(name))))

    def needed(self, candidates: str) -> int:
        """Return how many candidates a query must keep, for the largest n that is drawn from them alone.

        What is drawn from a pool is the pool's matter: of its members, one may find nothing.
        """
        pooled = candidates in self.joint and not self.joint[candidates].is_cut
        return 0 if pooled else self.drawn(candidates)

    def drawn(self, name: str) -> int:
        """Return the largest n that is drawn from candidates or a pool of that name."""
        return max((visit.phase.num_negatives for visit in self.drawn_by(name)), default=0)

    def candidates_of(self, visit: Visit) -> tuple[str, ...]:
        """Return the names of the candidates that a visit needs: several for a pool, none without negatives."""
        return self._members(visit.candidates)

    def _members(self, name: str) -> tuple[str, ...]:
        if name in self.joint:
            return tuple(dict.fromkeys((*self.joint[name].members, *self.joint[name].within)))
        return (name,) if name else ()

    def most_drawn(self, name: str) -> int:
        """Return how many documents can be drawn at most from candidates or a pool of that name."""
        joint = self.joint.get(name, Joint((name,)))
        depths = [min(self.mining(member).top_k, joint.top_k or self.mining(member).top_k) for member in joint.members]
        return sum(len(joint.negatives.sampler.window(depth)) for depth in depths)

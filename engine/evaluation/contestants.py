"""Who takes part in a comparison of several runs: retrievers that find lists, and whatever re-orders them.

A contestant is a state of a model, BM25 or a run file. What it is stands in its identity, a hash of its weights and of
the settings that its scores depend on: rankings are kept under it, and what two runs share is measured once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from engine.config.negatives import ConstrainedFilterConfig, Joint
from engine.config.pools import GIVEN
from engine.config.sections import WHERE_EMBEDDINGS_LIE
from engine.config.timetable import Timetable, WeightsOf
from engine.data.corpus import Data
from engine.errors import ConfigError
from engine.evaluation.evaluate import retriever_of
from engine.evaluation.pairs import PairScorer
from engine.evaluation.systems import RANKER, System, system_of
from engine.models.weights import MARKER, weights_sha256
from engine.retrievers.choice import Choice
from engine.retrievers.kinds import BM25, choice_of, open_searcher, stamp_of
from engine.retrievers.prior import choice_of_prior
from engine.run import Run
from engine.search import Rescorer
from shards.files import canonical_json


@dataclass(frozen=True)
class Contestant:
    """One retriever, or one ranker.

    Attributes:
        label: How tables name it; unique in a comparison.
        run: Whose it is.
        data: The run's, with the run's texts.
        choice: Which retriever; None for a ranker.
        weights: Of a model; None for a retriever without.
    """

    label: str
    run: Run
    data: Data
    choice: Choice | None
    weights: WeightsOf | None = None

    @cached_property
    def identity(self) -> str:
        """A hash of all that its scores depend on besides the corpus."""
        made_of: dict[str, object] = {}
        if self.choice is not None:
            made_of |= {"kind": self.choice.kind, "of": stamp_of(self.run, self.data, self.choice).weights_sha256}
            if self.weights is not None:
                made_of["index"] = self.run.config.index.model_dump(mode="json", exclude=WHERE_EMBEDDINGS_LIE)
        elif self.weights is not None:
            folder = self.run.folder.weights(self.weights.model, self.weights.state)
            made_of |= {"kind": RANKER, "of": weights_sha256(folder)}
        if self.weights is not None:
            section = self.run.config.models[self.weights.model]
            made_of["model"] = section.model_dump(mode="json", exclude={"name", "prior", "bm25_prior"})
            if self.choice is None:
                made_of["prior"] = [
                    [stamp_of(self.run, self.data, choice_of_prior(prior)).weights_sha256, prior.scale]
                    for prior in self.run.config.priors
                ]
            made_of["query_max_length"] = self.run.config.query_max_length
        return hashlib.sha256(canonical_json(made_of).encode()).hexdigest()

    @property
    def orders_lists(self) -> bool:
        """Whether it can score what somebody else found; a run file has scores for its own documents alone."""
        return self.choice is None or self.choice.kind != "run_file"

    def scorer(self) -> Rescorer:
        """Open it for lists that somebody else found.

        Raises:
            ConfigError: It cannot score them.
            ArtifactError: What it scores with is missing or damaged.
        """
        if self.choice is None:
            if self.weights is None:
                raise ValueError(f"{self.label} is neither a retriever nor a ranker")
            return PairScorer.open(self.run, self.data, self.weights.model, self.weights.state)
        opened = open_searcher(self.run, self.data, self.run.folder, self.choice)
        if not isinstance(opened, Rescorer):
            raise ConfigError(
                f"{self.label} has scores for its own documents alone, and cannot re-order another retriever's list",
                expected="BM25 or a model",
                remedy="use it as a retriever only",
            )
        return opened


@dataclass(frozen=True)
class Negatives:
    """Where the negatives of a ranker came from.

    Attributes:
        found_by: The retrievers whose lists they were drawn from.
        within: Retrievers to whose best they were kept, each with how many of these counted.
    """

    found_by: tuple[Contestant, ...]
    within: tuple[tuple[Contestant, int], ...] = ()

    def told(self, entrant: Entrant) -> str:
        """Return their names, without that of the run: `BM25,D2` or `D2 within BM25 1000`."""

        def short(one: Contestant) -> str:
            return one.label.removeprefix(entrant.named(""))

        kept = "".join(f" within {short(one)} {top}" for one, top in self.within)
        return ",".join(map(short, self.found_by)) + kept


@dataclass(frozen=True)
class Entrant:
    """A run that takes part.

    Attributes:
        name: What its systems' labels begin with; empty where it is alone.
        run: The run.
        data: Its data.
        setting: What begins the labels of what several runs, which differ in their seed alone, come to together.
    """

    name: str
    run: Run
    data: Data
    setting: str = ""

    def of_setting(self, label: str) -> str:
        """Return the label of one of its systems without its seed."""
        system = label.removeprefix(self.named(""))
        return f"{self.setting}:{system}" if self.setting else system

    def named(self, system: str) -> str:
        """Return the label of one of its systems."""
        return f"{self.name}:{system}" if self.name else system

    def bm25(self) -> Contestant:
        """Return BM25 by the run's settings."""
        return Contestant(self.named("BM25"), self.run, self.data, BM25)

    def state(self, weights: WeightsOf) -> Contestant:
        """Return a state of one of its models.

        Raises:
            ConfigError: Its weights are not there.
        """
        table, system = self.run.timetable, system_of(self.run.config, weights)
        if not (self.run.folder.weights(weights.model, weights.state) / MARKER).exists():
            raise ConfigError(
                f"there are no weights of {weights.model} {weights.state} in {self.run.folder.path}",
                expected="the weights of every system that takes part",
                remedy="name other iterations, or let the run come so far",
            )
        label, namesakes = system.name, [one for one in published(self.run) if _is_called(table, one, system)]
        if len(namesakes) > 1:
            label = f"{label}@{weights.iteration}"
        return Contestant(
            self.named(label), self.run, self.data, None if system.kind == RANKER else retriever_of(system), weights
        )

    def negatives_of(self, ranker: WeightsOf) -> Negatives:
        """Return where a ranker's negatives came from.

        Raises:
            ConfigError: The run's timetable does not say what the state was trained on, or it was trained on negatives
                that the data give.
        """
        table = self.run.timetable
        visits = [visit for phase in table.phases_of(ranker.model) for visit in phase.visits]
        for visit in visits:
            if visit.iteration == ranker.iteration:
                joint = table.joint.get(visit.candidates, Joint((visit.candidates,)))
                filters = (one for one in joint.negatives.filters if isinstance(one, ConstrainedFilterConfig))
                return Negatives(
                    tuple(self._mined(name) for name in joint.members),
                    tuple((self._mined(one.within), one.top_k) for one in filters),
                )
        raise ConfigError(
            f"the recipe of {self.run.folder.path} does not train {ranker.model} in iteration {ranker.iteration}",
            expected=f"one of {', '.join(str(visit.iteration) for visit in visits)}",
        )

    def _mined(self, name: str) -> Contestant:
        """Return the retriever that some candidates of the timetable come from.

        Raises:
            ConfigError: They are the data's own, of training queries alone.
        """
        choice = choice_of(self.run.timetable.mining(name))
        if choice.kind == GIVEN:
            raise ConfigError(
                f"negatives of {self.run.folder.path} are those that its data give, by nobody who searches",
                expected="a ranker whose negatives were found by retrievers, which rank any queries",
                remedy="leave this ranker out, or name a state that was trained on what retrievers find",
            )
        if choice.weights is not None:
            return self.state(choice.weights)
        if choice.path:
            return Contestant(self.named(choice.path.rpartition("/")[2]), self.run, self.data, choice)
        return self.bm25()


def published(run: Run) -> list[WeightsOf]:
    """Return the states of all models whose weights are there, in the order in which they are trained."""
    states = [weights for model in run.config.models for weights in run.timetable.states(model)]
    return [one for one in states if (run.folder.weights(one.model, one.state) / MARKER).exists()]


def without_repetitions(contestants: Iterable[Contestant]) -> list[Contestant]:
    """Leave out who is the same as one before, such as BM25 of a second run.

    Raises:
        ConfigError: Two that are different have one label.
    """
    by_identity: dict[str, Contestant] = {}
    for one in contestants:
        by_identity.setdefault(one.identity, one)
    kept = list(by_identity.values())
    require_labels(kept)
    return kept


def require_labels(contestants: Sequence[Contestant]) -> None:
    """Refuse two contestants with one label.

    Raises:
        ConfigError: There are.
    """
    labels = [one.label for one in contestants]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(
            f"{' and '.join(repeated)} would stand in the table more than once",
            expected="a name of its own for every run and every run file",
            remedy="name them: NAME=RUN, --run-file NAME=PATH",
        )


def _is_called(table: Timetable, weights: WeightsOf, system: System) -> bool:
    return (
        system.weights is not None and weights.model == system.weights.model and table.name_of(weights) == system.name
    )

"""What is left of a recipe, by the pace of what it has done: the timetable's work, the ledger's seconds.

    training             steps of the visits that are left, at the seconds of a step of their phase
    encoding, an index,  those that the timetable's minings still need, each as long as those before
    mining
    evaluation           on dev after each iteration, each as long as those before; the test split as many times that
                         as it has states of the models; a mixture of what several found half of that on either, for
                         what no ranker has scored yet

A kind of work of which nothing was measured yet is left out, and the sum is then a lower bound; before anything was
measured there is no sum. What a refresh does beside the ranker's phase counts where it is the longer one. What comes
once (shards, BM25, exports) is counted while it runs. What comes after `run.stop_before` is not of this run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.recipe import Config
from engine.config.timetable import Timetable, Visit, WeightsOf

_OF_MININGS = ("encode", "index", "candidates", "negatives")
_EVALUATE = "evaluate"
_OF_A_MIXTURE = 0.5
_LAST = math.inf


@dataclass(frozen=True, slots=True)
class Now:
    """The stage that runs, as its counter shows it."""

    stage: str
    """Its name in the ledger."""
    done: int
    """Units that are done."""
    total: int
    """Units in all; 0 where nothing is counted."""
    per_second: float | None
    """Units a second; None where that is not known."""

    @property
    def seconds_left(self) -> float | None:
        """What the stage still takes at this pace; None where that is not known."""
        return (self.total - self.done) / self.per_second if self.per_second and self.total else None


@dataclass(frozen=True, slots=True)
class Left:
    """What a recipe still takes."""

    seconds: float
    """Of the clock."""
    is_all: bool
    """Whether all kinds of work that are left have been measured; otherwise it is a lower bound."""

    def told(self, in_words: Callable[[float], str]) -> str:
        """Say it, such as `about 3h 20m left`.

        Args:
            in_words: Writes a duration.
        """
        return f"{'about' if self.is_all else 'at least'} {in_words(self.seconds)} left"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stage that a recipe has, the kind of work that it is, and how much of it."""

    stage: str
    kind: str
    size: float = 1.0
    place: tuple[float, float] = (_LAST, _LAST)
    """Iteration, and what of it comes first."""


def left_of(config: Config, ledger: Mapping[str, Any], now: Now | None) -> Left | None:
    """Estimate what a recipe still takes.

    Args:
        config: Sized, where its phases are counted in epochs.
        ledger: Finished stages with their seconds.
        now: The stage that runs.

    Returns:
        None where nothing was measured that is still to come.
    """
    pieces = list(_pieces(config))
    end = next((piece.place for piece in pieces if piece.stage == config.run.stop_before), None)
    pace = _pace(pieces, ledger, now)
    running, left_here = (now.stage, now.seconds_left) if now is not None else ("", None)
    beside = config.timetable.beside
    alone, at_once, is_all, is_known = 0.0, {True: 0.0, False: 0.0}, True, False
    for piece in pieces:
        if piece.stage in ledger or piece.size == 0 or (end is not None and piece.place >= end):
            continue
        if piece.stage == running and left_here is not None:
            seconds = left_here
        elif piece.kind in pace:
            seconds = piece.size * pace[piece.kind]
        else:
            is_all = False
            continue
        is_known = True
        group = piece.stage.partition("/")[0]
        if beside and group in {*beside, "ranker"}:  # of the two that go on at once, the longer one counts
            at_once[group in beside] += seconds
        else:
            alone += seconds
    if left_here is not None and running not in {piece.stage for piece in pieces}:
        alone, is_known = alone + left_here, True
    return Left(alone + max(at_once.values()), is_all) if is_known else None


def _pace(pieces: list[_Piece], ledger: Mapping[str, Any], now: Now | None) -> dict[str, float]:
    """Return the seconds of a unit of each kind of work that was measured; of one that was not, the running stage's."""
    seconds: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for piece in pieces:
        if piece.stage in ledger:
            seconds[piece.kind] = seconds.get(piece.kind, 0.0) + float(ledger[piece.stage]["seconds"])
            sizes[piece.kind] = sizes.get(piece.kind, 0.0) + piece.size
    pace = {kind: seconds[kind] / sizes[kind] for kind in seconds if sizes[kind] > 0}
    for piece in pieces:  # an evaluation's counter goes through one system after the other, and tells nothing of all
        if now is not None and piece.stage == now.stage and piece.kind != _EVALUATE and now.per_second and now.total:
            pace.setdefault(piece.kind, now.total / now.per_second / max(piece.size, 1.0))
    return pace


def _pieces(config: Config) -> Iterator[_Piece]:
    table = config.timetable
    trained: dict[WeightsOf, tuple[float, float]] = {}
    for number, phase in enumerate(table.phases):
        for visit in phase.visits:
            # Without iterations, the order of the phases is that of all.
            iteration = visit.iteration if table.in_each_iteration else 0
            place = trained[WeightsOf(phase.model, visit.iteration)] = iteration, number
            yield _Piece(visit.stage, phase.name, phase.steps, place)
    yield from _of_minings(config, table, trained)
    phases = {phase.name for phase in table.phases}
    for kind in table.in_each_iteration:
        if kind not in phases and kind not in _OF_MININGS:
            has_it = filter(table.is_refreshed, range(table.iterations + 1))
            yield from (_Piece(f"{kind}/{iteration}", kind, place=(iteration, _LAST)) for iteration in has_it)
    if not config.learns_from_queries:
        return
    if not table.in_each_iteration:
        behind = {weights.model: (iteration, number + 0.6) for weights, (iteration, number) in trained.items()}
        for model in config.models:
            yield _Piece(f"{_EVALUATE}/{model}", _EVALUATE, place=behind.get(model, (_LAST, -1)))
    mixes = config.evaluation.fuse and config.evaluation.fusion_candidates == "hybrid"
    if mixes:
        yield _Piece("fusion/dev", _EVALUATE, _OF_A_MIXTURE, (_LAST, 0))
    if config.evaluation.test_at_end:
        states = min(2, table.iterations + 1) if table.in_each_iteration else len(config.models)
        yield _Piece(f"{_EVALUATE}/test", _EVALUATE, float(states), (_LAST, 1))
        if mixes:
            yield _Piece("fusion/test", _EVALUATE, _OF_A_MIXTURE, (_LAST, 2))


def _of_minings(config: Config, table: Timetable, trained: Mapping[WeightsOf, tuple[float, float]]) -> Iterator[_Piece]:
    def place_behind(weights: WeightsOf) -> tuple[float, float]:
        """Of what is made with weights: right behind the stage that trains them, before all others without one."""
        iteration, number = trained.get(weights, (-1, -1))
        return iteration, number + 0.5

    def place_before(visit: Visit) -> tuple[float, float]:
        """Of what is made for a visit: right before it."""
        iteration, number = trained[WeightsOf(visit.phase.model, visit.iteration)]
        return iteration, number - 0.25

    searched = [mining.weights for mining in table.minings if mining.weights is not None]
    if config.learns_from_queries and config.evaluation.zero_shot:
        searched += [WeightsOf(model, None) for model in table.encoders]
    for weights in dict.fromkeys(searched):
        name, kind, place = table.artifact(weights), config.models[weights.model].kind, place_behind(weights)
        yield _Piece(f"encode/{name}", f"encode {kind}", place=place)
        if kind == "retriever":  # others search what encoding writes
            yield _Piece(f"index/{name}", "index", place=place)
    for mining in table.minings:
        if mining.weights is not None:
            kind, place = f"candidates {mining.retriever}", place_behind(mining.weights)
            yield _Piece(f"candidates/{mining.name}", kind, place=place)
    for name, joint in table.joint.items():
        if not joint.is_cut:
            place = next((place_before(visit) for visit in table.visits if visit.candidates == name), (_LAST, _LAST))
            yield _Piece(f"negatives/{name}", "negatives", place=place)
    for name, visits in table.rescored.items():
        place = place_before(visits[0])
        yield _Piece(f"rescore/{name}", "rescore", place=place)
        drawn_from = table.joint.get(visits[0].candidates)
        if drawn_from is not None and not drawn_from.is_cut:
            yield _Piece(f"negatives/{name}", "negatives", place=place)

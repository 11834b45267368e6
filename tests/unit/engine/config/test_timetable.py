"""The timetable: every step has its place, and who draws from which candidates stands in the table alone."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.ar2 import Ar2Config, WarmupRankerConfig, WarmupRetrieverConfig, ar2_timetable
from engine.config.schedule import Schedule
from engine.config.timetable import Phase, Timetable, WeightsOf
from engine.config.training import OptimConfig, PhaseConfig

LINEAR = Schedule(OptimConfig(lr=1.0, warmup_ratio=0.2), 10)


def table(**game: Any) -> Timetable:
    return ar2_timetable(
        Ar2Config(iterations=3, **game), WarmupRetrieverConfig(steps=7), WarmupRankerConfig(steps=5, num_negatives=20)
    )


# --- learning rates --------------------------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_towards_zero() -> None:
    rates = [LINEAR.lr(step) for step in range(11)]
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3]), "the first step already learns"
    assert rates[2] == 1.0
    assert rates[2:] == pytest.approx([1 - k / 8 for k in range(9)])
    assert rates[10] == 0.0


def test_a_constant_schedule_stays_at_its_peak() -> None:
    schedule = Schedule(OptimConfig(lr=0.5, warmup_ratio=0.2, schedule="constant"), 10)
    assert [schedule.lr(step) for step in (2, 5, 9, 30)] == [0.5] * 4
    assert schedule.lr(0) < schedule.lr(1) < 0.5


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert Schedule(OptimConfig(lr=0.5, warmup_ratio=0.0), 4).lr(0) == 0.5


def test_a_schedule_of_one_step_learns() -> None:
    assert Schedule(OptimConfig(lr=0.5, warmup_ratio=0.1), 1).lr(0) == 0.5


# --- phases and their visits -----------------------------------------------------------------------------------------


def test_a_phase_goes_on_in_its_schedule_from_visit_to_visit() -> None:
    """AR2 Table 9 counts the steps of the game over all iterations."""
    phase = Phase("p", "s", "m", 5, 4, 2, 1, OptimConfig(), ("a", "b", "c"), first_iteration=1)
    assert [(visit.stage, visit.candidates, visit.first_step) for visit in phase.visits] == [
        ("p/1", "a", 0),
        ("p/2", "b", 5),
        ("p/3", "c", 10),
    ]
    assert (phase.total_steps, phase.schedule.total_steps) == (15, 15)
    assert [list(visit.places)[:: 5 * 4 - 1] for visit in phase.visits] == [[0, 19], [20, 39], [40, 59]]


@pytest.mark.parametrize(
    ("order", "of_ranker"), [("paper", ["001", "002", "003"]), ("released", ["000", "001", "002"])]
)
def test_who_draws_from_which_candidates(order: str, of_ranker: list[str]) -> None:
    """In the paper's order the ranker learns from the refreshed index, in the released one from the one before."""
    phases = {phase.name: phase for phase in table(order=order).phases}
    assert list(phases["retriever"].candidates) == ["000", "001", "002"]
    assert list(phases["ranker"].candidates) == of_ranker
    assert [phases[name].visits[0].stage for name in phases] == [
        "warmup_retriever",
        "warmup_ranker",
        "retriever/1",
        "ranker/1",
    ]
    assert (phases["warmup_retriever"].candidates, phases["warmup_ranker"].candidates) == (("bm25",), ("000",))


def test_candidates_must_last_for_the_largest_n_that_is_drawn_from_them() -> None:
    game = table(num_negatives=4)
    assert [game.needed(name) for name in ("bm25", "000", "001", "003")] == [1, 20, 4, 4]
    assert table(order="released").needed("003") == 0, "nobody draws from the last refresh"
    assert game.most_negatives == 20


def test_every_candidates_name_is_mined() -> None:
    for order in ("paper", "released"):
        game = table(order=order)
        assert {visit.candidates for visit in game.visits} <= {mining.name for mining in game.minings}


def test_what_the_start_finds_is_mined_once_for_whoever_draws_from_it() -> None:
    warm, ranker = WarmupRetrieverConfig(candidates="zero_shot", bm25_depth=50), WarmupRankerConfig()
    filters = {"filters": [{"name": "constrained", "within": "zero_shot", "top_k": 200}]}
    for game in (
        Ar2Config(),
        Ar2Config(further_retrievers=("zero_shot",)),
        Ar2Config.model_validate({"negatives": filters}),
    ):
        found = ar2_timetable(game, warm, ranker)
        assert found.mining("zero-shot").weights == WeightsOf("retriever", None)
        assert len({one.name for one in found.minings}) == len(found.minings)
        assert "bm25" not in {one.name for one in found.minings}
        assert found.starts == ("retriever",)
        (first,) = found.phase("warmup_retriever").visits
        assert found.candidates_of(first) == ("zero-shot",)
        assert found.most_drawn("zero-shot") == 50, "however deep others read"
    assert found.mining("zero-shot").top_k == 200
    for idle in (WarmupRetrieverConfig(), WarmupRetrieverConfig(candidates="zero_shot", hard_negatives=0)):
        assert ar2_timetable(Ar2Config(), idle, ranker).starts == ()


def test_without_a_ranker_the_retriever_plays_alone_on_what_it_found() -> None:
    """ANCE: no phase, no state and no stage of a ranker, so that none is loaded, measured or exported."""
    game = table(objective="ance", in_batch_negatives="rank")
    assert [visit.stage for visit in game.visits] == ["warmup_retriever", "retriever/1", "retriever/2", "retriever/3"]
    assert game.phase("retriever").candidates == ("000", "001", "002")
    assert (game.phase("retriever").opponent, game.phase("retriever").pool) == (None, "rank")
    assert table(objective="ance").phase("retriever").pool == "none"
    assert game.in_each_iteration == ("retriever", "encode", "index", "candidates", "evaluate")
    assert game.needed("000") == 15, "D0's twenty negatives are nobody's"


def test_the_games_differ_in_their_rows() -> None:
    """Whoever compares rows, such as a branch of a run, must see that D0 of one game is none of another's."""
    ours, irgan = table(), table(objective="irgan")
    assert [phase.name for phase in ours.phases if phase != irgan.phase(phase.name)] == [
        "warmup_ranker",
        "retriever",
        "ranker",
    ]
    assert ours.phase("warmup_retriever") == table(objective="ance").phase("warmup_retriever"), "all begin from one G0"
    assert irgan.in_each_iteration == ours.in_each_iteration


@pytest.mark.parametrize(("restarts", "state"), [("never", None), ("warmup", "000"), ("pretrained", "zero-shot")])
def test_a_ranker_that_begins_again_has_a_schedule_for_each_iteration(restarts: str, state: str | None) -> None:
    """Symptom: it would begin from its first weights with the last, lowest rates of the whole game."""
    phase = table(ranker_restarts=restarts, ranker=PhaseConfig(steps=5)).phase("ranker")
    assert phase.restarts == state
    rates = [[phase.schedule.lr(visit.first_of_schedule + step) for step in range(5)] for visit in phase.visits]
    assert (rates[0] == rates[1] == rates[2]) == (restarts != "never")
    assert rates[2][-1] < rates[0][-1] or restarts != "never"
    assert [visit.places.start for visit in phase.visits] == [0, 5 * 64, 10 * 64], "the queries go on"


def test_a_game_without_iterations_is_its_warm_ups() -> None:
    game = ar2_timetable(Ar2Config(iterations=0), WarmupRetrieverConfig(), WarmupRankerConfig())
    assert [visit.stage for visit in game.visits] == ["warmup_retriever", "warmup_ranker"]


def test_the_steps_of_a_recipe_are_those_of_its_sections() -> None:
    game = table(retriever=PhaseConfig(steps=11, batch_size=6), ranker=PhaseConfig(steps=2))
    steps = {visit.stage: visit.phase.steps for visit in game.visits}
    assert (steps["warmup_retriever"], steps["warmup_ranker"], steps["retriever/2"], steps["ranker/3"]) == (7, 5, 11, 2)
    assert [phase.name for phase in game.phases_of("ranker")] == ["warmup_ranker", "ranker"]

"""What a recipe still takes, by what its finished stages took."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.config.remaining import Left, Now, left_of
from engine.config.timetable import Sizes
from tests.distributed.processes import ROOT

REFRESH = ("encode", "index", "candidates")


def config_of(recipe: str, *words: str) -> Config:
    return load_config(ROOT / "configs" / f"{recipe}.yaml", list(words))


def took(seconds: float, *names: str) -> dict[str, Any]:
    return {name: {"seconds": seconds} for name in names}


@pytest.fixture(scope="module")
def game() -> Config:
    """Three iterations: 6 steps of the retriever, 4 of the ranker; warm-ups of 10 and 8."""
    return config_of("tiny", "ar2.iterations=3")


def test_nothing_is_told_before_anything_was_measured(game: Config) -> None:
    assert left_of(game, {}, None) is None
    assert left_of(game, took(9.0, "shards", "bm25", "evaluate/yardsticks"), None) is None
    assert left_of(game, {}, Now("warmup_retriever", 0, 10, None)) is None


def test_the_running_stage_alone_is_a_lower_bound(game: Config) -> None:
    assert left_of(game, {}, Now("warmup_retriever", 4, 10, 2.0)) == Left(3.0, False)
    assert left_of(game, {}, Now("shards", 1, 5, 0.5)) == Left(8.0, False), "also what comes once"


def test_each_kind_of_work_has_its_own_pace(game: Config) -> None:
    """An hour of encoding says nothing of the seconds of a step."""
    ledger = {
        **took(10.0, "warmup_retriever"),
        **took(16.0, "warmup_ranker"),
        **took(12.0, "retriever/1"),
        **took(2.0, "ranker/1"),
        **took(100.0, "encode/zero-shot", "encode/000", "encode/001"),
        **took(7.0, "index/zero-shot", "index/000", "index/001"),
        **took(3.0, "candidates/000", "candidates/001"),
        **took(5.0, "evaluate/0", "evaluate/1"),
    }
    two_iterations = 2 * (12.0 + 2.0 + 100.0 + 7.0 + 3.0 + 5.0)
    test_split = 2 * 5.0 + 5.0  # of G0 with D0 and of G with D; and of a mixture, on dev and on test
    assert left_of(game, ledger, None) == Left(two_iterations + test_split, True)
    running = Now("retriever/2", 2, 6, 1.0)
    assert left_of(game, ledger, running) == Left(two_iterations - 12.0 + 4.0 + test_split, True)
    assert left_of(game, {**ledger, **took(5.0, *_all_stages(), *_AT_THE_END)}, None) is None


_AT_THE_END = ("fusion/dev", "evaluate/test", "fusion/test")


def _all_stages() -> list[str]:
    iterations = [f"{kind}/{t}" for kind in ("retriever", "ranker", "evaluate") for t in (1, 2, 3)]
    return [*iterations, *(f"{kind}/{t:03d}" for kind in REFRESH for t in range(4))]


def test_the_first_visit_of_a_phase_tells_of_the_next_ones(game: Config) -> None:
    """Steps of half a second: two are left here, and six in each of the two further visits."""
    assert left_of(game, {}, Now("retriever/1", 4, 6, 2.0)) == Left(1.0 + 2 * 3.0, False)


def test_a_counter_of_one_system_is_not_that_of_an_evaluation(game: Config) -> None:
    assert left_of(game, {}, Now("evaluate/0", 1, 3, 2.0)) == Left(1.0, False)


def test_what_there_is_comes_from_the_timetable() -> None:
    """The time left was that of AR2's stages, whatever the recipe consisted of."""
    config = config_of("ict_tiny").sized(Sizes(0, 500))
    epochs, steps = config.timetable.iterations, config.timetable.phases[0].steps
    assert (epochs, steps) > (1, 1)
    ledger = {**took(5.0 * steps, "ict/1"), **took(3.0, "held_out/0", "held_out/1")}
    assert left_of(config, ledger, None) == Left((epochs - 1) * (5.0 * steps + 3.0), True)
    several = config_of("r2anker_tiny").sized(Sizes(100, 300))
    ledger = took(2.0, "encode/dense-001", "index/dense-001", "candidates/dense-001")
    left = left_of(several, ledger, None)
    assert left is not None
    assert not left.is_all, "neither steps nor lexical vectors were measured"
    again = [one for one in several.timetable.minings if one.model == "dense" and one.name != "dense-001"]
    searched = {one.weights for one in again if one.weights is not None and one.weights.iteration is not None}
    zero_shot = 2 if several.evaluation.zero_shot else 0
    assert left.seconds == 2.0 * (2 * len(searched) + len(again) + zero_shot)


def test_what_comes_after_the_stop_is_not_of_this_run() -> None:
    """Symptom: half an hour left, of a run that was to end behind the stage that ran."""
    words = "ar2.iterations=3", "evaluation.zero_shot=false"
    ledger = {
        **took(10.0, "warmup_retriever"),
        **took(100.0, "encode/000"),
        **took(7.0, "index/000"),
        **took(3.0, "candidates/000"),
        **took(16.0, "warmup_ranker"),
        **took(5.0, "evaluate/0"),
        **took(12.0, "retriever/1"),
    }

    def until(stage: str) -> Left | None:
        return left_of(config_of("tiny", *words, f"run.stop_before={stage}"), ledger, Now("ranker/1", 1, 4, 1.0))

    refresh = 100.0 + 7.0 + 3.0
    assert until("retriever/2") == Left(refresh + 3.0 + 5.0, True)
    assert until("evaluate/1") == Left(refresh + 3.0, True)
    assert until("encode/002") == Left(refresh + 3.0 + 5.0 + 12.0, True)
    assert until("fusion/dev") == Left(3 * refresh + 3.0 + 2 * 4.0 + 3 * 5.0 + 2 * 12.0, True)
    mixed = until("evaluate/test")
    assert mixed == Left(3 * refresh + 3.0 + 2 * 4.0 + 3 * 5.0 + 2 * 12.0 + 2.5, True), "its mixture comes before"
    assert until("no such stage") == left_of(config_of("tiny", *words), ledger, Now("ranker/1", 1, 4, 1.0))


def test_without_iterations_the_phases_are_in_their_order() -> None:
    several = config_of("r2anker_tiny", "run.stop_before=ranker").sized(Sizes(100, 300))
    ledger = took(2.0, *(visit.stage for visit in several.timetable.visits if visit.stage not in ("ranker", "student")))
    searched = ("dense-zero-shot", "lexical-zero-shot", "dense-001", "lexical-001", "dense-002", "lexical-002")
    ledger |= took(2.0, *(f"encode/{one}" for one in searched), *(f"index/{one}" for one in searched))
    ledger |= took(2.0, *(f"candidates/{one}" for one in searched), "negatives/joint")
    ledger |= took(8.0, "evaluate/dense", "evaluate/lexical")
    del ledger["encode/lexical-002"], ledger["negatives/joint"]
    assert left_of(several, ledger, Now("negatives/joint", 1, 2, 1.0)) == Left(2.0 + 1.0, True)
    del ledger["evaluate/lexical"]
    assert left_of(several, ledger, Now("negatives/joint", 1, 2, 1.0)) == Left(2.0 + 1.0 + 8.0, True)

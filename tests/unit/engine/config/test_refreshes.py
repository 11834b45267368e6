"""Rarer refreshes: all draw from what a refresh has found, and nothing that was mined before an end is mined anew."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from engine.config.ar2 import Ar2Config, Ar2Recipe, WarmupRankerConfig, WarmupRetrieverConfig, ar2_timetable
from engine.config.file import differences, load_config
from engine.config.remaining import left_of
from engine.config.timetable import Timetable, WeightsOf, iteration_name
from engine.data.batches import rows_drawn
from engine.errors import ConfigError
from engine.refresh.refresh import stages_beside
from engine.results import kept_shares
from tests.distributed.processes import ROOT

SIMANS: dict[str, Any] = {"sampler": {"name": "simans", "a": 0.5}}
TINY = ROOT / "configs" / "tiny.yaml"
GAMES: list[dict[str, Any]] = [
    {"order": order, "overlap": overlap, "iterations": iterations, "refresh_every": every, "refresh_until": until}
    for order, overlap, iterations, every, until in product(
        ("paper", "released"), ("none", "ranker"), (0, 1, 2, 5, 7), (1, 2, 3, 9), (None, 0.9)
    )
    if (order, overlap) != ("released", "ranker")
]
SPLIT = ("ar2.overlap=split", "ar2.refresh_devices=2")


def table(ended: int | None = None, **game: Any) -> Timetable:
    settings = Ar2Config(**game, retriever={"steps": 6, "batch_size": 5}, ranker={"steps": 4, "batch_size": 3})
    warm = WarmupRetrieverConfig(steps=7), WarmupRankerConfig(steps=5, batch_size=2, num_negatives=20)
    return ar2_timetable(settings, *warm, ended=ended)


def refreshed(found: Timetable) -> list[int]:
    return [iteration for iteration in range(found.iterations + 1) if found.is_refreshed(iteration)]


def test_every_visit_draws_from_the_newest_refresh_that_its_order_allows() -> None:
    for game in GAMES:
        found = table(**game)
        every, last = game["refresh_every"], game["iterations"]
        assert refreshed(found) == sorted({*range(0, last + 1, every), last})
        assert [one.name for one in found.minings if one.model] == [iteration_name(one) for one in refreshed(found)]
        waits = game["order"] == "paper" and game["overlap"] == "none"
        for visit in found.visits:
            if not visit.phase.is_warmup:
                until = visit.iteration - (0 if waits and visit.phase.name == "ranker" else 1)
                newest = max(one for one in refreshed(found) if one <= until)
                assert visit.candidates == iteration_name(newest), (game, visit.stage)


def test_a_visit_is_rescored_by_the_newest_retriever_where_an_older_one_found_its_candidates() -> None:
    """Symptom: a sampler would go by scores of a retriever that is iterations old."""
    num_rescored = 0
    for game in GAMES:
        found = table(**game, rescore="always")
        for visit in found.visits:
            if visit.phase.is_warmup:
                assert visit.rescored_by is None
                continue
            trains_after = game["order"] == "paper" and visit.phase.name == "ranker"
            newest = visit.iteration if trains_after else visit.iteration - 1
            is_stale = int(visit.candidates) != newest
            assert visit.rescored_by == (WeightsOf("retriever", newest) if is_stale else None), (game, visit.stage)
            assert visit.rescored == (f"{visit.candidates}@{newest:03d}" if is_stale else "")
            num_rescored += is_stale
        names = {visit.rescored for visit in found.visits if visit.rescored}
        assert set(found.rescored) == names
        assert sum(map(len, found.rescored.values())) == sum(bool(visit.rescored) for visit in found.visits)
        assert not table(**game).rescored, "nobody asks for scores"
        assert not table(**game, rescore="never", negatives=SIMANS).rescored
        assert set(table(**game, negatives=SIMANS).rescored) == names
    assert num_rescored > 100


def test_who_asks_for_scores_or_ranks() -> None:
    game = {"iterations": 2, "refresh_every": 2}
    for asks, negatives in (
        (True, SIMANS),
        (True, {"sampler": {"top_k": 20}}),
        (True, {"sampler": {"name": "rank_window", "first_rank": 2, "last_rank": 9}}),
        (True, {"filters": [{"name": "margin"}]}),
        (False, {"filters": [{"name": "margin", "scores": "teacher"}], "teacher_scores": "/scores"}),
        (False, {"filters": [{"name": "answers"}]}),
    ):
        assert bool(table(**game, negatives=negatives).rescored) is asks, negatives
    untrained = Ar2Config(**game, negatives=SIMANS, retriever={"steps": 0})
    assert not untrained.rescores, "its scores would be the same"


def test_an_end_changes_nothing_that_was_mined_before_it() -> None:
    """Symptom: with `mine: sampled`, later iterations would draw queries that the last refresh has not searched."""
    cases = [(game, end) for game in GAMES if game["refresh_until"] for end in refreshed(table(**game))[1:-1]]
    assert len(cases) > 10
    for game, end in cases:
        planned = table(**game)
        ended = table(end, **game)
        assert refreshed(ended) == [one for one in refreshed(planned) if one <= end] + [planned.iterations]
        for one in refreshed(ended):
            name = iteration_name(one)
            stages = [[visit.stage for visit in found.drawing_from(name)] for found in (planned, ended)]
            assert stages[0] == stages[1], name
            assert planned.needed(name) == ended.needed(name)
            rows = rows_drawn(planned.drawing_from(name), 1, 40)
            for visit in ended.visits:
                if visit.candidates == name:
                    assert np.isin(rows_drawn([visit], 1, 40), rows).all()


def test_pools_are_made_for_all_that_may_draw_from_them() -> None:
    game = {"iterations": 4, "refresh_until": 0.5, "further_retrievers": ("bm25",)}
    planned, ended = table(**game), table(2, **game)
    for found in (planned, ended):
        drawing = [visit.stage for visit in found.drawn_by("002")]
        assert drawing == ["retriever/3", "retriever/4", "ranker/2", "ranker/3"], "the fourth ranker has the last one"
        assert drawing == [visit.stage for visit in found.drawing_from("002")]
    assert ended.phase("retriever").candidates == ("000", "001", "002", "002")
    assert planned.joint["002"] == ended.joint["002"]


def test_steps_of_a_model_lie_between_its_states() -> None:
    found = table(iterations=5)
    assert [found.steps_between("retriever", *pair) for pair in ((0, 1), (1, 4), (3, 3))] == [6, 18, 0]
    assert found.steps_between("ranker", 0, 2) == 8
    assert found.refreshed_before(3) == 2
    assert table(iterations=5, refresh_every=2).refreshed_before(5) == 4


def test_the_first_refresh_that_keeps_enough_ends_them() -> None:
    config = load_config(TINY, ["ar2.iterations=5", "ar2.refresh_until=0.8"])
    assert isinstance(config, Ar2Recipe)
    for kept, expected in (
        ({}, [0, 1, 2, 3, 4, 5]),
        ({1: 0.79, 2: None}, [0, 1, 2, 3, 4, 5]),
        ({1: 0.5, 2: 0.8, 3: 0.4}, [0, 1, 2, 5]),
        ({5: 1.0}, [0, 1, 2, 3, 4, 5]),
    ):
        assert refreshed(config.with_measured(kept).timetable) == expected
    assert refreshed(load_config(TINY).with_measured({1: 1.0}).timetable) == [0, 1, 2], "nothing asks for it"


def test_without_any_of_it_the_timetable_is_that_of_every_iteration() -> None:
    assert table(iterations=3).refreshes is None
    assert table(iterations=3, refresh_every=3, refresh_until=None).iterations_with("index") == 1
    assert table(iterations=3, refresh_every=3).iterations_with("ranker") == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("ar2.overlap=ranker", "ar2.order=released"), "set order to paper"),
        (("ar2.overlap=ranker", "ar2.objective=ance"), "trains no ranker"),
        (("ar2.overlap=ranker", "ar2.ranker.steps=0"), "ranker.steps is 0"),
        (("ar2.overlap=ranker", "ar2.ranker.micro_batch_tokens=auto"), "name a number"),
        (("ar2.refresh_until=0",), "greater than 0"),
        (("ar2.refresh_every=0",), "greater than or equal to 1"),
        (("ar2.overlap=split",), "refresh_devices 0, so that nobody would refresh: set refresh_devices"),
        (("ar2.refresh_devices=1",), "refresh_devices is 1 and overlap none, .*: set overlap to split"),
        ((*SPLIT, "ar2.order=released"), "set order to paper, or leave overlap and refresh_devices out"),
        ((*SPLIT, "ar2.objective=ance"), "trains no ranker, .*: leave overlap and refresh_devices out"),
        ((*SPLIT, "ar2.refresh_devices=-1"), "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(TINY, list(words))


def test_a_split_game_is_an_overlapped_one_whose_corpus_is_encoded_beside() -> None:
    """Symptom: a start with other devices for the refresh would be refused, or train on other candidates."""
    assert load_config(TINY, ["ar2.overlap=ranker"]).refresh_devices == load_config(TINY).refresh_devices == 0
    split = load_config(TINY, [*SPLIT, "ar2.ranker.micro_batch_tokens=auto"])  # which finds its GPU as it will be
    assert split.refresh_devices == 2
    assert split.timetable.beside == ("encode", "index", "candidates")
    ranker, other = (load_config(TINY, [*words]) for words in (("ar2.overlap=ranker",), (*SPLIT,)))
    assert replace(other.timetable, beside=ranker.timetable.beside) == ranker.timetable
    assert stages_beside(other.timetable, "001") == ("encode/001", *stages_beside(ranker.timetable, "001"))
    assert not differences(load_config(TINY, [*SPLIT, "ar2.refresh_devices=5"]), other)
    assert differences(ranker, other), "where lists are scored anew, another encoding of them rounds otherwise"


def test_status_counts_the_refreshes_that_are_left_and_what_runs_beside_once() -> None:
    """Symptom: a run of ten iterations with two refreshes would be said to have the hours of ten left."""

    def left(*words: str, share: float = 0.1) -> float:
        without = "evaluation.test_at_end=false", "evaluation.fuse=false"
        config = load_config(TINY, ["ar2.iterations=7", *without, *words])
        names = ("zero-shot", "000", "001")
        done = {f"{kind}/{name}": {"seconds": 100.0} for kind in ("encode", "index", "candidates") for name in names}
        once = ("retriever/1", "ranker/1", "evaluate/0", "evaluate/1", "warmup_retriever", "warmup_ranker")
        done |= {name: {"seconds": 10.0} for name in once}
        kept = {"before": 0, "lag_steps": 6, "weights_changed": 0.1, "kept": share, "queries": 4}
        done["staleness/1"] = {"seconds": 0.0, "result": kept}
        found = left_of(config.with_measured(kept_shares(done)), done, None)
        assert found is not None
        assert found.is_all
        return found.seconds

    assert left() == 6 * 330.0
    assert left("ar2.refresh_every=3") == 6 * 20 + 3 * 310.0, "iterations 3, 6 and 7"
    assert left("ar2.refresh_until=0.5") == 6 * 330.0
    assert left("ar2.refresh_until=0.5", share=0.6) == 6 * 20 + 310.0, "the last one alone"
    assert left("ar2.overlap=ranker") == 6 * (10 + 100 + 10 + 200.0), "the ranker's phase is the shorter one"
    assert left(*SPLIT) == 6 * (10 + 10 + 300.0), "and the encoding is beside it, too"

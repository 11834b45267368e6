"""Filters and samplers are chosen by name, with numbers of their own; a timetable says what they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.ar2 import Ar2Config, WarmupRankerConfig, WarmupRetrieverConfig, ar2_timetable
from engine.config.file import dump_config, load_config
from engine.config.negatives import Joint, NegativesConfig, RankWindowConfig, SimAnsConfig, UniformConfig
from engine.config.r2anker import R2ankerConfig, r2anker_timetable
from engine.config.timetable import Timetable
from engine.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
TINY, R2ANKER = CONFIGS / "tiny.yaml", CONFIGS / "r2anker_tiny.yaml"


def ar2(depth: int = 100, **game: Any) -> Timetable:
    return ar2_timetable(
        Ar2Config.model_validate({"iterations": 2} | game),
        WarmupRetrieverConfig(bm25_depth=depth),
        WarmupRankerConfig(),
    )


def r2anker(**game: Any) -> Timetable:
    return r2anker_timetable(R2ankerConfig.model_validate(game), ("dense",), 1000)


def test_the_default_is_the_plain_recipe() -> None:
    assert NegativesConfig().is_plain
    assert not NegativesConfig(sampler=UniformConfig(top_k=5)).is_plain
    table = ar2()
    assert table.joint == {}, "each phase draws from one retriever's candidates, as they were mined"
    assert [(one.name, one.top_k) for one in table.minings] == [("bm25", 100), ("000", 100), ("001", 100), ("002", 100)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ar2.negatives.sampler={name: simans, a: .5, b: 1}"], SimAnsConfig(name="simans", a=0.5, b=1.0)),
        (
            ["ar2.negatives.sampler.name=rank_window", "ar2.negatives.sampler.last_rank=020"],
            RankWindowConfig(name="rank_window", last_rank=20),
        ),
        (["ar2.negatives.sampler.top_k=1_0"], UniformConfig(top_k=10)),
    ],
)
def test_a_sampler_is_chosen_by_name(words: list[str], expected: object) -> None:
    config: Any = load_config(TINY, words)
    assert config.ar2.negatives.sampler == expected


def test_filters_are_read_in_their_order_and_written_back(tmp_path: Path) -> None:
    filters = f"[{{name: answers}}, {{name: additions, file: {tmp_path}/010}}, {{name: margin, share: 1e-1}}]"
    config: Any = load_config(TINY, [f"ar2.negatives.filters={filters}", "ar2.negatives.repeats=yes"])
    found = config.ar2.negatives
    assert [one.name for one in found.filters] == ["answers", "additions", "margin"]
    assert (found.filters[1].file, found.filters[2].share, found.repeats) == (tmp_path / "010", 0.1, True)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ("sampler: {name: best}", "best"),
        ("sampler: {name: simans}", r"sampler\.a' is not given"),
        ("sampler: {name: simans, a: 3, b: 1, form: absolute}", "the form `absolute` has no shift"),
        ("sampler: {name: rank_window, first_rank: 9, last_rank: 3}", "last_rank 3 is above first_rank 9"),
        ("sampler: {name: uniform, last_rank: 3}", "unknown key .*last_rank"),
        ("filters: [{name: additions}]", r"filters\.0\.file' is not given"),
        ("filters: [{name: ranker_thresholds, reject_above: 1.5}]", "less than 1"),
        ("teacher_scores: x, filters: [{name: redistributed}, {name: margin}]", "must be the last filter"),
        (
            "teacher_scores: x, filters: [{name: redistributed}], sampler: {name: simans, a: 1}",
            "must be the last filter",
        ),
        ("filters: [{name: ranker_thresholds}]", "asks for a teacher's scores: name them by teacher_scores"),
        ("filters: [{name: margin, scores: teacher}]", "asks for a teacher's scores"),
        ("sampler: {name: uniform, top_k: 3}", "negatives are drawn by .* lower num_negatives"),
        ("sampler: {name: rank_window, first_rank: 18, last_rank: 90}", "negatives are drawn by"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_read(negatives: str, message: str) -> None:
    """N smaller than n is found out here where the configuration says so, and not hours later."""
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, [f"ar2.negatives={{{negatives}}}", "ar2.num_negatives=4", "ar2.top_k=20"])


def test_further_retrievers_join_each_iteration_in_a_pool() -> None:
    table = ar2(depth=30, further_retrievers=["bm25", "lists/run.trec"], top_k=50)
    assert table.joint["001"] == Joint(("001", "bm25", "run-file-0"), 50)
    assert table.joint["bm25"] == Joint(("bm25",), 30), "G0 draws from as many as it always did"
    assert [(one.name, one.top_k, one.path) for one in table.minings] == [
        ("bm25", 50, ""),
        *((name, 50, "") for name in ("000", "001", "002")),
        ("run-file-0", 50, "lists/run.trec"),
    ]
    assert [table.needed(name) for name in ("bm25", "001", "run-file-0")] == [1, 0, 0], "a pool fills itself"
    assert (table.drawn("000"), table.drawn("001")) == (15, 15)
    assert {visit.stage for visit in table.drawing_from("bm25")} == {
        *("warmup_retriever", "warmup_ranker", "retriever/1", "retriever/2", "ranker/1", "ranker/2")
    }
    assert table.most_drawn("001") == 150
    assert "bm25" not in ar2(depth=80, further_retrievers=["bm25"], top_k=50).joint, "deep enough as it is"


def test_what_a_filter_keeps_to_is_mined_as_deep_as_it_asks() -> None:
    table = ar2(negatives={"filters": [{"name": "constrained", "top_k": 1000}]})
    assert table.mining("bm25").top_k == 1000
    assert (table.joint["001"].members, table.joint["001"].within) == (("001",), ("bm25",))
    assert table.joint["bm25"] == Joint(("bm25",), 100)
    assert "retriever/1" in {visit.stage for visit in table.drawing_from("bm25")}, "its queries are searched too"


def test_the_joint_pool_of_all_retrievers() -> None:
    table = r2anker(retrievers=["bm25", "dense", "run.trec"], negatives={"sampler": {"name": "uniform", "top_k": 150}})
    assert table.joint["joint"].members == ("bm25", "dense-002", "run-file-0")
    assert table.joint["joint"].top_k == 200
    assert (table.most_drawn("joint"), table.needed("dense-002"), table.drawn("joint")) == (450, 0, 40)
    again = r2anker(retrievers=["dense@1", "dense"], second_stage="mined_and_bm25", bm25_depth=100)
    assert again.joint["joint"].members == ("dense-001", "dense-002")
    assert again.joint["dense-hard"] == Joint(("bm25", "dense-001"), 200)
    assert again.joint["bm25"] == Joint(("bm25",), 100)


def test_a_filter_may_name_any_retriever() -> None:
    filters = [{"name": "constrained", "within": "dense@1", "top_k": 300}]
    table = r2anker(retrievers=["bm25", "dense"], negatives={"filters": filters})
    assert (table.joint["joint"].within, table.mining("dense-001").top_k) == (("dense-001",), 300)
    assert table.joint["dense-001"] == Joint(("dense-001",), 200), "D2 draws from as many as it always did"


def test_a_filter_may_name_a_run_file() -> None:
    filters = [{"name": "constrained", "within": "other.trec", "top_k": 500}]
    table = r2anker(retrievers=["dense", "other.trec"], negatives={"filters": filters})
    (one,) = table.joint["joint"].negatives.filters
    assert (one.name, getattr(one, "within", ""), table.mining("run-file-0").top_k) == (
        "constrained",
        "run-file-0",
        500,
    )

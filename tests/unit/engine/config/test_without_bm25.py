"""A recipe without BM25 (`bm25.enabled`): what is left of its timetable and its rows, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.config.timetable import Sizes
from engine.data.negatives import NoNegatives
from engine.errors import ConfigError
from engine.evaluation.systems import every_system, fused_system

CONFIGS = Path(__file__).parents[4] / "configs"
WITHIN = "{filters: [{name: constrained}]}"
RUN_FILE = "a/ranking.trec"


def recipe(name: str, *words: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", ["bm25.enabled=false", *words])


@pytest.mark.parametrize(
    ("name", "words", "option", "remedy"),
    [
        (
            "tiny",
            (),
            "warmup_retriever.candidates=bm25",
            "path of a TREC run file.*given.*hard_negatives=0 for in-batch",
        ),
        ("tiny", ("ar2.further_retrievers=[given,bm25]",), r"ar2.further_retrievers=\[given,bm25\]", "take bm25 out"),
        ("tiny", (f"ar2.negatives={WITHIN}",), "filter constrained in ar2.negatives.filters", "its `within`"),
        ("tiny", ("data.fallback_positive=answer",), "data.fallback_positive=answer", "leave it out"),
        (
            "tiny",
            ("warmup_retriever.candidates=given", "data.without_given=bm25"),
            "data.without_given=bm25",
            "set it to random",
        ),
        ("tiny", (), "warmup_retriever.candidates=bm25", r"zero_shot \(what the retriever finds before any training"),
        ("r2anker_tiny", (), "r2anker.candidates=bm25", "path of a TREC run file.* or to given"),
        ("r2anker_tiny", ("r2anker.retrievers=[bm25,dense]",), r"r2anker.retrievers=\[bm25,dense\]", "in its place"),
        (
            "r2anker_tiny",
            (f"r2anker.negatives={WITHIN}",),
            "filter constrained in r2anker.negatives.filters",
            "its `within`",
        ),
    ],
)
def test_what_needs_it_is_refused_with_what_to_do(name: str, words: tuple[str, ...], option: str, remedy: str) -> None:
    """Symptom guarded against: hours of shards and encoding, and then no index to draw negatives from."""
    with pytest.raises(ConfigError, match=rf"bm25.enabled is false, but .*{option}: .*{remedy}"):
        recipe(name, *words)


@pytest.mark.parametrize("word", ["r2anker.candidates=zero_shot", "r2anker.retrievers=[zero_shot,dense]"])
def test_several_retrievers_have_no_start_of_them_all(word: str) -> None:
    """Symptom: the word is taken for a file's path, and the message says that there is no such file."""
    with pytest.raises(ConfigError, match=r"zero_shot.*expected"):
        load_config(CONFIGS / "r2anker_tiny.yaml", [word])


@pytest.mark.parametrize("candidates", [RUN_FILE, "given", "given@ann"])
def test_the_warm_up_draws_from_what_is_named(candidates: str) -> None:
    config = recipe("tiny", f"warmup_retriever.candidates={candidates}")
    table = config.timetable
    (found,) = table.phase("warmup_retriever").candidates
    assert table.mining(found).retriever == ("run_file" if candidates == RUN_FILE else "given")
    assert {one.retriever for one in table.minings} == {table.mining(found).retriever, "dense"}


@pytest.mark.parametrize("word", ["warmup_retriever.hard_negatives=0", "warmup_retriever.steps=0"])
def test_a_warm_up_that_draws_none_needs_no_candidates(word: str) -> None:
    """Symptom guarded against: BM25 is built and asked for candidates that no step takes."""
    table = recipe("tiny", word).timetable
    assert table.phase("warmup_retriever").candidates == ("",)
    assert {one.retriever for one in table.minings} == {"dense"}
    with_bm25 = load_config(CONFIGS / "tiny.yaml", [word]).timetable
    assert with_bm25.phase("warmup_retriever").candidates == ("bm25",), "as it always was"
    with pytest.raises(ConfigError, match="1 negatives are to be drawn of 'q1'"):
        NoNegatives().draw("q1", 3, 1, np.random.default_rng(0))


def test_tables_and_mixtures_lack_its_row() -> None:
    config = recipe("tiny", "warmup_retriever.hard_negatives=0")
    plain = load_config(CONFIGS / "tiny.yaml", [])
    rows = [one.name for one in every_system(config, taken=1)]
    assert ["BM25", *rows] == [one.name for one in every_system(plain, taken=1)]
    parts = [one.name for one in fused_system(config, taken=1).parts]
    assert [*parts, "BM25"] == [one.name for one in fused_system(plain, taken=1).parts]


def test_the_retrievers_of_r2anker_begin_on_another_ranking() -> None:
    words, sizes = (f"r2anker.candidates={RUN_FILE}", "r2anker.second_stage=mined_and_bm25"), Sizes(100, 300)
    table = recipe("r2anker_tiny", *words).sized(sizes).timetable
    assert table.phase("dense_1").candidates == ("run-file-0",)
    assert table.mining("run-file-0").path == RUN_FILE
    assert table.joint["dense-hard"].members == ("run-file-0", "dense-001")
    assert table.joint["joint"].members[0] == "run-file-0"
    assert "bm25" not in (table.reranked or ())
    assert all(one.retriever != "bm25" for one in table.minings)
    plain = load_config(CONFIGS / "r2anker_tiny.yaml", []).sized(sizes).timetable
    assert (plain.reranked or ())[0] == plain.phase("dense_1").candidates[0] == "bm25"


def test_pre_training_on_documents_asks_for_nothing() -> None:
    assert recipe("ict_tiny").asks_for_bm25 == {}

"""The smallest R2ANKER recipe from end to end: every stage, killed in each new one, on fewer ranks, read by others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, losses_of, measured, summary_of, weights_of
from tests.e2e.starts import ROOT, Zygote, wait_until
from tests.e2e.test_resume import OFTEN, checkpointed, exists, in_ledger

R2ANKER = ROOT / "configs" / "r2anker_tiny.yaml"
WORDS = (*OFTEN, "data.generated_documents=160")
"""The ranker scores the candidates of every query: with half of the data it takes half of the time."""
TRAINED = ("dense_1", "dense_2", "lexical_1", "lexical_2", "ranker", "student")


@pytest.fixture(scope="module")
def made(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The recipe on two ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("r2anker") / "run"
    ended = zygote.recipe(f"run.path={folder}", *WORDS, num_ranks=2, config=R2ANKER).wait()
    assert ended.code == 0, ended.err[-6000:]
    return Finished(folder, ended)


def test_every_stage_is_there_in_the_order_of_the_paper(made: Finished) -> None:
    stages = list(ledger_of(made.folder))
    places = [stages.index(name) for name in (*TRAINED[:4], "ranker", "scores/ranker-001", "student", "export")]
    assert places == sorted(places)
    for retriever in ("dense", "lexical"):
        first, second = (stages.index(f"{retriever}_{state}") for state in (1, 2))
        assert first < stages.index(f"encode/{retriever}-001") < stages.index(f"candidates/{retriever}-001") < second


def test_the_ranker_is_measured_over_each_retriever_and_all_states_have_rows(made: Finished) -> None:
    rows = [(row["system"], row["over"]) for row in summary_of(made.folder) if row["split"] == "test"]
    assert {system for system, over in rows if over is None} == {
        *("hybrid", "BM25", "zero-shot-dense", "zero-shot-lexical", "D1", "D2", "L1", "L2", "S")
    }
    assert {over for system, over in rows if system == "R"} == {"BM25", "D2", "L2", "hybrid"}
    assert {over for system, over in rows if system == "fused"} == {"hybrid"}
    kept = json.loads((made.folder / "results" / "fusion.json").read_text())
    assert [part["system"] for part in kept["parts"]] == ["D2", "R", "L2", "BM25"]
    files = {path.name for path in (made.folder / "results").glob("test-R-*.trec")}
    assert len(files) == 4, "each ranking in a file of its own"


def test_the_second_stage_begins_from_the_pre_trained_weights_again(made: Finished) -> None:
    """Symptom: D2 would go on from D1, and so be trained twice as long as the paper's."""
    weights = made.folder / "weights"
    for model in ("dense", "lexical"):
        states = {state: load(weights / model / state) for state in ("zero-shot", "001", "002")}
        moved = {state: distance(states[state], states["zero-shot"]) for state in ("001", "002")}
        apart = distance(states["001"], states["002"])
        assert 0.3 < moved["002"] / moved["001"] < 3, "as far from the beginning as the first stage"
        assert apart > 0.3 * moved["002"], "and not behind it on one way"


def test_epochs_become_steps(made: Finished) -> None:
    sizes = ledger_of(made.folder)["sizes"]["result"]
    steps = max(step for stage, step, _ in losses_of(made.folder) if stage == "ranker")
    assert steps == -(-sizes["queries"] // 2 // 8), "half an epoch of batches of 8"


def test_the_losses_fall_or_at_least_exist(made: Finished) -> None:
    losses = losses_of(made.folder)
    assert {key[0] for key in losses} == set(TRAINED)
    assert all(np.isfinite(value) for value in losses.values())


def test_killed_in_every_stage_two_ranks_end_bit_equal(zygote: Zygote, made: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("dense_1", checkpointed(folder, "dense", "dense_1", 5)),
        ("dense_2", checkpointed(folder, "dense", "dense_2", 1)),
        ("lexical_1", checkpointed(folder, "lexical", "lexical_1", 3)),
        ("lexical_2", checkpointed(folder, "lexical", "lexical_2", 4)),
        ("ranker", checkpointed(folder, "ranker", "ranker", 11)),
        ("scores/ranker-001", exists(folder / "teacher_scores")),
        ("student", checkpointed(folder, "student", "student", 3)),
        ("encode/student-001", in_ledger(folder, "student")),
    ]
    cut = []
    for stage, moment in moments:
        started = zygote.recipe(f"run.path={folder}", *WORDS, num_ranks=2, config=R2ANKER)
        wait_until(moment, started)
        started.kill()
        assert started.wait().code == -9
        cut += [stage] if stage not in ledger_of(folder) else []
    assert len(cut) >= 6, f"the kills came too late; only these stages were cut: {cut}"
    ended = zygote.recipe(f"run.path={folder}", *WORDS, num_ranks=2, config=R2ANKER).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert weights_of(folder) == weights_of(made.folder)
    assert summary_of(folder) == summary_of(made.folder)
    assert list(ledger_of(folder)) == list(ledger_of(made.folder))


def test_one_rank_goes_on_with_what_two_began(zygote: Zygote, made: Finished, tmp_path: Path) -> None:
    """Sums are made in another order, so the losses are near and not equal."""
    folder = tmp_path / "run"
    started = zygote.recipe(f"run.path={folder}", *WORDS, num_ranks=2, config=R2ANKER)
    wait_until(checkpointed(folder, "lexical", "lexical_2", 2), started)
    started.kill()
    started.wait()
    ended = zygote.recipe(f"run.path={folder}", *WORDS, config=R2ANKER).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert "lexical goes on from lexical_2, step" in ended.err
    here, there = losses_of(folder), losses_of(made.folder)
    assert here.keys() == there.keys()
    assert [here[key] for key in here] == pytest.approx([there[key] for key in here], rel=2e-3, abs=2e-3)
    assert measured(folder).keys() == measured(made.folder).keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("r2anker.retrievers=[bm25,dence]",), r"dence does not exist"),
        (("r2anker.student.scores=dence.jsonl",), r"there is no file .*dence\.jsonl"),
        (("r2anker.retrievers=[bm25,dense@3]",), r"names 'dense@3': expected of bm25, dense"),
        (("r2anker.ranker.num_negatives=500",), r"500 negatives are drawn by ranker from 60 candidates of bm25, dense"),
        (("r2anker.ranker.num_negatives=500", "r2anker.top_k=400"), r"300 documents, a step draws 500 negatives"),
        (("recipe=r2ranker",), r"names the recipe 'r2ranker'. Expected: one of ar2"),
        (("r2anker.ranker.steps=null", "r2anker.ranker.epochs=0"), r"r2anker.ranker.epochs"),
        (("ar2.iterations=1",), r"unknown key 'ar2'"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(
    zygote: Zygote, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    folder = tmp_path / "run"
    ended = zygote.recipe(f"run.path={folder}", *words, config=R2ANKER).wait()
    assert ended.code == 2, ended.err[-3000:]
    assert "Traceback" not in ended.err
    assert re.search(told, ended.err), ended.err
    assert not {"dense_1", "shards"} & ledger_of(folder).keys()


def load(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one)))


def test_others_load_what_is_exported(made: Finished) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

    exported = made.folder / "export"
    text = json.loads((made.folder / "data" / "corpus.jsonl").read_text().splitlines()[0])["text"]
    for model in ("dense", "student"):
        assert SentenceTransformer(str(exported / model), device="cpu").encode([text]).shape == (1, 32)
    assert SparseEncoder(str(exported / "lexical"), device="cpu").encode([text]).shape[0] == 1
    assert np.isfinite(CrossEncoder(str(exported / "ranker"), device="cpu").predict([(text, text)])).all()

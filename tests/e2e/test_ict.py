"""The inverse cloze task as a run: a corpus alone, kills, and a retriever that starts from what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.models.retriever import Retriever
from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, metrics_of, weights_of
from tests.e2e.starts import ROOT, Zygote, wait_until
from tests.e2e.test_resume import OFTEN, checkpointed

TINY = ROOT / "configs" / "ict_tiny.yaml"
STAGES = ["start", "held_out/0", "ict/1", "held_out/1", "ict/2", "held_out/2", "export"]
WORDS = ("ict.held_out=20", "retriever.tied=false", "retriever.zero_stage=2")


@pytest.fixture(scope="module")
def pretrained(zygote: Zygote, corpus_alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("cloze") / "run"
    ended = zygote.recipe(f"run.path={folder}", f"data.path={corpus_alone}", *WORDS, num_ranks=2, config=TINY).wait()
    assert ended.code == 0, ended.err[-6000:]
    return Finished(folder, ended)


def test_a_corpus_alone_is_enough(pretrained: Finished) -> None:
    assert list(ledger_of(pretrained.folder)) == ["sizes", "shards", *STAGES]
    assert ledger_of(pretrained.folder)["ict/1"]["result"]["steps"] == 4  # 60 documents by 16
    assert set(weights_of(pretrained.folder)) == {"retriever/zero-shot", "retriever/001", "retriever/002"}
    rows = json.loads((pretrained.folder / "results" / "held_out.json").read_text())
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[0]["loss"] > rows[2]["loss"]
    points = {(line["step"], name): value for line in metrics_of(pretrained.folder) for name, value in line.items()}
    assert [points[row["iteration"], "held_out/loss"] for row in rows] == [row["loss"] for row in rows]


def test_two_ranks_killed_inside_an_epoch_end_bit_equal(
    zygote: Zygote, pretrained: Finished, corpus_alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = (f"run.path={folder}", f"data.path={corpus_alone}", *WORDS, *OFTEN)
    started = zygote.recipe(*words, num_ranks=2, config=TINY)
    wait_until(checkpointed(folder, "retriever", "ict/2", 2), started)
    started.kill()
    started.wait()
    assert "ict/2" not in ledger_of(folder)
    ended = zygote.recipe(*words, num_ranks=2, config=TINY).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert "retriever goes on from ict/2, step" in ended.err
    assert weights_of(folder) == weights_of(pretrained.folder)


def test_a_retriever_starts_from_the_export(zygote: Zygote, pretrained: Finished) -> None:
    """Both towers, as they were trained; and the run itself answers no queries."""
    settings = {"pooling": "cls", "similarity": "cosine", "tied": False}
    start = Retriever.load(str(pretrained.folder / "export" / "retriever"), **settings)  # type: ignore[arg-type]
    own = Retriever.open(pretrained.folder / "weights" / "retriever" / "002").state_dict()
    assert {name for name, _ in start.named_parameters()} <= own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in start.named_parameters())
    assert any(
        not torch.equal(weight, own[name.replace("towers.query", "towers.document")])
        for name, weight in start.named_parameters()
        if name.startswith("towers.query")
    )
    searched = zygote.launcher("search", str(pretrained.folder), "a question")
    assert searched.code == 2
    assert "is of the recipe ict, which pre-trains on documents alone" in searched.err
    assert "retriever.name=" in searched.err

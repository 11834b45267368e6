"""What a run loses between two starts, or finds in a batch: it goes on from what is whole, or stops and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, losses_of, weights_of
from tests.e2e.starts import Zygote, wait_until
from tests.e2e.test_resume import checkpointed


def test_a_checkpoint_damaged_at_the_end_of_a_stage_is_trained_again(
    zygote: Zygote, alone: Finished, tmp_path: Path
) -> None:
    """Symptom: the ledger skips the stage, and the next one goes on from weights of some steps before its end."""
    folder = tmp_path / "run"
    started = zygote.recipe(f"run.path={folder}", "run.checkpoint_every_steps=2", "run.log_every_steps=2")
    wait_until(lambda: "retriever/1" in ledger_of(folder), started)
    started.kill()
    started.wait()
    newest = max((folder / "checkpoints" / "retriever").glob("[0-9]*"))
    position = json.loads((newest / "COMMIT.json").read_text())["position"]
    assert (position["stage"], position["step"]) == ("retriever/1", 6)
    path = newest / "optimizer-00000-000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    ended = zygote.recipe(f"run.path={folder}", "run.checkpoint_every_steps=2", "run.log_every_steps=2").wait()
    assert ended.code == 0, ended.err[-6000:]
    assert f"{newest} is no whole checkpoint: {path.name} has" in ended.err
    assert "retriever goes on from retriever/1, step 4" in ended.err
    assert "retriever has lost what it learnt in retriever/1" in ended.err
    assert weights_of(folder) == weights_of(alone.folder)
    assert losses_of(folder) == losses_of(alone.folder)


def test_killed_on_two_ranks_a_run_goes_on_on_one_and_under_other_zero_stages(
    zygote: Zygote, tiny: Finished, tmp_path: Path
) -> None:
    """The samples and their order are the same, so all losses are, but for the order in which floats are summed."""
    folder = tmp_path / "run"
    started = zygote.recipe(f"run.path={folder}", "run.checkpoint_every_steps=1", num_ranks=2)
    wait_until(checkpointed(folder, "retriever", "retriever/1", 3), started)
    started.kill()
    started.wait()
    stages = ("retriever.zero_stage=3", "ranker.zero_stage=0")
    ended = zygote.recipe(f"run.path={folder}", *stages).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert "it was written by 2 ranks under ZeRO-1, and is now on 1 under ZeRO-3" in ended.err
    assert losses_of(folder) == pytest.approx(losses_of(tiny.folder), abs=1e-4)
    assert list(ledger_of(folder)) == list(ledger_of(tiny.folder))


def test_a_loss_that_is_not_finite_stops_with_its_batch(zygote: Zygote, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("warmup_retriever.optim.lr=1e15", "warmup_retriever.optim.max_grad_norm=0", "evaluation.zero_shot=false")
    ended = zygote.recipe(f"run.path={folder}", *words, num_ranks=2).wait()
    assert ended.code == 2, ended.err[-6000:]
    assert "is not finite" in ended.err
    (path,) = (folder / "postmortem").iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"warmup_retriever-{found['step']}.json"
    assert [entry["rank"] for entry in found["batch"]] == [0] * 8 + [1] * 8
    queries = [json.loads(line)["_id"] for line in (folder / "data" / "queries.jsonl").read_text().splitlines()]
    documents = [json.loads(line)["_id"] for line in (folder / "data" / "corpus.jsonl").read_text().splitlines()]
    assert {entry["query"] for entry in found["batch"]} <= set(queries)
    assert {docid for entry in found["batch"] for docid in entry["documents"]} <= set(documents)
    assert "warmup_retriever" not in ledger_of(folder)

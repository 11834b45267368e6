"""The real recipe on two ranks: asked to stop, killed, started twice; it ends with the same weights and metrics."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.conftest import small_data
from tests.e2e.made import ledger_of, measured, metrics_of, summary_of, weights_of
from tests.e2e.starts import Started, Zygote, wait_until
from tests.e2e.test_resume import checkpointed

__all__ = ["small_data"]

WORDS = (
    *("ar2.iterations=1", "warmup_retriever.steps=60", "warmup_ranker.steps=40", "run.checkpoint_every_steps=20"),
    *("run.log_every_steps=3", "run.heartbeat_seconds=0.2", "random_model.hidden_size=16"),
)


def recipe(zygote: Zygote, folder: Path) -> Started:
    return zygote.recipe(f"run.path={folder}", *WORDS, num_ranks=2)


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = recipe(zygote, folder).wait()
    assert ended.code == 0, ended.err[-4000:]
    return folder


@pytest.fixture(scope="module")
def disturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was disturbed in several ways; what is said meanwhile is checked on the way."""
    folder = tmp_path_factory.mktemp("disturbed") / "run"
    first = recipe(zygote, folder)
    wait_until(checkpointed(folder, "retriever", "warmup_retriever", 20), first)
    refuse_a_second_start(zygote, folder)
    status = zygote.launcher("status", str(folder))
    assert status.code == 0, status.out + status.err
    assert "running: 2 ranks" in status.out
    os.kill(first._ranks[1].pid, signal.SIGTERM)  # one rank alone is asked
    ended = first.wait()
    assert ended.code == 85, ended.err[-4000:]
    assert ended.err.count("stopped at ") == 1
    assert "Traceback" not in ended.err

    second = recipe(zygote, folder)
    wait_until(checkpointed(folder, "ranker", "warmup_ranker", 20), second)
    second.kill()
    assert second.wait().code == -9
    status = zygote.launcher("status", str(folder))
    assert status.code == 4, status.out
    assert "killed without a word" in status.out

    last = recipe(zygote, folder).wait()
    assert last.code == 0, last.err[-4000:]
    assert "taken over" in last.err, "the lock of the killed start"
    return folder


def refuse_a_second_start(zygote: Zygote, folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "config.yaml", folder / "starts.json", folder / "run.lock")}
    ended = zygote.recipe(f"run.path={folder}", *WORDS, "run.seed=7").wait()
    assert ended.code == 2, ended.err
    assert "is in use: a start of 2 rank(s)" in ended.err
    assert "Traceback" not in ended.err
    assert {path: path.read_bytes() for path in before} == before


def test_the_models_are_those_of_an_undisturbed_run(undisturbed: Path, disturbed: Path) -> None:
    assert weights_of(disturbed) == weights_of(undisturbed)
    assert summary_of(disturbed) == summary_of(undisturbed)
    assert list(ledger_of(disturbed)) == list(ledger_of(undisturbed))


def test_each_point_is_measured_once_and_is_the_same(undisturbed: Path, disturbed: Path) -> None:
    """Symptom: what lay between the last checkpoint and the kill stood twice in metrics.jsonl."""
    lines = metrics_of(disturbed)
    points = [(line["stage"], line["step"], name) for line in lines for name in line.keys() - {"time", "stage", "step"}]
    assert len(points) == len(set(points))
    assert measured(disturbed) == measured(undisturbed)


def test_tensorboard_shows_the_curves_of_an_undisturbed_run(undisturbed: Path, disturbed: Path) -> None:
    boards = [EventAccumulator(str(folder / "tensorboard")) for folder in (undisturbed, disturbed)]
    for board in boards:
        board.Reload()
    for tag in ("warmup_retriever/loss", "warmup_ranker/loss", "ranker/loss"):
        curves = [[(event.step, event.value) for event in board.Scalars(tag)] for board in boards]
        assert curves[0] == curves[1], tag


def test_what_changed_since_is_refused_or_forced_and_then_recorded(zygote: Zygote, disturbed: Path) -> None:
    words = (f"run.path={disturbed}", *WORDS, "ar2.top_k=19")
    ended = zygote.recipe(*words).wait()
    assert ended.code == 2
    assert "ar2.top_k: 20 -> 19" in ended.err
    assert "run.force_resume=true" in ended.err
    assert not (disturbed / "run.lock").exists(), "the next start is not kept out"
    forced = zygote.recipe(*words, "run.force_resume=true").wait()
    assert forced.code == 0, forced.err
    assert "forced to go on although ar2.top_k: 20 -> 19" in forced.err
    assert json.loads((disturbed / "starts.json").read_text())[-1]["forced"] == ["ar2.top_k: 20 -> 19"]


def test_an_evaluation_elsewhere_leaves_the_run_alone(zygote: Zygote, disturbed: Path, small_data: Path) -> None:
    """Symptom: it wrote its stages into the ledger of a run that was training beside it."""
    ledger = (disturbed / "ledger.json").read_bytes()
    ended = zygote.launcher(*("evaluate", str(disturbed), "--data", str(small_data), "--max-queries", "2"))
    assert ended.code == 0, ended.err
    assert (disturbed / "ledger.json").read_bytes() == ledger
    (folder,) = (disturbed / "evaluations").iterdir()
    assert f"{folder.name}/shards" in ledger_of(folder)
    assert not (folder / "run.lock").exists()

"""What `python -m launcher status` says of a run, running or not, and the exit code that scripts look at."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from engine.config.file import dump_config, load_config
from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.reliability.activity import Activity
from engine.reliability.failure import record_failure
from engine.reliability.heartbeat import ENDED, RUNNING, Heart, beat_path
from engine.reliability.run_lock import RunLock, acquire
from engine.reliability.starts import Start, record_start
from launcher.commands.status import FINISHED, SILENT, STOPPED, show_status
from launcher.commands.status import RUNNING as IS_RUNNING
from tests.distributed.processes import ROOT

GAME = ("retriever", "encode", "index", "candidates", "ranker", "evaluate")


class Made:
    """A run folder as a start leaves it, without the start."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        words = [f"run.path={folder}", "ar2.iterations=3"]
        self.config: Config = load_config(ROOT / "configs" / "tiny.yaml", words)
        (folder / "config.yaml").write_text(dump_config(self.config))
        self.lock: RunLock = acquire(folder / "run.lock", num_ranks=2, patience_seconds=1)
        self.nonce = self.lock.nonce
        record_start(folder, Start.now(self.nonce, 2, "store", []))

    def beat(self, rank: int, state: str = RUNNING, code: int | None = None, age: float = 0.0) -> None:
        activity = Activity()
        with activity.in_stage("retriever/2"), activity.counting(6, "step", 0):
            activity.done, activity.last_point = 2, "barrier 'encode/001: end'"
            Heart(self.folder / "heartbeats", rank, 2, self.nonce, activity).beat(state, code)
        os.utime(beat_path(self.folder / "heartbeats", rank), (time.time() - age,) * 2)

    def ledger(self, *names: str) -> None:
        stages = {name: {"seconds": 10.0, "result": None} for name in names}
        (self.folder / "ledger.json").write_text(json.dumps({"stages": stages}))

    def fail(self, code: int, kind: str = "DataError") -> None:
        record_failure(
            self.folder, attempt=self.nonce, rank=1, stage="shards", step=7, kind=kind, message="it is bad", code=code
        )


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "run")


def status(made: Made, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = show_status(made.folder)
    return code, capsys.readouterr().out


def test_a_run_that_runs(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.beat(0)
    made.beat(1)
    made.ledger("shards", "encode/000")
    commit = made.folder / "checkpoints" / "retriever" / "000004" / "COMMIT.json"
    commit.parent.mkdir(parents=True)
    commit.write_text(json.dumps({"position": {"stage": "retriever/1", "step": 6, "number": 4}}))
    code, told = status(made, capsys)
    assert code == IS_RUNNING == 0
    for part in (
        f"running: 2 ranks, pid {os.getpid()}",
        "in retriever/2, step 2 of 6",
        "last barrier  barrier 'encode/001: end'",
        "2 stages, the last encode/000 in 10.0s",
        "retriever: retriever/1, step 6",
    ):
        assert part in " ".join(told.split(" ")), told
    assert "last error" not in told
    assert [line.split()[0] for line in told.splitlines()[-2:]] == ["0", "1"]


def test_a_rank_that_gives_no_sign(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.beat(0)
    made.beat(1, age=100.0)
    code, told = status(made, capsys)
    assert code == SILENT
    assert "a rank gives no sign" in told
    assert "1m 40s ago" in told


def test_a_run_that_was_killed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.beat(0)
    lock = json.loads(made.lock.path.read_text())
    made.lock.path.write_text(json.dumps(lock | {"pid": 2**22 + 1}))
    code, told = status(made, capsys)
    assert code == STOPPED
    assert "not running: killed without a word; the same command goes on" in told
    assert "in retriever/2, step 2 of 6" in told


def test_a_run_that_ended_where_it_was_to(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Symptom: "the same command goes on", which ends at the same place once more."""
    made.beat(0, ENDED, 0)
    made.lock.release()
    code, told = status(made, capsys)
    assert code == STOPPED
    assert "ended where run.stop_before says; the same command without it goes on" in told


@pytest.mark.parametrize(
    ("failed_with", "message"),
    [
        (2, "failed with exit code 2; once that is mended, the same command goes on"),
        (75, "failed with exit code 75; the same command goes on"),
        (85, "stopped because it was asked to; the same command goes on"),
    ],
)
def test_a_run_that_stopped_with_a_reason(
    made: Made, capsys: pytest.CaptureFixture[str], failed_with: int, message: str
) -> None:
    made.beat(0, ENDED, failed_with)
    made.fail(failed_with)
    made.lock.release()
    code, told = status(made, capsys)
    assert code == STOPPED
    assert message in told
    assert ("DataError: it is bad" in told) == (failed_with != 85), "a stop that was asked for is no error"


def test_an_error_of_an_earlier_start_is_not_todays(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.fail(1)
    record_start(made.folder, Start.now("newer", 2, "store", []))
    _, told = status(made, capsys)
    assert "last error" not in told


def test_a_run_that_has_finished(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.beat(0, ENDED, 0)
    made.ledger("export")
    made.lock.release()
    code, told = status(made, capsys)
    assert code == FINISHED
    assert "stopped" not in told
    assert [line.split()[1] for line in told.splitlines() if line.startswith("state")] == ["finished"]
    assert f"report {made.folder}" in told, "what can be done with it"
    assert "heartbeat" not in told


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        show_status(tmp_path)


def test_what_the_whole_recipe_still_takes(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """It was that of AR2's six stages alone, without the test split; `engine.config.remaining` counts."""
    made.beat(0)
    assert "recipe" not in [line.split()[0] for line in status(made, capsys)[1].splitlines() if line], "no guess"
    made.ledger("retriever/1")
    assert "at least 20.0s left" in status(made, capsys)[1]

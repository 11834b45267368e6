"""`cancel` and what `status` tells of a job, with stand-ins for SLURM's commands."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from engine.config.file import dump_config, load_config
from engine.errors import ConfigError
from engine.reliability.run_lock import acquire
from launcher.commands.status import FINISHED, RUNNING, STOPPED, show_status
from launcher.slurm import cancel
from launcher.slurm.job import Submitted, ask_about, ask_slurm, job_lines, write_submitted
from tests.distributed.processes import ROOT
from tests.unit.launcher.slurm.stand_ins import StandIns, leave_start

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
BUSY = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
TIME = "2026-01-01T00:00:00+0000"


def shown(state: str, reason: str = "None", restarts: int = 0, task: str = "") -> str:
    """A stand-in's line for `scontrol --oneliner show job`."""
    array = f"ArrayJobId=41 ArrayTaskId={task} " if task else ""
    return (
        f"echo 'JobId=41 {array}JobName=x UserId=u(1) JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
        f"Restarts={restarts} ExitCode=0:0 RunTime=00:12:03 TimeLimit=01:00:00 NodeList=n[1-2] BatchHost=n1 "
        "Command=/a JobState=FAILED b NumNodes=2'"
    )


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    stand_ins = StandIns(tmp_path / "programs")
    monkeypatch.setenv("PATH", f"{stand_ins.bin}:{os.environ['PATH']}")
    monkeypatch.setattr(cancel, "_LOOK_SECONDS", 0.01)
    stand_ins.make("scancel")
    stand_ins.make("sacct", "exit 1")
    return stand_ins


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was submitted as job 41."""
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    text = dump_config(load_config(ROOT / "configs" / "tiny.yaml", [f"run.path={run}", "run.preemption_seconds=1"]))
    (run / "slurm" / "recipe.yaml").write_text(text)
    (run / "config.yaml").write_text(text)
    write_submitted(run, Submitted("41", TIME, nodes=2, ranks=8))
    return run


def run_cancel(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    cancel.add_arguments(parser)
    return cancel.run_command(parser.parse_args([*map(str, words)]))


def text_of(run: Path) -> str:
    return dict(job_lines(run, ask_about(run)))["job"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (shown("PENDING", "Priority"), "41: pending (Priority) on n[1-2]"),
        (shown("PENDING", "BeginTime", 2), "41: requeued, pending (BeginTime) on n[1-2], restart 2"),
        (shown("RUNNING", restarts=1), "41: running on n[1-2], restart 1, 00:12:03 of 01:00:00"),
        (shown("NODE_FAIL", "NodeDown"), "41: node fail on n[1-2], 00:12:03 of 01:00:00"),
    ],
)
def test_how_a_job_is(made: StandIns, run: Path, line: str, text: str) -> None:
    made.make("scontrol", line)
    assert job_lines(run, ask_about(run)) == [("job", text), ("job's log", f"{run}/slurm/41.out")]


def test_a_job_that_only_the_accounts_know(made: StandIns, run: Path) -> None:
    made.make("scontrol", FORGOTTEN)
    made.make("sacct", "echo '41|CANCELLED by 1000|n[1-2]|00:05:00|01:00:00'")
    assert text_of(run) == "41: cancelled on n[1-2], 00:05:00 of 01:00:00"


def test_a_job_that_nobody_knows_any_more(made: StandIns, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.make("scontrol", FORGOTTEN)
    assert text_of(run) == f"41: submitted at {TIME}; SLURM does not know it any more"
    (run / "slurm" / "cancelled").touch()
    assert text_of(run) == f"41: submitted at {TIME}; cancelled; SLURM does not know it any more"
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "this host has no scontrol" in text_of(run)


def test_a_slurm_that_does_not_answer_has_not_forgotten(
    made: StandIns, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: "SLURM does not know it" of a job that was there, while a busy controller let scontrol's time pass."""
    made.make("scontrol", BUSY)
    assert text_of(run) == f"41: submitted at {TIME}; what became of it is not known here: SLURM did not answer"
    show_status(make_sweep(tmp_path / "sweep"))
    assert capsys.readouterr().out.count("SLURM did not answer") == 4
    with pytest.raises(
        ConfigError, match=r"whether job 41, .*, still waits or runs is not known: SLURM did not answer"
    ):
        run_cancel(run)
    assert made.calls_of("scancel") == []
    assert not (run / "slurm" / "cancelled").exists()


@pytest.mark.parametrize("recipe", ["slurm/recipe.yaml", "mine.yaml"])
@pytest.mark.parametrize(("state", "runs"), [("PENDING", False), ("NODE_FAIL", False), ("RUNNING", True)])
def test_a_job_that_waits_has_no_process_however_fresh_its_lock(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str], recipe: str, state: str, runs: bool
) -> None:
    """Symptom: "running ... asked to stop" of a requeued job, whose rank 0 was ended before it took its lock away.

    A start by hand, of another recipe, is not the job's: for that the lock counts alone.
    """
    lock = acquire(run / "run.lock", num_ranks=2, patience_seconds=1)
    far = {"host": "n1", "place": "n1/another boot/", "argv": ["run.py", "--config", f"/far/run/{recipe}"]}
    lock.path.write_text(json.dumps(json.loads(lock.path.read_text()) | far))
    made.make("scontrol", shown(state, restarts=1))
    by_hand = recipe == "mine.yaml"
    assert show_status(run) == (RUNNING if runs or by_hand else STOPPED)
    told = capsys.readouterr().out
    assert ("running: 2 ranks" in told) == (runs or by_hand)


def test_a_run_whose_job_waits_goes_on_by_its_job(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: "the same command goes on" of a requeued job; `submit` would have refused a second one."""
    leave_start(run, failure={"code": 85})
    made.make("scontrol", shown("PENDING", restarts=1))
    show_status(run)
    assert "stopped because it was asked to; its job goes on" in capsys.readouterr().out


def test_status_of_a_run_that_waits_and_of_one_that_was_not_submitted(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.make("scontrol", shown("PENDING", "Resources"))
    assert show_status(run) == STOPPED
    told = capsys.readouterr().out
    assert "submitted; no rank has opened the run folder yet" in told
    assert "41: pending (Resources)" in told
    (run / "slurm" / "job.json").unlink()
    show_status(run)
    assert "job" not in capsys.readouterr().out


def test_status_of_a_sweep(made: StandIns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep(tmp_path)
    made.make("scontrol", shown("RUNNING", task="1") + "\n" + shown("PENDING", "JobArrayTaskLimit", task="2-3%1"))
    leave_start(sweep / "0", stages=("shards", "export"))
    leave_start(sweep / "1", stages=("shards",))
    assert show_status(sweep) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "0 0 finished 2 stages, the last export" in rows
    assert "1 1 running on n[1-2], 00:12:03 of 01:00:00 1 stages, the last shards" in rows
    assert "2 2 pending (JobArrayTaskLimit) on n[1-2]" in rows
    for name in ("1", "2", "3"):
        leave_start(sweep / name, stages=("export",))
    assert show_status(sweep) == FINISHED


def make_sweep(tmp_path: Path) -> Path:
    sweep = tmp_path / "sweep"
    runs = {str(number): str(sweep / str(number)) for number in range(4)}
    for number in range(4):
        (sweep / str(number) / "slurm").mkdir(parents=True)
        write_submitted(sweep / str(number), Submitted("41", TIME, 1, 1, task=number, sweep=str(sweep)))
    (sweep / "slurm").mkdir()
    write_submitted(sweep, Submitted("41", TIME, 1, 1, tasks=runs))
    return sweep


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_a_job_that_waits_is_taken_out_of_the_queue(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.make("scontrol", shown("PENDING", "Priority"))
    assert run_cancel(run) == 0
    assert capsys.readouterr().out == "job 41, which waited, is cancelled\n"
    assert made.calls_of("scancel") == ["scancel 41"]
    assert (run / "slurm" / "cancelled").exists()


def test_a_job_that_runs_is_asked_and_waited_for(made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.make("scontrol", f"if [ -e {run}/over ]; then {shown('FAILED')}; else {shown('RUNNING')}; fi")
    made.make("scancel", f"[ -e {run}/slurm/cancelled ] && touch {run}/over")  # the mark is there first
    assert run_cancel(run) == 0
    assert made.calls_of("scancel") == ["scancel --signal=USR1 --batch 41"]
    assert "job 41 has stopped; submitted again, the run goes on" in capsys.readouterr().out


def test_a_job_that_does_not_stop_is_ended(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancel, "REQUEUE_SECONDS", -0.9)
    made.make("scontrol", shown("RUNNING"))
    run_cancel(run)
    assert made.calls_of("scancel") == ["scancel --signal=USR1 --batch 41", "scancel 41"]
    assert "has not stopped in time and is cancelled" in capsys.readouterr().out


def test_cancel_now_does_not_wait(made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.make("scontrol", shown("RUNNING"))
    run_cancel(run, "--now")
    assert made.calls_of("scancel") == ["scancel 41"]
    assert capsys.readouterr().out == "job 41 is cancelled\n"


def test_one_task_of_a_sweep(made: StandIns, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    made.make("scontrol", shown("PENDING", task="2"))
    run_cancel(sweep, "--task", "2")
    assert made.calls_of("scancel") == ["scancel 41_2"]
    assert [path.parent.parent.name for path in sweep.glob("*/slurm/cancelled")] == ["2"]
    with pytest.raises(ConfigError, match="has no task 9"):
        run_cancel(sweep, "--task", "9")


def test_a_job_that_is_over(made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.make("scontrol", shown("COMPLETED"))
    assert run_cancel(run) == 0
    assert "job 41 is over, the run is not running" in capsys.readouterr().out
    assert made.calls_of("scancel") == []


def test_a_job_that_has_stopped_is_not_seen_while_slurm_is_busy(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: "has stopped", of a job that still wrote its checkpoint."""
    asked, busy = run / "asked", run / "busy"
    made.make(
        "scontrol",
        f"if [ ! -e {asked} ]; then {shown('RUNNING')}; exit; fi\n"
        f"if [ ! -e {busy} ]; then touch {busy}; {BUSY}; fi\n{shown('FAILED')}",
    )
    made.make("scancel", f"touch {asked}")
    run_cancel(run)
    assert busy.exists()
    assert len(made.calls_of("scontrol")) == 3
    assert "job 41 has stopped" in capsys.readouterr().out


def test_slurms_refusal_is_told(made: StandIns, run: Path) -> None:
    made.make("scontrol", shown("RUNNING"))
    made.make("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(ConfigError, match="Access/permission denied"):
        run_cancel(run)


def test_a_run_without_a_job_is_stopped_by_its_own_means(
    made: StandIns, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "slurm" / "job.json").unlink()
    run_cancel(run)
    assert "has no job and does not run" in capsys.readouterr().out
    acquire(run / "run.lock", num_ranks=2, patience_seconds=1)
    run_cancel(run)
    assert (run / "stop").exists()
    with pytest.raises(ConfigError, match="has no job and no run"):
        run_cancel(run / "slurm")


def test_nothing_is_asked_where_there_is_no_slurm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert ask_slurm(Submitted("41", TIME, 1, 1)) is None
    with pytest.raises(ConfigError, match="this host has no scontrol"):
        run_cancel(run)

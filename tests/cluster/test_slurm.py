"""Runs as jobs of a real SLURM over two hosts: submitted, stopped by it in every way, started again, cancelled, swept.

The jobs mostly wait for the processor, so each is started once and goes through several things in turn.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lab import BIN, Lab, why_not
from tests.cluster.runs import PATIENCE_SECONDS
from tests.cluster.slurm import PROGRAMS, Slurm, why_no_slurm
from tests.e2e.made import ledger_of, measured, summary_of, weights_of

ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WORDS = ["run.heartbeat_seconds=0.5", "run.preemption_seconds=20", "ar2.iterations=1", "ar2.retriever.steps=150"]
WORDS += ["run.checkpoint_every_steps=50"]
ON_TWO_NODES = ["--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1"]
ON_ONE_NODE = ["--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1"]
ENDLESS = [*WORDS, "warmup_retriever.steps=100000"]


@pytest.fixture(scope="module")
def slurm(lab: Lab) -> Iterator[Slurm]:
    if reason := why_not(*PROGRAMS) or why_no_slurm():
        pytest.skip(reason)
    folder = lab.folder / "slurm"
    folder.mkdir()
    with Slurm(lab, folder) as started:
        yield started


@pytest.fixture(scope="module")
def on_one_host(lab: Lab) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The same recipe without SLURM: as many ranks on one host, left alone; still at work when this returns."""
    folder = lab.folder / "alone"
    folder.mkdir()
    words = [BIN / "mpirun", "--oversubscribe", "-n", "2", BIN / "python", "launcher/run.py"]
    with (folder / "out").open("wb") as out:
        process = lab.login.start(
            [*words, "--config", "configs/tiny.yaml", *WORDS, f"run.path={folder / 'run'}"], ENV, out.fileno()
        )
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def sweep(slurm: Slurm) -> tuple[Path, str]:
    """A sweep on the first node, its last task cancelled, and its job; it goes on while the other tests wait."""
    folder = slurm.folder / "sweep"
    words = ["--sbatch", "nodelist=node1", "--sweep", "run.seed=1,2,3", "--max-parallel", "2", *WORDS]
    job = submit(slurm, folder, *ON_ONE_NODE, *words)
    told = launcher(slurm, "cancel", folder, "--task", "2")
    assert f"job {job}_2, which waited, is cancelled" in told
    return folder, job


def launcher(slurm: Slurm, *words: str | Path, code: int = 0) -> str:
    """Run `python -m launcher` as a user on the login host; again where SLURM was too busy to tell it what it asked."""
    for _ in range(5):
        done = slurm.run([BIN / "python", "-m", "launcher", *words], ENV)
        if "SLURM did not answer" not in done.stdout:
            break
    assert done.returncode == code, done.stdout
    return done.stdout


def submit(slurm: Slurm, run: Path, *words: str) -> str:
    """Submit a run of the small recipe and return the job's number."""
    told = launcher(slurm, "submit", "--config", "configs/tiny.yaml", *words, f"run.path={run}")
    match = re.match(r"job (\d+): ", told)
    assert match, told
    return match[1]


def wait_for_stage(slurm: Slurm, run: Path, stage: str) -> None:
    """Wait until a stage is finished."""
    slurm.wait_for(lambda: stage in ledger_of(run), f"{stage} in {run}", PATIENCE_SECONDS)


def wait_for_work(slurm: Slurm, run: Path, number: int, stage: str) -> None:
    """Wait until the ranks of a job's so many-th start are in the middle of a stage."""

    def trains() -> bool:
        starts = json.loads((run / "starts.json").read_text()) if (run / "starts.json").exists() else []
        beats = [json.loads(path.read_text()) for path in (run / "heartbeats").glob("rank-*.json")]
        return len(starts) == number and any(
            beat["attempt"] == starts[-1]["nonce"] and beat["stage"] == stage and beat["done"] for beat in beats
        )

    slurm.wait_for(trains, f"start {number} of {run}", PATIENCE_SECONDS)


def soon(slurm: Slurm, job: str) -> int:
    """Return the minutes of a time limit that comes soon, but not at once: SLURM looks at limits every half minute."""
    hours, minutes, seconds = map(int, slurm.job(job)["RunTime"].split(":"))
    return -(-(3600 * hours + 60 * minutes + seconds + 30) // 60)


def log_of(run: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted((run / "slurm").glob("*.out")))


def ends_of(run: Path) -> list[dict[str, Any]]:
    """What the job's script has recorded of each start."""
    ends: list[dict[str, Any]] = json.loads((run / "slurm" / "ends.json").read_text())
    return ends


def test_a_run_goes_on_after_the_end_of_its_time_and_after_a_preemption(
    slurm: Slurm, folder: Path, on_one_host: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    """Stopped twice, it ends with the bytes of a run on one host that was left alone.

    The preemption is the hard one: SLURM signals mpirun's daemon on the second node, and not the script.
    """
    run = folder / "a run's $(touch x)"
    job = submit(slurm, run, *ON_TWO_NODES, "--time", "10", *WORDS)
    wait_for_stage(slurm, run, "bm25")
    told = launcher(slurm, "status", run)
    assert re.search(rf"job +{job}: running on node\[1-2\], [0-9:]+ of 00:10:00\n", told), told
    assert re.search(r"state +running: 2 ranks", told), told

    slurm.check("scancel", "--signal=USR1", "--batch", job)  # what --signal does before the time limit
    slurm.wait_for_state(job, "PENDING", timeout=PATIENCE_SECONDS)
    slurm.check("scontrol", "hold", job)  # so that it still waits when it is looked at
    told = launcher(slurm, "status", run, code=4)
    assert re.search(rf"job +{job}: requeued, pending \(\w+\), restart 1\n", told), told
    assert re.search(r"state +stopped because it was asked to; its job goes on\n", told), told
    slurm.check("scontrol", "release", job)

    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\ntrue\n")
    wait_for_work(slurm, run, 2, "retriever/1")
    slurm.check("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", urgent)
    slurm.wait_for_state(job, "PENDING", timeout=PATIENCE_SECONDS)
    slurm.wait_for_state(job, "COMPLETED", "FAILED", timeout=PATIENCE_SECONDS)

    log = log_of(run)
    assert slurm.job(job)["JobState"] == "COMPLETED", log
    assert slurm.job(job)["Restarts"] == "2", log
    assert [(end["code"], end["again"]) for end in ends_of(run)] == [(85, True), (85, True)], log
    assert log.count("The job is requeued") == 2, log
    assert "stopped at retriever/1, step" in log, "the preemption came in the middle of a phase"
    assert "DUE TO PREEMPTION" not in log, "SLURM had to end what did not stop in time"
    assert "2 ranks on 2 hosts" in log
    assert "the run is finished" in log.splitlines()[-1]
    told = launcher(slurm, "status", run, code=3)
    assert re.search(rf"job +{job}: completed on node\[1-2\], restart 2, ", told), told
    assert "is finished" in launcher(
        slurm, "submit", "--config", "configs/tiny.yaml", *ON_TWO_NODES, *WORDS, f"run.path={run}"
    )

    alone, process = on_one_host
    assert process.wait(PATIENCE_SECONDS) == 0, (alone / "out").read_text()
    assert weights_of(run) == weights_of(alone / "run")
    assert summary_of(run) == summary_of(alone / "run")
    assert measured(run) == measured(alone / "run")
    assert not (Path.cwd() / "x").exists()


@pytest.mark.usefixtures("sweep")  # which goes on meanwhile
def test_a_job_meets_its_time_limit_loses_its_node_and_is_cancelled(slurm: Slurm, lab: Lab, folder: Path) -> None:
    run = folder / "run"
    job = submit(slurm, run, *ON_ONE_NODE, "--sbatch", "hold", *ENDLESS)
    told = launcher(slurm, "status", run, code=4)
    assert re.search(rf"job +{job}: pending \(JobHeldUser\)\n", told), told
    told = launcher(slurm, "submit", "--config", "configs/tiny.yaml", *ON_ONE_NODE, f"run.path={run}", code=2)
    assert f"has a job already: {job} is pending (JobHeldUser)" in told, told
    assert f"job {job}, which waited, is cancelled" in launcher(slurm, "cancel", run)

    job = submit(slurm, run, *ON_ONE_NODE, "--sbatch", "nodelist=node2", "--time", "10", *ENDLESS)
    wait_for_work(slurm, run, 1, "warmup_retriever")
    slurm.check("scontrol", "update", f"JobId={job}", f"TimeLimit={soon(slurm, job)}")
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "1", "the end of its time", PATIENCE_SECONDS)
    slurm.check("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert "DUE TO TIME LIMIT" not in log_of(run)
    assert [(end["code"], end["again"]) for end in ends_of(run)] == [(85, True)]

    wait_for_work(slurm, run, 2, "warmup_retriever")
    lab.nodes[1].lose()
    slurm.check("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")  # as SLURM finds after a while
    slurm.wait_for(lambda: slurm.job(job)["Restarts"] == "2", "requeued by SLURM")
    slurm.start_slurmd(lab.restart_node(2))
    wait_for_work(slurm, run, 3, "warmup_retriever")
    told = launcher(slurm, "cancel", run)
    assert "it was asked to write a checkpoint and stop" in told, told
    assert f"job {job} has stopped" in told, told
    assert slurm.job(job)["JobState"] == "FAILED", "not COMPLETED: what waits for its success must not start"
    assert slurm.job(job)["Restarts"] == "2", log_of(run)
    assert [(end["code"], end["again"]) for end in ends_of(run)] == [(85, True), (85, False)]
    assert "has no job that waits or runs" in launcher(slurm, "cancel", run)


def test_a_sweep_is_an_array_with_a_folder_for_each_task(slurm: Slurm, sweep: tuple[Path, str]) -> None:
    folder, job = sweep
    slurm.wait_for(lambda: slurm.ask("squeue", "-h", f"-j{job}") == "", "the sweep's end", 2 * PATIENCE_SECONDS)
    told = launcher(slurm, "status", folder, code=4)
    assert re.search(r"^0 +0_seed-1 +finished +\d+ stages, the last export$", told, re.MULTILINE), told
    assert re.search(r"^2 +2_seed-3 +cancelled", told, re.MULTILINE), told
    runs = [folder / "0_seed-1", folder / "1_seed-2"]
    assert all("export" in ledger_of(run) for run in runs), log_of(folder)
    assert weights_of(runs[0]).keys() == weights_of(runs[1]).keys()
    assert weights_of(runs[0]) != weights_of(runs[1]), "each has its own seed"
    assert not (folder / "2_seed-3" / "starts.json").exists()
    assert re.search(rf"job +{job}_0: completed", launcher(slurm, "status", runs[0], code=3))


def test_what_slurm_does_not_take_is_told(slurm: Slurm, folder: Path) -> None:
    words = ["submit", "--config", "configs/tiny.yaml", *ON_ONE_NODE, f"run.path={folder / 'run'}"]
    told = launcher(slurm, *words, "--partition", "nowhere", code=2)
    assert "SLURM does not take the job: invalid partition specified: nowhere" in told, told
    assert "sinfo" in told
    assert "is 60 s, of which the last" in launcher(slurm, *words, "--time", "1", code=2)

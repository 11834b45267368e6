"""`python -m launcher cancel RUN`: end the job of a run, with a checkpoint where it runs.

A job that waits is taken out of the queue. One that runs is asked as SLURM asks before the end of its time: its ranks
write a checkpoint and stop, and a file beside the script says that it is not to be requeued. What does not stop in
time, and everything with `--now`, is ended by SLURM; submitted again, the run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from engine.errors import ConfigError
from launcher.slurm.job import PENDING, Submitted, alive, ask_slurm, is_finished, read_submitted, run_slurm
from launcher.slurm.script import REQUEUE_SECONDS, recipe_path, slurm_folder
from launcher.terminal.arguments import typed_path, whole_number

_LOOK_SECONDS = 1.0
_DEFAULT_STOP_SECONDS = 120.0


EXAMPLES = (
    "runs/nq",
    "runs/sweep --task 3 --now",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cancel`."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder, or that of a sweep")
    parser.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    parser.add_argument(
        "--task", type=whole_number, metavar="K", help="number of the one task of a sweep that is to end, from 0"
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Cancel and wait for the end; return 0.

    Raises:
        ConfigError: The folder has no job, SLURM does not answer, or does not do it.
    """
    folder = arguments.run.absolute()
    submitted = read_submitted(folder)
    if submitted is None:
        return _stop_without_job(folder)
    jobs = _tasks(folder, submitted, arguments.task)
    found = [(run, job, known) for run, job in jobs for known in alive(job)]
    if not found:
        state = "finished" if all(is_finished(run) for run, _ in jobs) else "not running"
        print(f"{folder} has no job that waits or runs: job {submitted.name} is over, the run is {state}")
        return 0
    for run, _, _ in found:
        (slurm_folder(run) / "cancelled").touch()  # also for what waits: it may begin in this moment
    asked = []
    for run, job, known in found:
        if arguments.now or known.state == PENDING:
            _scancel(job.name)
            print(f"job {job.name}{', which waited,' * (known.state == PENDING)} is cancelled")
        else:
            _scancel("--signal=USR1", "--batch", job.name)
            print(f"job {job.name} runs; it was asked to write a checkpoint and stop", flush=True)
            asked.append((run, job))
    _wait(asked)
    return 0


def _tasks(folder: Path, submitted: Submitted, task: int | None) -> list[tuple[Path, Submitted]]:
    """Return the run folders and jobs that are meant."""
    if submitted.tasks is None:
        if task is not None:
            raise ConfigError(f"{folder} is no sweep, so it has no task {task}", remedy="leave out --task")
        return [(folder, submitted)]
    if task is not None and str(task) not in submitted.tasks:
        raise ConfigError(f"the sweep {folder} has no task {task}", expected=f"0 to {len(submitted.tasks) - 1}")
    chosen = [Path(run) for number, run in submitted.tasks.items() if task is None or number == str(task)]
    jobs = [(run, read_submitted(run)) for run in chosen]
    return [(run, job) for run, job in jobs if job is not None and job.id == submitted.id]


def _scancel(*words: str) -> None:
    done = run_slurm("scancel", *words)
    if done is None:
        raise ConfigError("scancel is not installed here, or does not answer", remedy="cancel where the cluster is")
    if done.returncode:
        raise ConfigError(f"SLURM does not cancel: {done.stderr.strip()}", remedy="look with `squeue --me`")


def _wait(asked: list[tuple[Path, Submitted]]) -> None:
    """Wait until what was asked has stopped; end what does not stop in time."""
    deadline = time.monotonic() + max((_stop_seconds(run) for run, _ in asked), default=0.0)
    left = asked
    while left and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        now: list[tuple[Path, Submitted]] = []
        for run, job in left:
            if _still_runs(job):
                now.append((run, job))
            else:
                print(f"job {job.name} has stopped; submitted again, the run goes on")
        left = now
    for _, job in left:
        _scancel(job.name)
        print(f"job {job.name} has not stopped in time and is cancelled; the run goes on from its last checkpoint")


def _still_runs(job: Submitted) -> bool:
    """Return whether a job that was asked to stop has not; while SLURM does not answer, it counts as running."""
    found = ask_slurm(job)
    return found is None or any(not known.is_over and known.state != "COMPLETING" for known in found)


def _stop_seconds(run: Path) -> float:
    """Return how long a run may take to stop, from its recipe."""
    from engine.config.file import load_config

    try:
        seconds = load_config(recipe_path(run)).run.preemption_seconds
    except ConfigError:  # changed or deleted by hand: the default will do
        seconds = _DEFAULT_STOP_SECONDS
    return seconds + REQUEUE_SECONDS


def _stop_without_job(folder: Path) -> int:
    """Stop a run that was started without SLURM, by its own means."""
    from engine.reliability.run_lock import read_holder

    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} has no job and no run", expected="a folder that submit or a run has written")
    holder = read_holder(folder / "run.lock")
    if holder is None:
        print(f"{folder} has no job and does not run")
        return 0
    (folder / "stop").touch()
    print(f"{folder} was not submitted; its ranks, on {holder.host}, are asked to write a checkpoint and stop")
    return 0

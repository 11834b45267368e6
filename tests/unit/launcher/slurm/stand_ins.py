"""A folder of programs that stand in for SLURM's and MPI's, so that scripts and commands run for real without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.reliability.starts import Start, record_start
from launcher.slurm.script import Job, render, slurm_folder
from launcher.slurm.settings import Settings
from tests.distributed.processes import ROOT

SETTINGS = Settings(nodes=2, gpus_per_node="4", time="1:00:00")


def make_job(folder: Path, python: Path = Path(sys.executable), **changes: Any) -> Job:
    """A job of a run in a folder."""
    given = {"settings": SETTINGS, "name": "sparring-run", "cwd": ROOT, "root": ROOT, "stop_seconds": 150}
    return Job(**{**given, "folder": folder, "python": python, **changes})


class StandIns:
    """Programs in a folder, each writing down how it was called.

    Args:
        folder: Takes the programs and what they write down.
    """

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self._calls = folder / "calls"
        self.make("python", f'exec {sys.executable} "$@"', written=False)

    def make(self, name: str, body: str = "", written: bool = True) -> None:
        """Make a program of lines of bash."""
        note = f'echo {name} "$@" >>{self._calls}\n' if written else ""
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{note}{body}\n")
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """The command lines so far, in their order."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def calls_of(self, name: str) -> list[str]:
        """The command lines of one program."""
        return [call for call in self.calls if call.split()[0] == name]

    def start(self, run: Path, **changes: Any) -> subprocess.Popen[str]:
        """Start the script of a run's job as SLURM starts it."""
        script = slurm_folder(run) / "job.sbatch"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(render(make_job(run, self.bin / "python", **changes)))
        env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "HOME": str(run)}
        if changes.get("runs"):
            env |= {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
        return subprocess.Popen(
            ["bash", "-c", 'export SCRIPT=$$; exec bash "$0"', script],
            env=env,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def leave_start(
    run: Path, nonce: str = "a", failure: dict[str, Any] | None = None, stages: tuple[str, ...] = ()
) -> None:
    """Leave the files that a start leaves in a run folder."""
    run.mkdir(parents=True, exist_ok=True)
    record_start(run, Start.now(nonce, num_ranks=1, coordinator="local", forced=[]))
    (run / "ledger.json").write_text(json.dumps({"stages": {name: {"seconds": 1.0} for name in stages}}))
    if failure is not None:
        given = {"attempt": nonce, "time": 0.0, "rank": 1, "host": "n1", "stage": "retriever/1", "step": 7}
        (run / "last_error.json").write_text(json.dumps({**given, "kind": "K", "message": "it is bad", **failure}))

"""Runs over the hosts of the lab, started as their users start them, and what is read from their folders afterwards."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.lab import BIN, ROOT, Host, Lab
from tests.e2e.made import weights_of

TINY = ROOT / "configs" / "tiny.yaml"
RECIPE = (
    *("ar2.iterations=1", "warmup_retriever.steps=20", "warmup_ranker.steps=2", "ar2.retriever.steps=2"),
    *("ar2.ranker.steps=2", "evaluation.max_dev_queries=4", "evaluation.max_test_queries=4"),
)
"""The smallest recipe, with one stage that is long enough to be hit in."""
OF_THE_RUN = (
    *("run.checkpoint_every_steps=5", "run.heartbeat_seconds=0.5", "run.rendezvous_seconds=60"),
    *("run.timeout_seconds=60", "random_model.hidden_size=16"),
)
PATIENCE_SECONDS = 240.0
"""For one start, on a machine that is busy with other things."""

_RECORDER = """
import os, socket, sys

def record(event, arguments, place={place!r}):
    if event == "os.rename":
        with open(f"{{place}}/{{socket.gethostname()}}-{{os.getpid()}}", "a") as written:
            written.write(f"{{arguments[1]}}\\n")

sys.addaudithook(record)
"""
"""Lets every Python process of a run write down which files it has given their names."""


def recipe(folder: Path, *words: str) -> list[str]:
    """Return the words of a small recipe behind the name of the starter."""
    return ["launcher/run.py", "--config", str(TINY), *RECIPE, *OF_THE_RUN, f"run.path={folder}", *words]


def by_pdsh(hostfile: Path, words: Sequence[str], *options: str) -> list[str]:
    """Return what a user types for `deepspeed` over a hostfile."""
    return ["deepspeed", "--hostfile", str(hostfile), *options, *words]


def by_openmpi(hostfile: Path, words: Sequence[str], *options: str) -> list[str]:
    """Return what a user types for `deepspeed` over Open MPI."""
    return by_pdsh(hostfile, words, "--launcher", "openmpi", *options)


def by_mpirun(hostfile: Path, words: Sequence[str], *options: str) -> list[str]:
    """Return what a user types for Open MPI itself."""
    return ["mpirun", "-n", "2", "--hostfile", str(hostfile), *options, str(BIN / "python"), *words]


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        code: What its starter returned.
        text: Both streams of all ranks, as they came.
        seconds: How long it ran.
    """

    code: int
    text: str
    seconds: float

    def __str__(self) -> str:
        return f"code {self.code} after {self.seconds:.0f} s\n{self.text[-6000:]}"

    @property
    def errors(self) -> list[str]:
        """What the ranks have told as errors, without pdsh's names of hosts in front."""
        lines = [line.split(": ", 1)[1] if line.startswith("node") else line for line in self.text.splitlines()]
        return [line for line in lines if line.startswith("[rank ")]

    @property
    def told(self) -> str:
        """The same as one line, wherever a long path has made the lines end, and without the ranks' names."""
        return " ".join(line.split("] ", 1)[-1].strip() for line in self.errors)


def home(folder: Path, **variables: str) -> dict[str, str]:
    """Make a home folder with a `.deepspeed_env`, by which `deepspeed` hands variables to the ranks of all hosts.

    Args:
        folder: Is made.
        variables: To hand over, besides one thread a rank.

    Returns:
        The environment of a start.
    """
    folder.mkdir(exist_ok=True)
    handed = {"OMP_NUM_THREADS": "1", **variables}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in handed.items()))
    return {"HOME": str(folder)}


class Running:
    """A command on a host, in the background; by itself with one thread a rank, where its starter hands that on.

    Args:
        host: Where it is typed.
        command: Its words.
        env: Added to the environment.
    """

    def __init__(self, host: Host, command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> None:
        self._command, self._began = command, time.monotonic()
        with tempfile.NamedTemporaryFile(dir=host.lab.folder, suffix=".out", delete=False) as self._output:
            self.process = host.start(command, {"OMP_NUM_THREADS": "1", **(env or {})}, self._output.fileno())
        atexit.register(self.kill)  # a test that fails waits for nobody

    @property
    def text(self) -> str:
        """What it has told so far."""
        return Path(self._output.name).read_text(errors="replace")

    def wait(self, timeout: float = PATIENCE_SECONDS) -> Ended:
        """Wait for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        seconds = time.monotonic() - self._began
        if self.process.returncode is None:
            self.kill()
            raise TimeoutError(f"{self._command} still ran after {seconds:.0f} s\n{self.text[-6000:]}")
        return Ended(self.process.returncode, self.text, seconds)

    def wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE_SECONDS) -> None:
        """Poll a condition on what it writes; it must come before the command ends."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended before the moment\n{self.wait()}"
            assert time.monotonic() < deadline, f"the moment did not come\n{self.text[-6000:]}"
            time.sleep(0.01)

    def kill(self) -> None:
        """End it without a word; what it has started on other hosts stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def left_running(host: Host, folder: Path, seconds: float = 5.0) -> str:
    """Return the processes of a run that still are on a host after some seconds; empty is what it should be.

    Args:
        host: Where to look.
        folder: The run folder, which all processes of a run have among their words.
        seconds: How long they may take to end.
    """
    deadline = time.monotonic() + seconds
    while (found := host.run(["pgrep", "-af", f"python.*{folder}"]).stdout) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


_undisturbed: dict[Path, Running] = {}


def begin_undisturbed(lab: Lab) -> None:
    """Start a run of two ranks on one host, by `deepspeed` without a hostfile; once a lab."""
    folder = lab.folder / "undisturbed"
    if folder not in _undisturbed:
        _undisturbed[folder] = Running(lab.nodes[0], alone(folder))


def undisturbed(lab: Lab) -> Path:
    """Return the folder of a run of two ranks on one host, when it has come to its end."""
    begin_undisturbed(lab)
    folder = lab.folder / "undisturbed"
    ended = _undisturbed[folder].wait()
    assert ended.code == 0, ended
    return folder


def alone(folder: Path) -> list[str]:
    """Return what a user types on a single machine."""
    return [
        "deepspeed",
        "--hostfile",
        "/nonexistent",
        "--master_port",
        "29400",
        "--num_accelerators",
        "2",
        *recipe(folder),
    ]


def results(folder: Path) -> dict[str, Any]:
    """Return what a run has computed: weights, metrics, candidates, as hashes or numbers."""
    manifests = {
        str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.glob("candidates/*/*.json")
    }
    return {
        "weights": weights_of(folder),
        "summary": json.loads((folder / "results" / "summary.json").read_text()),
        "candidates": manifests,
    }


class Recorder:
    """Records which host of a run gives which file its name, wherever in the code that is done.

    Args:
        folder: Takes the records; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._place = folder / "renames"
        self._place.mkdir()
        (folder / "sitecustomize.py").write_text(_RECORDER.format(place=str(self._place)))
        self.env = {"PYTHONPATH": str(folder)}
        """For the run; it must reach the ranks, as `deepspeed` sees to and `mpirun -x PYTHONPATH` does."""

    def names(self, below: Path) -> dict[str, Counter[str]]:
        """Return host -> name, relative to a folder -> how often it was given."""
        hosts: dict[str, Counter[str]] = {}
        for path in self._place.iterdir():
            names = [Path(line) for line in path.read_text().splitlines()]
            mine = [str(name.relative_to(below)) for name in names if name.is_relative_to(below)]
            hosts.setdefault(path.name.split("-")[0], Counter()).update(mine)
        return hosts

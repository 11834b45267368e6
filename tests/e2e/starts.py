"""Start our commands as a user does, or as a copy of a process that has imported everything (`tests.e2e.zygote`)."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.distributed.processes import ROOT, clean_environment, free_port

BIN = Path(sys.executable).parent
TINY = ROOT / "configs" / "tiny.yaml"
TIMEOUT_SECONDS = 400.0
"""For one start, on a machine that is busy with other things."""


@dataclass(frozen=True)
class Ended:
    """How a start ended; with several ranks, their outputs one after the other."""

    code: int
    out: str
    err: str
    seconds: float


def refused(ended: Ended, *words: str) -> None:
    """Check that a start ended because the user can mend something, with one message that has these words."""
    assert ended.code == 2, ended.err
    assert ended.err.count("error:") == 1
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


def on_the_cpu(**variables: str) -> dict[str, str]:
    """The environment of all starts: one thread a rank, so that sums are made in the same order everywhere."""
    return clean_environment({"TOKENIZERS_PARALLELISM": "false", **variables})


def deepspeed_command(num_ranks: int) -> list[str]:
    """What a user types, with a port of its own and without what may lie in a job-wide hostfile."""
    options = ["--hostfile", "/nonexistent", "--master_port", str(free_port())]
    return [str(BIN / "deepspeed"), *options, "--num_accelerators", str(num_ranks), "launcher/run.py"]


def mpirun_command(num_ranks: int) -> list[str]:
    return [str(BIN / "mpirun"), "--oversubscribe", "-n", str(num_ranks), sys.executable, "launcher/run.py"]


def start(command: Sequence[str], *, timeout: float = TIMEOUT_SECONDS) -> Ended:
    """Run a whole command line in a process group of its own."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=on_the_cpu(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(process.returncode, out, err, time.monotonic() - began)


class Rank:
    """One forked process; what it shares with `subprocess.Popen` is called so."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pid = folder, 0
        self.returncode: int | None = None
        self.ended = threading.Event()

    def kill(self) -> None:
        """Kill it and all that it started, as a machine that fails does."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.folder), timeout or 0.0)
        return self.returncode

    def _signal(self, number: int) -> None:
        if self.pid and not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


class Started:
    """The ranks of one start, still running."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks, self._began = ranks, time.monotonic()

    @property
    def running(self) -> bool:
        return not all(rank.ended.is_set() for rank in self._ranks)

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> Ended:
        """Wait for all ranks; the code is the first one that is not 0."""
        deadline = time.monotonic() + timeout
        for rank in self._ranks:
            if not rank.ended.wait(max(0.0, deadline - time.monotonic())):
                self.kill()
                raise TimeoutError(f"still running after {timeout:g} s\n{self._text('stderr')}")
        codes = [rank.returncode or 0 for rank in self._ranks]
        code = next((code for code in codes if code), 0)
        return Ended(code, self._text("stdout"), self._text("stderr"), time.monotonic() - self._began)

    def _text(self, name: str) -> str:
        return "".join((rank.folder / name).read_text(errors="replace") for rank in self._ranks)


class Zygote:
    """Forks commands, from several threads if need be; `the_zygote` is the one of a test session."""

    def __init__(self) -> None:
        self._folder, self._number = Path(tempfile.mkdtemp(prefix="zygote-")), 0
        self._lock = threading.Lock()
        self._ranks: dict[int, Rank] = {}
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._errors = (self._folder / "zygote.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), str(self._folder)],
            cwd=ROOT,
            env=on_the_cpu(DS_ACCELERATOR="cpu"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._answers.get(timeout=TIMEOUT_SECONDS)

    def recipe(
        self, *words: str, num_ranks: int = 1, config: Path = TINY, script: Path = ROOT / "launcher" / "run.py"
    ) -> Started:
        """Start `launcher/run.py --config CONFIG WORDS` on so many ranks, or another script with these words."""
        argv = [str(script), "--config", str(config), *words, "run.device=cpu"]
        if num_ranks == 1:
            return Started([self._fork(argv, "", {})])
        return Started([self._fork(argv, "", rank) for rank in self._world(num_ranks)])

    def _world(self, num_ranks: int) -> list[dict[str, str]]:
        """What a starter tells each rank."""
        world = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]

    def launcher(
        self, *words: str, stdin: str = "", encoding: str = "utf-8", unread: bool = False, num_ranks: int = 1
    ) -> Ended:
        """Run `python -m launcher WORDS`.

        Args:
            words: Surrogates stand for bytes that are no UTF-8.
            stdin: Likewise.
            encoding: Of the terminal.
            unread: Whether nobody reads the outputs any more.
            num_ranks: How many processes share the work.
        """
        env, argv = {"PYTHONIOENCODING": encoding}, ["launcher", *words]
        world = [{}] if num_ranks == 1 else self._world(num_ranks)
        return Started([self._fork(argv, "launcher", env | rank, stdin, unread=unread) for rank in world]).wait()

    def begin(self, *words: str, module: str = "launcher") -> Rank:
        """Start `python -m launcher WORDS`, or a script that is the first word where there is no module, and go on."""
        return self._fork([module, *words] if module else list(words), module, {})

    def close(self) -> None:
        for rank in self._ranks.values():
            rank.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()  # on which it ends
        self._process.wait(60)
        self._errors.close()

    def rank(self, argv: list[str], env: dict[str, str], log: Path) -> Rank:
        """Start a script as one rank.

        Args:
            argv: The script and its arguments.
            env: All variables that it has.
            log: Takes both outputs.
        """
        files = {"stdin": os.devnull, "stdout": str(log), "stderr": str(log)}
        return self._order({"argv": argv, "module": "", "env": env, "only": True, "unread": False, **files}, log.parent)

    def _fork(
        self, argv: list[str], module: str, env: dict[str, str], stdin: str = "", *, unread: bool = False
    ) -> Rank:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        (folder / "stdin").write_bytes(stdin.encode("utf-8", "surrogateescape"))
        files = {name: str(folder / name) for name in ("stdin", "stdout", "stderr")}
        order = {"argv": argv, "module": module, "env": env, "only": False, "unread": unread, **files}
        return self._order(order, folder)

    def _order(self, order: dict[str, Any], folder: Path) -> Rank:
        with self._lock:
            self._number += 1
            rank = self._ranks[self._number] = Rank(folder)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"number": self._number, **order}).encode() + b"\n")
            self._process.stdin.flush()
            rank.pid = int(self._answers.get(timeout=60)["started"])
        return rank

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            record = json.loads(line)
            if "ended" in record:
                rank = self._ranks[record["number"]]
                rank.returncode = record["ended"]
                rank.ended.set()
            else:
                self._answers.put(record)


@cache
def the_zygote() -> Zygote:
    """Return the prepared process of this test session, which ends with it."""
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote


def wait_until(condition: Callable[[], bool], started: Started, timeout: float = TIMEOUT_SECONDS) -> None:
    """Poll a condition on files that a start writes; fail if the start ends before it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if not started.running:
            ended = started.wait()
            raise AssertionError(f"ended with {ended.code} before the moment to kill it\n{ended.err[-3000:]}")
        if time.monotonic() > deadline:
            started.kill()
            raise TimeoutError(f"the moment did not come within {timeout:g} s")
        time.sleep(0.01)

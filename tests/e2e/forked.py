"""`launcher/run.py` with companions that are forked from their ranks, which takes no time for imports.

A companion of the real kind is a new process that imports torch. What is forked is the same from its first line on: it
reads its order, its pipe and its files, and has nothing of its rank's but the modules. Where the run folder has a file
named `fails` or `waits`, companions fail when they are to search, or wait there for their end; with `encodes`, they
wait when they have encoded a shard. With `fails` or `holds`, a rank takes no further step before it has heard of a
failure. With one named `slow`, a rank's steps take long enough to be met in between.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.refresh import companion, refresh
from engine.reliability.preemption import PREEMPTION
from engine.retrievers import dense
from launcher import run
from launcher.commands import companion as program
from launcher.terminal.streams import run_at_terminal

AGREED, ENCODE = PREEMPTION.agreed, dense.encode_documents


class Forked:
    """What the engine asks of a `subprocess.Popen`."""

    def __init__(self, words: list[str], **_: Any) -> None:
        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writing)
            os.dup2(reading, 0)
            for name, function in (("fails", fail), ("waits", wait)):
                if has_file(name):
                    refresh.mine = function
            if has_file("encodes"):
                dense.encode_documents = encode_one
            os._exit(program.main(words))
        os.close(reading)
        self.stdin: IO[bytes] = os.fdopen(writing, "wb")

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        began = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired("companion", timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def has_file(name: str) -> bool:
    """Whether the run folder has a file of this name."""
    return any(
        (Path(word.removeprefix("run.path=")) / name).exists() for word in sys.argv if word.startswith("run.path=")
    )


def agreed(device: Any) -> bool:
    """What a rank asks after each step, at the time that the test needs."""
    deadline = time.monotonic() + 120
    while (has_file("fails") or has_file("holds")) and not PREEMPTION.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    if has_file("slow"):
        time.sleep(0.3)
    return AGREED(device)


def fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("made to fail")


def encode_one(
    encoder: Any, template: Any, shards: Any, stream: str, numbers: Iterator[int], *more: Any, **named: Any
) -> None:
    ENCODE(encoder, template, shards, stream, islice(numbers, 1), *more, **named)
    wait()


def wait(*_: Any, **__: Any) -> Any:
    deadline = time.monotonic() + 600
    while not PREEMPTION.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    raise PREEMPTION.stop_here("a search that waits for its end")


if __name__ == "__main__":
    PREEMPTION.agreed = agreed  # type: ignore[method-assign]
    names = ("PIPE", "DEVNULL", "TimeoutExpired")
    companion.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=Forked, **{name: getattr(subprocess, name) for name in names}
    )
    sys.exit(run_at_terminal(run.main))

"""Conversations with the hosts: a probe on each, started over ssh, by srun, or here, and asked over pipes.

Every command is a list of words, never a text for a shell of ours. ssh hands its command to a shell of the host, so
that one is quoted, and holds only paths of this installation: what a user wrote travels as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any, TypeVar

from launcher.preflight.facts import ROOT
from launcher.preflight.probe import ANSWER
from launcher.preflight.records import Clock, NoAnswer
from shards.errors import ArtifactError
from shards.files import parse_record

_PROBE = ("-m", "launcher.preflight.probe")
_CONNECT_SECONDS = 5
_HELLO_SECONDS = 40.0
"""Until the probe's first word: login, and Python's start from a file system that may be slow."""
ANSWER_SECONDS = 120.0
"""Until an answer; the slowest imports torch on a cold file system."""
_CLOSE_SECONDS = 2.0
_MOST_THREADS = 64
_KEPT_LINES = 50
_OTHER_CODE = "look whether the same code and environment are on this host"
R = TypeVar("R")

# What ssh, env and Python print -> (what it means, what to do). The first that is found in the text counts.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    ("could not resolve hostname", "its name is not known here",
     "correct the name in the hostfile, or enter it into DNS or /etc/hosts"),
    ("remote host identification has changed", "its host key is not the one that is known",
     "if the host was reinstalled: ssh-keygen -R {host}, then log in once by hand; else ask its administrator"),
    ("host key verification failed", "its host key is not known here",
     "log in once by hand (ssh {host}) and confirm the key, as the user who starts the run"),
    ("permission denied (", "it refuses the login",
     "make a key without passphrase (or start ssh-agent) and bring it there: ssh-copy-id {host}"),
    ("permission denied", "what has to be started there is closed to this user",
     "let the user enter {root} and run {python} there"),
    ("connection refused", "nothing listens on its ssh port",
     "start sshd there; another port belongs into ~/.ssh/config"),
    ("no route to host", "there is no route to it", "see whether the host is up and on the network"),
    ("network is unreachable", "there is no route to it", "see whether the host is up and on the network"),
    ("timed out", "it does not answer", "see whether the host is up, and whether a firewall drops ssh"),
    ("connection closed", "it closed the connection", "look into sshd's log there (MaxStartups, AllowUsers)"),
    ("connection reset", "it closed the connection", "look into sshd's log there (MaxStartups, AllowUsers)"),
    ("cannot change directory", "the project's folder {root} is not there",
     "share the folder by all hosts at the same path, or copy it there"),
    ("no module named", "Python there lacks a module", "install the same environment there, or share one by all hosts"),
    ("no such file or directory", "the Python of this environment ({python}) is not there",
     "share the environment by all hosts at the same path, or make the same one there"),
    ("not found", "the Python of this environment ({python}) is not there",
     "share the environment by all hosts at the same path, or make the same one there"),
)  # fmt: skip


class Unreachable(Exception):
    """A host cannot be asked.

    Args:
        fact: Why.
        remedy: What to do.
    """

    def __init__(self, fact: str, remedy: str) -> None:
        super().__init__(fact)
        self.fact, self.remedy = fact, remedy


class Conversation:
    """A probe on one host; constructing it starts the probe and waits for its first word.

    Args:
        host: Name of the host.
        words: What starts the probe.

    Raises:
        Unreachable: There was no first word.
    """

    def __init__(self, host: str, words: Sequence[str], hello_seconds: float = _HELLO_SECONDS) -> None:
        self.host = host
        self._printed: list[str] = []
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            fact = f"{words[0]} cannot be started: {error.strerror}"
            raise Unreachable(fact, f"install {words[0]}, or correct PATH") from error
        self._readers = [
            threading.Thread(target=self._read, args=(stream, is_answer), daemon=True)
            for stream, is_answer in ((self._process.stdout, True), (self._process.stderr, False))
        ]
        for reader in self._readers:
            reader.start()
        try:
            self._next(hello_seconds)
        except BaseException:
            self.close(patience_seconds=0.0)
            raise

    def ask(self, do: str, kind: type[R], **arguments: Any) -> R:
        """Ask one question and wait for the answer.

        Args:
            do: What is to be done there; see `probe`.
            kind: The form of the answer.
            arguments: Of the function there, as JSON can hold them.

        Raises:
            Unreachable: There is no answer, or it has another form, or the function there failed.
        """
        if self._process.stdin is None:
            raise Unreachable("the conversation is over", "start again")
        with contextlib.suppress(OSError):  # a probe that is gone: the wait below says how
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        answer = self._next(ANSWER_SECONDS)
        if set(answer) == {"error"}:
            raise Unreachable(f"it could not answer ({do}): {answer['error']}", _OTHER_CODE)
        try:
            return parse_record(answer, kind, f"the answer ({do})")
        except ArtifactError as error:
            raise Unreachable(error.fact, _OTHER_CODE) from error

    def close(self, patience_seconds: float = _CLOSE_SECONDS) -> None:
        """Let the probe end, which it does with its input; after a moment, end what started it."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # ssh, and what it started to get through
            self._process.wait()

    def _read(self, stream: IO[str], is_answer: bool) -> None:
        for line in stream:
            if is_answer and line.startswith(ANSWER):
                self._answers.put(json.loads(line[len(ANSWER) :]))
            else:
                self._printed = [*self._printed, line.strip()][-_KEPT_LINES:]
        if is_answer:
            self._answers.put(None)

    def _next(self, timeout_seconds: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout_seconds)
        except queue.Empty:
            remedy = "log in by hand and see what hangs: the login itself, its shell's start-up files, a dead mount"
            raise Unreachable(f"it did not answer within {timeout_seconds:g} s", remedy) from None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._readers[1].join(1.0)
            raise Unreachable(*explain(self.host, self._process.returncode, self._printed))
        return answer


def explain(host: str, returncode: int | None, printed: Sequence[str]) -> tuple[str, str]:
    """Say why a probe ended before its time, and what to do.

    Args:
        host: Name of the host.
        returncode: How what started it ended; None where it still runs.
        printed: What it printed, line by line.

    Returns:
        Fact and remedy.
    """
    lines = [line for line in printed if line]
    text = "\n".join(lines).lower()
    last = next((line for line in reversed(lines) if not set(line) <= set("@*-=# ")), "")
    for sign, meaning, remedy in _CAUSES:
        if sign in text:
            line = next(line for line in lines if sign in line.lower())
            names = {"host": host, "root": ROOT, "python": sys.executable}
            return f"{meaning.format(**names)} ({_shortened(line)})", remedy.format(**names)
    if last:
        fact = f"what was started there printed {_shortened(last)!r} and ended with code {returncode}"
        return fact, f"see what `ssh {host} true` prints: it must log in and print nothing"
    return f"what was started there ended with code {returncode} without a word", "log in by hand and see what happens"


def ssh_words(host: str) -> list[str]:
    """Return the words that start a probe over ssh."""
    remote = shlex.join(["env", "-C", str(ROOT), sys.executable, *_PROBE])
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", "--", host, remote]


def srun_words(host: str) -> list[str]:
    """Return the words that start a probe on a node of the allocation."""
    options = ["--overlap", "--nodes=1", "--ntasks=1", "--mpi=none", "--unbuffered", "--quiet"]
    return ["srun", *options, f"--chdir={ROOT}", f"--nodelist={host}", sys.executable, *_PROBE]


def local_words(_host: str) -> list[str]:
    """Return the words that start a probe here."""
    return [sys.executable, *_PROBE]


class Conversations:
    """Probes on all hosts at once; those that cannot be reached, or stop answering, are `unreachable` from then on.

    Args:
        hosts: Their names.
        words: From a name to what starts a probe there.
        hello_seconds: How long to wait for a probe's first word.
    """

    def __init__(
        self, hosts: Sequence[str], words: Callable[[str], list[str]], hello_seconds: float = _HELLO_SECONDS
    ) -> None:
        self.hosts = list(hosts)
        self.unreachable: dict[str, NoAnswer] = {}
        self._open: dict[str, Conversation] = {}
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, max(1, len(self.hosts))))
        self._open = self._everywhere(self.hosts, lambda host: Conversation(host, words(host), hello_seconds))

    def __enter__(self) -> Conversations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        list(self._pool.map(lambda conversation: conversation.close(), self._open.values()))
        self._pool.shutdown()

    @property
    def reached(self) -> list[str]:
        """Hosts that answer, in order."""
        return [host for host in self.hosts if host in self._open and host not in self.unreachable]

    def ask(self, do: str, kind: type[R], only: Sequence[str] | None = None, **arguments: Any) -> dict[str, R]:
        """Ask the hosts that answer, or some of them, the same at once; return what came, by host.

        Args:
            do: As for `Conversation.ask`.
            kind: Likewise.
            only: The hosts to ask; None asks all that answer.
            arguments: Likewise.
        """
        asked = [host for host in self.reached if only is None or host in only]
        return self._everywhere(asked, lambda host: self._open[host].ask(do, kind, **arguments))

    def clock_offsets(self, times: int = 3) -> dict[str, Clock]:
        """Measure how far each host's clock is ahead of this one's; of some tries the one with least delay counts."""

        def measure(host: str) -> Clock:
            found = []
            for _ in range(times):
                before, start = time.time(), time.monotonic()
                there = self._open[host].ask("time", dict[str, float])["time"]
                delay = time.monotonic() - start
                found.append((delay / 2, there - (before + delay / 2)))
            uncertainty, offset = min(found)
            return Clock(offset, uncertainty)

        return self._everywhere(self.reached, measure)

    def _everywhere(self, hosts: Sequence[str], function: Callable[[str], R]) -> dict[str, R]:
        def guarded(host: str) -> R | None:
            try:
                return function(host)
            except Unreachable as error:
                self.unreachable[host] = NoAnswer(error.fact, error.remedy)
                return None

        answers = zip(hosts, self._pool.map(guarded, hosts), strict=True)
        return {host: answer for host, answer in answers if answer is not None}


def _shortened(line: str) -> str:
    line = re.sub(r"\s+", " ", line)
    return line if len(line) <= 160 else line[:157] + "..."

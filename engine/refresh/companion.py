"""Processes beside the ranks, which make an index and search it while the ranks train.

Each rank has one on its own device, or the first rank of each host has those on the devices that are kept for them
(`engine.refresh.beside`).

It is a process and not a thread, because what training draws on is a process's own: torch's random numbers, Python's
lock, the threads of OpenMP. All companions are a world of their own, of a size of its own, with a coordinator over a
store of its own; nothing of `torch.distributed` is used in them. Their words to each other and to the ranks go through
a folder, `RUN/beside/NAME`, and a pipe, whose end tells a companion that its rank is gone.

A companion that fails ends the run, with its traceback: its rank asks all ranks to stop at the next step, whose
checkpoint is written. One that is told to stop ends at the next unit of work, and is killed where that takes long: what
it had finished is on disk, and nothing else counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.coordination.coordinator import PeerError
from engine.errors import CoordinationError, SparringError
from engine.reliability.activity import ACTIVITY
from engine.reliability.exit_codes import EXIT_CRASH, EXIT_LOST
from engine.reliability.preemption import PREEMPTION, Preempted
from engine.run import Refresher, Run
from shards.errors import ArtifactError
from shards.files import parse_record, read_record, write_json

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
STOP = b"stop\n"
"""What a rank writes to its companion's standard input to end it."""
_LOOK_SECONDS = 0.1
"""Between two looks at one that is waited for."""
_WATCH_SECONDS = 0.5
"""Between two looks at all of them, each of which lists a folder."""
_GRACE_SECONDS = 10.0
"""How long a companion that is told to stop may take."""


class CompanionCrash(Exception):
    """A companion ended by an error of the program; the message has its traceback."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a companion is told on its command line.

    Attributes:
        run: The run folder.
        name: Of the candidates or the pool that it is to make.
        folder: Where its ledger, its metrics and its last words lie.
        number: Its place among the companions.
        num_companions: Number of all.
        rank: That has started it.
        device: What it computes on.
        address: Of the first one's host, as the others reach it.
        nonce: Of the start that it belongs to.
        token: Of this companion and all others of this refresh.
        timeout_seconds: How long companions wait for each other.
        heartbeat_seconds: Between two heartbeats.
    """

    run: str
    name: str
    folder: str
    number: int
    num_companions: int
    rank: int
    device: str
    address: str
    nonce: str
    token: str
    timeout_seconds: float
    heartbeat_seconds: float


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where companions meet: the first one's port, of the store of those with a token."""

    token: str
    port: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A companion's last words.

    Attributes:
        token: As of the order.
        number: As of the order.
        rank: As of the order.
        outcome: `finished`, `stopped` or `failed`.
        message: Why it failed.
        traceback: Of an error of the program.
        code: The exit code that the failure is worth.
        follows: Whether it failed because of another companion's failure.
    """

    token: str
    number: int
    rank: int
    outcome: str
    message: str = ""
    traceback: str = ""
    code: int = 0
    follows: bool = False


def ended_path(folder: Path, number: int) -> Path:
    """Return where a companion's last words lie."""
    return folder / f"ended-{number:05d}.json"


def meeting_path(folder: Path) -> Path:
    """Return where the first companion writes its port."""
    return folder / "meeting.json"


def heartbeats_of(run: Path) -> Path:
    """Return where companions write their heartbeats."""
    return run / "heartbeats" / "beside"


def read_words(folder: Path, number: int, token: str) -> Ended | None:
    """Return a companion's last words; None where there are none of it, but of an earlier start's at most.

    Args:
        folder: Where they lie.
        number: Which companion's.
        token: Of its refresh.
    """
    with contextlib.suppress(OSError, ArtifactError):  # not there, or written this moment
        words = read_record(ended_path(folder, number), Ended, "the last words of a companion")
        return words if words.token == token else None
    return None


class _Process:
    """One companion, as its rank has it.

    Args:
        order: What it is told.
        command: Words that start it, without the order.
        place: Where it works.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, order: Order, command: Sequence[str], place: Refresher) -> None:
        self.order = order
        self.seconds: float | None = None
        """How long it took, once it has ended."""
        self._is_told, self._started = False, time.monotonic()
        # One progress bar at a terminal is enough.
        self._process = subprocess.Popen(
            [*command, json.dumps(asdict(order))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "TQDM_DISABLE": "1", **place.environ},
        )
        if place.cores:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(self._process.pid, place.cores)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        if self._process.poll() is None:
            return True
        if self.seconds is None:
            self.seconds = time.monotonic() - self._started
        return False

    def tell(self) -> None:
        """Tell it to stop."""
        self._is_told = self._is_told or self.is_running
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._process.stdin.write(STOP)
                self._process.stdin.flush()

    def wait(self, seconds: float) -> None:
        """Wait for its end, so long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(seconds, 0.0))

    def kill(self) -> None:
        """End it at once."""
        self._is_told = self._is_told or self.is_running
        self._process.kill()
        self._process.wait()

    def last_words(self, label: str) -> Ended:
        """Return its last words; of one that has died without any, say them in its place, for all ranks to read.

        Args:
            label: What it did, for messages.
        """
        order, folder = self.order, Path(self.order.folder)
        if (words := read_words(folder, order.number, order.token)) is not None:
            return words
        ended = Ended(order.token, order.number, order.rank, STOPPED if self._is_told else FAILED, code=EXIT_LOST)
        if not self._is_told:
            ended = replace(ended, message=self._death(label))
        with contextlib.suppress(OSError, SparringError):  # the ranks that have none of their own wait for longer
            write_json(ended_path(folder, order.number), asdict(ended))
        return ended

    def _death(self, label: str) -> str:
        return (
            f"the process of {label} on rank {self.order.rank} (pid {self._process.pid}) ended with "
            f"{self._process.returncode} and without a word; where the system kills what takes too much memory, its "
            "log says so, and ar2.overlap=none takes less"
        )


class Companions:
    """This rank's companions, of which it may have none, started with those of the other ranks.

    All ranks call all methods alike.

    Args:
        run: Whose refresh they make; its `companion_command` starts one.
        orders: What each of them is told, and where it works.
        label: What they do, for messages.
        folder: As all orders have it, those of other ranks' companions too.
        token: Likewise.
        num_companions: Likewise.

    Raises:
        OSError: One cannot be started.
    """

    def __init__(
        self,
        run: Run,
        orders: Sequence[tuple[Order, Refresher]],
        label: str,
        *,
        folder: Path,
        token: str,
        num_companions: int,
    ) -> None:
        self._run, self._label = run, label
        self._folder, self._token, self._num_companions = folder, token, num_companions
        self._asked = folder / f"stop-{token}"
        """Made by a rank that was asked to stop, for those to see that wait beside it."""
        self._own: list[_Process] = []
        try:
            for order, place in orders:
                self._own.append(_Process(order, run.companion_command, place))
        except OSError:
            for one in self._own:
                one.kill()
            raise
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="companions", daemon=True)
        self._watch.start()

    @property
    def seconds(self) -> float | None:
        """How long they took, once they have ended; None of none."""
        return max((one.seconds for one in self._own if one.seconds is not None), default=None)

    def join(self) -> None:
        """Wait until they have finished, and learn whether those of all ranks have.

        Raises:
            Preempted: This start was asked to stop meanwhile.
            CompanionCrash: One ended by an error of the program.
            SparringError: One failed by an error that the user can mend, or was killed.
            PeerError: Another rank's failed.
        """
        with ACTIVITY.waiting(self._label):
            while any(one.is_running for one in self._own) and not PREEMPTION.requested:
                time.sleep(_LOOK_SECONDS)
            while not self._all_have_ended() and not PREEMPTION.requested:
                time.sleep(_WATCH_SECONDS)
        if PREEMPTION.requested:
            with contextlib.suppress(OSError):  # the others are asked, too, or wait for their own companions
                self._asked.touch()
            self.stop()
        ended = self._gather()
        self._watch.join()
        self._judge(ended)
        if any(one.outcome == STOPPED for one in ended):
            raise PREEMPTION.stop_here(self._label)

    def stop(self) -> None:
        """Tell them to stop, and kill those that take long."""
        deadline = time.monotonic() + _GRACE_SECONDS
        for one in self._own:
            one.tell()
        for one in self._own:
            one.wait(deadline - time.monotonic())
        self.kill()

    def kill(self) -> None:
        """End them at once."""
        self._over.set()
        for one in self._own:
            one.kill()
        self._watch.join()

    def end_with(self, error: BaseException) -> None:
        """End them because training ended by an error; raise in its place what companions failed by, if they did.

        Args:
            error: Of the training.

        Raises:
            CompanionCrash: As of `join`.
            SparringError: As of `join`.
            PeerError: As of `join`.
        """
        if not isinstance(error, Preempted):
            self.kill()
            return
        self.stop()
        try:
            ended = self._gather(2 * _GRACE_SECONDS)  # others may have some to wait for
        except CoordinationError:  # a rank was ended meanwhile: what training ended by stands
            return
        self._judge(ended)

    def _all_have_ended(self) -> bool:
        """Whether all companions have said their last words, or one has failed, which the others need not outlive."""
        known = self._known()
        return len(known) == self._num_companions or any(one.outcome == FAILED for one in known)

    def _look(self) -> None:
        """Watch them from a thread; where a companion fails, let all ranks stop at their next step."""
        while not self._over.wait(_WATCH_SECONDS):
            if self._asked.exists():
                PREEMPTION.interrupt("another rank was asked to stop")
                return
            if any(one.outcome == FAILED for one in self._known()):
                PREEMPTION.interrupt(f"{self._label} has failed")
                return

    def _known(self) -> list[Ended]:
        """Return the last words that are there, and of this rank's own that died without any what is said of them."""
        own = [one.last_words(self._label) for one in self._own if not one.is_running]
        mine = {one.order.number for one in self._own}
        numbers = (int(path.stem.rpartition("-")[2]) for path in self._folder.glob("ended-*.json"))
        others = (read_words(self._folder, number, self._token) for number in sorted(numbers) if number not in mine)
        return [*own, *(words for words in others if words is not None)]

    def _gather(self, timeout_seconds: float | None = None) -> list[Ended]:
        own = [asdict(one.last_words(self._label)) for one in self._own]
        found = self._run.coordinator.gather(f"{self._label}: how it ended", own, timeout_seconds)
        self._over.set()
        return [parse_record(words, Ended, "the last words of a companion") for told in found for words in told]

    def _judge(self, ended: list[Ended]) -> None:
        """Raise what the first companion to fail failed by, on its own rank; on the others, an error that quotes it."""
        failed = sorted((one for one in ended if one.outcome == FAILED), key=lambda one: (one.follows, one.number))
        if all(one.follows for one in failed) and (not failed or any(one.outcome == STOPPED for one in ended)):
            return  # those that had not been told to stop have lost those that were
        first = failed[0]
        if first.rank != self._run.coordinator.rank:
            error = PeerError(f"{self._label} failed on rank {first.rank}: {first.message}")
            error.crashed = first.code == EXIT_CRASH
            raise error
        if first.traceback:
            raise CompanionCrash(f"{self._label} failed:\n{first.traceback}")
        kind = CoordinationError if first.code == EXIT_LOST else SparringError
        raise kind(f"{self._label}: {first.message}")

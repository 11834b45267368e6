"""A process beside each rank, which makes an index and searches it while the rank trains.

It is a process and not a thread, because what training draws on is a process's own: torch's random numbers, Python's
lock, the threads of OpenMP. The companions of all ranks are a world of their own, with a coordinator over a store of
its own; nothing of `torch.distributed` is used in them. Their words to each other and to the ranks go through a folder,
`RUN/beside/NAME`, and a pipe, whose end tells a companion that its rank is gone.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.coordination.coordinator import PeerError
from engine.errors import CoordinationError, SparringError
from engine.reliability.activity import ACTIVITY
from engine.reliability.exit_codes import EXIT_CRASH, EXIT_LOST
from engine.reliability.preemption import PREEMPTION, Preempted
from engine.run import Run
from shards.errors import ArtifactError
from shards.files import parse_record, read_record

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
        rank: Its rank's.
        world_size: Number of ranks.
        device: Its rank's.
        address: Of rank 0's host, as the others reach it.
        nonce: Of the start that it belongs to.
        token: Of this companion and those of the other ranks.
        timeout_seconds: How long companions wait for each other.
        heartbeat_seconds: Between two heartbeats.
    """

    run: str
    name: str
    folder: str
    rank: int
    world_size: int
    device: str
    address: str
    nonce: str
    token: str
    timeout_seconds: float
    heartbeat_seconds: float


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where companions meet: rank 0's port, of the store of those with a token."""

    token: str
    port: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A companion's last words.

    Attributes:
        token: As of the order.
        rank: As of the order.
        outcome: `finished`, `stopped` or `failed`.
        message: Why it failed.
        traceback: Of an error of the program.
        code: The exit code that the failure is worth.
        follows: Whether it failed because of another companion's failure.
    """

    token: str
    rank: int
    outcome: str
    message: str = ""
    traceback: str = ""
    code: int = 0
    follows: bool = False


def ended_path(folder: Path, rank: int) -> Path:
    """Return where a companion's last words lie."""
    return folder / f"ended-{rank:05d}.json"


def meeting_path(folder: Path) -> Path:
    """Return where rank 0's companion writes its port."""
    return folder / "meeting.json"


def heartbeats_of(run: Path) -> Path:
    """Return where companions write their heartbeats."""
    return run / "heartbeats" / "beside"


class Companion:
    """This rank's companion, started with those of the other ranks; all ranks call all methods alike.

    Args:
        run: Whose refresh it makes; its `companion_command` starts one.
        order: What it is told.
        label: What it does, for messages.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, run: Run, order: Order, label: str) -> None:
        self._run, self._order, self._label = run, order, label
        self._folder = Path(order.folder)
        self.started = time.monotonic()
        self.seconds: float | None = None
        """How long it took, once it has ended."""
        self._is_told = False
        words = [*run.companion_command, json.dumps(asdict(order))]
        # One progress bar at a terminal is enough.
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "TQDM_DISABLE": "1"}
        )
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="companion", daemon=True)
        self._watch.start()

    def join(self) -> None:
        """Wait until it has finished, and learn whether those of all ranks have.

        Raises:
            Preempted: This start was asked to stop meanwhile.
            CompanionCrash: It ended by an error of the program.
            SparringError: It failed by an error that the user can mend, or was killed.
            PeerError: Another rank's failed.
        """
        with ACTIVITY.waiting(self._label):
            while self._process.poll() is None and not PREEMPTION.requested:
                time.sleep(_LOOK_SECONDS)
        if self._process.poll() is None:
            self.stop()
        self._note_end()
        ended = self._gather()
        self._watch.join()
        self._judge(ended)
        if any(one.outcome == STOPPED for one in ended):
            raise PREEMPTION.stop_here(self._label)

    def stop(self) -> None:
        """Tell it to stop, and kill it where that takes long."""
        self._is_told = self._is_told or self._process.poll() is None
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended
                self._process.stdin.write(STOP)
                self._process.stdin.flush()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._is_told = self._is_told or self._process.poll() is None
        self._over.set()
        self._process.kill()
        self._process.wait()
        self._watch.join()

    def end_with(self, error: BaseException) -> None:
        """End it because training ended by an error; raise in its place what the companions failed by, if they did.

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
            ended = self._gather(_GRACE_SECONDS)
        except CoordinationError:  # a rank was ended meanwhile: what training ended by stands
            return
        self._judge(ended)

    def _look(self) -> None:
        """Watch it from a thread; where a companion fails, let all ranks stop at their next step."""
        while not self._over.wait(_WATCH_SECONDS):
            self._note_end()
            if any(one.outcome == FAILED for one in self._known()):
                PREEMPTION.interrupt(f"{self._label} has failed")
                return

    def _note_end(self) -> None:
        if self._process.poll() is not None and self.seconds is None:
            self.seconds = time.monotonic() - self.started

    def _known(self) -> list[Ended]:
        """Return the last words that are there, this rank's own included where its companion has died without any."""
        own = [self._last_words()] if self._process.poll() is not None else []
        numbers = (int(path.stem.rpartition("-")[2]) for path in self._folder.glob("ended-*.json"))
        others = (self._read(rank) for rank in sorted(numbers) if rank != self._order.rank)
        return [*own, *(words for words in others if words is not None)]

    def _read(self, rank: int) -> Ended | None:
        with contextlib.suppress(OSError, ArtifactError):  # not there, or written this moment
            words = read_record(ended_path(self._folder, rank), Ended, "the last words of a companion")
            return words if words.token == self._order.token else None
        return None

    def _last_words(self) -> Ended:
        if (words := self._read(self._order.rank)) is not None:
            return words
        ended = Ended(self._order.token, self._order.rank, FAILED, code=EXIT_LOST)
        if self._is_told:
            return replace(ended, outcome=STOPPED)
        return replace(
            ended,
            message=f"the process of {self._label} on rank {self._order.rank} (pid {self._process.pid}) ended with "
            f"{self._process.returncode} and without a word; where the system kills what takes too much memory, its "
            "log says so, and ar2.overlap=none takes less",
        )

    def _gather(self, timeout_seconds: float | None = None) -> list[Ended]:
        own = asdict(self._last_words())
        found = self._run.coordinator.gather(f"{self._label}: how it ended", own, timeout_seconds)
        self._over.set()
        return [parse_record(one, Ended, "the last words of a companion") for one in found]

    def _judge(self, ended: list[Ended]) -> None:
        """Raise what the first companion to fail failed by, on its own rank; on the others, an error that quotes it."""
        failed = sorted((one for one in ended if one.outcome == FAILED), key=lambda one: (one.follows, one.rank))
        if all(one.follows for one in failed) and (not failed or any(one.outcome == STOPPED for one in ended)):
            return  # those that had not been told to stop have lost those that were
        first = failed[0]
        if first.rank != self._order.rank:
            error = PeerError(f"{self._label} failed on rank {first.rank}: {first.message}")
            error.crashed = first.code == EXIT_CRASH
            raise error
        if first.traceback:
            raise CompanionCrash(f"{self._label} failed:\n{first.traceback}")
        kind = CoordinationError if first.code == EXIT_LOST else SparringError
        raise kind(f"{self._label}: {first.message}")

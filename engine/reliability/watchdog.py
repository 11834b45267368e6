"""One thread a rank that shows that the rank lives, sees whether the others do, and ends this one where it must.

A rank that waits inside a collective operation for one that is stopped, dead or stuck cannot help itself: it is in C
code. This thread writes its heartbeat, reads those of others, and where one has given no sign for the timeout, or the
first failure of this start is recorded and the main thread does not come to its end by itself, it writes all stacks to
`RUN/stacks/` and ends the process. Rank 0 looks at all ranks, every rank at rank 0 and at its successor, so that the
number of reads grows with the ranks and not with their square.

Should this thread itself hang (a file system that does not answer, a library that holds Python's lock for ever), a
timer in C that it sets anew with each beat ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import IO

from engine.errors import CoordinationError, SparringError
from engine.log import terminal
from engine.reliability.activity import ACTIVITY
from engine.reliability.exit_codes import EXIT_LOST, EXIT_PREEMPTED, EXIT_REFUSED
from engine.reliability.failure import Failure, read_failure, record_failure
from engine.reliability.heartbeat import ENDED, RUNNING, STOPPING, Beat, Heart, read_beat
from engine.reliability.preemption import PREEMPTION
from engine.reliability.run_lock import RunLock

_LOOKS_AT_A_DEAD_PROCESS = 2
_SHARE_OF_TIMEOUT = 0.9
"""A silent rank is told before the waiting ones give up, because this message knows more than theirs."""
_LONGEST_GRACE_SECONDS = 10.0
_MOST_SIGHTINGS = 8


class Watchdog:
    """Watches one start of a run, from one rank.

    Args:
        folder: The run folder.
        lock: Of this start.
        rank: This process.
        world_size: Number of ranks.
        interval_seconds: Between two heartbeats, above 0.
        timeout_seconds: How long a rank may give no sign.
        speaks_for_host: Tell a loss here too that another host has told; for one rank of each host.
    """

    def __init__(
        self,
        folder: Path,
        lock: RunLock,
        rank: int,
        world_size: int,
        *,
        interval_seconds: float,
        timeout_seconds: float,
        speaks_for_host: bool = True,
    ) -> None:
        self._folder, self.lock, self._rank, self._world_size = folder, lock, rank, world_size
        self._interval = min(interval_seconds, timeout_seconds / 8)
        self._timeout = timeout_seconds
        self._heart = Heart(folder / "heartbeats", rank, world_size, lock.nonce, ACTIVITY)
        self._watched = sorted({*range(world_size)} if rank == 0 else {0, (rank + 1) % world_size})
        self._last: dict[int, tuple[int, float]] = {}
        self._gone: dict[int, int] = {}
        self._failed_since: float | None = None
        self._complained = False
        self._speaks_for_host = speaks_for_host
        self._ending = threading.Event()
        self._beating = threading.Lock()
        self._stacks = self._open_stacks()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to beat and to look."""
        self._beat()
        PREEMPTION.at_deadline(self._at_preemption_deadline)
        self._thread.start()

    def end(self, code: int) -> None:
        """Stop looking, tell the others that this rank ends, and let the next start in.

        Args:
            code: This rank's exit code.
        """
        if self._ending.is_set():
            return
        self._ending.set()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError), self._beating:
            self._heart.beat(ENDED, code)
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self.lock.release()
        self._stacks.close()
        with contextlib.suppress(OSError):
            path = Path(self._stacks.name)
            if path.stat().st_size == 0:
                path.unlink()

    def fail(self, kind: str, message: str, code: int, traceback: str = "") -> Failure | None:
        """Record a failure of this rank; return None where it is the start's first, else the first one."""
        try:
            return record_failure(
                self._folder,
                attempt=self.lock.nonce,
                rank=self._rank,
                stage=ACTIVITY.stage,
                step=ACTIVITY.done,
                kind=kind,
                message=message,
                code=code,
                traceback=traceback,
            )
        except (OSError, SparringError):  # a full disk, say, which may be the failure itself: it is told all the same
            return None

    def first_failure(self) -> Failure | None:
        """Return the first failure of this start, of whichever rank."""
        return read_failure(self._folder, self.lock.nonce)

    def loss_to_repeat(self) -> str | None:
        """Return, once, that a rank was lost, where another host has told it and this rank is to tell it too.

        A host that lost the network may be the one that has told it, to a terminal that it no longer reaches. So one
        rank of every other host repeats it.
        """
        first = self.first_failure()
        if first is None or first.code != EXIT_LOST or first.host == os.uname().nodename or not self._speaks_for_host:
            return None
        self._speaks_for_host = False
        return f"error, told by rank {first.rank} on {first.host}: {first.message}"

    def sightings(self) -> str:
        """Say where the other ranks were last seen, the conspicuous ones first; for a message about lost ranks."""
        lines = []
        for beat in (self._peer(rank) for rank in range(self._world_size) if rank != self._rank):
            if beat is None:
                continue
            if beat.process_is_gone:
                state = "its process is gone"
            elif beat.state == ENDED:
                state = f"ended with code {beat.code}"
            else:
                state = f"in {beat.at}, last sign {max(0.0, time.time() - beat.time):.1f} s ago"
            waits = beat.state != ENDED and (beat.in_collective or bool(beat.waiting_for))
            lines.append((waits, f"{beat.who}: {beat.where}; {state}"))
        return "\n".join(line for _, line in sorted(lines, key=lambda entry: entry[0])[:_MOST_SIGHTINGS])

    def absentees(self) -> list[Beat]:
        """Return the ranks that live but are neither in a collective operation nor waiting for the others."""
        beats = [self._peer(rank) for rank in range(self._world_size) if rank != self._rank]
        return [
            beat
            for beat in beats
            if beat is not None and beat.state != ENDED and not beat.in_collective and not beat.waiting_for
        ]

    def lost_peer(self) -> Beat | None:
        """Return a rank whose process is gone without having said that it ends, as far as that can be seen."""
        for rank in range(self._world_size):
            beat = self._peer(rank)
            if beat is not None and rank != self._rank and beat.state != ENDED and beat.process_is_gone:
                return beat
        return None

    def _peer(self, rank: int) -> Beat | None:
        """Read a rank's heartbeat, if it is of this start."""
        beat = read_beat(self._folder / "heartbeats", rank)
        return beat if beat is not None and beat.attempt == self.lock.nonce else None

    def _run(self) -> None:
        while not self._ending.wait(self._interval):
            try:
                self._beat()
                self._look()
            except OSError as error:  # a full or failing disk must not end the run by way of its heartbeats
                if not self._complained:
                    terminal().write(f"[rank {self._rank}] no heartbeat can be written: {error}\n")
                self._complained = True

    def _beat(self) -> None:
        faulthandler.dump_traceback_later(self._timeout, exit=True, file=self._stacks)
        with self._beating:
            if not self._ending.is_set():
                self._heart.beat(STOPPING if PREEMPTION.requested else RUNNING)
        if self._rank == 0:
            self.lock.touch()
            stop = self._folder / "stop"
            if stop.exists():
                stop.unlink(missing_ok=True)
                PREEMPTION.request(f"the file {stop}")

    def _look(self) -> None:
        try:
            self.lock.require()
        except CoordinationError as error:
            zero = self._peer(0)
            if zero is None or zero.state != ENDED:  # else it has let go of the lock, which is its last act
                self._end_process("lost lock", str(error), EXIT_REFUSED)
        now = time.monotonic()
        if (failure := self.first_failure()) is not None:
            self._failed_since = self._failed_since or now
            if now - self._failed_since > min(_LONGEST_GRACE_SECONDS, self._timeout / 2):
                if (text := self.loss_to_repeat()) is not None:
                    terminal().write(f"[rank {self._rank} on {os.uname().nodename}] {text}\n")
                    terminal().flush()
                self._dump_and_exit(failure.code)
            return
        for rank in self._watched:
            if rank != self._rank:
                self._look_at(rank, now)

    def _look_at(self, rank: int, now: float) -> None:
        beat = self._peer(rank)
        number = beat.number if beat else 0
        if self._last.get(rank, (-1, 0.0))[0] != number:
            self._last[rank] = (number, now)
        if beat is not None and beat.state == STOPPING:
            PREEMPTION.request(f"rank {rank} was asked to stop")
        if beat is not None and beat.state == ENDED:
            return
        silent = now - self._last[rank][1]
        who = beat.who if beat else f"rank {rank}"
        where = beat.where if beat else "not yet seen"
        if beat is not None and beat.process_is_gone:
            self._gone[rank] = self._gone.get(rank, 0) + 1
            if self._gone[rank] >= _LOOKS_AT_A_DEAD_PROCESS:
                self._lose(f"{who} has died without a word; it was last seen {where}")
        elif silent > self._timeout * _SHARE_OF_TIMEOUT:
            self._lose(f"{who} has given no sign for {silent:.0f} s; it was last seen {where}")

    def _lose(self, fact: str) -> None:
        message = (
            f"{fact}. This rank is {ACTIVITY}. Remedy: look in that rank's log and at its host; the stacks of the "
            f"other ranks are in {self._folder / 'stacks'}. Starting the same command again goes on from the last "
            "checkpoint."
        )
        self._end_process("lost rank", message, EXIT_LOST)

    def _end_process(self, kind: str, message: str, code: int) -> None:
        first = self.fail(kind, message, code)
        if first is None:
            host = os.uname().nodename
            terminal().write(f"[rank {self._rank} on {host}] error: {message}\n")
            terminal().flush()
        self._dump_and_exit(first.code if first else code)

    def _dump_and_exit(self, code: int) -> None:
        if self._ending.is_set():  # the main thread is at its end already
            return
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)
            self._heart.beat(ENDED, code)
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self.lock.release()
        os._exit(code)

    def _at_preemption_deadline(self) -> None:
        message = f"asked to stop ({PREEMPTION.reason}) but not at a place to stop in time; this rank is {ACTIVITY}"
        if self._ending.is_set():
            return
        if self.fail("preempted", message, EXIT_PREEMPTED) is None:
            terminal().write(f"[rank {self._rank}] {message}. The same command goes on from the last checkpoint.\n")
            terminal().flush()
        self._dump_and_exit(EXIT_PREEMPTED)

    def _open_stacks(self) -> IO[str]:
        folder = self._folder / "stacks"
        folder.mkdir(exist_ok=True)
        return (folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8")


_watching: list[Watchdog] = []


def watch(watchdog: Watchdog) -> None:
    """Start a watchdog and make it the process's own, which `watchdog_of_process` finds."""
    _watching[:] = [watchdog]
    watchdog.start()


def watchdog_of_process() -> Watchdog | None:
    """Return this process's watchdog; None before a run is open."""
    return _watching[0] if _watching else None

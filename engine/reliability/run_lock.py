"""`RUN/run.lock`: one start at a time works in a run folder.

The lock is a file that exactly one can make. It names its holder's process, which a start on the same host looks for;
a start on another host watches whether the holder still touches the file. A lock whose holder is gone is taken over.
Fencing: every start has a nonce, and a start that finds another nonce in the lock has lost the folder and stops before
it commits anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config.text import as_recorded
from engine.errors import ConfigError, CoordinationError
from engine.log import get_logger
from engine.reliability.processes import Signed, own_place
from shards.errors import ArtifactError
from shards.files import read_record, write_atomically

log = get_logger(__name__)
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Holder(Signed):
    """Who holds a lock: the process that took it, and of which start."""

    nonce: str
    started: str
    num_ranks: int
    argv: list[str]


@dataclass(frozen=True, slots=True)
class RunLock:
    """A lock that this start holds; every rank has one, with the same nonce.

    Args:
        path: The lock file.
        nonce: What tells this start from all others.
    """

    path: Path
    nonce: str

    def touch(self) -> None:
        """Show that the holder lives; by rank 0, more often than a waiting start's patience."""
        with contextlib.suppress(FileNotFoundError):  # whoever requires the lock will say so
            os.utime(self.path)

    def require(self) -> None:
        """Make sure that no other start has taken the folder over; a small read, for before each commit.

        Raises:
            CoordinationError: One has, or the lock was deleted.
        """
        holder = read_holder(self.path)
        if holder is None or holder.nonce != self.nonce:
            raise CoordinationError(
                f"{self.path} is no longer this start's: "
                + (f"the start on {holder.host} (pid {holder.pid}) has it" if holder else "it was deleted"),
                expected="one start at a time in a run folder",
                remedy="let the other start run; this one has stopped before it changed anything more",
            )

    def release(self) -> None:
        """Let the next start in; never takes away a lock that is another's."""
        holder = read_holder(self.path)
        if holder is not None and holder.nonce == self.nonce:
            self.path.unlink(missing_ok=True)


def acquire(path: Path, *, num_ranks: int, patience_seconds: float) -> RunLock:
    """Take the lock of a folder, from a holder that is gone if need be.

    Args:
        path: The lock file; its folder must exist.
        num_ranks: Of this start, for the message that another start gets.
        patience_seconds: How long a lock of another host must stay untouched before its holder counts as gone.

    Returns:
        The lock, whose nonce the other ranks must be given.

    Raises:
        ConfigError: Another start holds it and lives.
        DiskFullError: There is no space for it.
    """
    own = Holder(
        nonce=secrets.token_hex(8),
        host=socket.gethostname(),
        place=own_place(),
        pid=os.getpid(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        num_ranks=num_ranks,
        argv=[as_recorded(word) for word in sys.argv],
    )
    ready = path.with_name(f".{path.name}.{own.nonce}")
    with write_atomically(ready) as temporary:
        temporary.write_text(json.dumps(asdict(own)) + "\n", encoding="utf-8")
    try:
        while True:
            try:
                os.link(ready, path)  # as O_EXCL, and whole from the first moment
            except FileExistsError:
                _clear_if_stale(path, patience_seconds)
            else:
                return RunLock(path, own.nonce)
    finally:
        ready.unlink(missing_ok=True)


@contextmanager
def hold(path: Path, *, num_ranks: int, touch_seconds: float, patience_seconds: float) -> Iterator[RunLock]:
    """Hold a lock while the body runs, for work that has no watchdog to touch it.

    Args:
        path: The lock file; its folder is made if needed.
        num_ranks: Of this start.
        touch_seconds: Between two signs of life.
        patience_seconds: As `acquire`.

    Raises:
        ConfigError: Another start holds it and lives.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, over = acquire(path, num_ranks=num_ranks, patience_seconds=patience_seconds), threading.Event()

    def touch() -> None:
        while not over.wait(touch_seconds):
            lock.touch()

    threading.Thread(target=touch, name="lock", daemon=True).start()
    try:
        yield lock
    finally:
        over.set()
        lock.release()


@contextmanager
def kept_alive(path: Path, touch_seconds: float) -> Iterator[None]:
    """Touch a lock that this process takes while the body runs, and let go of it at the end; a watchdog does both.

    Args:
        path: The lock file.
        touch_seconds: Between two signs of life.
    """
    over = threading.Event()

    def own() -> RunLock | None:
        holder = read_holder(path)
        is_own = holder is not None and holder.is_from_here and holder.pid == os.getpid()
        return RunLock(path, holder.nonce) if holder is not None and is_own else None

    def touch() -> None:
        while not over.wait(touch_seconds):
            if (lock := own()) is not None:
                lock.touch()

    threading.Thread(target=touch, name="lock", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if (lock := own()) is not None:
            lock.release()


def require_free(path: Path, *, patience_seconds: float) -> None:
    """Refuse a folder in which a start works, without taking its lock; for who changes nothing in it.

    Args:
        path: The lock file, which need not be there.
        patience_seconds: As `acquire`.

    Raises:
        ConfigError: A start holds it and lives.
    """
    holder = read_holder(path)
    if holder is not None and not _is_gone(path, holder, patience_seconds):
        raise _in_use(path, holder)


def read_holder(path: Path) -> Holder | None:
    """Read who holds a lock; None where nobody does."""
    with contextlib.suppress(OSError, ArtifactError):
        return read_record(path, Holder, "the lock")
    return None


def _clear_if_stale(path: Path, patience_seconds: float) -> None:
    holder = read_holder(path)
    if holder is None:
        path.unlink(missing_ok=True)  # gone in between, or not a lock of ours
        return
    if not _is_gone(path, holder, patience_seconds):
        raise _in_use(path, holder)
    if holder.pid != os.getpid():
        left_by = (path, holder.host, holder.pid, holder.started)
        log.warning("%s was left by a start on %s (pid %d, since %s) that is gone; taken over", *left_by)
    # A rename to a name that holds the old nonce: of two starts that both find the lock stale, one moves it.
    aside = path.with_name(f".{path.name}.{holder.nonce}.stale")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        moved = read_holder(aside)
        if moved is not None and moved.nonce != holder.nonce:  # a third start's, made in this moment: give it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _is_gone(path: Path, holder: Holder, patience_seconds: float) -> bool:
    if not holder.is_from_here:
        return _stays_untouched(path, holder, patience_seconds)
    return holder.pid == os.getpid() or holder.process_is_gone  # who opens its folder again is over with what it did


def _in_use(path: Path, holder: Holder) -> ConfigError:
    return ConfigError(
        f"the run folder {path.parent} is in use: a start of {holder.num_ranks} rank(s) on {holder.host} "
        f"(pid {holder.pid}, since {holder.started}) works in it",
        expected="one start at a time in a run folder",
        remedy="wait for it or end it (`sparring status` shows what it does); else choose another run.path",
    )


def _stays_untouched(path: Path, holder: Holder, seconds: float) -> bool:
    """Watch a lock for some time, by this host's clock alone; clocks of two hosts are never compared."""
    with contextlib.suppress(FileNotFoundError):
        first, deadline = path.stat().st_mtime_ns, time.monotonic() + seconds
        log.warning("%s is held by a start on %s; watching for %.0f s whether it lives", path, holder.host, seconds)
        while time.monotonic() < deadline:
            if path.stat().st_mtime_ns != first:
                return False
            time.sleep(_LOOK_SECONDS)
    return True

"""Requests to stop: SIGTERM, SIGUSR1, or a file named `stop` in the run folder.

A request sets a flag and nothing else. All ranks agree on it where a step, a unit or a stage ends, so that all stop at
the same place with a checkpoint; one rank that was asked is enough. Should that not come about in time, a timer ends
the process: what is lost then is what came after the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from engine.errors import SparringError
from engine.reliability.exit_codes import EXIT_PREEMPTED

if TYPE_CHECKING:  # imported where ranks agree: what only looks at a run is told in a moment, and not in seconds
    import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SparringError):
    """The run was asked to stop and has: the same command goes on where it is."""


class Preemption:
    """Whether this process was asked to stop, and the timer that backs it; one a process, as the signals are."""

    def __init__(self) -> None:
        self.requested = False
        """Set by a signal, by the file, or by another rank that was asked."""
        self.reason = ""
        """What asked for it."""
        self._seconds = 0.0
        self._at_deadline: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def listen(self, seconds: float) -> None:
        """Turn SIGTERM and SIGUSR1 into requests; from the main thread.

        A Python handler waits until the main thread is back from whatever C code it is in, such as a collective
        operation that another rank does not come to. So the signal's number also goes through a pipe to a thread.

        Args:
            seconds: How long after the first request the process may still take; then it ends.
        """
        self._seconds = seconds
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True).start()

    def request(self, reason: str) -> None:
        """Ask this process to stop; the first request starts the timer.

        Args:
            reason: What asked for it, such as `SIGTERM`.
        """
        with self._lock:
            if self.requested:
                return
            self.requested, self.reason = True, reason
        if self._seconds:
            timer = threading.Timer(self._seconds, self._force)
            timer.daemon = True
            timer.start()

    def interrupt(self, reason: str) -> None:
        """Let all ranks stop where a request would stop them, without its timer: something beside them has failed.

        Args:
            reason: What has.
        """
        with self._lock:
            if not self.requested:
                self.requested, self.reason = True, reason

    def at_deadline(self, function: Callable[[], None]) -> None:
        """Name what is called, from another thread, before the process is ended by the timer."""
        self._at_deadline = function

    def agreed(self, device: torch.device) -> bool:
        """Return whether any rank was asked to stop; the same answer on all ranks. A collective.

        Args:
            device: Where the collective's backend works.
        """
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.requested
        asked = torch.tensor([float(self.requested)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item() > 0:
            self.request("another rank was asked to stop")
        return self.requested

    def require_none(self, where: str) -> None:
        """Stop between two units of work, which a rank may do alone: the next start deals those that are missing.

        Args:
            where: What is being done.

        Raises:
            Preempted: This process was asked to stop.
        """
        if self.requested:
            raise self.stop_here(where)

    def stop_here(self, where: str) -> Preempted:
        """Return the error that ends this start, to be raised by all ranks at the same place.

        Args:
            where: What was reached, such as `retriever/3, step 40`.
        """
        return Preempted(f"stopped at {where} ({self.reason or 'asked to stop'}); the same command goes on from there")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Do nothing: the thread at the other end of the pipe does it, whatever the main thread is busy with."""

    def _read(self, reading: int) -> None:
        while numbers := os.read(reading, 64):
            for number in numbers:
                if number in _SIGNALS:
                    self.request(signal.Signals(number).name)

    def _force(self) -> None:
        try:
            if self._at_deadline is not None:
                with contextlib.suppress(OSError):  # the last words; the end comes all the same
                    self._at_deadline()
        finally:
            os._exit(EXIT_PREEMPTED)


def _forget() -> None:
    """Let a forked child take signals as any process does: the pipe's other end is its parent's."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


PREEMPTION = Preemption()
"""This process's own."""

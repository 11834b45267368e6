"""What this process is doing right now, for heartbeats, the status command and error messages.

There is one activity a process, as there is one main thread that works. Stages, progress bars and points where ranks
meet note here what they do by plain assignments, which cost nothing; the thread that writes heartbeats
(`engine.reliability.watchdog`) reads them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Activity:
    """The present stage, how far it is, and what is waited for."""

    stage: str = ""
    """Name of the innermost stage, such as `retriever/3`; empty between stages."""
    done: int = 0
    """Units of the present piece of work that are done, those of earlier starts included."""
    total: int = 0
    """Units of it in all; 0 where nothing is counted."""
    unit: str = ""
    """What is counted: `step`, `doc`, `query`."""
    piece: int = 0
    """Counts the pieces of work begun, so that a speed is never taken over two of them."""
    waiting_for: str = ""
    """The point where this rank waits for the others; empty where it works."""
    waiting_since: float = 0.0
    """`time.monotonic()` when the wait began."""
    last_point: str = ""
    """The last point that all ranks came to."""

    @contextmanager
    def in_stage(self, name: str) -> Iterator[None]:
        """Name the stage while the body runs; stages may lie inside each other."""
        outer, self.stage = self.stage, name
        self._begin(0, 0, "")
        yield
        self.stage = outer  # after an error it keeps its name, which is where the error was
        self._begin(0, 0, "")

    @contextmanager
    def counting(self, total: int, unit: str, done: int) -> Iterator[None]:
        """Count units while the body runs.

        Args:
            total: Number of units in all.
            unit: What is counted.
            done: Units that an earlier start already did.
        """
        self._begin(done, total, unit)
        yield

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Name what is waited for while the body runs; after an error it stays named."""
        self.waiting_since, self.waiting_for = time.monotonic(), label
        yield
        self.waiting_for, self.last_point = "", label

    def _begin(self, done: int, total: int, unit: str) -> None:
        self.piece += 1
        self.done, self.total, self.unit = done, total, unit

    def __str__(self) -> str:
        return describe(self.stage, self.done, self.total, self.unit, self.waiting_for)


def describe(stage: str, done: int, total: int, unit: str, waiting_for: str) -> str:
    """Say in words where a rank is, such as `retriever/3, step 4 of 6, waiting for barrier 'x'`."""
    words = [f"in {stage}" if stage else "between stages"]
    if total:
        words.append(f"{unit} {done} of {total}")
    if waiting_for:
        words.append(f"waiting for {waiting_for}")
    return ", ".join(words)


ACTIVITY = Activity()
"""This process's own."""

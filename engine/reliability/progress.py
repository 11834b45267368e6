"""Progress: a live line where rank 0 has a terminal, a line of the log every so often where it has not.

Every rank counts, shown or not, so that its heartbeats tell how far it is. What the whole recipe still takes is told by
whoever was named for it (`follow`), and asked seldom.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from engine.log import get_logger, is_live, terminal
from engine.reliability.activity import ACTIVITY

log = get_logger(__name__)
FIRST_LINE_SECONDS, LINE_SECONDS = 15.0, 60.0
"""Into a pipe or a file: after how long a piece of work has a line, and how long until the next."""
_OUTLOOK_SECONDS = 5.0
Outlook = Callable[[float], str]
"""Takes the units a second of the counter that runs, 0 where none does, and tells what the whole recipe still takes;
empty where that is not known."""
_FOLLOWED: list[Outlook] = []
_TOLD_AT = [0.0]
"""When a line told it last, by the clock."""


def follow(outlook: Outlook | None) -> None:
    """Show from now on, beside a counter, what the whole recipe still takes; None for no longer."""
    _FOLLOWED[:] = [] if outlook is None else [outlook]
    _TOLD_AT[0] = time.monotonic()


def tell_outlook(clock: Callable[[], float] = time.monotonic) -> None:
    """Log what the whole recipe still takes, where no line has told it for a while: short stages have none.

    Args:
        clock: Seconds that only grow.
    """
    if not _FOLLOWED or is_live() or (now := clock()) < _TOLD_AT[0] + LINE_SECONDS:
        return
    if told := _FOLLOWED[0](0.0):
        _TOLD_AT[0] = now
        log.info("%-28s %s", "recipe", told)


def plural(unit: str) -> str:
    """Return the plural of what is counted: `queries` for `query`."""
    return {"B": "bytes", "query": "queries"}.get(unit, f"{unit}s")


def format_seconds(seconds: float) -> str:
    """Write a duration as a person reads it, such as `1m 05s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


class ProgressBar:
    """Counts a piece of work, and shows it.

    Args:
        description: What runs.
        total: Number of units in all.
        unit: What is counted.
        shown: Whether this rank shows anything.
        initial: Units that an earlier start already did.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        *,
        shown: bool,
        initial: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n = initial
        self._description, self._total, self._unit, self._initial = description, total, unit, initial
        self._clock, self._begun = clock, clock()
        self._words: dict[str, Any] = {}
        shown = shown and not os.environ.get("TQDM_DISABLE")  # said to what runs beside a rank
        has_live_line = shown and is_live()
        self._line_due = self._begun + FIRST_LINE_SECONDS if shown and not has_live_line else float("inf")
        self._outlook_due = self._begun + _OUTLOOK_SECONDS if has_live_line else float("inf")
        self._bar: Any = None
        if has_live_line:
            self._bar = tqdm(
                total=total,
                desc=description,
                unit=unit,
                unit_scale=unit == "B",
                initial=initial,
                file=terminal(),
                dynamic_ncols=True,
                mininterval=0.5,
                leave=False,
            )

    def update(self, n: int = 1) -> None:
        """Count units that are done."""
        self.n += n
        ACTIVITY.done = self.n
        if self._bar is not None:
            if (now := self._clock()) >= self._outlook_due:
                self._outlook_due = now + _OUTLOOK_SECONDS
                words = ", ".join([*(f"{name}={value}" for name, value in self._words.items()), *self._outlook()])
                self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(n)
        elif (now := self._clock()) >= self._line_due and self.n < self._total:
            self._line_due, _TOLD_AT[0] = now + LINE_SECONDS, now
            log.info("%-28s %s", self._description, self._line())

    def set_postfix(self, **words: Any) -> None:
        """Show words beside the counter, such as `loss=0.52`, from the next count on."""
        self._words = words

    def close(self) -> None:
        """Take the live line away."""
        if self._bar is not None:
            self._bar.close()

    @property
    def _per_second(self) -> float:
        return (self.n - self._initial) / max(1e-9, self._clock() - self._begun)

    def _outlook(self) -> list[str]:
        told = _FOLLOWED[0](self._per_second) if _FOLLOWED else ""
        return [f"recipe {told}"] if told else []

    def _amount(self, number: float) -> str:
        if self._unit == "B":
            return f"{tqdm.format_sizeof(number, 'B', 1000)}"
        return f"{number:.3g}" if isinstance(number, float) else f"{number} {plural(self._unit)}"

    def _line(self) -> str:
        pace = self._per_second
        words = [
            f"{100 * self.n // max(1, self._total)}% of {self._amount(self._total)}, {self._amount(pace)} a second"
        ]
        if pace > 0:
            words.append(f"{format_seconds((self._total - self.n) / pace)} left")
        words += [f"{name} {value}" for name, value in self._words.items()]
        return ", ".join([*words, *self._outlook()])


@contextmanager
def progress_bar(description: str, total: int, unit: str, *, shown: bool, initial: int = 0) -> Iterator[ProgressBar]:
    """Show how far a stage is, at which speed, and how long it and the recipe will still take.

    Args:
        description: What runs, such as `retriever/3`.
        total: Number of units in all.
        unit: What is counted: `step`, `doc`, `query`.
        shown: Only rank 0 shows a bar.
        initial: Units that an earlier start already did.
    """
    bar = ProgressBar(description, total, unit, shown=shown, initial=initial)
    try:
        with ACTIVITY.counting(total, unit, initial):
            yield bar
    finally:
        bar.close()

"""Progress bars: rank 0 shows them, and every rank counts, so that its heartbeats tell how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from engine.reliability.activity import ACTIVITY


class _CountingBar(tqdm):  # type: ignore[type-arg]  # it is generic in its stub alone
    """A bar that counts on every rank, shown or not, and tells `engine.reliability.activity` how far it is."""

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self.disable:
            self.n += n or 0
        ACTIVITY.done = int(self.n)
        return shown


@contextmanager
def progress_bar(description: str, total: int, unit: str, *, shown: bool, initial: int = 0) -> Iterator[Any]:
    """Show how far a stage is, at which speed, and how long it will still take.

    Args:
        description: What runs, such as `retriever/3`.
        total: Number of units in all.
        unit: What is counted: `step`, `doc`, `query`.
        shown: Only rank 0 shows a bar.
        initial: Units that an earlier start already did.
    """
    bar = _CountingBar(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.5,
        leave=False,
    )
    with ACTIVITY.counting(total, unit, initial), bar:
        yield bar

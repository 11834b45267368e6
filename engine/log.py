"""Logging: short lines for the person at the terminal, from rank 0 alone; warnings and errors from every rank.

Progress bars write to stderr as the log does, and the log goes through tqdm, so that a line never tears a bar.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from engine.reliability.activity import ACTIVITY

_NOISY = ("DeepSpeed", "deepspeed", "faiss", "transformers", "bm25s", "torch.distributed", "absl", "root")


class _BarFriendlyHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _CountingBar(tqdm):  # type: ignore[type-arg]  # it is generic in its stub alone
    """A bar that counts on every rank, shown or not, and tells `engine.reliability.activity` how far it is."""

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        if self.disable:
            self.n += n or 0
        ACTIVITY.done = int(self.n)
        return shown


def set_up_logging(rank: int, world_size: int) -> None:
    """Send Sparring's own log to stderr and quieten the libraries.

    Args:
        rank: This process; ranks other than 0 only show warnings, with their rank in front.
        world_size: Number of processes.
    """
    handler = _BarFriendlyHandler()
    where = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {where}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("sparring")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|transformers)\..*")
    # Told to the caller, on every rank; what is to replace it exists in the newest torch only.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"torch\.distributed\.nn\.functional")


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(f"sparring.{name}")


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

"""Logging: short lines for the person at the terminal, from rank 0 alone; warnings and errors from every rank.

A run keeps a log file of its own for each rank, `RUN/logs/rank-00000.log`: our lines in full, and what libraries say of
themselves, which the terminal is spared. An error that a library logs is shown at the terminal, too.

Live lines of progress write where the log does, and the log goes through tqdm, so that a line never tears one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_NOISY = ("DeepSpeed", "deepspeed", "faiss", "transformers", "bm25s", "torch.distributed", "absl", "root")
_TERMINAL: list[TextIO] = []
_BOLD = re.compile(r"\x1b\[[01]m")


def terminal() -> TextIO:
    """Return where our lines go: standard error, also where what libraries write to it goes elsewhere."""
    return _TERMINAL[0] if _TERMINAL else sys.stderr


def speak_at(stream: TextIO | None) -> None:
    """Write our lines to a stream from now on; None for whatever is standard error."""
    _TERMINAL[:] = [] if stream is None else [stream]


def is_live() -> bool:
    """Whether lines can be written over: on a terminal that can do it, not in a pipe, nor in SLURM's log."""
    return terminal().isatty() and os.environ.get("TERM") != "dumb"


def is_bold() -> bool:
    """Whether text can be shown in bold: where lines can be written over, unless NO_COLOR is set."""
    return is_live() and not os.environ.get("NO_COLOR")


class _TerminalHandler(logging.Handler):
    """Writes to the terminal, above a live line of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=terminal())


def set_up_logging(rank: int, world_size: int) -> None:
    """Send Sparring's own log to the terminal and quieten the libraries.

    Args:
        rank: This process; ranks other than 0 only show warnings, with their rank in front.
        world_size: Number of processes.
    """
    handler = _TerminalHandler()
    where = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {where}%(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root = logging.getLogger("sparring")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(handler.level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|transformers)\..*")
    # Told to the caller, on every rank; what is to replace it exists in the newest torch only.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"torch\.distributed\.nn\.functional")


def is_set_up() -> bool:
    """Tell whether Sparring's own log goes anywhere yet."""
    return bool(logging.getLogger("sparring").handlers)


def keep_log(file: Path) -> None:
    """Write our log to a file as well, from every rank and in full.

    Args:
        file: Added to; a file that cannot be written is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    root = logging.getLogger("sparring")
    root.addHandler(handler)
    root.setLevel(logging.INFO)


class _LogFileHandler(logging.FileHandler):
    """A log that no full disk turns into an error: what it holds was told at the terminal, or is of no account."""

    def format(self, record: logging.LogRecord) -> str:
        return _BOLD.sub("", super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(f"sparring.{name}")

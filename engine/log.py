"""Logging: short lines for the person at the terminal, from rank 0 alone; warnings and errors from every rank.

In a run, what libraries say goes into a file for each rank (`launcher.terminal.aside`), together with our lines of that
rank in full; an error that a library logs is shown at the terminal, too.

Live lines of progress write where the log does, and the log goes through tqdm, so that a line never tears one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import TextIO

from tqdm import tqdm

_NOISY = ("DeepSpeed", "deepspeed", "faiss", "transformers", "bm25s", "torch.distributed", "absl", "root")
_WITH_OWN_HANDLERS = ("DeepSpeed", "transformers")
"""Loggers that write by themselves, to the standard streams."""
_IN_FULL = "%(asctime)s %(message)s"
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


def set_up_logging(rank: int, world_size: int, *, aside: tuple[TextIO, TextIO] | None = None) -> None:
    """Send Sparring's own log to the terminal and quieten the libraries.

    Args:
        rank: This process; ranks other than 0 only show warnings, with their rank in front.
        world_size: Number of processes.
        aside: Streams for our log of every rank in full, and for what libraries log; no error of writing may come from
            them. Errors that libraries log are shown at the terminal, too. None where there are no such streams: then
            libraries are told to be silent.
    """
    where = f"[rank {rank}] " if world_size > 1 and rank else ""
    terminal_format = logging.Formatter(f"%(asctime)s {where}%(message)s", datefmt="%H:%M:%S")
    handlers = [_handler(_TerminalHandler(), terminal_format, logging.INFO if rank == 0 else logging.WARNING)]
    if aside is not None:
        handlers.append(_handler(logging.StreamHandler(aside[0]), _WithoutBold(_IN_FULL), logging.INFO))
    own = logging.getLogger("sparring")
    own.handlers[:] = handlers
    own.propagate = False
    own.setLevel(min(handler.level for handler in handlers))
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR if aside is None else logging.WARNING)
    if aside is None:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its level when it is imported, which may be later
        warnings.filterwarnings("ignore", module=r"(deepspeed|torch|transformers)\..*")
        # Told to the caller, on every rank; what is to replace it exists in the newest torch only.
        warnings.filterwarnings("ignore", category=FutureWarning, message=r"torch\.distributed\.nn\.functional")
        return
    format_of_libraries = logging.Formatter(f"%(asctime)s {where}%(name)s: %(message)s", datefmt="%H:%M:%S")
    for name in ("", *_WITH_OWN_HANDLERS):
        logger = logging.getLogger(name)
        logger.handlers[:] = [one for one in logger.handlers if not isinstance(one, _TerminalHandler)]
        logger.addHandler(_handler(_TerminalHandler(), format_of_libraries, logging.ERROR))
        logger.propagate = False
    logging.getLogger().addHandler(
        _handler(logging.StreamHandler(aside[1]), logging.Formatter(_IN_FULL), logging.WARNING)
    )


def is_set_up() -> bool:
    """Tell whether Sparring's own log goes anywhere yet."""
    return bool(logging.getLogger("sparring").handlers)


def _handler(handler: logging.Handler, form: logging.Formatter, level: int) -> logging.Handler:
    handler.setFormatter(form)
    handler.setLevel(level)
    return handler


class _WithoutBold(logging.Formatter):
    """Leaves out the codes of a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return _BOLD.sub("", super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(f"sparring.{name}")

"""Logging: short lines for the person at the terminal, from rank 0 alone; warnings and errors from every rank.

Progress bars write to stderr as the log does, and the log goes through tqdm, so that a line never tears a bar.
"""

from __future__ import annotations

import logging
import sys
import warnings

from tqdm import tqdm

_NOISY = ("DeepSpeed", "deepspeed", "faiss", "transformers", "bm25s", "torch.distributed", "absl", "root")


class _BarFriendlyHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


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


def is_set_up() -> bool:
    """Tell whether Sparring's own log goes anywhere yet."""
    return bool(logging.getLogger("sparring").handlers)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(f"sparring.{name}")

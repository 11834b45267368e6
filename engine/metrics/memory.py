"""The most memory that a process takes while it trains: what torch has given out of a GPU, or the resident set."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.metrics import Metric

_GIB = 2**30
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"


class PeakMemory:
    """Watches a process from when it is made.

    Args:
        device: Where it trains. Of a processor, the resident set is watched, with the pages of mapped files; only Linux
            tells it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._is_told = _forget_peak()

    @property
    def bytes(self) -> int:
        """The most so far; 0 where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak() if self._is_told else 0

    def metrics(self) -> dict[str, Metric]:
        """Return `peak_gib`, of the rank that took the most."""
        return {"peak_gib": Metric(self.bytes / _GIB, "max")}


def _forget_peak() -> bool:
    """Let the kernel count the largest resident set anew; tell whether it does."""
    try:
        _RESET.write_text(_FORGET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024

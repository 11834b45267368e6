"""How ranks take the steps of an index's training together: some shared out in units, some one rank's work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.coordination.coordinator import Coordinator
from engine.index.files import faiss_threads


@dataclass(frozen=True, slots=True)
class Steps:
    """The points of a training at which ranks meet."""

    coordinator: Coordinator
    name: str
    """Of the index, such as `index@3`."""
    seconds: float
    """How long ranks wait for each other at a step."""
    device: torch.device | str = "cpu"
    """This rank's, on which FAISS searches lists where it can."""

    @property
    def num_threads(self) -> int:
        """Threads of this rank: its share of the cores that its host's ranks may use, as nobody else works meanwhile.

        What is computed does not depend on it.
        """
        cores = len(os.sched_getaffinity(0)) // len(self.coordinator.ranks_of_host)
        return max(torch.get_num_threads(), cores)

    @contextmanager
    def shared(self, what: str, units: Sequence[int], homes: Sequence[str] | None = None) -> Iterator[Iterator[int]]:
        """Deal units to all ranks; to be entered by each, with a body that takes them all and holds no other point.

        Args:
            what: Is done, the same on all ranks.
            units: The same on all ranks.
            homes: Of each unit the host that has what it needs; any where it is left out.

        Yields:
            This rank's units, one after the other.
        """
        label = f"{self.name}: {what}"
        with self.coordinator.agreement(label, self.seconds), faiss_threads(1):
            yield self.coordinator.hand_out(label, units, self.seconds, homes=homes)

    def alone(self, what: str, function: Callable[[], Any]) -> Any:
        """Do something on rank 0, and return on all ranks what it returned, which must be JSON."""
        return self.coordinator.only_rank_zero(f"{self.name}: {what}", function, self.seconds)

    def every(self, what: str, obj: Any) -> list[Any]:
        """Return what every rank gives, in rank order."""
        return self.coordinator.gather(f"{self.name}: {what}", obj, self.seconds)

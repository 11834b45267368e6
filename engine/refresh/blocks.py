"""A pass over the training queries, cut into blocks that are done once.

Each block's result is a finished part on disk, in a folder beside that of the whole and named by all that it depends
on. So blocks can be handed out to the ranks, what an interrupted pass finished is not done again, and the parts of
another pass are never taken for those of this one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.run import Stage
from shards.files import canonical_json


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a pass, and where their results lie.

    Attributes:
        stage: Where this runs.
        folder: Of the whole result.
        asked: Hash of all that the result depends on besides its stamp; the same on all ranks.
        rows: Training rows of each block, int64; at least one block, be it empty.
        is_saved: Tells whether a folder holds a finished result of this pass, of a block or of the whole.
    """

    stage: Stage
    folder: Path
    asked: str
    rows: Sequence[NDArray[np.int64]]
    is_saved: Callable[[Path], bool]

    @property
    def parts(self) -> Path:
        """Folder of the parts, which are those of this pass and of this way to cut it; it goes with publishing."""
        cut = hashlib.sha256(canonical_json([self.asked, [len(one) for one in self.rows]]).encode()).hexdigest()
        return self.folder.with_name(f".{self.folder.name}.parts-{cut[:12]}")

    def part(self, number: int) -> Path:
        """Return the folder of a block's result."""
        return self.parts / f"{number:06d}"

    def missing(self, before: Callable[[], object] | None = None) -> list[int]:
        """List the blocks that are still to be done, the same on all ranks; parts of other passes are removed.

        Args:
            before: Called on rank 0 before it looks, to take over a whole result that lies elsewhere.
        """

        def look() -> list[int]:
            if before is not None:
                before()
            for other in self.folder.parent.glob(f".{self.folder.name}.parts-*"):
                if other != self.parts:
                    shutil.rmtree(other)  # of another pass, which nobody will go on with
            if self.is_saved(self.folder):
                return []
            return [number for number in range(len(self.rows)) if not self.is_saved(self.part(number))]

        missing: list[int] = self.stage.run.coordinator.only_rank_zero(f"{self.stage.name}: plan", look)
        return missing

    def publish(self, join: Callable[[list[Path]], None]) -> None:
        """Join all parts into the whole unless it is there, and remove them; on rank 0 alone, once all are done.

        Args:
            join: Takes the folders of all parts, in the order of the blocks.
        """
        if not self.is_saved(self.folder):
            join([self.part(number) for number in range(len(self.rows))])
        shutil.rmtree(self.parts, ignore_errors=True)

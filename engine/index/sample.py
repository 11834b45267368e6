"""The sample of the embeddings that trains an index, in files that all ranks write and read.

Which documents are in it follows from the corpus's size and a seed, how it is cut into units from its own size. A unit
is a file of rows as the lists see them (behind OPQ or PCA), with a marker written last; so no rank ever holds more of
the sample than a unit. The files lie in the folder of a training and go with it.

Shapes: N rows of a unit, D dimensions of the lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine.errors import ArtifactError
from engine.index.exact import Floats
from engine.index.files import IndexFile
from engine.index.held.rows import Documents, Rows
from engine.index.scratch import described, save_scratch, write_scratch
from shards.files import read_record

_UNIT_ROWS, _LEAST_ROWS, _LEAST_UNITS = 8192, 512, 64
"""Rows of a unit at most, and in a small sample at least; units that there should be."""


@dataclass(frozen=True, slots=True)
class UnitMarker:
    """What vouches for a unit; written after its rows."""

    num_rows: int
    largest_norm: float
    """Of a row."""
    file: IndexFile


def draw(num_documents: int, size: int, seed: int) -> Documents:
    """Draw documents without repeats.

    Args:
        num_documents: Of the corpus.
        size: How many to draw, at most all.
        seed: Any integer from 0.

    Returns:
        Their indices, ascending, int64 [size].
    """
    drawn: Documents = np.sort(np.random.default_rng(seed).choice(num_documents, size=size, replace=False))
    return drawn


def evenly(length: int, at_most: int) -> Documents:
    """Return the places of at most so many of `length` things, evenly spread: int64, ascending."""
    wanted = min(length, at_most)
    return np.arange(wanted, dtype=np.int64) * length // max(1, wanted)


def require_finite(rows_ND: Floats, documents: Sequence[int] | Documents) -> None:
    """Refuse what FAISS would count and then keep in no list.

    Args:
        rows_ND: Embeddings.
        documents: Whose they are.

    Raises:
        ArtifactError: One has a number that is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(rows_ND).all(axis=1))
    if bad.size:
        first = int(documents[int(bad[0])])
        raise ArtifactError(
            f"the embedding of document {first} is not finite, as are {bad.size - 1} more near it",
            expected="finite numbers, which a search can compare",
            remedy="look for a training run that diverged, and encode the corpus again",
        )


class Sample:
    """The rows that train an index.

    Args:
        folder: Of the training.
        documents: From `draw`.
    """

    def __init__(self, folder: Path, documents: Documents) -> None:
        self.folder, self.documents = folder, documents
        wanted = max(_LEAST_UNITS, -(-len(documents) // _UNIT_ROWS))
        size = max(_LEAST_ROWS, -(-len(documents) // wanted))
        self.units = [range(first, min(first + size, len(documents))) for first in range(0, len(documents), size)]

    def __len__(self) -> int:
        return len(self.documents)

    def write(self, unit: int, source: Rows, transform: Callable[[Floats], Floats]) -> None:
        """Read a unit's embeddings, transform them and write them, the marker last.

        Args:
            unit: Its number.
            source: Has their embeddings.
            transform: Takes and returns float32 [N, D].

        Raises:
            ArtifactError: An embedding is not finite.
            DiskFullError: There was no space for it.
        """
        documents = self.documents_of(unit)
        rows_ND = source.rows(documents)
        require_finite(rows_ND, documents)
        rows_ND = transform(rows_ND)
        largest = float(np.sqrt(np.square(rows_ND.astype(np.float64)).sum(axis=1).max()))
        path = self._path(unit)
        path.with_suffix(".json").unlink(missing_ok=True)
        save_scratch(path, rows_ND)
        write_scratch(path.with_suffix(".json"), asdict(UnitMarker(len(rows_ND), largest, described(path))))

    def documents_of(self, unit: int) -> Documents:
        """Return whose embeddings a unit has, ascending."""
        return self.documents[self.units[unit].start : self.units[unit].stop]

    def missing(self) -> list[int]:
        """Return the numbers of the units that are not there, or not whole; reads all that are there."""
        return [unit for unit in range(len(self.units)) if not self._is_complete(unit)]

    def largest_norm(self) -> float:
        """Return the norm of the longest row of all units, which must be there."""
        return max(self._marker(unit).largest_norm for unit in range(len(self.units)))

    def rows(self, unit: int) -> Floats:
        """Read a unit: float32 [N, D].

        Raises:
            ArtifactError: It is missing, or not what its marker says.
        """
        path = self._marker(unit).file.check(self.folder, fully=False)
        rows_ND: Floats = np.load(path, allow_pickle=False)
        return rows_ND

    def places_in(self, unit: int, places: Documents) -> Documents:
        """Return which of some ascending places in the whole sample lie in a unit, counted from its first row."""
        rows = self.units[unit]
        return places[np.searchsorted(places, rows.start) : np.searchsorted(places, rows.stop)] - rows.start

    def _is_complete(self, unit: int) -> bool:
        try:
            marker = self._marker(unit)
            marker.file.check(self.folder, fully=True)
        except ArtifactError:
            return False
        return marker.num_rows == len(self.units[unit])

    def _marker(self, unit: int) -> UnitMarker:
        return read_record(self._path(unit).with_suffix(".json"), UnitMarker, f"the marker of unit {unit} of a sample")

    def _path(self, unit: int) -> Path:
        return self.folder / f"rows-{unit:05d}.npy"

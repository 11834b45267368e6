"""Which positives a retriever found, where in its list, and with which score.

Mining takes positives out of the candidates. Their scores are kept here, because samplers and filters measure a
negative by its distance from the positive (SimANS, positive-aware margins), and that in the retriever's own numbers.

Names of shapes: P positives found of all queries together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ArtifactError

_ROW = np.dtype([("query", "<i8"), ("document", "<i8"), ("rank", "<i4"), ("score", "<f4")])


@dataclass(frozen=True, slots=True)
class FoundPositive:
    """A positive that a retriever found.

    Attributes:
        document: Global document index.
        rank: In the hits of the query, from 1, as they were before anything was taken out.
        score: The retriever's.
    """

    document: int
    rank: int
    score: float


@dataclass(frozen=True, eq=False)
class FoundPositives:
    """The found positives of many queries; a query of which none was found has none here.

    Attributes:
        rows_P: Records of query (its row in the candidates, ascending), document, rank and score [P], as on disk.
    """

    rows_P: NDArray[Any] = field(default_factory=lambda: np.empty(0, dtype=_ROW))
    _queries_P: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rows_P.dtype != _ROW or (np.diff(self.rows_P["query"]) < 0).any():
            raise ArtifactError(
                f"The found positives are no records of {_ROW} in the order of the queries",
                remedy="delete the candidates that they belong to and mine again",
            )
        object.__setattr__(self, "_queries_P", np.ascontiguousarray(self.rows_P["query"]))

    @classmethod
    def of(cls, found: Sequence[Iterable[FoundPositive]]) -> FoundPositives:
        """Gather what was found, query by query."""
        rows = [(row, one.document, one.rank, one.score) for row, positives in enumerate(found) for one in positives]
        return cls(np.array(rows, dtype=_ROW))

    def __len__(self) -> int:
        return len(self.rows_P)

    @property
    def num_queries(self) -> int:
        """How many queries there are at least."""
        return int(self._queries_P[-1]) + 1 if len(self) else 0

    def at(self, row: int) -> list[FoundPositive]:
        """Return the positives found of the query in a row, in the order of the hits."""
        start, stop = np.searchsorted(self._queries_P, [row, row + 1]).tolist()
        return [FoundPositive(document, rank, score) for _, document, rank, score in self.rows_P[start:stop].tolist()]

    def from_row(self, first: int) -> NDArray[Any]:
        """Return the records with the queries counted from another row, in memory, for joining parts."""
        moved_P: NDArray[Any] = np.array(self.rows_P)
        moved_P["query"] += first
        return moved_P

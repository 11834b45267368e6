"""Search over the parts of an index by all ranks together, for an index that one rank should not go through alone.

Where the parts of an index are not merged, or exact search streams all embeddings, a rank that answers its share of the
queries reads the whole corpus. Here each part is searched once, for a group of queries, by whichever rank is free, and
the best of all parts are merged; the result is what a search by one rank gives. Encoded queries and what was found in a
part are files, so an interrupted search goes on.

Shapes: Q queries of a group, D embedding dimension, C candidates a query and part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError
from engine.search import Hits, PartedSearcher
from shards.files import save_array, write_atomically
from shards.records import Query

_QUERIES_AT_A_TIME = 512


class FoundInParts:
    """A searcher that has the answers to a group of queries on disk, and asks on for anything else.

    Args:
        searcher: What was asked.
        queries: The group.
        top_k: The depth to which its parts were searched.
        folder: Where `search_over_ranks` has put what was found.
    """

    def __init__(self, searcher: PartedSearcher, queries: Sequence[Query], top_k: int, folder: Path) -> None:
        self.source, self.block_size = searcher.source, searcher.block_size
        self._searcher, self._top_k, self._folder = searcher, top_k, folder
        self._row_of = {query.id: row for row, query in enumerate(queries)}

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return the `top_k` documents of each query, best first: [Q, top_k]."""
        rows = [self._row_of.get(query.id) for query in queries]
        if top_k != self._top_k or None in rows:
            return self._searcher.search(queries, top_k)
        rows_Q = np.array(rows, dtype=np.int64)
        found = [
            Hits(_read(path)[rows_Q], _read(_scores_of(path))[rows_Q])
            for path in (_documents_path(self._folder, part) for part in range(self._searcher.num_parts))
        ]
        return self._searcher.finish(_read_queries(self._folder, len(self._row_of))[rows_Q], found, top_k)


def search_over_ranks(
    coordinator: Coordinator,
    searcher: PartedSearcher,
    queries: Sequence[Query],
    top_k: int,
    folder: Path,
    *,
    name: str,
) -> FoundInParts:
    """Encode a group of queries and search all parts for them, with all ranks. Every rank calls it alike.

    Args:
        coordinator: Between the ranks.
        searcher: Its `num_parts` parts are handed out.
        queries: Q queries with different ids, at least one.
        top_k: Documents to find for each.
        folder: Takes what is found, the same for all ranks; for this group and depth alone. The caller removes it.
        name: Of the work, for progress and errors.

    Returns:
        The answers.

    Raises:
        ArtifactError: What lies in the folder cannot be read.
    """
    starts = range(0, len(queries), _QUERIES_AT_A_TIME)

    def plan() -> list[list[int]]:
        encoded = [number for number in range(len(starts)) if not _queries_path(folder, number).exists()]
        # The scores are written last: with them, a part is complete.
        parts = [part for part in range(searcher.num_parts) if not _scores_of(_documents_path(folder, part)).exists()]
        return [encoded, parts]

    blocks, parts = coordinator.only_rank_zero(f"{name}: plan", plan)
    with coordinator.agreement(f"{name}: encode queries"):
        for number in coordinator.hand_out(f"{name}: encode queries", blocks):
            block = queries[starts[number] : starts[number] + _QUERIES_AT_A_TIME]
            _write(_queries_path(folder, number), searcher.encode(block))
    with coordinator.agreement(f"{name}: search parts"):
        queries_QD = _read_queries(folder, len(queries))
        for part in coordinator.hand_out(f"{name}: search parts", parts):
            found = searcher.search_parts(queries_QD, top_k, [part])
            path = _documents_path(folder, part)
            _write(path, found.documents_QK)
            _write(_scores_of(path), found.scores_QK)
    return FoundInParts(searcher, queries, top_k, folder)


def _queries_path(folder: Path, number: int) -> Path:
    return folder / f"queries-{number:04d}.npy"


def _documents_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:04d}.documents.npy"


def _scores_of(path: Path) -> Path:
    return path.with_name(path.name.replace(".documents.", ".scores."))


def _read_queries(folder: Path, num_queries: int) -> npt.NDArray[np.float32]:
    blocks = range(-(-num_queries // _QUERIES_AT_A_TIME))
    return np.concatenate([_read(_queries_path(folder, number)) for number in blocks])


def _write(path: Path, array: npt.NDArray[Any]) -> None:
    with write_atomically(path, num_bytes=array.nbytes) as temporary:
        save_array(temporary, array)


def _read(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error})",
            expected="what a rank found in a part of the index",
            remedy=f"delete {path.parent} and start the same command again",
        ) from error

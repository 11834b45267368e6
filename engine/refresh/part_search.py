"""Search over the parts of an index by all ranks together, for an index that one rank should not go through alone.

Where the parts of an index are not merged, or exact search streams all embeddings, a rank that answers its share of the
queries reads the whole corpus. Here each part is searched once, for a group of queries, by whichever rank is free, and
the best of all parts are merged; the result is what a search by one rank gives. Encoded queries and what was found in a
part are files, so an interrupted search goes on. Encoded queries are stored as they are, dense or sparse: a group of
8,192 queries with a number for each of 30,522 words would take 1 GB, their 30 words each 2 MB.

Shapes: Q queries of a group, C candidates a query and part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse  # type: ignore[import-untyped]

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

    def __init__(self, searcher: PartedSearcher[Any], queries: Sequence[Query], top_k: int, folder: Path) -> None:
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
        encoded = _read_queries(self._folder, len(self._row_of))
        return self._searcher.finish(encoded[rows_Q], found, top_k)


def search_over_ranks(
    coordinator: Coordinator,
    searcher: PartedSearcher[Any],
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
        encoded = [number for number in range(len(starts)) if not any(map(Path.exists, _queries_paths(folder, number)))]
        # The scores are written last: with them, a part is complete.
        parts = [part for part in range(searcher.num_parts) if not _scores_of(_documents_path(folder, part)).exists()]
        return [encoded, parts]

    blocks, parts = coordinator.only_rank_zero(f"{name}: plan", plan)
    with coordinator.agreement(f"{name}: encode queries"):
        for number in coordinator.hand_out(f"{name}: encode queries", blocks):
            block = queries[starts[number] : starts[number] + _QUERIES_AT_A_TIME]
            _write_queries(folder, number, searcher.encode(block))
    with coordinator.agreement(f"{name}: search parts"):
        encoded = _read_queries(folder, len(queries))
        for part in coordinator.hand_out(f"{name}: search parts", parts):
            found = searcher.search_parts(encoded, top_k, [part])
            path = _documents_path(folder, part)
            _write(path, found.documents_QK)
            _write(_scores_of(path), found.scores_QK)
    return FoundInParts(searcher, queries, top_k, folder)


def _queries_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """Return where a block of encoded queries lies if it is dense, and if it is sparse."""
    return folder / f"queries-{number:04d}.npy", folder / f"queries-{number:04d}.npz"


def _documents_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:04d}.documents.npy"


def _scores_of(path: Path) -> Path:
    return path.with_name(path.name.replace(".documents.", ".scores."))


def _write_queries(folder: Path, number: int, encoded: Any) -> None:
    dense, sparse_ = _queries_paths(folder, number)
    if not sparse.issparse(encoded):
        _write(dense, encoded)
        return
    with write_atomically(sparse_) as temporary, open(temporary, "wb") as file:
        sparse.save_npz(file, encoded, compressed=False)


def _read_queries(folder: Path, num_queries: int) -> Any:
    paths = [_queries_paths(folder, number) for number in range(-(-num_queries // _QUERIES_AT_A_TIME))]
    if any(dense.exists() for dense, _ in paths):
        return np.concatenate([_read(dense) for dense, _ in paths])
    return sparse.vstack([_read(sparse_, sparse.load_npz) for _, sparse_ in paths], format="csr")


def _write(path: Path, array: npt.NDArray[Any]) -> None:
    with write_atomically(path, num_bytes=array.nbytes) as temporary:
        save_array(temporary, array)


def _mapped(path: Path) -> Any:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read(path: Path, load: Callable[[Path], Any] = _mapped) -> Any:
    try:
        return load(path)
    except (OSError, ValueError, BadZipFile) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error})",
            expected="what a rank found in a part of the index",
            remedy=f"delete {path.parent} and start the same command again",
        ) from error

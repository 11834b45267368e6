"""Scores what an index found from embeddings that lie on several hosts: each host scores its own documents.

An index finds candidates by their codes, which lie where all ranks read them. Their exact scores need embeddings, and
the candidates of a query lie on all hosts. So candidates go to the hosts and scores come back, in files: 12 bytes of a
candidate are read and 4 written for 2 D bytes of an embedding that would pass through the shared file system. A block
of queries has its candidates sorted by document, so that a host reads what is its own. The order of the hits then
follows from the scores alone, which have the bits that one rank with all embeddings would compute.

Shapes: Q queries of a block, C candidates of a query, P index parts, D embedding dimension, K = `top_k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError
from engine.index.dense import document_parts
from engine.index.exact import Floats, best_of, blocks, score_pairs
from engine.index.held.store import HeldStore, homes_of
from engine.search import Hits
from shards.files import save_array, write_atomically

_SCORED_BYTES = 64 * 2**20
"""Embeddings of candidates held at a time."""


class ScoredBlocks:
    """Blocks of queries with their candidates and scores, in files that all ranks read.

    Args:
        folder: Of the files; the caller removes it.
        store: The embeddings, of which this host has some.
        num_blocks: Number of blocks.
    """

    def __init__(self, folder: Path, store: HeldStore, num_blocks: int) -> None:
        self._folder, self._store, self._num_blocks = folder, store, num_blocks
        self._parts = document_parts(store.manifest)

    def write_queries(self, block: int, queries_QD: Floats) -> None:
        """Write the queries of a block: float32 [Q, D]."""
        _write(self._path("queries", block), queries_QD)

    def queries(self, block: int) -> Floats:
        """Read the queries of a block: float32 [Q, D]."""
        queries_QD: Floats = _read(self._path("queries", block))
        return queries_QD

    def has_queries(self, block: int) -> bool:
        """Tell whether the queries of a block are there."""
        return self._path("queries", block).exists()

    def has_candidates(self, block: int) -> bool:
        """Tell whether the candidates of a block are there."""
        return self._path("layout", block).exists()

    def write_candidates(self, block: int, documents_QC: npt.NDArray[np.int64]) -> None:
        """Write the candidates of a block, without repeats in a query: int64 [Q, C]; -1 is none."""
        places = np.flatnonzero(documents_QC.ravel() >= 0)
        documents = documents_QC.ravel()[places]
        order = np.argsort(documents, kind="stable")
        ends = [part.start for part in self._parts] + [self._store.num_documents]
        _write(self._path("documents", block), documents[order])
        _write(self._path("places", block), places[order].astype(np.uint32))
        bounds = np.searchsorted(documents[order], np.array(ends))
        _write(self._path("layout", block), np.array([*documents_QC.shape, *bounds.tolist()], dtype=np.int64))

    def score(self, coordinator: Coordinator, name: str, timeout_seconds: float | None = None) -> None:
        """Score the candidates of all blocks, the ranks of each host those of its parts. All ranks call it alike.

        Args:
            coordinator: Between the ranks.
            name: Of the work, the same on all ranks.
            timeout_seconds: How long ranks wait for each other.
        """
        homes = homes_of(self._store, self._parts) or [self._store.disk.host] * len(self._parts)

        def missing() -> list[int]:
            return [part for part in range(len(self._parts)) if not self._path("scores", part).exists()]

        parts: list[int] = coordinator.only_rank_zero(f"{name}: plan", missing, timeout_seconds)
        with coordinator.agreement(name, timeout_seconds):
            for part in coordinator.hand_out(name, parts, timeout_seconds, homes=[homes[part] for part in parts]):
                found = [self._scores_of(part, block) for block in range(self._num_blocks)]
                _write(self._path("scores", part), np.concatenate([np.empty(0, dtype=np.float32), *found]))

    def hits(self, block: int, top_k: int) -> Hits:
        """Return the best of each query of a block whose candidates have been scored: [Q, top_k]."""
        num_queries, width, bounds = self._layout(block)
        before = [self._layout(other)[2] for other in range(block)]
        scores: list[Floats] = [np.empty(0, dtype=np.float32)]
        for part in range(len(self._parts)):
            start = sum(int(other[part + 1] - other[part]) for other in before)
            size = int(bounds[part + 1] - bounds[part])
            if size:
                scores.append(_read(self._path("scores", part))[start : start + size])
        documents_QC = np.full((num_queries, width), -1, dtype=np.int64)
        scores_QC = np.full((num_queries, width), -np.inf, dtype=np.float32)
        places = np.asarray(_read(self._path("places", block)), dtype=np.int64)
        documents_QC.ravel()[places] = _read(self._path("documents", block))
        scores_QC.ravel()[places] = np.concatenate(scores)
        return best_of(documents_QC, scores_QC, top_k)

    def _scores_of(self, part: int, block: int) -> Floats:
        _, width, bounds = self._layout(block)
        own = slice(int(bounds[part]), int(bounds[part + 1]))
        documents = np.asarray(_read(self._path("documents", block))[own])
        queries = np.asarray(_read(self._path("places", block))[own], dtype=np.int64) // width
        queries_QD, scores_K = self.queries(block), np.empty(len(documents), dtype=np.float32)
        for some in blocks(len(documents), max(1, _SCORED_BYTES // (4 * self._store.dimension))):
            scores_K[some] = score_pairs(self._store.rows(documents[some]), queries_QD[queries[some]])
        return scores_K

    def _layout(self, block: int) -> tuple[int, int, Sequence[int]]:
        """Return Q, C, and where each part's candidates begin among those of the block, and the last one's end."""
        num_queries, width, *bounds = _read(self._path("layout", block)).tolist()
        return num_queries, width, bounds

    def _path(self, what: str, number: int) -> Path:
        return self._folder / f"{what}-{number:04d}.npy"


def _write(path: Path, array: npt.NDArray[Any]) -> None:
    with write_atomically(path, num_bytes=array.nbytes) as temporary:
        save_array(temporary, array)


def _read(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error})",
            expected="what a rank wrote of a search",
            remedy=f"delete {path.parent} and start the same command again",
        ) from error

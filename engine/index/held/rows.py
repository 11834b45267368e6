"""Brings some documents' embeddings from the hosts that have them to where all ranks read them: samples, not corpora.

Shapes: N documents, K of them that are asked for, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.coordination.coordinator import Coordinator
from engine.index.dense import document_parts
from engine.index.exact import Floats, blocks
from engine.index.held.store import HeldStore, homes_of
from shards.embeddings import EmbeddingStore, read_rows
from shards.files import save_pieces, write_atomically

Documents = npt.NDArray[np.int64]
_ROWS_AT_A_TIME = 8192


class Rows(Protocol):
    """Embeddings by number of the document."""

    def rows(self, indices_K: Documents, /) -> Floats:
        """Return the embeddings of some documents, float32 [K, D]."""
        ...


class CollectedRows:
    """Embeddings of some documents, in a file for each index part that has some.

    Args:
        documents_N: Which, int64, ascending.
        bounds: Where each part's documents begin among them, and the last one's end.
        paths: Of the parts' files.
        dimension: D.
    """

    def __init__(self, documents_N: Documents, bounds: npt.NDArray[np.int64], paths: Sequence[Path], dimension: int):
        self._documents_N, self._bounds, self._paths, self._dimension = documents_N, bounds, paths, dimension

    def rows(self, indices_K: Documents) -> Floats:
        """Return the embeddings of some of these documents, in any order, float32 [K, D].

        Raises:
            IndexError: One is none of them.
        """
        places_K = np.searchsorted(self._documents_N, indices_K)
        known_K = places_K < len(self._documents_N)
        if not known_K.all() or not np.array_equal(self._documents_N[places_K], indices_K):
            raise IndexError("rows of documents that were not collected")
        rows_KD = np.empty((len(indices_K), self._dimension), dtype=np.float32)
        parts_K = np.searchsorted(self._bounds, places_K, side="right") - 1
        for part in np.unique(parts_K).tolist():
            here = np.flatnonzero(parts_K == part)
            wanted, places = np.unique(places_K[here] - self._bounds[part], return_inverse=True)
            part_ND = np.load(self._paths[part], mmap_mode="r", allow_pickle=False)
            rows_KD[here] = read_rows(part_ND, wanted)[places]
        return rows_KD


class MixedRows:
    """What this host has, and what was collected of the others'.

    Args:
        store: This host's.
        collected: Documents of other hosts.
    """

    def __init__(self, store: HeldStore, collected: Rows) -> None:
        self._store, self._collected = store, collected
        firsts = [entry.first_document for entry in store.manifest.shards]
        self._firsts_P = np.array(firsts, dtype=np.int64)
        self._own_P = np.array([home == store.disk.host for home in store.homes])

    def rows(self, indices_K: Documents) -> Floats:
        """Return the embeddings of some documents, float32 [K, D]."""
        own_K = self._own_P[np.searchsorted(self._firsts_P, indices_K, side="right") - 1]
        rows_KD = np.empty((len(indices_K), self._store.dimension), dtype=np.float32)
        for places, source in ((np.flatnonzero(own_K), self._store), (np.flatnonzero(~own_K), self._collected)):
            if len(places):
                rows_KD[places] = source.rows(indices_K[places])
        return rows_KD


def collect_rows(
    coordinator: Coordinator,
    name: str,
    store: EmbeddingStore,
    documents: Documents,
    folder: Path,
    timeout_seconds: float | None = None,
) -> Rows:
    """Let every rank read the embeddings of some documents, which are copied where only their hosts could.

    Args:
        coordinator: Between the ranks, which all call this alike.
        name: Of the work, the same on all ranks.
        store: The embeddings.
        documents: Which, int64, the same on all ranks.
        folder: Takes the copies; the caller removes it.
        timeout_seconds: How long ranks wait for each other.

    Returns:
        The store itself where any rank reads it, else the copies; the numbers are the same.

    Raises:
        DiskFullError: There is no space for a copy.
    """
    parts = document_parts(store.manifest)
    homes = homes_of(store, parts)
    if homes is None:
        return store
    documents_N = np.unique(documents)
    bounds = np.searchsorted(documents_N, np.array([*(part.start for part in parts), store.num_documents]))
    paths = [folder / f"rows-{number:04d}.npy" for number in range(len(parts))]
    units = np.flatnonzero(np.diff(bounds)).tolist()
    with coordinator.agreement(name, timeout_seconds):
        for number in coordinator.hand_out(name, units, timeout_seconds, homes=[homes[unit] for unit in units]):
            own_N = documents_N[bounds[number] : bounds[number + 1]]
            shape, dtype = (len(own_N), store.dimension), np.dtype(store.dtype)
            pieces = (store.rows(own_N[block]).astype(dtype) for block in blocks(len(own_N), _ROWS_AT_A_TIME))
            with write_atomically(paths[number], num_bytes=shape[0] * shape[1] * dtype.itemsize) as temporary:
                save_pieces(temporary, shape, dtype, pieces)
    return CollectedRows(documents_N, bounds, paths, store.dimension)


def deal_rows(
    coordinator: Coordinator,
    name: str,
    store: EmbeddingStore,
    units: Sequence[Documents],
    folder: Path,
    timeout_seconds: float | None = None,
) -> tuple[list[str] | None, Rows]:
    """Decide which host reads which units of rows, and let it read those that lie elsewhere. All ranks call it alike.

    Args:
        coordinator: Between the ranks.
        name: Of the work, the same on all ranks.
        store: The embeddings.
        units: Documents of each unit, ascending, at least one; the same on all ranks. One belongs to the host of its
            first document.
        folder: Takes copies; the caller removes it.
        timeout_seconds: How long ranks wait for each other.

    Returns:
        The host of each unit, None where any rank reads all; and what its ranks read from.
    """
    parts = document_parts(store.manifest)
    homes = homes_of(store, parts)
    if homes is None or not isinstance(store, HeldStore):
        return None, store
    starts, homes_P = np.array([part.start for part in parts]), np.array(homes)
    homes_N = [homes_P[np.searchsorted(starts, unit, side="right") - 1] for unit in units]
    foreign = [unit[own != own[0]] for unit, own in zip(units, homes_N, strict=True)]
    asked = np.concatenate([np.empty(0, dtype=np.int64), *foreign])
    collected = collect_rows(coordinator, name, store, asked, folder, timeout_seconds)
    return [str(own[0]) for own in homes_N], MixedRows(store, collected)

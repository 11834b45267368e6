"""What filters left of candidates, on disk: a bit for each entry, and the documents drawn where too little was left.

The artifact of a joint pool. It names the candidates that it is about by the hash of their manifests, so that bits
never meet other lists than those that they were made for.

Names of shapes: Q queries, C bytes of a query's bits, F documents drawn from the corpus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.arrays import Pieces, digest_of_qids, joined_qids, map_array, read_manifest, row_numbers, write_arrays
from engine.errors import ArtifactError
from shards.embeddings import Stamp
from shards.files import write_json

_MANIFEST, _KEPT, _FILLED = "filtered.json", "kept.npy", "filled.npy"
_VERSION = 1
_FILL = np.dtype([("query", "<i8"), ("document", "<i8")])


@dataclass(frozen=True, slots=True)
class PooledSource:
    """Candidates that a pool is a view of."""

    name: str
    """In the run folder."""
    stamp: Stamp
    """The weights and the corpus that they come from."""
    manifest_sha256: str
    """Of their manifest, which has the hashes of their arrays."""


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What vouches for the arrays; written last."""

    version: int
    asked: str
    """Names the candidates, the filters and all else that they depend on."""
    sources: tuple[PooledSource, ...]
    """The candidates, for people; `asked` is what is compared."""
    shape: tuple[int, int]
    num_filled: int
    counts: dict[str, int]
    sha256: dict[str, str]
    """Of the arrays, by file name."""
    qids_sha256: str
    qids: tuple[str, ...]


@dataclass
class Filtered:
    """What filters left of the candidates of Q queries.

    Attributes:
        asked: Names the candidates, the filters and all else that it depends on.
        sources: The candidates.
        qids: Q query ids, each once.
        kept_QC: A bit for each entry of a query's lists with padding, laid end to end, uint8 [Q, C].
        filled_F: Records of query (a row, ascending) and document that was drawn from the corpus [F].
        counts: What was counted on the way, all queries together.
    """

    asked: str
    sources: tuple[PooledSource, ...]
    qids: list[str]
    kept_QC: NDArray[np.uint8]
    filled_F: NDArray[Any]
    counts: Counter[str]

    def __post_init__(self) -> None:
        self._row_of = row_numbers("filtered candidates", self.qids)
        self._fill_of: dict[int, list[int]] = {}
        for row, document in self.filled_F.tolist():
            self._fill_of.setdefault(row, []).append(document)

    @classmethod
    def of(
        cls,
        asked: str,
        sources: tuple[PooledSource, ...],
        qids: Sequence[str],
        kept: Sequence[NDArray[np.uint8]],
        filled: Sequence[Sequence[int]],
        counts: Counter[str],
        *,
        width: int,
    ) -> Filtered:
        """Gather what was found, query by query.

        Args:
            asked: As the attribute.
            sources: As the attribute.
            qids: As the attribute.
            kept: Bits of each query, uint8 [C].
            filled: Documents that were drawn for each.
            counts: As the attribute.
            width: Entries of a query with padding.
        """
        kept_QC = np.array(kept, dtype=np.uint8).reshape(len(qids), -(-width // 8))
        rows = [(row, document) for row, documents in enumerate(filled) for document in documents]
        return cls(asked, sources, list(qids), kept_QC, np.array(rows, dtype=_FILL), counts)

    def __len__(self) -> int:
        return len(self.qids)

    def __contains__(self, qid: str) -> bool:
        return qid in self._row_of

    def bits(self, qid: str, width: int) -> NDArray[np.bool_]:
        """Return which entries of a query were left, bool [width]."""
        return np.unpackbits(self.kept_QC[self._row_of[qid]], count=width).astype(np.bool_)

    def fill(self, qid: str) -> NDArray[np.int64]:
        """Return the documents that were drawn from the corpus for a query, in the order drawn."""
        return np.array(self._fill_of.get(self._row_of[qid], ()), dtype=np.int64)

    @classmethod
    def load(cls, folder: Path, asked: str) -> Filtered:
        """Open what `publish` wrote.

        Args:
            folder: Where it lies.
            asked: What it must be made of.

        Raises:
            ArtifactError: The folder is unfinished, damaged, or about other candidates or other filters.
        """
        remedy = f"delete {folder} and start the run again, which filters once more"
        manifest = _read_manifest(folder, remedy)
        if manifest.asked != asked:
            raise ArtifactError(
                f"{folder} is about other candidates, or was made by other filters", expected=asked, remedy=remedy
            )
        if digest_of_qids(manifest.qids) != manifest.qids_sha256:
            raise ArtifactError(f"The query ids in {folder / _MANIFEST} are not those that were saved", remedy=remedy)
        kept_QC = map_array(folder / _KEPT, manifest.sha256.get(_KEPT), manifest.shape, remedy)
        filled_F = map_array(folder / _FILLED, manifest.sha256.get(_FILLED), (manifest.num_filled,), remedy)
        return cls(asked, manifest.sources, list(manifest.qids), kept_QC, filled_F, Counter(manifest.counts))


def is_filtered(folder: Path, asked: str) -> bool:
    """Tell whether a folder holds what was asked for."""
    try:
        return _read_manifest(folder, "").asked == asked
    except ArtifactError:
        return False


def publish(parts: Sequence[Filtered], folder: Path) -> None:
    """Publish parts as one, in the order given: the arrays first, the manifest that vouches for them last.

    Args:
        parts: At least one, all of one request; no query in two of them. Counts are added up. Gone through twice, as
            `OpenedInTurn` can be.
        folder: Made if missing; what lies there is replaced.

    Raises:
        ArtifactError: The parts do not belong together.
    """
    first, listed, filled, counts = parts[0], list[list[str]](), list[NDArray[Any]](), Counter[str]()
    for part in parts:
        if (part.asked, part.kept_QC.shape[1]) != (first.asked, first.kept_QC.shape[1]):
            raise ArtifactError(
                "parts of different filtering are to be joined", remedy=f"delete {folder} and start again"
            )
        moved_F = np.array(part.filled_F, dtype=_FILL)
        moved_F["query"] += sum(map(len, listed))
        filled.append(moved_F)
        listed.append(part.qids)
        counts += part.counts
    qids = joined_qids("filtered candidates", listed)
    shape, num_filled = (len(qids), first.kept_QC.shape[1]), sum(map(len, filled))
    folder.mkdir(parents=True, exist_ok=True)
    # Without its manifest the folder is unfinished, and says so, until the new one stands.
    (folder / _MANIFEST).unlink(missing_ok=True)
    kept = Pieces(shape, np.uint8, (part.kept_QC for part in parts))
    sha256 = write_arrays(folder, {_KEPT: kept, _FILLED: Pieces((num_filled,), _FILL, filled)})
    manifest = _Manifest(
        version=_VERSION,
        asked=first.asked,
        sources=first.sources,
        shape=shape,
        num_filled=num_filled,
        counts=dict(counts),
        sha256=sha256,
        qids_sha256=digest_of_qids(qids),
        qids=qids,
    )
    write_json(folder / _MANIFEST, asdict(manifest))


def _read_manifest(folder: Path, remedy: str) -> _Manifest:
    return read_manifest(folder / _MANIFEST, _Manifest, _VERSION, what="joint pool", remedy=remedy)

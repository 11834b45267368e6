"""Candidates: what one retriever proposes as negatives for the training queries, as arrays on disk.

The artifact between an index and the next phase. It carries the stamp of the weights and the corpus that made it, so
that a phase cannot train on the negatives of another iteration; its arrays are mapped into memory, not read. Positives
are taken out of the lists, but where they stood and with which score is kept beside them.

Names of shapes: Q queries, K candidates a query.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.arrays import (
    Pieces,
    digest_of_qids,
    joined_qids,
    map_array,
    read_manifest,
    require_alike,
    require_stamp,
    row_numbers,
    write_arrays,
)
from engine.data.found_positives import FoundPositives
from engine.data.negatives import sample_negatives
from engine.errors import ArtifactError, DataError
from shards.embeddings import Stamp
from shards.files import write_json

_MANIFEST, _DOCUMENTS, _SCORES, _POSITIVES = "candidates.json", "documents.npy", "scores.npy", "positives.npy"
_VERSION = 4


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What vouches for the arrays; written last."""

    version: int
    source: str
    stamp: Stamp
    search: str
    """What was asked of the retriever."""
    shape: tuple[int, int]
    num_positives: int
    """Positives that were found and taken out."""
    counts: dict[str, int]
    sha256: dict[str, str]
    """Of the arrays, by file name."""
    qids_sha256: str
    qids: tuple[str, ...]


@dataclass
class Candidates:
    """What one retriever proposes as negatives, query by query.

    Attributes:
        source: The retriever, such as `bm25` or `dense`.
        stamp: Iteration, weights and corpus that the candidates come from.
        qids: Q query ids, each once.
        documents_QK: Global document indices, best first, int64 [Q, K]; -1 where a query has fewer than K.
        scores_QK: The retriever's scores, float32 [Q, K]; -inf where the document is -1, or was not found but drawn.
        counts: What was counted on the way, all queries together: documents taken out by reason, and others.
        positives: The positives that were found on the way to the K candidates, and taken out; left out, none.
    """

    source: str
    stamp: Stamp
    qids: list[str]
    documents_QK: NDArray[np.int64]
    scores_QK: NDArray[np.float32]
    counts: Counter[str]
    positives: FoundPositives = field(default_factory=FoundPositives)
    _row_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = self.documents_QK.shape
        if self.documents_QK.ndim != 2 or shape != self.scores_QK.shape or shape[0] != len(self.qids):
            raise ArtifactError(
                f"Candidates of {self.source} have documents of shape {shape}, scores of shape "
                f"{self.scores_QK.shape} and {len(self.qids)} query ids",
                expected="[Q, K], [Q, K] and Q",
            )
        if self.positives.num_queries > len(self.qids):
            raise ArtifactError(
                f"Candidates of {self.source} have positives of {self.positives.num_queries} queries",
                expected=f"of their {len(self.qids)} queries",
            )
        self._row_of = row_numbers(f"Candidates of {self.source}", self.qids)

    def __len__(self) -> int:
        return len(self.qids)

    def row(self, qid: str) -> NDArray[np.int64]:
        """Return a query's candidates, best first.

        Args:
            qid: Query id.

        Returns:
            Global document indices, int64, at most K of them, none of them -1.

        Raises:
            DataError: The query was not mined.
        """
        documents_K = self.documents_QK[self.row_number(qid)]
        kept: NDArray[np.int64] = documents_K[documents_K >= 0]
        return kept

    def row_number(self, qid: str) -> int:
        """Return the row of a query in the arrays.

        Raises:
            DataError: The query was not mined.
        """
        if qid not in self._row_of:
            raise DataError(
                f"Query {qid!r} has no candidates of {self.source} at iteration {self.stamp.iteration}",
                expected="every training query is mined before a phase",
            )
        return self._row_of[qid]

    def __contains__(self, qid: str) -> bool:
        return qid in self._row_of

    def draw(self, qid: str, positive: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw negatives of a query uniformly from its candidates, as `engine.data.negatives.NegativeSource` has it."""
        return sample_negatives(self.row(qid), n, rng)

    def top(self, top_k: int | None) -> Candidates:
        """Return the best candidates of each query as a view; None for all."""
        if top_k is None or top_k >= self.documents_QK.shape[1]:
            return self
        return replace(self, documents_QK=self.documents_QK[:, :top_k], scores_QK=self.scores_QK[:, :top_k])

    def save(self, folder: Path, *, search: str = "") -> None:
        """Publish to a folder: the arrays first, the manifest that vouches for them last.

        Args:
            folder: Made if missing; what an earlier save left in it is replaced.
            search: Names what was asked of the retriever, for `is_saved`.
        """
        join([self], folder, search=search)

    @classmethod
    def load(cls, folder: Path, stamp: Stamp | None = None) -> Candidates:
        """Open what `save` published.

        Args:
            folder: Where it lies.
            stamp: What the candidates must come from; None takes any.

        Returns:
            The candidates, equal to the saved ones.

        Raises:
            ArtifactError: The folder is unfinished, damaged, or made by other weights or for another corpus.
        """
        remedy = f"delete {folder} and run the stage that writes it again"
        manifest = _read_manifest(folder, remedy)
        found, qids = manifest.stamp, list(manifest.qids)
        require_stamp("candidates", folder, found, stamp, remedy)
        if digest_of_qids(qids) != manifest.qids_sha256:
            raise ArtifactError(f"The query ids in {folder / _MANIFEST} are not those that were saved", remedy=remedy)
        documents_QK, scores_QK = (
            map_array(folder / name, manifest.sha256.get(name), manifest.shape, remedy)
            for name in (_DOCUMENTS, _SCORES)
        )
        shape = (manifest.num_positives,)
        rows_P = map_array(folder / _POSITIVES, manifest.sha256.get(_POSITIVES), shape, remedy)
        counts, positives = Counter(manifest.counts), FoundPositives(rows_P)
        return cls(manifest.source, found, qids, documents_QK, scores_QK, counts, positives)


def is_saved(folder: Path, stamp: Stamp, search: str) -> bool:
    """Tell whether a folder holds the candidates of a stamp and a search, so that they need not be searched again."""
    return is_of(folder, stamp) and _read_manifest(folder, "").search == search


def is_of(folder: Path, stamp: Stamp) -> bool:
    """Tell whether a folder holds the candidates of a stamp."""
    try:
        return _read_manifest(folder, "").stamp == stamp
    except ArtifactError:
        return False


def join(parts: Sequence[Candidates], folder: Path, *, search: str = "") -> None:
    """Publish parts of one search as one, in the order given; they are copied one by one, not held together.

    Args:
        parts: At least one; the same source, stamp and K; no query in two of them. Counts are added up. Gone through
            several times, as `OpenedInTurn` can be.
        folder: Made if missing; what lies there is replaced.
        search: As in `Candidates.save`.

    Raises:
        ArtifactError: The parts do not belong together.
    """
    if not parts:
        raise ArtifactError("There are no candidates to join", expected="one part or more")
    first, listed, counts, positives = parts[0], list[list[str]](), Counter[str](), list[NDArray[Any]]()
    remedy = "delete the parts and mine again"
    for number, part in enumerate(parts):
        pairs = {
            "source": (part.source, first.source),
            "stamp": (part.stamp, first.stamp),
            "number of candidates a query": (part.documents_QK.shape[1], first.documents_QK.shape[1]),
        }
        require_alike("candidates", number, pairs, of="one search", remedy=remedy)
        positives.append(part.positives.from_row(sum(map(len, listed))))
        listed.append(part.qids)
        counts += part.counts
    qids = joined_qids("candidates", listed)
    shape = len(qids), first.documents_QK.shape[1]
    folder.mkdir(parents=True, exist_ok=True)
    # Without its manifest the folder is unfinished, and says so, until the new one stands.
    (folder / _MANIFEST).unlink(missing_ok=True)
    sha256 = write_arrays(
        folder,
        {
            _DOCUMENTS: Pieces(shape, np.int64, (part.documents_QK for part in parts)),
            _SCORES: Pieces(shape, np.float32, (part.scores_QK for part in parts)),
            _POSITIVES: Pieces((sum(map(len, positives)),), positives[0].dtype, positives),
        },
    )
    manifest = _Manifest(
        version=_VERSION,
        source=first.source,
        stamp=first.stamp,
        search=search,
        shape=shape,
        num_positives=sum(map(len, positives)),
        counts=dict(counts),
        sha256=sha256,
        qids_sha256=digest_of_qids(qids),
        qids=qids,
    )
    write_json(folder / _MANIFEST, asdict(manifest))


def _read_manifest(folder: Path, remedy: str) -> _Manifest:
    return read_manifest(folder / _MANIFEST, _Manifest, _VERSION, what="candidates", remedy=remedy)

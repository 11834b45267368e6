"""Teacher scores: what a ranker says of the training queries' documents, computed once and reused from disk.

The artifact between a ranker and whoever learns from it or looks at what it says. Scores are raw logits, never
probabilities: a softmax, a margin or a temperature is the reader's affair. The stamp names the teacher's weights and
the corpus, so that nobody learns from another ranker than the one that was named.

The documents of a query are stored in ascending order, each once, whatever the candidates say twice.

Names of shapes: Q queries, P pairs of a query and a document, of all queries together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

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
from engine.errors import ArtifactError
from shards.embeddings import Stamp
from shards.files import write_json

_MANIFEST = "teacher_scores.json"
_OFFSETS, _DOCUMENTS, _SCORES = "offsets.npy", "documents.npy", "scores.npy"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What vouches for the arrays; written last."""

    version: int
    source: str
    stamp: Stamp
    asked: str
    """What the teacher was asked."""
    num_pairs: int
    margins_only: bool
    counts: dict[str, int]
    sha256: dict[str, str]
    """Of the arrays, by file name."""
    qids_sha256: str
    qids: tuple[str, ...]


@dataclass
class TeacherScores:
    """Raw logits of one teacher, query by query.

    Attributes:
        source: The teacher: a model's name in the recipe, or the file that its scores were read from.
        stamp: The teacher's weights (of a file, its hash) and the corpus that the documents are of.
        qids: Q query ids, each once.
        offsets_Q1: Where each query's pairs begin, and the number of all, int64 [Q + 1].
        documents_P: Global document indices, ascending within a query, int64 [P].
        scores_P: Raw logits, float32 [P], all finite.
        counts: What was counted on the way, such as records that were dropped, by reason.
        margins_only: The teacher is known up to a constant a query, as where a file holds margins alone.
    """

    source: str
    stamp: Stamp
    qids: list[str]
    offsets_Q1: NDArray[np.int64]
    documents_P: NDArray[np.int64]
    scores_P: NDArray[np.float32]
    counts: Counter[str] = field(default_factory=Counter)
    margins_only: bool = False
    _row_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shapes = self.offsets_Q1.shape, self.documents_P.shape, self.scores_P.shape
        ends = self.offsets_Q1[[0, -1]].tolist() if self.offsets_Q1.size else []
        if shapes[0] != (len(self.qids) + 1,) or shapes[1] != shapes[2] or ends != [0, *shapes[1]]:
            raise ArtifactError(
                f"Scores of {self.source} have offsets of shape {shapes[0]} from and to {ends}, documents {shapes[1]}, "
                f"scores {shapes[2]} and {len(self.qids)} query ids",
                expected="[Q + 1] from 0 to P, [P], [P] and Q",
            )
        self._row_of = row_numbers(f"Scores of {self.source}", self.qids)

    def __len__(self) -> int:
        return len(self.qids)

    def __contains__(self, qid: str) -> bool:
        return qid in self._row_of

    @property
    def num_pairs(self) -> int:
        """Number of scored pairs."""
        return len(self.documents_P)

    def documents(self, qid: str) -> NDArray[np.int64]:
        """Return the documents that are scored for a query.

        Args:
            qid: Query id.

        Returns:
            Global document indices, ascending, int64; empty where the query was not scored.
        """
        found: NDArray[np.int64] = self.documents_P[self._pairs(qid)]
        return found

    def of(self, qid: str, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Look scores up.

        Args:
            qid: Query id.
            documents: Global document indices, int64 [N], in any order, with repeats if wanted; -1 is never scored.

        Returns:
            Raw logits, float32 [N]; NaN where the document was not scored for the query.
        """
        pairs = self._pairs(qid)
        known, scores = self.documents_P[pairs], self.scores_P[pairs]
        found = np.full(len(documents), np.nan, dtype=np.float32)
        if len(known):
            places = np.minimum(np.searchsorted(known, documents), len(known) - 1)
            hit = known[places] == documents
            found[hit] = scores[places[hit]]
        return found

    def _pairs(self, qid: str) -> slice:
        row = self._row_of.get(qid)
        if row is None:
            return slice(0, 0)
        first, end = self.offsets_Q1[row : row + 2].tolist()
        return slice(first, end)

    def save(self, folder: Path, *, asked: str = "") -> None:
        """Publish to a folder: the arrays first, the manifest that vouches for them last.

        Args:
            folder: Made if missing; what an earlier save left in it is replaced.
            asked: Names what the teacher was asked, for `is_saved`.

        Raises:
            ArtifactError: A score is not finite, or a query's documents are not in order.
        """
        join([self], folder, asked=asked)

    @classmethod
    def load(cls, folder: Path, stamp: Stamp | None = None) -> TeacherScores:
        """Open what `save` published.

        Args:
            folder: Where it lies.
            stamp: Teacher and corpus that the scores must come from; None takes any.

        Returns:
            The scores, equal to the saved ones.

        Raises:
            ArtifactError: The folder is unfinished or damaged, or another ranker gave the scores, or they are of
                another corpus.
        """
        remedy = f"delete {folder} and run the stage that writes it again"
        manifest = _read_manifest(folder, remedy)
        require_stamp("teacher scores", folder, manifest.stamp, stamp, remedy)
        qids = list(manifest.qids)
        if digest_of_qids(qids) != manifest.qids_sha256:
            raise ArtifactError(f"The query ids in {folder / _MANIFEST} are not those that were saved", remedy=remedy)
        offsets_Q1, documents_P, scores_P = (
            map_array(folder / name, manifest.sha256.get(name), (size,), remedy)
            for name, size in (
                (_OFFSETS, len(qids) + 1),
                (_DOCUMENTS, manifest.num_pairs),
                (_SCORES, manifest.num_pairs),
            )
        )
        counts = Counter(manifest.counts)
        return cls(
            manifest.source, manifest.stamp, qids, offsets_Q1, documents_P, scores_P, counts, manifest.margins_only
        )


def scores_of_queries(
    source: str,
    stamp: Stamp,
    pairs: Sequence[tuple[str, NDArray[np.int64], NDArray[np.float32]]],
    *,
    counts: Counter[str] | None = None,
    margins_only: bool = False,
) -> TeacherScores:
    """Lay out scores that were found query by query.

    Args:
        source: As `TeacherScores.source`.
        stamp: As `TeacherScores.stamp`.
        pairs: Query id, its documents int64 [N] in any order, each once, and their scores float32 [N].
        counts: As `TeacherScores.counts`.
        margins_only: As `TeacherScores.margins_only`.
    """
    orders = [np.argsort(documents, kind="stable") for _, documents, _ in pairs]
    lengths = [len(order) for order in orders]
    return TeacherScores(
        source,
        stamp,
        [qid for qid, _, _ in pairs],
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate(
            [np.empty(0, np.int64), *(docs[order] for (_, docs, _), order in zip(pairs, orders, strict=True))]
        ),
        np.concatenate(
            [np.empty(0, np.float32), *(own[order] for (_, _, own), order in zip(pairs, orders, strict=True))]
        ).astype(np.float32, copy=False),
        Counter(counts or {}),
        margins_only,
    )


def is_published(folder: Path) -> bool:
    """Tell whether a folder holds finished scores of any teacher, as another run has left them."""
    return (folder / _MANIFEST).is_file()


def whose_scores(folder: Path) -> tuple[Stamp, bool, tuple[str, ...]]:
    """Return of which teacher and corpus published scores are, whether margins alone are known, and of which queries.

    Args:
        folder: Where they lie; of it the manifest alone is read.

    Raises:
        ArtifactError: There are none, or their manifest is damaged.
    """
    manifest = _read_manifest(folder, "score again, or name another folder")
    return manifest.stamp, manifest.margins_only, manifest.qids


def is_saved(folder: Path, stamp: Stamp, asked: str) -> bool:
    """Tell whether a folder holds what a teacher says to what is asked, so that it need not be asked again."""
    return is_of(folder, stamp) and _read_manifest(folder, "").asked == asked


def is_of(folder: Path, stamp: Stamp) -> bool:
    """Tell whether a folder holds scores of a teacher and a corpus."""
    try:
        return _read_manifest(folder, "").stamp == stamp
    except ArtifactError:
        return False


def join(parts: Sequence[TeacherScores], folder: Path, *, asked: str = "") -> None:
    """Publish parts of one pass as one, in the order given; they are copied one by one, not held together.

    Args:
        parts: At least one; of the same teacher and corpus; no query in two of them. Counts are added up. Gone through
            several times, as `OpenedInTurn` can be.
        folder: Made if missing; what lies there is replaced.
        asked: As in `TeacherScores.save`.

    Raises:
        ArtifactError: The parts do not belong together, a score is not finite, or a query's documents are not in order.
    """
    if not parts:
        raise ArtifactError("There are no teacher scores to join", expected="one part or more")
    first, listed, sizes, counts = parts[0], list[list[str]](), list[int](), Counter[str]()
    remedy = "delete the parts and score again"
    for number, part in enumerate(parts):
        pairs = {
            "source": (part.source, first.source),
            "stamp": (part.stamp, first.stamp),
            "margins only": (part.margins_only, first.margins_only),
        }
        require_alike("teacher scores", number, pairs, of="one pass", remedy=remedy)
        _require_sound(part)
        listed.append(part.qids)
        sizes.append(part.num_pairs)
        counts += part.counts
    qids, begins = joined_qids("teacher scores", listed), np.cumsum([0, *sizes], dtype=np.int64)
    num_pairs = int(begins[-1])
    offsets = (part.offsets_Q1[:-1] + begin for part, begin in zip(parts, begins[:-1], strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    # Without its manifest the folder is unfinished, and says so, until the new one stands.
    (folder / _MANIFEST).unlink(missing_ok=True)
    sha256 = write_arrays(
        folder,
        {
            _OFFSETS: Pieces((len(qids) + 1,), np.int64, chain(offsets, [begins[-1:]])),
            _DOCUMENTS: Pieces((num_pairs,), np.int64, (part.documents_P for part in parts)),
            _SCORES: Pieces((num_pairs,), np.float32, (part.scores_P for part in parts)),
        },
    )
    manifest = _Manifest(
        version=_VERSION,
        source=first.source,
        stamp=first.stamp,
        asked=asked,
        num_pairs=num_pairs,
        margins_only=first.margins_only,
        counts=dict(counts),
        sha256=sha256,
        qids_sha256=digest_of_qids(qids),
        qids=qids,
    )
    write_json(folder / _MANIFEST, asdict(manifest))


def _require_sound(part: TeacherScores) -> None:
    """Refuse what would mislead a reader: scores that are no numbers, documents that a lookup would not find."""
    bad = np.flatnonzero(~np.isfinite(part.scores_P))
    if bad.size:
        row = int(np.searchsorted(part.offsets_Q1, bad[0], side="right")) - 1
        raise ArtifactError(
            f"the score of document {part.documents_P[bad[0]]} for query {part.qids[row]!r} by {part.source} is "
            f"{part.scores_P[bad[0]]}, as are {bad.size - 1} more not finite",
            expected="finite raw logits",
            remedy="look for a ranker whose training diverged, or whose numeric type is too narrow (fp16): score again "
            "by sound weights or in fp32",
        )
    begins_P = np.zeros(part.num_pairs, dtype=bool)
    begins_P[part.offsets_Q1[:-1][np.diff(part.offsets_Q1) > 0]] = True
    ascends_P = np.diff(part.documents_P, prepend=-1) > 0
    if bool((~ascends_P & ~begins_P).any()) or bool((part.documents_P < 0).any()):
        raise ArtifactError(
            f"the documents of a query in the scores of {part.source} are not in ascending order, each once",
            expected="global document indices in ascending order",
        )


def _read_manifest(folder: Path, remedy: str) -> _Manifest:
    return read_manifest(folder / _MANIFEST, _Manifest, _VERSION, what="teacher scores", remedy=remedy)

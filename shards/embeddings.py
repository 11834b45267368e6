"""Document embeddings on disk: one part for each shard, stamped with the weights and the corpus that made it.

A part is an array and, written after it, a JSON marker; a part without a valid marker does not exist. Any rank may
write any part, writing one again is harmless, and a store opens only when every part is there and carries the same
stamp, so that an index can never mix two retrievers. What vouches for a part here does so for the parts of
`shards.postings`, too: `PartMarker`, `publish_part`, `part_fault`, `open_markers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shards.errors import ArtifactError
from shards.files import OpenFiles, read_record, save_array, sha256_file, write_atomically, write_json
from shards.manifest import CorpusManifest, ShardEntry

Embeddings = npt.NDArray[np.floating[Any]]
_DTYPES = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What an artifact of the refresh was made from; whoever reads one compares all of it."""

    iteration: str
    """The iteration of Algorithm 1 whose retriever made it, for people to read."""
    weights_sha256: str
    """Hash of the retriever's weights."""
    corpus_sha256: str
    """`CorpusManifest.sha256`."""


@dataclass(frozen=True, slots=True)
class PartMarker:
    """What vouches for a part; written after its array."""

    stamp: Stamp
    """What made it."""
    shape: tuple[int, int]
    """Documents, and numbers of each: embedding dimension or vocabulary."""
    dtype: str
    """Of the numbers."""
    first_document: int
    """Global index of the part's first document."""
    num_bytes: int
    """Of the array's file."""
    sha256: str
    """Of the array's file."""


M = TypeVar("M", bound=PartMarker)


def write_part(folder: Path, entry: ShardEntry, embeddings_ND: Embeddings, stamp: Stamp) -> None:
    """Write the embeddings of one shard's documents, the marker last.

    Args:
        folder: The store's folder; made if needed.
        entry: The shard.
        embeddings_ND: float16 or float32 [N, D], N the shard's documents in order, all finite.
        stamp: What made them.

    Raises:
        ArtifactError: Another shape or type, or a number that is not finite.
    """
    require_part(entry, embeddings_ND)
    publish_part(folder, entry, [embeddings_ND], partial(marker_of, entry, embeddings_ND, stamp))


def marker_of(entry: ShardEntry, embeddings_ND: Embeddings, stamp: Stamp, num_bytes: int, sha256: str) -> PartMarker:
    """Return what vouches for a part, whose file has these bytes and this hash; other arguments as of `write_part`."""
    num_rows, dimension = embeddings_ND.shape
    return PartMarker(stamp, (num_rows, dimension), embeddings_ND.dtype.name, entry.first_document, num_bytes, sha256)


def require_part(entry: ShardEntry, embeddings_ND: Embeddings) -> None:
    """Refuse what is not the embeddings of a shard; arguments and errors as of `write_part`."""
    shape, dtype = embeddings_ND.shape, embeddings_ND.dtype.name
    if len(shape) != 2 or shape[0] != entry.num_documents or shape[1] < 1 or dtype not in _DTYPES:
        raise ArtifactError(
            f"the embeddings of shard {entry.name} are {dtype} {list(shape)}",
            expected=f"float16 or float32 [{entry.num_documents}, D]",
        )
    bad = np.flatnonzero(~np.isfinite(embeddings_ND).all(axis=1))
    if bad.size:
        overflowed = dtype == "float16" and not np.isnan(embeddings_ND[bad]).any()
        raise ArtifactError(
            f"the embedding of document {entry.first_document + int(bad[0])} (shard {entry.name}) is not finite, "
            f"as are {bad.size - 1} more of this shard",
            expected=f"finite numbers, which a search can compare; {dtype} holds those up to {np.finfo(dtype).max:.0f}",
            remedy="start again with index.embedding_dtype=float32 (and run.force_resume=true, since the run was begun "
            "without it): the corpus is encoded anew, with the range of float32"
            if overflowed
            else "look for a training run that diverged: lower the learning rate or start from an earlier checkpoint",
        )


def part_is_complete(folder: Path, entry: ShardEntry, stamp: Stamp, dtype: str | None = None) -> bool:
    """Tell whether a shard's embeddings are already there, so that a resumed pass can skip it.

    Args:
        folder: The store's folder.
        entry: The shard.
        stamp: What the caller would make them from.
        dtype: What type of numbers the caller would store; any if None.

    Returns:
        Whether the part has a valid marker with an equal stamp, the shard's number of rows and the right size.
    """
    fault, marker = part_fault(folder, entry, stamp, PartMarker)
    return not fault and marker is not None and dtype in (None, marker.dtype)


class EmbeddingStore:
    """The embeddings of a whole corpus, mapped into memory part by part at first use.

    Threads, forked workers and spawned ones may read through one object.

    Args:
        folder: The store's folder.
        manifest: The corpus.
        stamp: What made the embeddings.
        dimension: D.
        dtype: `float16` or `float32`. `EmbeddingStore.open` finds and checks these.
    """

    def __init__(self, folder: Path, manifest: CorpusManifest, stamp: Stamp, dimension: int, dtype: str) -> None:
        self.folder, self.manifest, self.stamp = Path(folder), manifest, stamp
        self.dimension, self.dtype = dimension, dtype
        self._firsts_P = np.array([entry.first_document for entry in manifest.shards], dtype=np.int64)
        self._parts: OpenFiles[Embeddings] = OpenFiles(self._open_part)

    @classmethod
    def open(cls, folder: Path, manifest: CorpusManifest, stamp: Stamp, *, verify: bool = False) -> EmbeddingStore:
        """Open a store and check that every part is there, whole and of the same stamp.

        Args:
            folder: The store's folder.
            manifest: The corpus that was encoded. Parts beyond its shards are ignored.
            stamp: What must have made the embeddings.
            verify: Hash every part too; without it, parts are checked by size.

        Returns:
            The store.

        Raises:
            ArtifactError: Parts are missing, stale, short or damaged, or the stamp names another corpus.
        """
        marker = open_markers(folder, manifest, stamp, PartMarker, what="embeddings", verify=verify)[0]
        return cls(folder, manifest, stamp, marker.shape[1], marker.dtype)

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Any, ...]]:
        return EmbeddingStore, (self.folder, self.manifest, self.stamp, self.dimension, self.dtype)

    @property
    def num_documents(self) -> int:
        """Number of rows, one a document."""
        return self.manifest.num_documents

    def rows(self, indices_K: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Read the embeddings of some documents.

        Args:
            indices_K: Global document indices, int64 [K], in any order, with repeats if wanted.

        Returns:
            float32 [K, D], row k for indices_K[k].

        Raises:
            IndexError: An index outside 0..num_documents-1, such as the -1 that pads a list of hits.
        """
        indices_K = np.asarray(indices_K, dtype=np.int64)
        if indices_K.size and (indices_K.min() < 0 or indices_K.max() >= self.num_documents):
            raise IndexError(
                f"rows {indices_K.min()} to {indices_K.max()} of embeddings with {self.num_documents} rows"
            )
        rows_KD = np.empty((indices_K.size, self.dimension), dtype=np.float32)
        # Sorted, each part is opened once and its pages are read in order.
        order_K = np.argsort(indices_K, kind="stable")
        sorted_K = indices_K[order_K]
        bounds = np.searchsorted(sorted_K, np.append(self._firsts_P, self.num_documents))
        for part in np.flatnonzero(np.diff(bounds)).tolist():
            here = slice(bounds[part], bounds[part + 1])
            # Not through the mapping: around each page that is touched the kernel maps fifteen more, and the whole
            # store would soon count as this process's memory.
            wanted, places = np.unique(sorted_K[here] - self._firsts_P[part], return_inverse=True)
            rows_KD[order_K[here]] = read_rows(self._parts[part], wanted)[places]
        return rows_KD

    def parts(self, documents: range | None = None) -> Iterator[tuple[int, Embeddings]]:
        """Read the store in order, part by part.

        Args:
            documents: Open only the parts that hold some of these, a range without steps; all if None.

        Yields:
            (global index of the part's first document, float16 or float32 [N, D] mapped from the file, read-only).
        """
        documents = range(self.num_documents) if documents is None else documents
        if not documents:
            return
        first = max(0, int(np.searchsorted(self._firsts_P, documents.start, side="right")) - 1)
        for part in range(first, int(np.searchsorted(self._firsts_P, documents.stop))):
            yield self.manifest.shards[part].first_document, self._parts[part]

    def _path(self, part: int) -> Path:
        """Return where a part's array lies; a subclass may have it elsewhere, or refuse."""
        return part_paths(self.folder, self.manifest.shards[part])[0]

    def _open_part(self, part: int) -> Embeddings:
        entry = self.manifest.shards[part]
        path = self._path(part)
        expected = f"{self.dtype} {[entry.num_documents, self.dimension]}"
        remedy = f"delete {path.with_suffix('')}.* and run the encoding again"
        try:
            embeddings_ND: Embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be opened ({error})", expected=expected, remedy=remedy) from error
        found = f"{embeddings_ND.dtype} {list(embeddings_ND.shape)}"
        if found != expected:
            raise ArtifactError(f"{path} holds {found}", expected=expected, remedy=remedy)
        return embeddings_ND


def read_rows(part_ND: Any, rows_K: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Read rows of a part's file without mapping them into memory.

    Args:
        part_ND: What `EmbeddingStore.parts` yields: an array mapped from a file.
        rows_K: Rows of it, int64 [K], ascending.

    Returns:
        float32 [K, D].

    Raises:
        ArtifactError: The file is shorter than the array.
    """
    width = part_ND.shape[1]
    found_KD = np.empty((len(rows_K), width), dtype=part_ND.dtype)
    starts = np.flatnonzero(np.diff(rows_K, prepend=-2) != 1)
    with open(part_ND.filename, "rb", buffering=0) as file:
        for start, stop in pairwise([*starts.tolist(), len(rows_K)]):
            file.seek(part_ND.offset + int(rows_K[start]) * width * part_ND.dtype.itemsize)
            run: Any = found_KD[start:stop]
            if file.readinto(run.view(np.uint8)) != run.nbytes:
                raise ArtifactError(
                    f"{part_ND.filename} ends before row {int(rows_K[start]) + len(run)} of {len(part_ND)}",
                    remedy="delete it and run the encoding again",
                )
    return found_KD.astype(np.float32, copy=False)


def part_paths(folder: Path, entry: ShardEntry) -> tuple[Path, Path]:
    """Return where a part's array and its marker lie."""
    stem = f"part-{entry.number:06d}"
    return Path(folder) / f"{stem}.npy", Path(folder) / f"{stem}.json"


def publish_part(
    folder: Path,
    entry: ShardEntry,
    pieces: Sequence[npt.NDArray[Any]],
    describe: Callable[[int, str], PartMarker],
) -> None:
    """Write a part of a store, the marker last.

    Args:
        folder: The store's folder; made if needed.
        entry: The shard.
        pieces: Of the array, as `shards.files.save_array` joins them.
        describe: Takes the bytes and the sha256 of the array's file and gives the marker.
    """
    array_path, marker_path = part_paths(folder, entry)
    # A marker of an earlier iteration must not stand next to the new array, not even for a moment.
    marker_path.unlink(missing_ok=True)
    with write_atomically(array_path, num_bytes=sum(piece.nbytes for piece in pieces)) as temporary:
        save_array(temporary, *pieces)
        marker = describe(temporary.stat().st_size, sha256_file(temporary))
    write_json(marker_path, asdict(marker))


def part_fault(folder: Path, entry: ShardEntry, stamp: Stamp, kind: type[M]) -> tuple[str, M | None]:
    """Look at a part of a store without reading its array.

    Args:
        folder: The store's folder.
        entry: The shard.
        stamp: What must have made it.
        kind: The form of its marker.

    Returns:
        What is wrong with the part ("" if nothing), and its marker where its rows carry the right stamp.
    """
    array_path, marker_path = part_paths(folder, entry)
    if not marker_path.is_file() or not array_path.is_file():
        return "is missing", None
    try:
        marker = read_record(marker_path, kind, "the marker of a part")
    except ArtifactError:
        return "has a damaged marker", None
    if marker.stamp != stamp:
        made = f"iteration {marker.stamp.iteration}, weights {marker.stamp.weights_sha256[:12]}"
        return f"is stale: it was made by {made}, corpus {marker.stamp.corpus_sha256[:12]}", None
    num_bytes = array_path.stat().st_size
    if num_bytes != marker.num_bytes:
        word = "short" if num_bytes < marker.num_bytes else "damaged"
        return f"is {word} ({num_bytes} of {marker.num_bytes} bytes)", None
    num_rows, _ = marker.shape
    if (num_rows, marker.first_document) != (entry.num_documents, entry.first_document):
        word = "short" if num_rows < entry.num_documents else "damaged"
        return f"is {word} ({num_rows} of {entry.num_documents} rows)", marker
    return "", marker


def open_markers(
    folder: Path, manifest: CorpusManifest, stamp: Stamp, kind: type[M], *, what: str, verify: bool
) -> list[M]:
    """Check that a store is whole: every part is there, with the right stamp and of one form.

    Args:
        folder: The store's folder.
        manifest: The corpus that was encoded. Parts beyond its shards are ignored.
        stamp: What must have made the store.
        kind: The form of its markers.
        what: The store's content, for errors.
        verify: Hash every part too; without it, parts are checked by size.

    Returns:
        The markers of all parts, in order.

    Raises:
        ArtifactError: Parts are missing, stale, short or damaged, or the stamp names another corpus.
    """
    if stamp.corpus_sha256 != manifest.sha256:
        raise ArtifactError(
            f"{what}@{stamp.iteration} were asked for corpus {stamp.corpus_sha256}",
            expected=f"corpus {manifest.sha256}, which the shards hold",
            remedy="encode the corpus again",
        )
    faults: list[tuple[ShardEntry, str]] = []
    markers: list[M] = []
    for entry in manifest.shards:
        fault, marker = part_fault(folder, entry, stamp, kind)
        if not fault and marker and verify and sha256_file(part_paths(folder, entry)[0]) != marker.sha256:
            fault, marker = "is damaged (its bytes do not have the recorded hash)", None
        if fault:
            faults.append((entry, fault))
        if marker:
            markers.append(marker)
    if faults:
        entry, fault = faults[0]
        more = f", and {len(faults) - 1} more part(s) are not usable" if len(faults) > 1 else ""
        raise ArtifactError(
            f"{what}@{stamp.iteration} has {sum(marker.shape[0] for marker in markers)} rows, the corpus manifest "
            f"says {manifest.num_documents}; part {entry.number} {fault}{more}",
            remedy=f"delete {Path(folder) / f'part-{entry.number:06d}'}.* and run the encoding again",
        )
    forms = {(marker.shape[1], marker.dtype) for marker in markers}
    if len(forms) > 1:
        raise ArtifactError(
            f"{what}@{stamp.iteration} mixes parts of (dimension, type) {sorted(forms)}",
            expected="one dimension and one type",
            remedy=f"delete {folder} and run the encoding again",
        )
    return markers

"""The files of an index: written with their hash, read with it, and the index parts that ranks fill.

A part holds inverted lists and nothing else (ids and codes of a range of documents, list by list), in FAISS's own
format, so that it can be mapped into memory as it is. What its codes mean stands in the trained index, whose hash the
part's JSON marker carries; a part without a valid marker does not exist. FAISS notices neither a flipped bit nor a part
that another training made.

Shapes: N documents, D embedding dimension, L inverted lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
import numpy.typing as npt

from engine.errors import ArtifactError
from engine.log import get_logger
from shards.embeddings import Stamp
from shards.files import read_record, sha256_file, write_atomically, write_json

log = get_logger(__name__)
TRAINED, INDEX = "trained.faiss", "index.faiss"
MAPPED = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A file of an index and what it must hold."""

    name: str
    num_bytes: int
    sha256: str

    def check(self, folder: Path, *, fully: bool) -> Path:
        """Return the file's path.

        Args:
            folder: Where it lies.
            fully: Compare the hash too, not only the size.

        Raises:
            ArtifactError: It is missing, short, or damaged.
        """
        path = folder / self.name
        if not path.is_file():
            raise ArtifactError(f"the index file {path} is missing", remedy="build the index again")
        remedy, found = f"delete {path} and build the index again", path.stat().st_size
        if found != self.num_bytes:
            raise ArtifactError(
                f"the index file {path} has {found} bytes", expected=f"{self.num_bytes} bytes", remedy=remedy
            )
        if fully and (sha256 := sha256_file(path)) != self.sha256:
            raise ArtifactError(
                f"the index file {path} has sha256 {sha256}", expected=f"sha256 {self.sha256}", remedy=remedy
            )
        return path


@dataclass(frozen=True, slots=True)
class PartMarker:
    """What an index part holds and what it was made from."""

    first_document: int
    num_documents: int
    trained_sha256: str
    stamp: Stamp
    file: IndexFile


class _Hashing:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def writelines(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            self.write(piece)

    def as_file(self, name: str) -> IndexFile:
        return IndexFile(name, self.num_bytes, self._digest.hexdigest())


class WrittenFile:
    """What `writing` yields: takes the bytes, and tells what they are once all are written."""

    def __init__(self, sink: _Hashing) -> None:
        self._sink = sink
        self.write, self.writelines = sink.write, sink.writelines
        self.described: IndexFile | None = None

    def index(self, index: faiss.Index) -> None:
        """Write a FAISS index."""
        faiss.write_index(index, self._writer())

    def lists(self, lists: Any) -> None:
        """Write inverted lists."""
        faiss.write_InvertedLists(lists, self._writer())

    def _writer(self) -> Any:
        return getattr(faiss, "PyCallbackIOWriter")(self._sink.write, _WRITE_BYTES)  # noqa: B009 - its stub lacks it


@contextmanager
def writing(path: Path, *, num_bytes: int | None = None) -> Iterator[WrittenFile]:
    """Write a file of an index atomically and hash it; `described` of what it yields is set at the end.

    Args:
        path: The file.
        num_bytes: About how large it will be, where that is known.

    Raises:
        DiskFullError: There was no space for it. Whatever lay at `path` is untouched.
    """
    with write_atomically(path, num_bytes=num_bytes) as temporary, open(temporary, "wb") as file:
        written = WrittenFile(_Hashing(file))
        yield written
        file.flush()
        written.described = written._sink.as_file(path.name)


def write_index(index: faiss.Index, path: Path) -> IndexFile:
    """Write an index atomically.

    Raises:
        DiskFullError: There was no space for it.
    """
    with writing(path) as file:
        file.index(index)
    assert file.described
    return file.described


def read_index(path: Path, sha256: str) -> faiss.Index:
    """Read an index that `write_index` wrote.

    Args:
        path: The file.
        sha256: The hash that it must have.

    Returns:
        The index.

    Raises:
        ArtifactError: The file is missing, damaged, or not the one that the hash names.
    """
    if not path.is_file():
        raise ArtifactError(f"the index file {path} is missing", remedy="build the index again")
    IndexFile(path.name, path.stat().st_size, sha256).check(path.parent, fully=True)
    return parse_index(path)


def parse_index(path: Path, flags: int = 0) -> faiss.Index:
    """Read an index whose bytes have been checked; `MAPPED` leaves its lists on disk.

    Raises:
        ArtifactError: FAISS cannot read it.
    """
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise ArtifactError(
            f"FAISS cannot read the index file {path}: {error}", remedy=f"delete {path} and build the index again"
        ) from error


class MappedLists:
    """The inverted lists of a part, mapped into memory and read-only.

    Args:
        path: The part.

    Raises:
        ArtifactError: FAISS cannot read it.
    """

    def __init__(self, path: Path) -> None:
        try:
            lists = faiss.read_InvertedLists(faiss.FileIOReader(str(path)), MAPPED)
        except RuntimeError as error:
            raise ArtifactError(
                f"FAISS cannot read the index part {path}: {error}",
                remedy=f"delete {path} and build the index again",
            ) from error
        # FAISS's Python never frees lists that it has read, and so never unmaps them; an index that owns them does.
        self._quantizer = faiss.IndexFlatIP(1)
        self._owner = faiss.IndexIVFFlat(self._quantizer, 1, lists.nlist)
        self._owner.code_size = lists.code_size
        self._owner.replace_invlists(lists, True)
        self.path, self.code_size = path, int(lists.code_size)

    @property
    def lists(self) -> Any:
        """The FAISS object; valid as long as this one lives."""
        return self._owner.invlists


def list_sizes(lists: Any) -> npt.NDArray[np.int64]:
    """Return the number of documents in each inverted list, int64 [L]."""
    return np.fromiter((lists.list_size(number) for number in range(lists.nlist)), dtype=np.int64, count=lists.nlist)


def serialized_lists(lists: Any) -> bytes:
    """Return inverted lists as FAISS writes them; for small ones."""
    writer = faiss.VectorIOWriter()
    faiss.write_InvertedLists(lists, writer)
    data: bytes = faiss.vector_to_array(writer.data).tobytes()
    return data


def fingerprint(index: faiss.Index) -> str:
    """Return the SHA-256 of an index's bytes, the same as that of the file `write_index` makes of it."""
    return hashlib.sha256(faiss.serialize_index(index).tobytes()).hexdigest()


def part_path(folder: Path, number: int) -> Path:
    """Return where a part lies; its marker has the suffix `.json`."""
    return folder / f"part-{number:03d}.lists"


def write_part(folder: Path, number: int, lists: Any, documents: range, trained_sha256: str, stamp: Stamp) -> None:
    """Write an index part, its marker last.

    Args:
        folder: The index's folder.
        number: The part's number.
        lists: The filled inverted lists.
        documents: What they hold.
        trained_sha256: Hash of the trained index that made the codes.
        stamp: What made the embeddings.

    Raises:
        ArtifactError: The lists do not hold each of the documents once.
        DiskFullError: There was no space for it.
    """
    path = part_path(folder, number)
    _check_ids(lists, documents, path)
    marker = path.with_suffix(".json")
    marker.unlink(missing_ok=True)  # it must not stand next to other bytes, not even for a moment
    with writing(path) as file:
        file.lists(lists)
    assert file.described
    write_json(marker, asdict(PartMarker(documents.start, len(documents), trained_sha256, stamp, file.described)))


def read_part(folder: Path, number: int, documents: range, trained_sha256: str, stamp: Stamp) -> PartMarker:
    """Return what a part holds, by its marker and its size; the hash is compared when the part is used.

    Raises:
        ArtifactError: The part is missing, damaged, or made from something else.
    """
    path = part_path(folder, number)
    marker_path = path.with_suffix(".json")
    remedy = f"start again, which makes it again; if that does not help, delete {marker_path}"
    marker = read_record(marker_path, PartMarker, f"the marker of index part {number}")
    found = (marker.trained_sha256, marker.stamp, marker.first_document, marker.num_documents, marker.file.name)
    wanted = (trained_sha256, stamp, documents.start, len(documents), path.name)
    if found != wanted:
        what = "another trained index" if found[0] != wanted[0] else "other embeddings or documents"
        raise ArtifactError(f"the index part {path} was made from {what}: {found}", expected=f"{wanted}", remedy=remedy)
    marker.file.check(folder, fully=False)
    return marker


def part_is_complete(folder: Path, number: int, documents: range, trained_sha256: str, stamp: Stamp) -> bool:
    """Tell whether a part is there already, so that an interrupted build can skip it."""
    try:
        read_part(folder, number, documents, trained_sha256, stamp)
    except ArtifactError:
        return False
    return True


@contextmanager
def faiss_threads(num_threads: int) -> Iterator[None]:
    """Let FAISS use so many threads: its pool is its own, which `torch.set_num_threads` does not reach."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _check_ids(lists: Any, documents: range, path: Path) -> None:
    """Check that inverted lists hold each document once; an index's own count also has what got lost."""
    seen_N = np.zeros(len(documents), dtype=np.uint8)
    strangers = 0
    for number in np.flatnonzero(list_sizes(lists)).tolist():
        ids: npt.NDArray[np.int64] = faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number))
        inside = ids[(ids >= documents.start) & (ids < documents.stop)] - documents.start
        strangers += len(ids) - len(inside)
        np.add.at(seen_N, inside, 1)
    missing, twice = np.flatnonzero(seen_N == 0), np.flatnonzero(seen_N > 1)
    if not (len(missing) or len(twice) or strangers):
        return
    raise ArtifactError(
        f"the index part {path} lacks {len(missing)} documents (the first is "
        f"{documents.start + int(missing[0]) if len(missing) else 'none'}), holds {len(twice)} more than once (the "
        f"first is {documents.start + int(twice[0]) if len(twice) else 'none'}) and {strangers} of other parts",
        expected=f"the documents {documents.start} to {documents.stop - 1}, each once",
        remedy="look for embeddings that are not finite, and build the index again",
    )

"""The table of docids: from a global document index to the docid and back, without holding the docids in memory.

    docids.txt           one docid a line, in the order of the global indices
    docids.offsets.npy   where each line starts, int64 [N + 1]
    docids.lookup.npy    (hash of the docid, global index), uint64 [N, 2], sorted by hash

The last two follow from the first and are mapped into memory, so that all processes of a host share one copy: 24 bytes
a document and the docids themselves, most of it never touched. N: documents.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ArtifactError, DataError
from shards.files import sha256_file, write_atomically

DOCIDS_NAME = "docids.txt"
_OFFSETS_NAME, _LOOKUP_NAME = "docids.offsets.npy", "docids.lookup.npy"
_NUM_BUCKETS, _WAITING = 256, 4096
NAMES = (DOCIDS_NAME, _OFFSETS_NAME, _LOOKUP_NAME)


def write_docids(folder: Path, docids: Iterable[str]) -> tuple[int, str]:
    """Write the table of docids, in a few megabytes of memory for any number of them.

    Args:
        folder: The corpus folder.
        docids: All docids in the order of the global indices; each only once. Streamed.

    Returns:
        How many there are, and the hash of the bytes of `docids.txt`.

    Raises:
        DataError: A docid repeats, is empty or holds a line break.
    """
    digest, num_docids, offset = hashlib.sha256(), 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".docids.tmp-") as name:
        scratch = Path(name)
        with (
            write_atomically(folder / DOCIDS_NAME) as temporary,
            open(temporary, "wb") as lines,
            open(scratch / "offsets", "wb") as offsets,
            _Buckets(scratch) as buckets,
        ):
            for docid in docids:
                check_docid(docid)
                line = docid.encode() + b"\n"
                digest.update(line)
                lines.write(line)
                offsets.write(offset.to_bytes(8, "little"))
                buckets.add(_hash(docid), num_docids)
                num_docids, offset = num_docids + 1, offset + len(line)
            offsets.write(offset.to_bytes(8, "little"))
        _publish(folder / _OFFSETS_NAME, "<i8", (num_docids + 1,), [scratch / "offsets"])
        offsets_N = np.load(folder / _OFFSETS_NAME, mmap_mode="r", allow_pickle=False)
        for path in buckets.paths:
            entries_N2 = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)
            entries_N2 = entries_N2[np.argsort(entries_N2[:, 0], kind="stable")]
            _refuse_repeats(folder / DOCIDS_NAME, offsets_N, entries_N2)
            entries_N2.tofile(path)
        _publish(folder / _LOOKUP_NAME, "<u8", (num_docids, 2), buckets.paths)
    return num_docids, digest.hexdigest()


class _Buckets:
    """(hash, index) pairs in files by the first bits of the hash, so that each file can be sorted alone."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f"bucket-{number:03d}" for number in range(_NUM_BUCKETS)]
        self._waiting = [array("Q") for _ in self.paths]
        for path in self.paths:
            path.touch()

    def __enter__(self) -> _Buckets:
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(_NUM_BUCKETS):
            self._flush(number)

    def add(self, hash_of_docid: int, index: int) -> None:
        number = hash_of_docid * _NUM_BUCKETS >> 64
        self._waiting[number].extend((hash_of_docid, index))
        if len(self._waiting[number]) >= _WAITING:
            self._flush(number)

    def _flush(self, number: int) -> None:
        with open(self.paths[number], "ab") as file:  # not held open: there are more than a process may have
            file.write(self._waiting[number].tobytes())
        self._waiting[number] = array("Q")


def _publish(path: Path, dtype: str, shape: tuple[int, ...], pieces: Sequence[Path]) -> None:
    """Make one .npy file of raw pieces."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    num_bytes = sum(piece.stat().st_size for piece in pieces)
    with write_atomically(path, num_bytes=num_bytes) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            with open(piece, "rb") as source:
                shutil.copyfileobj(source, file)


def check_docid(docid: str) -> None:
    """Check that a docid can stand on a line of its own.

    Args:
        docid: Any text; dots, spaces and non-ASCII letters are fine.

    Raises:
        DataError: It is empty, holds a line break, or is not valid Unicode.
    """
    if docid and "\n" not in docid and "\r" not in docid:
        try:
            docid.encode()
            return
        except UnicodeEncodeError:
            pass
    raise DataError(
        f"the docid {docid!r} cannot be stored",
        expected="at least one character, no line break, valid Unicode",
        remedy="rename the document in the corpus and in the qrels",
    )


class Docids:
    """All docids of a corpus, by global index and the other way round.

    Args:
        folder: The corpus folder.
        num_documents: N, from the manifest.
        sha256: Of `docids.txt`, from the manifest; checked here, by reading the file once.

    Raises:
        ArtifactError: A file is missing, or is not the one the manifest names.
    """

    def __init__(self, folder: Path, num_documents: int, sha256: str) -> None:
        self._folder = Path(folder)
        for name in NAMES:
            if not (self._folder / name).is_file():
                raise self._broken(name, "is missing", "")
        found = sha256_file(self._folder / DOCIDS_NAME)
        if found != sha256:
            raise self._broken(DOCIDS_NAME, f"has sha256 {found}", f"sha256 {sha256}")
        self._offsets_N: npt.NDArray[np.int64] = self._load(_OFFSETS_NAME, (num_documents + 1,), "int64")
        self._lookup_N2: npt.NDArray[np.uint64] = self._load(_LOOKUP_NAME, (num_documents, 2), "uint64")
        with open(self._folder / DOCIDS_NAME, "rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if int(self._offsets_N[-1]) != len(self._lines):
            raise self._broken(_OFFSETS_NAME, f"ends at byte {self._offsets_N[-1]}", f"{len(self._lines)} bytes")

    def __len__(self) -> int:
        return len(self._lookup_N2)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of a corpus of {len(self)}")
        start, stop = self._offsets_N[index : index + 2].tolist()
        return self._lines[start : stop - 1].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def index_of(self, docid: str) -> int | None:
        """Return a document's global index, or None where the corpus has no such document."""
        hashes_N = self._lookup_N2[:, 0]
        wanted = np.uint64(_hash(docid))
        row = int(np.searchsorted(hashes_N, wanted))
        while row < len(self) and hashes_N[row] == wanted:  # two docids rarely share a hash
            index = int(self._lookup_N2[row, 1])
            if self[index] == docid:
                return index
            row += 1
        return None

    def _load(self, name: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        path = self._folder / name
        try:
            table: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._broken(name, f"cannot be opened ({error})", f"{dtype} {list(shape)}") from error
        if table.shape != shape or table.dtype != dtype:
            raise self._broken(name, f"holds {table.dtype} {list(table.shape)}", f"{dtype} {list(shape)}")
        return table

    def _broken(self, name: str, fact: str, expected: str) -> ArtifactError:
        return ArtifactError(
            f"the file of docids {self._folder / name} {fact}",
            expected=expected,
            remedy=f"delete {self._folder} and write the shards again",
        )


def _hash(docid: str) -> int:
    """Return 64 bits of a docid, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(docid.encode(), digest_size=8).digest(), "little")


def _refuse_repeats(path: Path, offsets_N: npt.NDArray[np.int64], entries_N2: npt.NDArray[np.uint64]) -> None:
    """Compare the docids whose hashes are equal, which are few where all docids differ."""
    equal = np.flatnonzero(entries_N2[1:, 0] == entries_N2[:-1, 0])
    suspects = np.unique(np.concatenate([entries_N2[equal, 1], entries_N2[equal + 1, 1]]))
    seen: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for index in suspects.tolist():
            start, stop = offsets_N[index : index + 2].tolist()
            file.seek(start)
            line = file.read(stop - start - 1)
            if line in seen:
                raise DataError(
                    f"the docid {line.decode()!r} occurs twice in the corpus, as document {seen[line]} and {index}",
                    expected="a docid of its own each",
                    remedy="give one of the two another id",
                )
            seen[line] = index

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
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ArtifactError, DataError
from shards.files import save_array, sha256_file, write_atomically

DOCIDS_NAME = "docids.txt"
_OFFSETS_NAME, _LOOKUP_NAME = "docids.offsets.npy", "docids.lookup.npy"
NAMES = (DOCIDS_NAME, _OFFSETS_NAME, _LOOKUP_NAME)


def write_docids(folder: Path, docids: Iterable[str]) -> tuple[int, str]:
    """Write the table of docids.

    Args:
        folder: The corpus folder.
        docids: All docids in the order of the global indices; each only once. Streamed: 24 bytes of each are held.

    Returns:
        How many there are, and the hash of the bytes of `docids.txt`.

    Raises:
        DataError: A docid repeats, is empty or holds a line break.
    """
    digest, hashes, offsets = hashlib.sha256(), array("Q"), array("q", [0])
    with write_atomically(folder / DOCIDS_NAME) as temporary:
        with open(temporary, "wb") as file:
            for docid in docids:
                check_docid(docid)
                line = docid.encode() + b"\n"
                digest.update(line)
                file.write(line)
                hashes.append(_hash(docid))
                offsets.append(offsets[-1] + len(line))
        hashes_N = np.frombuffer(hashes, dtype=np.uint64)
        order_N = np.argsort(hashes_N, kind="stable")
        _refuse_repeats(temporary, np.frombuffer(offsets, dtype=np.int64), hashes_N, order_N)
    lookup_N2 = np.stack([hashes_N[order_N], order_N.astype(np.uint64)], axis=1)
    for name, table in ((_OFFSETS_NAME, np.frombuffer(offsets, dtype=np.int64)), (_LOOKUP_NAME, lookup_N2)):
        with write_atomically(folder / name, num_bytes=table.nbytes) as temporary:
            save_array(temporary, table)
    return len(hashes), digest.hexdigest()


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


def _refuse_repeats(
    path: Path,
    offsets_N: npt.NDArray[np.int64],
    hashes_N: npt.NDArray[np.uint64],
    order_N: npt.NDArray[np.int64],
) -> None:
    """Compare the docids whose hashes are equal, which are few where all docids differ."""
    equal = np.flatnonzero(hashes_N[order_N[1:]] == hashes_N[order_N[:-1]])
    suspects = np.unique(np.concatenate([order_N[equal], order_N[equal + 1]]))
    seen: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for index in suspects.tolist():
            file.seek(int(offsets_N[index]))
            line = file.read(int(offsets_N[index + 1] - offsets_N[index]) - 1)
            if line in seen:
                raise DataError(
                    f"the docid {line.decode()!r} occurs twice in the corpus, as document {seen[line]} and {index}",
                    expected="a docid of its own each",
                )
            seen[line] = index

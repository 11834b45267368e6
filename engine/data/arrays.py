"""Arrays on disk that a manifest vouches for: what the artifacts of the training queries share.

An artifact is a folder with its arrays and, written last, a manifest with their hashes and with the stamp of what they
were made from. The arrays are mapped into memory, not read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from engine.errors import ArtifactError
from shards.embeddings import Stamp
from shards.files import read_record, save_pieces, sha256_file, write_atomically

A = TypeVar("A")
V = TypeVar("V", bound="Versioned")


@dataclass(frozen=True, slots=True)
class Pieces:
    """An array that is yet to be written.

    Attributes:
        shape: Of the whole.
        dtype: Of the whole.
        pieces: Joined along their first dimension; taken once, one after the other.
    """

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    pieces: Iterable[NDArray[Any]]


class Versioned(Protocol):
    """A manifest's record."""

    @property
    def version(self) -> int:
        """Of its form."""
        ...


def read_manifest(path: Path, kind: type[V], version: int, *, what: str, remedy: str) -> V:
    """Read the manifest that is written last.

    Args:
        path: The file.
        kind: Its form, a frozen dataclass.
        version: The one that is read.
        what: The folder's artifact in words, such as `candidates`.
        remedy: What to do about a folder without it.

    Raises:
        ArtifactError: There is none, or it is damaged or of another version.
    """
    if not path.is_file():
        raise ArtifactError(
            f"{path.parent} holds no finished {what}", expected=f"{path.name}, which is written last", remedy=remedy
        )
    manifest = read_record(path, kind, f"the manifest of {what}")
    if manifest.version != version:
        raise ArtifactError(f"{path} is not a manifest of {what} of version {version}", remedy=remedy)
    return manifest


def write_arrays(folder: Path, arrays: Mapping[str, Pieces]) -> dict[str, str]:
    """Write arrays piece by piece, so that the pieces are never held together.

    Args:
        folder: Where; it exists.
        arrays: By file name.

    Returns:
        File name to sha256.
    """
    for name, array in arrays.items():
        num_bytes = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        with write_atomically(folder / name, num_bytes=num_bytes) as temporary:
            save_pieces(temporary, array.shape, array.dtype, array.pieces)
    return {name: sha256_file(folder / name) for name in arrays}


class OpenedInTurn(Sequence[A]):
    """Artifacts that are opened when their turn comes, so that no pass holds more files open than a process may have.

    A mapped array holds its file open, and a pass over a million queries leaves thousands of parts.

    Args:
        load: Opens one.
        folders: Of all.
    """

    def __init__(self, load: Callable[[Path], A], folders: Sequence[Path]) -> None:
        self._load, self._folders = load, folders

    def __len__(self) -> int:
        return len(self._folders)

    @overload
    def __getitem__(self, number: int) -> A: ...
    @overload
    def __getitem__(self, number: slice) -> OpenedInTurn[A]: ...
    def __getitem__(self, number: int | slice) -> A | OpenedInTurn[A]:
        if isinstance(number, slice):
            return OpenedInTurn(self._load, self._folders[number])
        return self._load(self._folders[number])


def map_array(path: Path, sha256: str | None, shape: tuple[int, ...], remedy: str) -> NDArray[Any]:
    """Map an array into memory once its bytes are found to be the manifest's.

    Args:
        path: Its file.
        sha256: From the manifest.
        shape: From the manifest.
        remedy: For the errors.

    Raises:
        ArtifactError: It is missing, or is not the one that the manifest names.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", expected="the array that the manifest names", remedy=remedy)
    found = sha256_file(path)
    if found != sha256:
        raise ArtifactError(f"{path} has sha256 {found}", expected=f"{sha256}, as in the manifest", remedy=remedy)
    # An array without rows cannot be mapped.
    array: NDArray[Any] = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    if array.shape != shape:
        raise ArtifactError(f"{path} has shape {array.shape}", expected=f"{shape}, as in the manifest", remedy=remedy)
    return array


def require_stamp(what: str, folder: Path, found: Stamp, expected: Stamp | None, remedy: str) -> None:
    """Refuse an artifact of other weights or of another corpus.

    Args:
        what: What lies there, for the error.
        folder: Where.
        found: Its stamp.
        expected: What it must come from; None takes any.
        remedy: For the error.

    Raises:
        ArtifactError: The stamps differ.
    """
    if expected is not None and found != expected:
        raise ArtifactError(
            f"The {what} in {folder} are stale: they were made by {described(found)}",
            expected=described(expected),
            remedy=remedy,
        )


def row_numbers(what: str, qids: Sequence[str]) -> dict[str, int]:
    """Number query ids.

    Args:
        what: Who lists them, for the error.
        qids: The ids.

    Raises:
        ArtifactError: One occurs twice.
    """
    rows = {qid: row for row, qid in enumerate(qids)}
    if len(rows) != len(qids):
        twice = next(qid for row, qid in enumerate(qids) if rows[qid] != row)
        raise ArtifactError(f"{what} list query {twice!r} twice", expected="every query once")
    return rows


def require_alike(what: str, number: int, pairs: Mapping[str, tuple[object, object]], *, of: str, remedy: str) -> None:
    """Refuse a part that was not made together with the first.

    Args:
        what: Whose part, for the error.
        number: Its number.
        pairs: What must be the same of all parts, by name: of this one, of the first.
        of: What all of them must come from, such as one search.
        remedy: What to do.

    Raises:
        ArtifactError: They differ.
    """
    for name, (here, there) in pairs.items():
        if here != there:
            raise ArtifactError(
                f"Part {number} of the {what} has {name} {here}, part 0 has {there}",
                expected=f"parts of {of}",
                remedy=remedy,
            )


def joined_qids(what: str, parts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Join the query ids of parts.

    Args:
        what: Whose parts, for the error.
        parts: Query ids of each.

    Raises:
        ArtifactError: A query is in two of them.
    """
    qids = tuple(qid for part in parts for qid in part)
    if len(set(qids)) < len(qids):
        twice = Counter(qids).most_common(1)[0][0]
        raise ArtifactError(f"Two parts of the {what} list query {twice!r}", expected="every query once")
    return qids


def digest_of_qids(qids: Sequence[str]) -> str:
    """Return one hash for query ids in their order."""
    return hashlib.sha256(json.dumps(list(qids)).encode()).hexdigest()


def described(stamp: Stamp) -> str:
    """Say in words what an artifact was made from."""
    return f"iteration {stamp.iteration}, weights {stamp.weights_sha256[:12]}, corpus {stamp.corpus_sha256[:12]}"

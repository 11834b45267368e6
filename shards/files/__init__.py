"""Files that exist either whole or not at all, and the JSON and hashes that describe them.

Every artifact of a run goes through `write_atomically`: a process that is killed at any moment leaves the previous
file, or none, never half of one. A leftover temporary file starts with a dot and is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from shards.errors import ArtifactError, DiskFullError

T = TypeVar("T")
R = TypeVar("R")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
"""What the system says where a user may not; a file system that can only be read has no free space either."""
_FULL_WORDS = ("No space left on device", "Disk quota exceeded")
_SPARE_BYTES = 64 * 2**20
"""Left free on a host's own disk, so that its other programs go on."""
_NO_SPACE_BYTES = 2**20
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""Making one takes milliseconds, and heartbeats are read by the hundred."""


def sha256_file(path: Path) -> str:
    """Hash a file's bytes.

    Args:
        path: The file, of any size; it is streamed.

    Returns:
        The SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's list of names, survive a power cut.

    Args:
        path: A file or a folder that exists.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_folder(source: Path, target: Path, *, leave_out: Container[str] = ()) -> None:
    """Copy the files of a folder and of those below it, without their modes: a copy can be written to.

    Args:
        source: The folder, which may be one that nobody may write to.
        target: The folder to make, with those above it.
        leave_out: Names of files and folders that are not copied, wherever they lie.
    """
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name in leave_out:
            continue
        if entry.is_dir():
            copy_folder(entry, target / entry.name, leave_out=leave_out)
        else:
            shutil.copyfile(entry, target / entry.name)


@contextmanager
def write_atomically(path: Path, *, num_bytes: int | None = None) -> Iterator[Path]:
    """Give the body a temporary path to write; publish it under `path` only when the body succeeds.

    The temporary file lies in the same folder (made if needed), so that the last step is one rename. When the body
    raises, whatever lay at `path` before is untouched.

    Args:
        path: The file to make or replace.
        num_bytes: About how large it will be, where that is known; told where the disk is full.

    Yields:
        The temporary path, which does not exist yet; the body must create a file there.

    Raises:
        FileNotFoundError: The body wrote nothing.
        DiskFullError: There was no space for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{secrets.token_hex(6)}"
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        full = _disk_full(path, temporary, num_bytes, error)
        temporary.unlink(missing_ok=True)
        if full is not None:
            raise full from error
        raise
    fsync(path.parent)


def save_array(path: Path, *pieces: npt.NDArray[Any]) -> None:
    """Write an array as a .npy file with plain writes; `numpy.save` itself says of a full disk only that it wrote less.

    Args:
        path: The file to make.
        pieces: At least one, of one type and equal but for the first dimension, along which they are joined without
            ever being held together; not of objects.
    """
    shape = (sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
    save_pieces(path, shape, pieces[0].dtype, pieces)


def save_pieces(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, pieces: Iterable[npt.NDArray[Any]]) -> None:
    """Write an array as `save_array` does, of pieces that need not be there until their turn.

    Args:
        path: The file to make.
        shape: Of the whole.
        dtype: Of the whole.
        pieces: Taken once, in order, and joined along the first dimension.

    Raises:
        ValueError: The pieces are not of this shape and type.
    """
    kind, num_rows = np.dtype(dtype), 0
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            if piece.dtype != kind or piece.shape[1:] != shape[1:]:
                raise ValueError(f"a piece is {piece.dtype} {piece.shape} of an array that is {kind} {shape}")
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
            num_rows += len(piece)
    if num_rows != shape[0]:
        raise ValueError(f"the pieces have {num_rows} rows of an array that is {shape}")


def as_full_disk(error: BaseException) -> DiskFullError | None:
    """Return what to tell of an error that a library raised because a disk is full; None for any other error.

    Files of ours go through `write_atomically`, which tells it itself; libraries write some on their own.

    Args:
        error: Any error.
    """
    full = getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)
    if not full or isinstance(error, DiskFullError):
        return None
    name = getattr(error, "filename", None)
    place = Path(name if isinstance(name, str) else ".").absolute().parent
    free = f", {shutil.disk_usage(place).free} bytes are free in {place}" if name and place.is_dir() else ""
    return DiskFullError(
        f"the disk is full: {error}{free}",
        remedy="make space (or raise the quota) and start the same command again; what is finished is kept",
    )


def _disk_full(path: Path, temporary: Path, num_bytes: int | None, error: BaseException) -> DiskFullError | None:
    """Return the error to raise where a write failed for want of space, which libraries tell in many ways."""
    if not isinstance(error, OSError | RuntimeError) or getattr(error, "errno", None) in DENIED:
        return None
    free = shutil.disk_usage(path.parent).free
    if getattr(error, "errno", None) not in _FULL and free > _NO_SPACE_BYTES:
        return None
    written = temporary.stat().st_size if temporary.exists() else 0
    needed = f"needs about {num_bytes} bytes" if num_bytes else "needs more"
    return DiskFullError(
        f"the disk is full: {path} {needed}; {written} were written, {free} bytes were free in {path.parent} then",
        remedy="make space (or raise the quota) and start the same command again; what is finished is kept",
    )


def lack_of_room(folder: Path, num_bytes: int) -> str:
    """Say what a host's own disk lacks for what is still to be written there; empty where it has room.

    Args:
        folder: On the disk.
        num_bytes: Still to be written; with 0 nothing is lacking.
    """
    free = shutil.disk_usage(folder).free
    if not num_bytes or num_bytes + _SPARE_BYTES <= free:
        return ""
    return f"{folder} needs {num_bytes} bytes and {_SPARE_BYTES} to spare, {free} are free"


def canonical_json(obj: object) -> str:
    """Write an object as the one JSON text that stands for it, so that equal objects have equal hashes.

    Args:
        obj: Anything JSON can hold; NaN and infinities are refused.

    Returns:
        JSON with sorted keys and no spaces.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, obj: object) -> None:
    """Write an object as indented JSON, atomically.

    Args:
        path: The file to make or replace.
        obj: Anything JSON can hold; NaN and infinities are refused.
    """
    text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, what: str, *, remedy: str | None = None) -> Any:
    """Read JSON that a run wrote.

    Args:
        path: The file.
        what: What the file is, in words, for the error, such as "the corpus manifest".
        remedy: For the error of a file that is no JSON; None where it can be written again.

    Returns:
        The object, whose shape the caller checks.

    Raises:
        ArtifactError: The file is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{what} is missing: there is no {path}",
            remedy="the step that writes it did not finish; run it again",
        ) from None
    except ValueError as error:  # includes malformed JSON and malformed UTF-8
        raise ArtifactError(
            f"{what} is damaged: {path} is not valid JSON ({error})",
            remedy=remedy or f"delete {path} and run the step that writes it again",
        ) from error


def read_record(path: Path, kind: type[R], what: str) -> R:
    """Read JSON that a run wrote and check its form.

    Args:
        path: The file.
        kind: The form, such as a frozen dataclass of numbers, texts, tuples and other such dataclasses. Types are taken
            strictly; keys that it does not have are ignored.
        what: What the file is, in words, for the error.

    Raises:
        ArtifactError: The file is missing, is no JSON, or has another form.
    """
    return parse_record(
        read_json(path, what), kind, f"{what} {path}", remedy=f"delete {path} and run the step that writes it again"
    )


def parse_record(values: object, kind: type[R], what: str, *, remedy: str = "") -> R:
    """Check the form of what JSON held; as `read_record`, for what another reader or another rank has read.

    Args:
        values: Objects, lists, texts, numbers.
        kind: As in `read_record`.
        what: What the values are and whence, for the error.
        remedy: For the error.

    Raises:
        ArtifactError: They have another form.
    """
    try:
        record: R = _adapter(kind).validate_json(json.dumps(values), strict=True)
        return record
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "as a whole"
        raise ArtifactError(f"{what} is damaged: {place}: {first['msg']}", remedy=remedy) from error


class OpenFiles(Generic[T]):
    """The files of a store that are open right now: opened at first use, a bounded number of them at a time.

    A corpus may have more shards than a process may have open files, hence the bound. Threads may share it without a
    lock (which a fork could leave locked for ever): at worst a file is opened twice, and one that is dropped while
    another thread still reads it is closed when that thread lets go.

    Args:
        open_one: Opens the file of a number.
        limit: How many stay open at a time.
    """

    def __init__(self, open_one: Callable[[int], T], *, limit: int = 128) -> None:
        self._open_one, self._limit = open_one, limit
        self._opened: dict[int, T] = {}

    def __getitem__(self, number: int) -> T:
        found = self._opened.get(number)
        if found is None:
            found = self._open_one(number)
            for oldest in list(self._opened)[: max(0, len(self._opened) - self._limit + 1)]:
                self._opened.pop(oldest, None)
            self._opened[number] = found
        return found

    def __len__(self) -> int:
        return len(self._opened)

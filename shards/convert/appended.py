"""Files that only grow, whose length a journal knows, and what is said when the disk is full.

Bytes beyond the journal's length are those of a start that was killed; they are cut off before more is written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import ArtifactError, DataError, DiskFullError

BUFFER_BYTES = 1 << 20
"""Bytes of a file that are held before they are written."""
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file may be no larger"}


@contextmanager
def explain_full_disk(folder: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn an error of a full disk into one that says how much is needed and how much is free.

    Args:
        folder: Where the body writes.
        needed: Estimates the bytes that are still to be written.

    Raises:
        DiskFullError: The body ran out of space.
    """
    try:
        yield
    except DiskFullError as error:  # of a file that is written as a whole
        raise _full(error.fact, folder, needed()) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = f"{error.filename or folder} cannot be written: {_FULL[error.errno]} ({os.strerror(error.errno)})"
        raise _full(what, folder, needed()) from None


def _full(what: str, folder: Path, needed_bytes: int) -> DiskFullError:
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        f"{what}. About {needed_bytes:,} bytes more are needed, {free:,} are free on the disk of {folder}",
        remedy="make space (or lift the limit) and run the same command again: it goes on where it stopped",
    )


class Appended:
    """A file that is appended to, at first use made or cut to the length that is known to be whole.

    Args:
        path: The file.
        length: Bytes of it that are known to be whole.
        buffer_bytes: Bytes that are held before they are written; None for `BUFFER_BYTES`.

    Raises:
        ArtifactError: The file is shorter than that.
    """

    def __init__(self, path: Path, length: int = 0, *, buffer_bytes: int | None = None) -> None:
        self.path, self._parts, self._held, self._buffer_bytes = path, list[bytes](), 0, buffer_bytes or BUFFER_BYTES
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        found = os.fstat(self._descriptor).st_size
        if found < length:
            os.close(self._descriptor)
            raise ArtifactError(
                f"{path} has {found} bytes, the journal beside it says {length}",
                remedy="something else changed it: remove the folder .partial and run the command again",
            )
        os.ftruncate(self._descriptor, length)
        os.lseek(self._descriptor, length, os.SEEK_SET)
        self.length = length

    def write(self, data: bytes) -> None:
        """Append bytes; they reach the file a block at a time."""
        self._parts.append(data)
        self._held += len(data)
        if self._held >= self._buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Hand all bytes to the operating system."""
        data = memoryview(b"".join(self._parts))
        self._parts, self._held = [], 0
        while data:
            try:
                count = os.write(self._descriptor, data)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self.length += count
            data = data[count:]

    def sync(self) -> None:
        """Make all bytes survive a power cut."""
        self.flush()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; what was not flushed is given up."""
        os.close(self._descriptor)


def read_blocks(path: Path, size: int) -> Iterator[bytes]:
    """Stream a file in blocks of a size; the last one may be shorter."""
    with open(path, "rb", buffering=0) as file:
        while block := file.read(size):
            yield block


def lines_of(path: Path) -> Iterator[bytes]:
    """Stream the lines of a file that this package wrote.

    Raises:
        DataError: The last line has no end.
    """
    with open(path, "rb", buffering=BUFFER_BYTES) as file:
        for line in file:
            if not line.endswith(b"\n"):
                raise DataError(
                    f"{path} ends inside a line", remedy="remove the folder .partial and run the command again"
                )
            yield line

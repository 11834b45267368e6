"""Files as they were downloaded: plain, `.gz` or `.zst`, all read as one stream of bytes.

A compressed file that was cut short is an error and never the end of the file; so is one that is damaged. What lies
beside a file's name, `collection.tsv` or `collection.tsv.gz`, is decided here for all readers.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from shards.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SUFFIXES = (".gz", ".zst")
_BUFFER_BYTES = 1 << 20


def plain_name(name: str) -> str:
    """Return a file's name without `.gz` or `.zst`."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.endswith(suffix)), name)


def find_file(path: Path) -> Path:
    """Find a file under its own name or under that of its compressed form.

    Args:
        path: The file without `.gz` or `.zst`.

    Returns:
        The one that is there; `path` itself where none is.

    Raises:
        DataError: Both the file and a compressed form of it are there, and they may differ.
    """
    found = [each for each in (path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)) if each.exists()]
    if len(found) > 1:
        raise DataError(
            f"{path.parent} has {' and '.join(each.name for each in found)}",
            expected="one of them",
            remedy="remove what is not meant",
        )
    return found[0] if found else path


def find_files(folder: Path, pattern: str) -> list[Path]:
    """List the files that match a pattern as they are or in a compressed form, sorted by name."""
    return sorted({path for suffix in ("", *SUFFIXES) for path in folder.glob(pattern + suffix)})


@contextmanager
def open_bytes(path: Path, consumed: Callable[[int], None] | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed by its suffix, in bounded memory.

    Args:
        path: The file.
        consumed: Told the number of bytes of the file itself that were read since it was told last.

    Yields:
        A buffered stream of the file's content.

    Raises:
        DataError: While reading: the compressed data end early or are damaged.
    """
    raw = _Counted(path, consumed)
    with io.BufferedReader(raw, _BUFFER_BYTES) as file:
        if path.suffix not in SUFFIXES:
            yield file
            return
        opened: object = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else zstd.ZstdFile(file)
        with io.BufferedReader(_Checked(path, cast(BinaryIO, opened)), _BUFFER_BYTES) as content:
            yield content


class _Counted(io.FileIO):
    """A file that says how much of it was read."""

    def __init__(self, path: Path, consumed: Callable[[int], None] | None) -> None:
        super().__init__(path, "rb")
        self._consumed = consumed

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # the buffer protocol has no type before 3.12
        count = super().readinto(buffer) or 0
        if self._consumed is not None:
            self._consumed(count)
        return count


class _Checked(io.RawIOBase):
    """A decompressor whose errors say which file is damaged."""

    def __init__(self, path: Path, source: BinaryIO) -> None:
        self._path, self._source, self._done = path, source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # as above
        try:
            block = self._source.read(len(buffer))
        except EOFError:
            raise self._damaged("is cut short: its compressed data end early") from None
        except (zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
            raise self._damaged(f"is damaged: {error}") from None
        buffer[: len(block)] = block
        self._done += len(block)
        return len(block)

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"{self._path} {what} (after {self._done} bytes of content)",
            expected="the whole file",
            remedy="fetch it again, and compare its size and checksum with those that its source gives",
        )

"""A file as a stream of lines that knows where it stands, so that a later start can go on from there.

A line ends at a line feed and nowhere else: Python's own idea of a line also ends at characters, such as U+2028, that
occur inside real passages and would shift every record after them. A line longer than the limit is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.errors import DataError
from shards.formats.compressed import open_bytes

MAX_LINE_BYTES = 64 << 20
"""The most that is held of one line. The longest real ones, training records with all their passages, have 1 MiB."""
_SKIP_BYTES = 1 << 20


class BadRecord(DataError):
    """One record of a file cannot be used; the records after it still can.

    Args:
        reason: What is wrong in a few words that are the same for all such records, by which they are counted.
        fact: As in every error of ours, and so are `expected` and `remedy`.
    """

    def __init__(self, reason: str, fact: str, *, expected: str = "", remedy: str = "") -> None:
        super().__init__(fact, expected=expected, remedy=remedy)
        self.reason = reason


OR_LEAVE_OUT = "or let `sparring convert --on-error drop` leave such records of a data set out"
"""The way out for who cannot mend a record."""


@dataclass(slots=True)
class Mark:
    """A place in a file, between two records.

    Attributes:
        offset: Bytes of content before it.
        line: Lines before it.
        row: Records before it, which a quoted row or a JSON list make fewer or more than lines.
        beside_offset: Bytes before the place in a second file that is read along.
        beside_line: Lines before that place.
    """

    offset: int = 0
    line: int = 0
    row: int = 0
    beside_offset: int = 0
    beside_line: int = 0

    def copy(self) -> Mark:
        """Return an equal mark that does not move with this one."""
        return Mark(self.offset, self.line, self.row, self.beside_offset, self.beside_line)


def place(path: Path, line: int) -> str:
    """Name a line for an error."""
    return f"{path} line {line}"


def require_content(path: Path) -> None:
    """Check that a file is there and holds something.

    Raises:
        DataError: It is missing, a folder, or has no bytes.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}", remedy="check the folder, or put the file there")
    if not path.stat().st_size:
        raise empty(path)


def empty(path: Path) -> DataError:
    """Describe a file that holds nothing."""
    return DataError(f"{path} is empty", remedy="write it again; its writing or its download may have broken off")


def raw_lines(
    path: Path,
    mark: Mark,
    *,
    max_bytes: int = MAX_LINE_BYTES,
    consumed: Callable[[int], None] | None = None,
) -> Iterator[bytes | BadRecord]:
    """Stream a file's lines from a mark on, and move the mark behind each.

    Args:
        path: The file, plain or compressed.
        mark: Where to begin. A plain file is entered there, a compressed one is read up to there.
        max_bytes: The longest line that is yielded as it is.
        consumed: Told of the bytes of the file that were read.

    Yields:
        The line with its line end and without a byte order mark, or what is wrong with it where it is too long.

    Raises:
        DataError: The file is missing, empty, damaged, or ends before the mark.
    """
    require_content(path)
    with open_bytes(path, consumed) as file:
        _enter(path, file, mark.offset)
        while line := file.readline(max_bytes + 1):
            mark.offset += len(line)
            mark.line += 1
            if len(line) <= max_bytes or line.endswith(b"\n"):
                if mark.line == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield line
                continue
            del line  # before more is read: one such line must not be held twice
            mark.offset += _rest_of_line(file)
            yield BadRecord(
                "line too long",
                f"{place(path, mark.line)} has more than {max_bytes} bytes",
                expected="one record on each line",
                remedy="look at that line: line ends may have been lost before it",
            )
        if not mark.offset:
            raise empty(path)


def _enter(path: Path, file: BinaryIO, offset: int) -> None:
    if file.seekable():
        file.seek(offset)
        return
    while offset:
        block = file.read(min(offset, _SKIP_BYTES))
        if not block:
            raise DataError(
                f"{path} ends {offset} bytes before the place where its reading stopped",
                remedy="the file changed: begin anew",
            )
        offset -= len(block)


def _rest_of_line(file: BinaryIO) -> int:
    count = 0
    while part := file.readline(_SKIP_BYTES):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def decoded(raw: bytes, path: Path, line: int) -> str:
    """Return a line's text without its line end.

    Raises:
        BadRecord: It is not UTF-8.
    """
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise not_utf8(path, line, error) from None


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> BadRecord:
    """Describe a line that cannot be decoded."""
    return BadRecord(
        "not UTF-8",
        f"{place(path, line)} is not UTF-8: it has the byte 0x{error.object[error.start]:02x}",
        expected="UTF-8 text",
        remedy="convert the file, for example with iconv",
    )

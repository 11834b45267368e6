"""Streaming a file that is one JSON list of objects, such as DPR's, which is larger than what should lie in memory.

`json` reads a list only as a whole, so the list's brackets and commas are followed here and each object is decoded by
it. Whether the file is on one line or on millions makes no difference.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import DataError
from shards.formats.compressed import open_bytes
from shards.formats.lines import malformed_json
from shards.formats.stream import MAX_LINE_BYTES, not_utf8, place, require_content

_CHUNK_BYTES = 1 << 20
# What a word that the end of a chunk cuts in two (`-Infinity`, an escape) can stretch over.
_CUT_CHARACTERS = 16


def read_json_list(path: Path, consumed: Callable[[int], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the objects of a file that is one JSON list.

    Args:
        path: A UTF-8 file, plain or compressed.
        consumed: Told of the bytes of the file that were read.

    Yields:
        The line on which the object begins, and the object.

    Raises:
        DataError: The file cannot be read, ends inside the list, or is not a list of objects.
    """
    require_content(path)
    with open_bytes(path, consumed) as file:
        text = _Text(path, file)
        _expect(text, "[")
        if text.skip_space() == "]":
            text.advance(1)
        else:
            while True:
                line = text.line
                yield line, text.decode_object()
                if _expect(text, ",]") == "]":
                    break
                text.skip_space()
        if rest := text.skip_space():
            raise malformed_json(path, text.line, f"{rest!r} after the end of the list")


def _expect(text: _Text, characters: str) -> str:
    found = text.skip_space()
    if not found or found not in characters:
        wanted = " or ".join(map(repr, characters))
        raise malformed_json(
            text.path, text.line, f"{found!r} in place of {wanted}" if found else "the file ends early"
        )
    text.advance(1)
    return found


class _Text:
    """A file's text, of which only a window around the current position is held."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.line = path, 1
        self._file, self._utf8 = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._window, self._position, self._ended = "", 0, False

    def skip_space(self) -> str:
        """Move to the next character that is no white space and return it, or an empty string at the end."""
        while True:
            start, end = self._position, len(self._window)
            while start < end and self._window[start] in " \t\r\n":
                start += 1
            self.advance(start - self._position)
            if start < end:
                return self._window[start]
            if self._ended:
                return ""
            self._read(_CHUNK_BYTES)

    def decode_object(self) -> dict[str, Any]:
        """Decode the object at the current position and move behind it."""
        while True:
            found = self._window[self._position] if self._position < len(self._window) else ""
            if found and found != "{":
                raise malformed_json(self.path, self.line, f"{found!r} in place of an object")
            try:
                record, end = self._json.raw_decode(self._window, self._position)
            except json.JSONDecodeError as error:
                # An object cut by the window's end is read on; anything wrong further inside is wrong for good.
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._window) - _CUT_CHARACTERS
                if self._ended or not is_cut:
                    line = self.line + self._window.count("\n", self._position, error.pos)
                    raise malformed_json(self.path, line, error.msg) from None
                if len(self._window) - self._position > MAX_LINE_BYTES:
                    raise DataError(
                        f"{place(self.path, self.line)} begins an object of more than {MAX_LINE_BYTES} characters",
                        expected="one record in each object of the list",
                        remedy="look at that line: a bracket or a quote is not closed there",
                    ) from None
                self._read(max(_CHUNK_BYTES, len(self._window)))  # doubling: a huge object takes linear time
                continue
            except RecursionError:
                raise malformed_json(self.path, self.line, "brackets nested without end") from None
            except ValueError as error:  # a number with thousands of digits
                raise malformed_json(self.path, self.line, str(error)) from None
            self.advance(end - self._position)
            found_object: dict[str, Any] = record
            return found_object

    def advance(self, count: int) -> None:
        self.line += self._window.count("\n", self._position, self._position + count)
        self._position += count

    def _read(self, size: int) -> None:
        raw = self._file.read(size)
        self._ended = not raw
        try:
            more = self._utf8.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._window.count("\n", self._position) + error.object.count(b"\n", 0, error.start)
            raise not_utf8(self.path, line, error) from None
        self._window, self._position = self._window[self._position :] + more, 0

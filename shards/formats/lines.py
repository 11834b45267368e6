"""Reading the text files of data sets record by record, with errors that say which file, which line, and what to do."""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.formats.stream import OR_LEAVE_OUT, BadRecord, Mark, decoded, place, raw_lines

# JSON can escape half of a character of two code units; such a string cannot be written to any file again.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
MAX_COLUMN_CHARACTERS = 1_000_000
"""The longest column of a quoted file; the one with a quote that is never closed has no other end."""


def read_lines(path: Path, mark: Mark | None = None) -> Iterator[tuple[int, str]]:
    """Stream a file's lines, without line ends and without a byte order mark.

    Args:
        path: A UTF-8 file, plain or compressed (`.gz`, `.zst`).
        mark: Where to begin; left out, at its beginning.

    Yields:
        Line number, from 1, and the line; blank lines too.

    Raises:
        DataError: The file is missing, empty or damaged, or a line is not UTF-8 or too long.
    """
    mark = mark or Mark()
    for raw in raw_lines(path, mark):
        if isinstance(raw, BadRecord):
            raise raw
        yield mark.line, decoded(raw, path, mark.line)


def read_jsonl(path: Path, mark: Mark | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the records of a file with one JSON object a line; blank lines are skipped.

    Args:
        path: The file.
        mark: As of `read_lines`.

    Yields:
        Line number and record.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    for number, text in read_lines(path, mark):
        if not text or text.isspace():
            continue
        yield number, json_object(text, path, number)


def json_object(text: str, path: Path, line: int) -> dict[str, Any]:
    """Parse a line that is one JSON object.

    Raises:
        BadRecord: It is anything else.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise malformed_json(path, line, f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise malformed_json(path, line, "brackets nested without end") from None
    except ValueError as error:  # a number with thousands of digits
        raise malformed_json(path, line, str(error)) from None
    if not isinstance(record, dict):
        raise malformed_json(path, line, f"{type(record).__name__} in place of an object")
    return record


def quoted_rows(
    path: Path,
    mark: Mark,
    *,
    max_characters: int = MAX_COLUMN_CHARACTERS,
    consumed: Callable[[int], None] | None = None,
) -> Iterator[list[str] | BadRecord]:
    """Stream the rows of a tab-separated file in which quotes enclose a column and are doubled inside it.

    Blank lines are skipped.

    Args:
        path: The file, plain or compressed.
        mark: Where to begin; moved behind each row.
        max_characters: The longest column; a quote that is never closed is noticed after as many.
        consumed: Told of the bytes of the file that were read.

    Yields:
        The columns; or what is wrong, and then only the first line of that row is lost: the reading goes on with the
        second, because a quote that is never closed would otherwise swallow rows that are whole.
    """
    csv.field_size_limit(max_characters)
    feed = _Feed(path, mark.copy(), consumed)
    rows = csv.reader(feed, delimiter="\t", strict=True)
    while True:
        feed.taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            found: list[str] | BadRecord = _malformed_quotes(path, feed.taken[-1][2], error)
            feed.give_back()
        except BadRecord as error:
            found = error
            feed.give_back()
        else:
            found = row
        _, mark.offset, mark.line = feed.taken[-1]
        if found:
            mark.row += 1
            yield found


class _Feed:
    """Hands decoded lines to a csv reader, remembers those of the present row and takes them back."""

    def __init__(self, path: Path, mark: Mark, consumed: Callable[[int], None] | None) -> None:
        self._path, self._mark = path, mark
        self._lines = raw_lines(path, mark, consumed=consumed)
        self._returned: deque[tuple[bytes | BadRecord, int, int]] = deque()
        self.taken: list[tuple[bytes | BadRecord, int, int]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._returned:
            self.taken.append(self._returned.popleft())
        else:
            raw = next(self._lines)
            self.taken.append((raw, self._mark.offset, self._mark.line))
        raw, _, line = self.taken[-1]
        if isinstance(raw, BadRecord):
            raise raw
        return decoded(raw, self._path, line) + "\n"

    def give_back(self) -> None:
        """Hand all lines of the present row out again, except its first."""
        self._returned.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _malformed_quotes(path: Path, line: int, error: csv.Error) -> BadRecord:
    return BadRecord(
        "malformed quotes",
        f"{place(path, line)}: {error}",
        expected='tab-separated columns, with a column that holds a quote enclosed in quotes: "say ""so"""',
        remedy="check the quotes on and before this line",
    )


def text_of(record: dict[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    """Return a text field of a record.

    Args:
        record: A JSON object.
        name: Name of the field.
        where: File and line, for the error.
        default: What a missing or null field stands for; None makes the field required.

    Raises:
        DataError: A required field is missing, or the field is not text.
    """
    value = record.get(name)
    if value is None:
        if default is not None:
            return default
        raise BadRecord(
            "missing field",
            f"{where} has no field {name!r}",
            expected=f"a string; the fields there are {', '.join(map(repr, record))}",
            remedy=f"add the field, {OR_LEAVE_OUT}",
        )
    if not isinstance(value, str):
        raise BadRecord(
            "malformed field",
            f"{where} has {_shown(value)} in field {name!r}",
            expected="a string",
            remedy=f"write the text in quotes, {OR_LEAVE_OUT}",
        )
    if not _is_whole(value):
        raise BadRecord(
            "not UTF-8",
            f"{where} has half of a surrogate pair in field {name!r}",
            expected="whole characters",
            remedy=f"write the text again, as it was cut inside of a character, {OR_LEAVE_OUT}",
        )
    return value


def id_of(value: object, name: str, where: str) -> str:
    """Return an id as the string that it is everywhere else.

    Args:
        value: The id; a whole number is taken as its digits.
        name: Name of the field, for the error.
        where: File and line, for the error.

    Raises:
        DataError: The id is missing, empty, not a string, or holds white space, which separates columns in run files.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise BadRecord(
            "missing field",
            f"{where} has no field {name!r}",
            expected="an id, as a string",
            remedy=f"give the record an id, {OR_LEAVE_OUT}",
        )
    if not isinstance(value, str) or value.split() != [value] or not _is_whole(value):
        raise BadRecord(
            "malformed id",
            f"{where} has {_shown(value)} in field {name!r}",
            expected="an id: a string without white space, not empty",
            remedy="write _ for each blank, in all files that name the id, since rows of TREC's run files are split at "
            f"blanks; {OR_LEAVE_OUT}",
        )
    return value


def answers_of(value: object, where: str) -> tuple[str, ...]:
    """Return a list of answers; None stands for none.

    Raises:
        DataError: It is not a list of strings.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(answer, str) and _is_whole(answer) for answer in value):
        raise BadRecord(
            "malformed field",
            f"{where} has {_shown(value)} as answers",
            expected='a list of strings, such as ["Paris"]',
            remedy=f"write a single answer in brackets, too, {OR_LEAVE_OUT}",
        )
    return tuple(value)


def _is_whole(text: str) -> bool:
    return text.isascii() or not _HALF_CHARACTER.search(text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def malformed_json(path: Path, line: int, what: str) -> BadRecord:
    """Describe a line that is not the JSON it should be."""
    return BadRecord(
        "malformed JSON",
        f"{place(path, line)} is malformed JSON: {what}",
        remedy="correct the line, or write the file again: its writing or its download may have broken off",
    )

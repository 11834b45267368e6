"""Reading the text files of data sets line by line, with errors that say which file, which line, and what to do.

Lines end at a line feed and nowhere else: Python's own idea of a line also ends at characters, such as U+2028, that
occur inside real passages and would shift every record after them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.errors import DataError

# JSON can escape half of a character of two code units; such a string cannot be written to any file again.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def place(path: Path, line: int) -> str:
    """Name a line for an error."""
    return f"{path} line {line}"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Stream a file's lines, without line ends and without a byte order mark.

    Args:
        path: A UTF-8 file.

    Yields:
        Line number, from 1, and the line; blank lines too.

    Raises:
        DataError: The file is missing or empty, or a line is not UTF-8.
    """
    require_content(path)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, error) from None
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text.rstrip("\r\n")


def require_content(path: Path) -> None:
    """Check that a file is there and holds something.

    Raises:
        DataError: It is missing, a folder, or has no bytes.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}", remedy="check the folder, or put the file there")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty", remedy="write it again; its writing or its download may have broken off")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the records of a file with one JSON object a line; blank lines are skipped.

    Yields:
        Line number and record.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    for number, text in read_lines(path):
        if not text or text.isspace():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise malformed_json(path, number, f"{error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise malformed_json(path, number, f"{type(record).__name__} in place of an object")
        yield number, record


def read_quoted_tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    r"""Stream the rows of a tab-separated file in which quotes enclose a column and are doubled inside it.

    Yields:
        The row's last line and its columns.

    Raises:
        DataError: The file cannot be read, or a quote is never closed.
    """
    reader = csv.reader((text + "\n" for _, text in read_lines(path)), delimiter="\t", strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{place(path, reader.line_num)}: {error}",
            expected='tab-separated columns, with a column that holds a quote enclosed in quotes: "say ""so"""',
            remedy="check the quotes on and before this line",
        ) from None


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
        raise DataError(
            f"{where} has no field {name!r}", expected=f"a string; the fields there are {', '.join(map(repr, record))}"
        )
    if not isinstance(value, str):
        raise DataError(f"{where} has {_shown(value)} in field {name!r}", expected="a string")
    if not _is_whole(value):
        raise DataError(f"{where} has half of a surrogate pair in field {name!r}", expected="whole characters")
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
        raise DataError(f"{where} has no field {name!r}", expected="an id, as a string")
    if not isinstance(value, str) or value.split() != [value] or not _is_whole(value):
        raise DataError(
            f"{where} has {_shown(value)} in field {name!r}", expected="an id: a string without white space, not empty"
        )
    return value


def answers_of(value: object, where: str) -> tuple[str, ...]:
    """Return a list of answers; None stands for none.

    Raises:
        DataError: It is not a list of strings.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise DataError(f"{where} has {_shown(value)} as answers", expected="a list of strings")
    return tuple(value)


def _is_whole(text: str) -> bool:
    return text.isascii() or not _HALF_CHARACTER.search(text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def malformed_json(path: Path, line: int, what: str) -> DataError:
    """Describe a line that is not the JSON it should be."""
    return DataError(
        f"{place(path, line)} is malformed JSON: {what}",
        remedy="correct the line, or write the file again: its writing or its download may have broken off",
    )


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    """Describe a line that cannot be decoded."""
    return DataError(
        f"{place(path, line)} is not UTF-8: it has the byte 0x{error.object[error.start]:02x}",
        expected="UTF-8 text",
        remedy="convert the file, for example with iconv",
    )

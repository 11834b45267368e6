"""Text that comes from outside: words of a command line, lines of a terminal, names of files, numbers.

Python decodes them by the locale and marks each byte that it cannot decode (a lone surrogate). Most of what reads a
name here (tokenizers, safetensors, FAISS) takes UTF-8 alone, and would fail deep inside a run or open another file.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_INTEGER = re.compile(r"[+-]?\d[\d_]*", re.ASCII)
_OTHER_BASE = re.compile(r"[+-]?0(?:x[\da-f_]+|o[0-7_]+|b[01_]+)", re.ASCII | re.IGNORECASE)
_DECIMAL = re.compile(r"[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_NOT_FINITE = re.compile(r"[+-]?\.?(?:inf|nan)", re.IGNORECASE)


def as_typed(text: str) -> str:
    """Return a text as it was typed: bytes that the locale could not decode are read as UTF-8 where they are that.

    Under `LC_ALL=C`, Python may take a command line as ASCII, whatever the terminal sends.
    """
    if is_whole(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def as_recorded(text: str) -> str:
    """Return a text as any file can hold it: as it was typed, with escapes for bytes that are no UTF-8."""
    return as_typed(text).encode("utf-8", "backslashreplace").decode()


def is_whole(text: str) -> bool:
    """Whether a text has no bytes in it that could not be decoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def absolute_path(path: str | Path) -> Path:
    """Return a path as it is stored: absolute, from the working directory, a leading `~` being the home folder.

    Symbolic links and `..` stay, as they mean what they mean when they are followed.

    Args:
        path: As it was typed; `./~` is a folder of that name.

    Raises:
        ValueError: It is empty, or no program here could use the name.
    """
    text = as_typed(os.fspath(path))
    if not text:
        raise ValueError("is empty, expected the path of a file or folder")
    if "\0" in text:
        raise ValueError("has a NUL character, which no name of a file can have")
    home = os.path.expanduser(text)
    if text.startswith("~") and home == text:
        raise ValueError(f"there is no user {text.split('/')[0][1:]!r} whose home folder it could be; write ./{text}")
    try:
        found = Path(home) if os.path.isabs(home) else Path.cwd() / home
    except FileNotFoundError:
        raise ValueError("is relative, and the working directory does not exist any more") from None
    _require_usable(str(found))
    return found


def number_of(text: str) -> int | float | None:
    """Read a number as a person writes it; None where it is none.

    Args:
        text: Such as `7`, `1_000`, `1e-6`, `.5`, `0x1f`; `inf` and `nan` are numbers, too.
    """
    try:
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
        if _DECIMAL.fullmatch(text):
            return float(text.replace("_", ""))
        if _NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
    except ValueError:  # more digits than Python reads, `0x_`
        return None
    return None


def _require_usable(path: str) -> None:
    shown = as_typed(path)
    if not is_whole(shown):
        raise ValueError(
            "is no UTF-8, which the libraries that read files need: rename what is not, or reach it by a link of "
            "another name (ln -s)"
        )
    encoding = sys.getfilesystemencoding().lower().replace("_", "-")
    if not shown.isascii() and encoding != "utf-8":
        raise ValueError(
            f"has more than ASCII ({shown}), and Python takes names of files as {encoding} in this locale: start with "
            "PYTHONUTF8=1 (export it), or in a locale of UTF-8 such as LC_ALL=C.UTF-8"
        )

"""Files and folders that cannot be used as they are: the system's error, with what was expected and a remedy.

A folder of somebody else, a file where a folder should be or a name that is too long is no error of the program. Who
reads or writes need not foresee each: what ends a process asks `as_told` for the words. An error without a path stays
what it is, and so does that of a file that is missing from a folder that is there, a mistake of the program.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from shards.errors import FileError, SparringError
from shards.files import DENIED, as_full_disk

_UNFINISHED = re.compile(r"\.(.+)\.(?:tmp|old)-\w+")
"""Names that files and folders have while they are written or replaced; who names a file knows the other one."""
_LONGEST_NAME_BYTES = 200
"""File systems take 255; what is written has a longer name at first."""
_SHOWN_CHARACTERS = 60
_ELSEWHERE = "name another place (a command's --out, a run's run.path)"


def as_told(error: BaseException) -> SparringError | None:
    """Return what to tell in place of an error of the system that a user can mend; None for any other error.

    Args:
        error: Any error; one of ours needs no other words.

    Returns:
        An error of ours, with the system's as its cause.
    """
    if isinstance(error, SparringError):
        return None
    told = as_full_disk(error) or _as_unusable(error)
    if told is not None:
        told.__cause__ = error  # what ranks have told each other of it holds for this one as well
    return told


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or in the one in which it would be made."""
    place = _nearest(os.path.abspath(folder))
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)


def require_writable(folder: Path, *, remedy: str) -> None:
    """Refuse a folder in which nothing can be written, before work is lost for it.

    Args:
        folder: It need not be there; then it is to be made, with those above it.
        remedy: For the error.

    Raises:
        FileError: It is a file or below one, or it may not be written to.
    """
    if not is_writable(folder):
        place = _nearest(os.path.abspath(folder))
        where = "" if place == os.path.abspath(folder) else f", where {folder} would be made"
        if os.path.isdir(place):
            fact = f"{place} is a folder that may not be written to by this user{where}"
        else:
            fact = f"{place} is a file{where}"
        raise FileError(fact, expected="a folder to write to", remedy=remedy)


def _as_unusable(error: BaseException) -> FileError | None:
    """Return the words for the path that an error of the system names; None for all other errors."""
    if not isinstance(error, OSError) or error.errno not in _WORDS:
        return None
    given = error.filename if error.filename2 is None else error.filename2
    if not isinstance(given, str | bytes | os.PathLike) or not os.fspath(given):  # or a file's number
        return None
    return _WORDS[error.errno](os.path.abspath(os.fsdecode(given)))


def _denied(path: str) -> FileError:
    place, shown = _nearest(path), _as_named(path)
    if place == path and os.path.isfile(path):
        if not os.access(path, os.R_OK):
            return FileError(
                f"{shown} may not be read by this user",
                expected="a file that may be read",
                remedy="let its owner give the permission (`chmod a+r`), or name a copy that is yours",
            )
        place = os.path.dirname(path)
    lacks = [word for word, mode in _MODES if not os.access(place, mode)] if os.path.isdir(place) else []
    fact = f"{shown} may not be used by this user"
    if lacks:
        fact = f"{shown} may not be used: the folder {_as_named(place)} may not be {lacks[0]} by this user"
    return FileError(
        fact,
        expected="files and folders that may be read, and written where results go",
        remedy=f"{_ELSEWHERE}, work on a copy that is yours (`cp -r`, `chmod -R u+w`), or change the permissions",
    )


def _taken(path: str) -> FileError:
    return FileError(
        f"{_as_named(path)} is there already, and is {_kind(path)}",
        expected="a path on which there is nothing, or what the same command has made",
        remedy=f"{_ELSEWHERE}, or move away what is there",
    )


def _below_a_file(path: str) -> FileError:
    place = _nearest(path)
    return FileError(
        f"{_as_named(path)} cannot be reached: {_as_named(place)} is {_kind(place)}",
        expected="a folder",
        remedy=f"{_ELSEWHERE}, or move away what is there",
    )


def _folder_for_file(path: str) -> FileError:
    return FileError(f"{_as_named(path)} is {_kind(path)}", expected="a file", remedy="name a file, or move it away")


def _missing(path: str) -> FileError | None:
    folder = os.path.dirname(path)
    if os.path.isdir(folder):
        return None
    return FileError(
        f"{_as_named(path)} cannot be reached: there is no folder {_as_named(folder)}",
        expected="a folder that is there, on a disk that is mounted",
        remedy="look whether it was moved or removed while it was in use; make it, or name another",
    )


def _too_long(path: str) -> FileError:
    longest = max(_as_named(path).split(os.sep), key=lambda name: len(os.fsencode(name)))
    return FileError(
        f"a name is too long for the file system: {longest[:_SHOWN_CHARACTERS]}..., of {len(os.fsencode(longest))} "
        f"bytes, in a path of {len(os.fsencode(path))}",
        expected=f"names of at most {_LONGEST_NAME_BYTES} bytes, in a path of at most some thousand",
        remedy="name a shorter path",
    )


def _in_circles(path: str) -> FileError:
    return FileError(
        f"{_as_named(path)} cannot be reached: symbolic links lead in a circle",
        expected="links that end at a file or a folder",
        remedy="mend them (`ls -l` shows where each leads), or name another path",
    )


_MODES = (("entered", os.X_OK), ("written to", os.W_OK), ("listed", os.R_OK))
_WORDS: dict[int, Callable[[str], FileError | None]] = {
    **dict.fromkeys(DENIED, _denied),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), _taken),
    errno.ENOTDIR: _below_a_file,
    errno.EISDIR: _folder_for_file,
    errno.ENOENT: _missing,
    errno.ENAMETOOLONG: _too_long,
    errno.ELOOP: _in_circles,
}


def _nearest(path: str) -> str:
    """Return a path, or what of it is there, as far as this user may see."""
    while not os.path.lexists(path) and (above := os.path.dirname(path)) != path:
        path = above
    return path


def _as_named(path: str) -> str:
    """Return a path without the names that things have while they are written."""
    found = (_UNFINISHED.fullmatch(name) for name in path.split(os.sep))
    return os.sep.join(
        name if match is None else match[1] for name, match in zip(path.split(os.sep), found, strict=True)
    )


def _kind(path: str) -> str:
    return "a folder" if os.path.isdir(path) else "a file"

"""Whether a folder is the same shared one on all hosts: one writes a file with a random name, the others look for it.

The name is new each time, so that no client of a network file system can answer from memory that there is none.
Nothing else of the folder is touched: another start may be at work in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.preflight.records import Mark, Mount, SharedFolder

_PREFIX = ".preflight-"
_PATIENCE_SECONDS = 2.0
"""How long a host looks for the file of another: clients of network file systems may remember old listings."""
_LEFTOVER_SECONDS = 3600.0


def leave_mark(path: Path) -> Mark:
    """Write a file with a random name into a folder, which is made where it is missing; by one host.

    Args:
        path: The folder, absolute.

    Returns:
        The mark, with the reason where there is no file.
    """
    nonce, made = secrets.token_hex(8), list[str]()
    try:
        missing = [folder for folder in [path, *path.parents] if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(str(folder))
        _write(_mark_path(path, nonce))
    except OSError as error:
        return Mark(nonce, made, _describe(error))
    return Mark(nonce, made, None)


def look_for_mark(path: Path, mark: Mark) -> SharedFolder:
    """Examine a folder from this host, where another (or this one) has left a mark in it.

    Args:
        path: The folder, absolute.
        mark: What `leave_mark` returned.
    """
    place = next(folder for folder in [path, *path.parents] if folder.is_dir())
    found = SharedFolder(str(path), mount=mount_of(place))
    if mark.error is None:
        found = replace(found, seen=_wait_for(_mark_path(path, mark.nonce)))
    with contextlib.suppress(OSError):
        system = os.statvfs(place)
        files = system.f_favail if system.f_files else None
        found = replace(found, free_bytes=system.f_bavail * system.f_frsize, free_inodes=files)
    if found.seen:
        own = _mark_path(path, f"{mark.nonce}.{secrets.token_hex(4)}")
        try:
            before = time.time()
            _write(own)
            after = time.time()
            written = own.stat().st_mtime
            found = replace(found, clock_seconds=round(written - (before + after) / 2, 3))
        except OSError as error:
            found = replace(found, error=_describe(error))
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
    return found


def remove_mark(path: Path, mark: Mark, *, keep_folder: bool) -> None:
    """Take the mark away, and marks that killed processes left; by the host that left it.

    Args:
        path: The folder.
        mark: What `leave_mark` returned.
        keep_folder: Leave folders that were made for the mark; else they go where nothing else is in them.
    """
    own = _mark_path(path, mark.nonce)
    with contextlib.suppress(OSError):
        now = own.stat().st_mtime  # by the clock that dates the others
        for leftover in path.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if now - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                    leftover.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        own.unlink(missing_ok=True)
    for folder in [] if keep_folder else reversed(mark.made):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def marks_in(path: Path, marks: Mapping[str, Mark]) -> list[str]:
    """Return whose marks are in a folder; each was left in what its host takes for it.

    Args:
        path: The folder, absolute.
        marks: Of other hosts, by name.
    """
    with_file = {name: mark for name, mark in marks.items() if mark.error is None}
    return [name for name, mark in with_file.items() if _mark_path(path, mark.nonce).exists()]


def mount_of(path: Path, mounts: str | None = None) -> Mount | None:
    """Say on which file system a path lies.

    Args:
        path: Absolute.
        mounts: Text in the form of /proc/self/mountinfo, in place of that file.

    Returns:
        The file system; None where unknown.
    """
    found: Mount | None = None
    with contextlib.suppress(OSError, IndexError, ValueError):
        if mounts is None:
            path = path.resolve()
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        for line in mounts.splitlines():
            words = line.split()
            point = Path(_unescape(words[4]))
            if path.is_relative_to(point) and len(str(point)) >= len(found.point if found else ""):  # the last covers
                rest = words[words.index("-") + 1 :]
                found = Mount(rest[0], _unescape(rest[1]), str(point))
    return found


def _unescape(word: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, character)
    return word


def _mark_path(path: Path, nonce: str) -> Path:
    return path / f"{_PREFIX}{nonce}"


def _write(path: Path) -> None:
    with open(path, "xb") as file:
        file.write(b"preflight\n")
        file.flush()
        os.fsync(file.fileno())


def _wait_for(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.is_file():
                return True
            for folder in (path.parent.parent, path.parent):
                os.listdir(folder)  # makes a network file system's client ask again
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _describe(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"

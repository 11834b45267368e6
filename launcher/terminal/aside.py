"""What libraries say in the process of a rank, kept apart from what we say: it goes into the run's log file.

Python's two streams are replaced while a recipe runs; what speaks to the person (`engine.log.terminal`) keeps the real
one. So the terminal has our lines alone, and none of theirs is lost:

* `RUN/logs/rank-00000.log` has all of it, with our own lines, once the run folder is open; what was said before that is
  held until then, and shown where the program crashes first;
* an error that a library logs, and the traceback of a thread, are shown at the terminal as well;
* what C code writes by itself (an abort, NCCL_DEBUG) is not touched: it comes to the terminal whatever becomes of us.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from engine.log import speak_at, terminal

_MOST_HELD = 10_000
"""Pieces of text that are held before there is a file; the last ones are kept."""


class _Aside(io.RawIOBase):
    """Takes what is written to either stream, and is never an error for who writes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number, self._lock = number, threading.RLock()
        self._held: deque[tuple[bool, bytes]] = deque(maxlen=_MOST_HELD)
        self._file: int | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def write(self, data: Any) -> int:
        return self.take(bytes(data), is_ours=False)

    def take(self, data: bytes, *, is_ours: bool) -> int:
        """Write to the file, or hold it for the time when there is one."""
        with self._lock:
            if self._file is None:
                self._held.append((is_ours, data))
            else:
                with suppress(OSError):  # a full disk: nothing of the run depends on it
                    os.write(self._file, data)
        return len(data)

    def lead_into(self, file: Path) -> None:
        """Write what is held and all that follows to the end of a file."""
        with suppress(OSError), self._lock:
            self.close_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._file, b"".join(data for _, data in self._held))
            self._held.clear()

    def close_file(self) -> None:
        """Hold what comes from now on."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def told_by_libraries(self) -> str:
        """Return what is held of theirs, and hold it no longer."""
        with self._lock:
            theirs = b"".join(data for is_ours, data in self._held if not is_ours)
            self._held.clear()
        return theirs.decode("utf-8", "backslashreplace")


class _Ours(io.TextIOBase):
    """What our log is written to, beside the terminal."""

    def __init__(self, aside: _Aside) -> None:
        super().__init__()
        self._aside = aside

    def write(self, text: str) -> int:
        return self._aside.take(text.encode("utf-8", "backslashreplace"), is_ours=True)


_NOW: list[_Aside] = []


@contextmanager
def libraries_aside() -> Iterator[None]:
    """Keep what libraries write to the standard streams apart while the body runs."""
    real, raw = (sys.stdout, sys.stderr), _Aside(2)
    below: Any = raw
    aside: TextIO = io.TextIOWrapper(below, encoding="utf-8", errors="backslashreplace", write_through=True)
    hook = threading.excepthook
    sys.stdout = sys.stderr = aside
    speak_at(real[1])
    threading.excepthook = _tell_thread
    _NOW.append(raw)
    try:
        yield
    finally:
        _NOW.remove(raw)
        raw.close_file()
        threading.excepthook = hook
        sys.stdout, sys.stderr = real
        speak_at(None)


def streams_aside() -> tuple[TextIO, TextIO] | None:
    """Return where our log and what libraries log is kept apart, as `set_up_logging` takes it; None where it is not."""
    return (_Ours(_NOW[-1]), sys.stderr) if _NOW else None  # type: ignore[return-value]  # it is written to alone


def lead_into(file: Path) -> None:
    """Let what was and will be said aside stand in a file; nothing where nothing is kept apart."""
    for raw in _NOW:
        raw.lead_into(file)


def keep(text: str) -> None:
    """Let a text stand in the file alone, such as the traceback of an error that the terminal has in words."""
    for raw in _NOW:
        raw.take(text.encode("utf-8", "backslashreplace"), is_ours=True)


def tell_held() -> None:
    """Show what no file has got yet: whatever went wrong, it may be the reason."""
    for raw in _NOW:
        terminal().write(raw.told_by_libraries())
        terminal().flush()


def _tell_thread(args: threading.ExceptHookArgs) -> None:
    """Show the traceback of a thread, as Python does on standard error."""
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else "?"
    trace = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
    terminal().write(f"Exception in thread {name}:\n{trace}")
    terminal().flush()

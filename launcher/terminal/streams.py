r"""How a program speaks at its ends: in any encoding, to a pipe that may close, and when it is interrupted.

* In a locale that is not of UTF-8, where torch itself cannot be imported whole, the program begins again in Python's
  UTF-8 mode: names of files and words are read alike everywhere, and only what is printed is in the locale's encoding.
* A character that the terminal's encoding lacks is written as its escape (`\u4e2d`), and never an error.
* Where the reader of standard output goes (`| head -1`), a command that only tells something ends at once, with 141 as
  a shell says it of other programs. A command that does something finishes it silently and ends with its own exit code.
* Nothing that is written to standard error can stop a program: it has nobody left to tell it to.
* Ctrl-C is one line and exit code 130, also while libraries are still being imported.
* A closed standard output (`>&-`) is no output; one that cannot be written (a full disk) is exit code 2.

The streams are replaced in the process that runs as a program, never where its functions are called by others.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from engine.reliability.exit_codes import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_READER_GONE, EXIT_REFUSED

_INTERRUPTED = "interrupted\n"


class _Descriptor(io.FileIO):
    """A file descriptor whose reader may go.

    Args:
        number: The descriptor.
        survives: Whether an error of the descriptor, whichever, is nothing to end for.
        stops: Whether the program ends with its reader.
    """

    def __init__(self, number: int, *, survives: bool, stops: bool) -> None:
        super().__init__(number, "wb", closefd=False)
        self.has_stopped = False
        self.failure: OSError | None = None
        self._survives, self._stops = survives, stops

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            gone = isinstance(error, BrokenPipeError)
            if not (gone or self._survives):
                self.failure = error
                raise
        _lead_to_nowhere(self.fileno(), os.O_WRONLY)  # for what is written from now on, by libraries in C as well
        if self._stops:
            self.has_stopped = True
            raise SystemExit(EXIT_READER_GONE)
        return memoryview(data).nbytes


def begin_in_utf8() -> None:
    """Begin the process again in Python's UTF-8 mode, as the same process and with the same words, where it is not."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":  # once, whatever comes of it
        return
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_streams(*, stops: bool = False) -> None:
    """Make the standard streams of this process such that neither an encoding nor a closed end is an error.

    Args:
        stops: End the program with exit code 141 where the reader of its standard output goes.
    """
    sys.stdin = _input(sys.stdin)
    sys.stdout = _output(sys.stdout, 1, survives=False, stops=stops)
    sys.stderr = _output(sys.stderr, 2, survives=True, stops=False)
    sys.excepthook = _tell_unhandled


def run_at_terminal(main: Callable[[], int]) -> int:
    """Run a program's main function on the streams that `open_streams` made; return the exit code.

    Args:
        main: Returns the exit code.
    """
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_CRASH if end.code else 0
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except KeyboardInterrupt:
        sys.stderr.write(_INTERRUPTED)
        code = EXIT_INTERRUPTED
    except OSError as error:
        raw = _descriptor()
        if raw is None or raw.failure is not error:
            raise
        code = _unwritten(error)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on there is nothing to tell of one
    return _flushed(code)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except SystemExit:
        pass
    except OSError as error:
        code = code or _unwritten(error)
    sys.stderr.flush()
    raw = _descriptor()
    return EXIT_READER_GONE if raw is not None and raw.has_stopped else code


def _unwritten(error: OSError) -> int:
    """Say that standard output cannot be written, and let what is left of it go nowhere; return the exit code."""
    _lead_to_nowhere(sys.stdout.fileno(), os.O_WRONLY)
    sys.stderr.write(f"error: the output cannot be written: {error.strerror}.\n")
    return EXIT_REFUSED


def _descriptor() -> _Descriptor | None:
    """Return what stands below standard output, where `open_streams` made it."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Descriptor) else None


def _output(stream: TextIO | None, number: int, *, survives: bool, stops: bool) -> TextIO:
    if stream is None:  # closed before the program began: the number must not become that of some file
        _lead_to_nowhere(number, os.O_WRONLY)
        encoding, at_once = "utf-8", False
    else:
        stream.flush()
        number, encoding = stream.fileno(), stream.encoding
        at_once = bool(getattr(stream, "write_through", False))
    raw = _Descriptor(number, survives=survives, stops=stops)
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=survives or raw.isatty(),
        write_through=at_once,
    )


def _input(stream: TextIO | None) -> TextIO:
    if stream is None:
        _lead_to_nowhere(0, os.O_RDONLY)
        return io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)), encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")  # who reads it says what is to become of what is no text
    return stream


def _lead_to_nowhere(number: int, flags: int) -> None:
    nowhere = os.open(os.devnull, flags)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _tell_unhandled(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End an interrupted import as an interrupted program; leave all else to Python."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(_INTERRUPTED)
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)

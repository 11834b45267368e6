"""The first failure of a start: recorded once, told once, and what all ranks end with.

One rank's error makes the others fail: they lose the connection in the middle of a collective operation, or wait in
vain. The person at the terminal needs the first error, once. So the rank that fails first makes
`RUN/errors/NONCE.json` (by a link, which exactly one can make) and tells it; whoever fails later sees it there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.errors import ArtifactError
from shards.files import fsync, read_record, write_json


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a start ended before its end.

    Attributes:
        attempt: Nonce of the start.
        time: Seconds since 1970, by the rank's clock.
        rank: Whose failure it is, or who noticed it.
        host: Its host.
        stage: Where it was.
        step: Units of the stage that were done.
        kind: Class of the error, or `lost rank`.
        message: What was told.
        code: The exit code of all ranks.
        traceback: Of an error of the program.
    """

    attempt: str
    time: float
    rank: int
    host: str
    stage: str
    step: int
    kind: str
    message: str
    code: int
    traceback: str = ""


def record_failure(
    folder: Path,
    *,
    attempt: str,
    rank: int,
    stage: str,
    step: int,
    kind: str,
    message: str,
    code: int,
    traceback: str = "",
) -> Failure | None:
    """Record a failure, if it is the first of its start.

    Args:
        folder: The run folder; `errors/` is made in it, and `last_error.json` is the newest of all starts.
        attempt: Nonce of this start.
        rank: This process.
        stage: Where it was.
        step: Units of the stage that were done.
        kind: Class of the error.
        message: What it says.
        code: The exit code.
        traceback: Of an error of the program.

    Returns:
        None where this is the first failure, which is now recorded and is to be told; else the first one.
    """
    failure = Failure(
        attempt, round(time.time(), 3), rank, socket.gethostname(), stage, step, kind, message, code, traceback
    )
    path = _path(folder, attempt)
    path.parent.mkdir(exist_ok=True)
    own = path.with_name(f".{attempt}.rank-{rank}.tmp")
    own.write_text(json.dumps(asdict(failure), indent=1) + "\n", encoding="utf-8")
    fsync(own)
    try:
        os.link(own, path)
    except FileExistsError:
        return read_failure(folder, attempt)
    finally:
        own.unlink(missing_ok=True)
    write_json(folder / "last_error.json", asdict(failure))
    return None


def read_failure(folder: Path, attempt: str) -> Failure | None:
    """Read the first failure of a start; None where it has none."""
    return _read(_path(folder, attempt))


def last_failure(folder: Path) -> Failure | None:
    """Read the failure of the newest start that failed."""
    return _read(folder / "last_error.json")


def _read(path: Path) -> Failure | None:
    with contextlib.suppress(OSError, ArtifactError):
        return read_record(path, Failure, "the record of a failure")
    return None


def _path(folder: Path, attempt: str) -> Path:
    return folder / "errors" / f"{attempt}.json"

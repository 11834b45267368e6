"""Files that only one training reads, in its own folder: complete or absent, and not waited for until they are on disk.

A training writes some files for each unit in each iteration, and waiting for a disk each time takes longer than the
work between. What a training that was killed goes on from is read with its hash, so that after a power cut, which may
leave files of nothing, it goes on from less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.index.files import IndexFile
from shards.files import as_full_disk, save_array, sha256_file


def save_scratch(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array.

    Raises:
        DiskFullError: There was no space for it.
    """
    with _replacing(path) as temporary:
        save_array(temporary, np.ascontiguousarray(array))


def write_scratch(path: Path, obj: object) -> None:
    """Write JSON.

    Raises:
        DiskFullError: There was no space for it.
    """
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(obj, allow_nan=False), encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield where to write; what is written there takes the file's place when the body ends."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise as_full_disk(error) or error from error


def described(path: Path) -> IndexFile:
    """Return what a file is, by its hash."""
    return IndexFile(path.name, path.stat().st_size, sha256_file(path))

"""A data folder is gone through once: what the check found is recorded, and stands while the files are as they were.

A start that goes on with a run would else read and hash a corpus of gigabytes before its first step, each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from shards.errors import ArtifactError, DataError
from shards.files import read_record, write_json
from shards.records import Checked, Dataset, SeenFile


def look_at(path: Path, files: Iterable[Path]) -> tuple[SeenFile, ...]:
    """Note what files of a data folder are like, those that are there.

    Args:
        path: The folder.
        files: Files in it.
    """
    found = []
    for file in sorted(set(files)):
        if file.is_file():
            stat = file.stat()
            found.append(SeenFile(file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found)


def recorded_check(record: Path, path: Path) -> Checked | None:
    """Return what an earlier check of a data folder found, if its files have not changed since.

    Args:
        record: Where `record_check` wrote it.
        path: The folder.

    Returns:
        The outcome; None where there is none, or a file has another size or time, or is gone.
    """
    try:
        checked = read_record(record, Checked, "the record of a check")
    except ArtifactError:
        return None  # there is none yet, or it is damaged
    return checked if checked.files and look_at(path, _paths(path, checked)) == checked.files else None


def record_check(record: Path, dataset: Dataset) -> None:
    """Record what the check of a data folder found.

    Args:
        record: The file to write.
        dataset: The data, as `open_dataset` returned it.
    """
    if dataset.checked is not None:
        write_json(record, asdict(dataset.checked))


def is_of_files(checked: Checked, path: Path, files: Iterable[Path]) -> bool:
    """Tell whether a check was of these files and no others; where nobody looked at them, it is taken to be.

    Args:
        checked: The outcome.
        path: The data folder.
        files: All files of it that are read now.
    """
    return not checked.files or {file.name for file in checked.files} == {one.name for one in look_at(path, files)}


def require_seen(path: Path, checked: Checked) -> None:
    """Refuse a folder whose files have other sizes than those that were checked, as on a host with a copy of its own.

    Times are not compared: a copy has others.

    Raises:
        DataError: They have, or one is missing.
    """
    here = {file.name: file.bytes for file in look_at(path, _paths(path, checked))}
    for file in checked.files:
        if here.get(file.name) != file.bytes:
            found = f"has {here[file.name]} bytes" if file.name in here else "is missing"
            raise DataError(
                f"{path / file.name} {found} here, where it was checked {file.bytes} bytes",
                expected="the same files for all ranks, unchanged while they are read",
                remedy="copy the data folder to this host again, or name one that all hosts see by data.path",
            )


def _paths(path: Path, checked: Checked) -> list[Path]:
    return [path / file.name for file in checked.files]

"""How far a conversion is, on disk beside its partial output: written anew, atomically, every few seconds.

Outputs only grow, so that a journal is a place in the sources and the length of each file at that place; a start that
finds one cuts the files to these lengths and reads on from there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards.convert.options import Options
from shards.convert.sources import Source
from shards.errors import DataError
from shards.files import parse_record, read_json, sha256_file, write_json
from shards.formats.canonical import NamedContents

_NAME, _LOCK = "journal.json", "lock"
_POLICIES = ("on_error", "on_unknown_docid")


@dataclass(frozen=True)
class Finished:
    """What became of an output: records kept, and reason -> records dropped."""

    kept: int
    dropped: dict[str, int]


@dataclass
class Journal:
    """The state of a conversion.

    Attributes:
        inputs: The source files, in the order in which they are read.
        options: The options.
        times: Name of a source -> its time of modification in nanoseconds; with the same one, and the same size, it is
            not hashed again.
        phase: `read` the sources, `finish` the outputs one by one, `publish` them.
        source: Number of the source that is being read.
        mark: The place in it, as `Mark` says it.
        lengths: File below the partial folder -> its bytes at that place.
        rows: Output -> records so far.
        dropped: Reason -> records dropped so far.
        finished: Output -> what became of it, of those that are finished.
        description: What `dataset.json` will hold, once all outputs are finished.
        replaced: Files of an earlier conversion that the new one takes the place of.
    """

    inputs: list[NamedContents]
    options: dict[str, Any]
    times: dict[str, int] = field(default_factory=dict)
    phase: Literal["read", "finish", "publish"] = "read"
    source: int = 0
    mark: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    description: dict[str, Any] | None = None
    replaced: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write the journal into the partial folder."""
        write_json(folder / _NAME, asdict(self))


def read_journal(folder: Path) -> Journal | None:
    """Read the journal of a partial folder; None where there is none.

    Raises:
        ArtifactError: It is damaged, or of another version.
    """
    if not (folder / _NAME).exists():
        return None
    return parse_record(
        read_json(folder / _NAME, "the journal of the conversion"),
        Journal,
        f"the journal {folder / _NAME}",
        remedy=f"remove {folder} and run the command again",
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a partial folder for this process; the lock ends with the process, however it ends.

    Raises:
        DataError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            f"another conversion is writing {folder.parent}", remedy="wait for it, or choose another --out"
        ) from None
    finally:
        os.close(descriptor)


def describe_inputs(
    sources: list[Source], known: Journal | None, hashed: Callable[[int], None]
) -> tuple[list[NamedContents], dict[str, int]]:
    """Hash the source files, those left out that a journal knows with the same size and time.

    Args:
        sources: The files, in the order in which they are read.
        known: A journal of an earlier start.
        hashed: Told the bytes of each file that is done.

    Returns:
        What each file holds; and name -> time of modification.
    """
    before = {entry.name: entry for entry in known.inputs} if known else {}
    inputs, times = [], {}
    for source in sources:
        for path, name in ((source.path, source.name), (source.beside, f"{source.name} (titles)")):
            if path is None:
                continue
            stat, entry = path.stat(), before.get(name)
            times[name] = stat.st_mtime_ns
            is_known = entry and known and entry.bytes == stat.st_size and known.times.get(name) == stat.st_mtime_ns
            sha256 = entry.sha256 if entry and is_known else sha256_file(path)
            hashed(stat.st_size)
            inputs.append(NamedContents(name, stat.st_size, sha256))
    return inputs, times


def differences(
    inputs: list[NamedContents], options: dict[str, Any], their_inputs: list[NamedContents], theirs: dict[str, Any]
) -> list[str]:
    """Say in words what two conversions differ in.

    Args:
        inputs: Sources of the present command, as `describe_inputs` gives them.
        options: Its options.
        their_inputs: Sources of the other one.
        theirs: Its options.

    Returns:
        One phrase for each difference; empty for the same conversion.
    """
    theirs = asdict(Options()) | theirs  # an option that did not exist then was left out
    found = [
        f"{name} is {options.get(name)!r} now, {theirs.get(name)!r} then"
        for name in {**theirs, **options}
        if options.get(name) != theirs.get(name)
    ]
    ours_by_name = {entry.name: entry for entry in inputs}
    by_name = {entry.name: entry for entry in their_inputs}
    found += [f"{name} is new" for name in ours_by_name if name not in by_name]
    found += [f"{name} is not there now" for name in by_name if name not in ours_by_name]
    for name, entry in ours_by_name.items():
        if name in by_name and entry != by_name[name]:
            sizes = f"{entry.bytes} bytes now, {by_name[name].bytes} then"
            found.append(f"{name} has {sizes if entry.bytes != by_name[name].bytes else 'another content'}")
    if not found and inputs != their_inputs:
        found.append("the sources come in another order")
    return found


def may_go_on(journal: Journal, options: Options) -> bool:
    """Tell whether options differ from a journal's only in being less strict: nothing was dropped by them so far."""
    now, then = asdict(options), asdict(Options()) | journal.options
    relaxed = {name for name in _POLICIES if (then.get(name), now.get(name)) == ("error", "drop")}
    return journal.phase != "publish" and all(now.get(name) == then.get(name) for name in {*now, *then} - relaxed)

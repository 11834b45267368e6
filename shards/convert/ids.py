"""Which ids repeat, and which are unknown: found on disk, in a few megabytes of memory for any number of ids.

While the sources are read, each id is appended to a log as 24 bytes: a 128-bit hash and the place it came from. A log
is then spread over buckets by the hash, so that equal ids meet in one, and each bucket is sorted alone. With 128 bits
two of 10^9 different ids share a hash with probability 10^-21, far below that of a wrong bit read from the disk, so
that equal hashes are equal ids. What is found is written as flags, one byte an id, in the order of the log.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shards.convert.appended import Appended, read_blocks

_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("place", "<u8")])
_KEYED = np.dtype([("high", "<u8"), ("low", "<u8"), ("ordinal", "<u8"), ("is_asked", "u1")])
_BUCKET_ENTRIES, _MAX_BUCKETS = 1 << 16, 256
_BLOCK_ENTRIES = 1 << 16
_LINE_BITS = 40


class IdLog:
    """The log of one kind of id.

    Args:
        path: Its file.
        length: Bytes of it that are known to be whole.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.file = Appended(path, length)

    def add(self, identifier: str, source: int, line: int) -> None:
        """Append an id.

        Args:
            identifier: The id, or several joined by a character that none holds.
            source: Number of the source file.
            line: Line in it.
        """
        digest = hashlib.blake2b(identifier.encode(), digest_size=16).digest()
        self.file.write(digest + (source << _LINE_BITS | line).to_bytes(8, "little"))


def place_of(path: Path, ordinal: int) -> tuple[int, int]:
    """Return source and line of an entry of a log."""
    with open(path, "rb") as file:
        file.seek(ordinal * _ENTRY.itemsize + 16)
        value = int.from_bytes(file.read(8), "little")
    return value >> _LINE_BITS, value & ((1 << _LINE_BITS) - 1)


def flag_repeated(log: Path, flags: Path) -> int:
    """Flag every id of a log that an earlier entry has, too.

    Args:
        log: The log.
        flags: The file of flags to write.

    Returns:
        Number of flags.
    """
    return _flag({0: log}, flags, lambda _, same: same)


def flag_unknown(asked: Path, known: Path, flags: Path) -> int:
    """Flag every id of a log that another log does not have.

    Args:
        asked: The log whose ids are looked up.
        known: The log of the ids that exist.
        flags: The file of flags to write, one for each entry of `asked`.

    Returns:
        Number of flags.
    """

    def unknown(entries: np.ndarray, same: np.ndarray) -> np.ndarray:
        # Known entries sort before those that ask: a group that begins with one that asks has none.
        starts = np.flatnonzero(~same)
        first = np.repeat(starts, np.diff(np.append(starts, len(entries))))
        return np.asarray(entries["is_asked"][first] == 1)

    return _flag({0: known, 1: asked}, flags, unknown)


def _flag(logs: dict[int, Path], flags: Path, chosen: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> int:
    """Sort bucket by bucket and flag what is chosen of the last log's entries.

    Args:
        logs: 0 -> the log of what is there, 1 -> the log that asks, if there is one.
        flags: The file to write.
        chosen: From sorted entries, and whether each has the hash of the one before, which are flagged.
    """
    last, count = max(logs), 0
    num_entries = logs[last].stat().st_size // _ENTRY.itemsize
    with _spread(logs, flags.with_name(flags.name + ".buckets")) as buckets, open(flags, "wb") as file:
        os.ftruncate(file.fileno(), num_entries)
        for bucket in buckets:
            entries = np.fromfile(bucket, dtype=_KEYED)
            order = np.lexsort((entries["ordinal"], entries["is_asked"], entries["low"], entries["high"]))
            entries = entries[order]
            same = np.zeros(len(entries), dtype=bool)
            same[1:] = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
            for ordinal in entries["ordinal"][chosen(entries, same) & (entries["is_asked"] == last)].tolist():
                os.pwrite(file.fileno(), b"\1", ordinal)
                count += 1
    return count


@contextmanager
def _spread(logs: dict[int, Path], folder: Path) -> Iterator[list[Path]]:
    """Write the entries of logs into bucket files by the first bits of their hashes."""
    size = sum(log.stat().st_size for log in logs.values()) // _ENTRY.itemsize
    bits = min(_MAX_BUCKETS, -(-size // _BUCKET_ENTRIES)).bit_length()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03}" for number in range(1 << bits)]
    try:
        # Opened for each block anew: a process may have fewer files open than there are buckets.
        for is_asked, log in logs.items():
            start = 0
            for block in read_blocks(log, _BLOCK_ENTRIES * _ENTRY.itemsize):
                entries = np.frombuffer(block, dtype=_ENTRY)
                keyed = np.empty(len(entries), dtype=_KEYED)
                keyed["high"], keyed["low"], keyed["is_asked"] = entries["high"], entries["low"], is_asked
                keyed["ordinal"] = np.arange(start, start + len(entries), dtype=np.uint64)
                start += len(entries)
                numbers = (keyed["high"] >> np.uint64(64 - bits)).astype(np.int64)
                order = np.argsort(numbers, kind="stable")
                ends = np.cumsum(np.bincount(numbers, minlength=1 << bits))
                keyed, begin = keyed[order], 0
                for number, end in enumerate(ends.tolist()):
                    if end > begin:
                        with open(paths[number], "ab", buffering=0) as file:
                            file.write(keyed[begin:end].tobytes())
                    begin = end
        yield [path for path in paths if path.exists()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_flags(path: Path | None) -> Iterator[bool]:
    """Stream flags; without a file, none is set, without end."""
    if path is None:
        while True:
            yield False
    for block in read_blocks(path, 1 << 16):
        yield from map(bool, block)


def first_like(log: Path, ordinal: int) -> int:
    """Return the number of the first entry of a log that has the id of a given entry."""
    with open(log, "rb") as file:
        file.seek(ordinal * _ENTRY.itemsize)
        wanted = np.frombuffer(file.read(_ENTRY.itemsize), dtype=_ENTRY)[0]
    start = 0
    for block in read_blocks(log, _BLOCK_ENTRIES * _ENTRY.itemsize):
        entries = np.frombuffer(block, dtype=_ENTRY)
        found = np.flatnonzero((entries["high"] == wanted["high"]) & (entries["low"] == wanted["low"]))
        if len(found):
            return start + int(found[0])
        start += len(entries)
    return ordinal

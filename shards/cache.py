"""Copies of a corpus's shards on a host's own disk, for where many hosts would read one file system.

A copy is hashed while it is made and gets its name only when the hash is the manifest's, so a file that is there is
whole. Several processes of a host share the copying; the copies of a corpus serve every later run on the host.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import ArtifactError, DataError, DiskFullError
from shards.files import lack_of_room, write_atomically
from shards.manifest import CorpusManifest, ShardEntry

_BLOCK_BYTES = 4 * 2**20


def copies_folder(cache: Path, manifest: CorpusManifest) -> Path:
    """Return where the copies of a corpus lie: a folder named by the corpus's hash.

    Args:
        cache: Folder of the user's choice, of the host's own disk.
        manifest: The corpus.
    """
    return Path(cache) / manifest.sha256[:16]


def require_space(cache: Path, source: Path, manifest: CorpusManifest) -> None:
    """Refuse a cache that will not hold what is still to be copied, before anything is.

    Raises:
        DataError: The folder cannot be made.
        DiskFullError: It is too small.
    """
    folder = copies_folder(cache, manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder for copies of the shards cannot be made: {error}",
            expected="a folder on this host's own disk that can be written",
            remedy="name another by shards.cache, or leave shards.cache out",
        ) from error
    missing = _missing_copies(cache, source, manifest)
    needed = sum((source / name).stat().st_size for entry in missing for name, _ in _to_copy(source, folder, entry))
    if lack := lack_of_room(folder, needed):
        raise DiskFullError(
            f"the disk is too small for copies of the shards: {lack}",
            remedy="make space there, name another folder by shards.cache, or leave shards.cache out: the shards are "
            "then read where they lie",
        )


def copy_shard(cache: Path, source: Path, manifest: CorpusManifest, entry: ShardEntry) -> int:
    """Copy a shard and its offsets, unless they are there.

    Args:
        cache: As for `copies_folder`.
        source: The corpus folder.
        manifest: The corpus.
        entry: The shard.

    Returns:
        Bytes copied.

    Raises:
        ArtifactError: The shard is not the manifest's.
        DiskFullError: There is no space for the copy.
    """
    folder, total = copies_folder(cache, manifest), 0
    for name, sha256 in _to_copy(source, folder, entry):
        num_bytes = (source / name).stat().st_size
        with write_atomically(folder / name, num_bytes=num_bytes) as temporary:
            found = _copy_and_hash(source / name, temporary)
            if found != sha256:
                raise ArtifactError(
                    f"the shard file {source / name} has sha256 {found}",
                    expected=f"sha256 {sha256}",
                    remedy=f"delete {source} and write the shards again",
                )
        total += num_bytes
    return total


def _missing_copies(cache: Path, source: Path, manifest: CorpusManifest) -> list[ShardEntry]:
    """Return the shards that have no whole copy yet, in order."""
    folder = copies_folder(cache, manifest)
    return [entry for entry in manifest.shards if any(_to_copy(source, folder, entry))]


def _to_copy(source: Path, folder: Path, entry: ShardEntry) -> Iterator[tuple[str, str]]:
    """Yield (name, sha256) of the files of a shard that have no copy of the right size."""
    for name, sha256 in ((entry.name, entry.sha256), (entry.offsets_name, entry.offsets_sha256)):
        copy = folder / name
        if not copy.is_file() or copy.stat().st_size != (source / name).stat().st_size:
            yield name, sha256


def _copy_and_hash(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    with open(source, "rb") as read, open(target, "wb") as written:
        while block := read.read(_BLOCK_BYTES):
            digest.update(block)
            written.write(block)
        # A corpus may be larger than the memory: pages that are not read again soon should not push others out.
        os.posix_fadvise(read.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()

"""Embeddings on the disks of the hosts that made them (`index.embeddings: local`), and who may read which.

A part's array lies in a folder of its host; its marker lies where all ranks see it, in the run folder, and names the
host beside what every marker has. A part counts where its host is one of this start's and the file there is whole.

The folder on a host is named by the run and by the hashes of weights and corpus, not by the iteration: an iteration
that takes over another's embeddings takes markers alone, and what no marker names any more is cleared.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import ArtifactError, ConfigError
from shards.embeddings import (
    Embeddings,
    EmbeddingStore,
    PartMarker,
    Stamp,
    marker_of,
    part_is_complete,
    part_paths,
    require_part,
)
from shards.errors import DiskFullError
from shards.files import lack_of_room, read_record, save_array, sha256_file, write_atomically, write_json
from shards.manifest import CorpusManifest, ShardEntry

_GATHERED = "gathered.json"


@dataclass(frozen=True, slots=True)
class HeldMarker(PartMarker):
    """What vouches for a part on a host's own disk."""

    host: str
    """Whose."""


@dataclass(frozen=True, slots=True)
class LocalDisk:
    """Where a host keeps the embeddings of a run.

    Attributes:
        root: Of this run, on the host's own disk.
        host: As the ranks call it.
    """

    root: Path
    host: str

    @classmethod
    def of(cls, named: str, run: Path, host: str) -> LocalDisk:
        """Return this host's.

        Args:
            named: `index.local_folder`.
            run: The run folder, absolute, as all hosts see it.
            host: This one.

        Raises:
            ConfigError: As of `expanded`.
        """
        return cls(expanded(named) / f"sparring-{hashlib.sha256(str(run).encode()).hexdigest()[:16]}", host)

    def folder(self, stamp: Stamp) -> Path:
        """Return where the parts of a stamp lie."""
        return self.root / _name_of(stamp)

    def path(self, entry: ShardEntry, stamp: Stamp) -> Path:
        """Return where the array of a part lies."""
        return part_paths(self.folder(stamp), entry)[0]


def expanded(named: str) -> Path:
    """Return a local folder as this host has it, its `~` and variables replaced.

    Raises:
        ConfigError: A variable is not set here, or the folder is not absolute.
    """
    text = os.path.expanduser(os.path.expandvars(named))
    if "$" in text or not text.startswith("/"):
        raise ConfigError(
            f"index.local_folder is {named}, which is {text!r} here",
            expected="an absolute folder; its environment variables set in every rank's process",
            remedy="set the variable on all hosts, or name the folder itself",
        )
    return Path(text)


@dataclass(frozen=True, slots=True)
class Gathered:
    """The record of embeddings that were copied to the run folder; written after them."""

    stamp: Stamp
    """What made them."""


class HeldStore(EmbeddingStore):
    """The embeddings of a whole corpus, of which this host has some; the others' are refused.

    Args:
        folder: The store's folder in the run folder, with the markers.
        manifest: The corpus.
        stamp: What made the embeddings.
        dimension: D.
        dtype: `float16` or `float32`.
        homes: The host of each shard's part.
        disk: This host's.
        scattered: Whether the ranks are on several hosts.
    """

    def __init__(
        self,
        folder: Path,
        manifest: CorpusManifest,
        stamp: Stamp,
        dimension: int,
        dtype: str,
        homes: Sequence[str],
        disk: LocalDisk,
        *,
        scattered: bool,
    ) -> None:
        super().__init__(folder, manifest, stamp, dimension, dtype)
        self.homes, self.disk, self.scattered = tuple(homes), disk, scattered

    def __reduce__(self) -> Any:
        raise TypeError("a store on one host's disk stays in its process")

    def _path(self, part: int) -> Path:
        if self.homes[part] != self.disk.host:
            raise ArtifactError(
                f"the embeddings of shard {part} lie on {self.homes[part]}, and are asked for on {self.disk.host}",
                expected="work that is handed out to the host that has them",
            )
        return self.disk.path(self.manifest.shards[part], self.stamp)

    def home_of(self, documents: range) -> str:
        """Return the host that has the embeddings of consecutive documents, at least one.

        Raises:
            ArtifactError: They are on several hosts.
        """
        own = [home for entry, home in zip(self.manifest.shards, self.homes, strict=True) if _meet(entry, documents)]
        if len(set(own)) != 1:
            raise ArtifactError(
                f"the embeddings of documents {documents.start} to {documents.stop - 1} lie on {sorted(set(own))}",
                expected="one host",
                remedy=f"delete {self.folder} and run the encoding again",
            )
        return own[0]


def homes_of(store: EmbeddingStore, parts: Sequence[range]) -> list[str] | None:
    """Return the host that each part of a corpus is handed out to; None where any rank reads them all.

    Args:
        store: The embeddings.
        parts: Documents of each part, as `engine.index.dense.document_parts` cuts them.
    """
    if not isinstance(store, HeldStore) or not store.scattered:
        return None
    return [store.home_of(documents) for documents in parts]


def write_held(folder: Path, disk: LocalDisk, stamp: Stamp, entry: ShardEntry, embeddings_ND: Embeddings) -> None:
    """Write the embeddings of one shard to this host's disk, and the marker to the run folder after it.

    Args:
        folder: The store's folder in the run folder.
        disk: This host's.
        stamp: What made them.
        entry: The shard.
        embeddings_ND: As of `shards.embeddings.write_part`.

    Raises:
        ArtifactError: As of `write_part`.
        DiskFullError: There is no space on this host; the message names it.
    """
    require_part(entry, embeddings_ND)
    marker_path = held_marker_path(folder, entry)
    marker_path.unlink(missing_ok=True)
    try:
        with write_atomically(disk.path(entry, stamp), num_bytes=embeddings_ND.nbytes) as temporary:
            save_array(temporary, embeddings_ND)
            marker = marker_of(entry, embeddings_ND, stamp, temporary.stat().st_size, sha256_file(temporary))
    except DiskFullError as error:
        raise _full(disk, error.fact) from error
    write_json(marker_path, asdict(marker) | {"host": disk.host})


def require_room(disk: LocalDisk, stamp: Stamp, num_bytes: int) -> None:
    """Refuse to begin an encoding that this host's disk has no room for.

    Args:
        disk: This host's.
        stamp: Of the embeddings.
        num_bytes: Still to be written here.

    Raises:
        ConfigError: The folder cannot be made.
        DiskFullError: Less is free.
    """
    folder = disk.folder(stamp)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made on {disk.host}: {error.strerror or error}",
            expected="a folder on the host's own disk that can be written (index.local_folder)",
            remedy="name another, or make it on every host",
        ) from error
    if lack := lack_of_room(folder, num_bytes):
        raise _full(disk, f"the disk is too small for its share of the embeddings: {lack}")


def _full(disk: LocalDisk, fact: str) -> DiskFullError:
    return DiskFullError(
        f"on host {disk.host}: {fact}",
        remedy="make space on that host (what other runs left in index.local_folder can go), name another "
        "index.local_folder, or set index.embeddings=shared for a new run; what is finished is kept",
    )


def read_held(folder: Path, entry: ShardEntry, stamp: Stamp) -> HeldMarker | None:
    """Return the marker of a part on some host's disk; None where there is no such one of this stamp."""
    path = held_marker_path(folder, entry)
    if not path.is_file():
        return None
    try:
        marker = read_record(path, HeldMarker, "the marker of a part on a host")
    except ArtifactError:
        return None
    rows = (marker.shape[0], marker.first_document)
    return marker if marker.stamp == stamp and rows == (entry.num_documents, entry.first_document) else None


def held_marker_path(folder: Path, entry: ShardEntry) -> Path:
    """Return where the marker of a part on some host's disk lies."""
    return part_paths(folder, entry)[1].with_suffix(".held.json")


def is_gathered(folder: Path, stamp: Stamp) -> bool:
    """Tell whether all parts of a stamp have been copied to the run folder; `EmbeddingStore.open` checks them."""
    try:
        return read_record(folder / _GATHERED, Gathered, "the record of gathered embeddings").stamp == stamp
    except ArtifactError:
        return False


def note_gathered(folder: Path, stamp: Stamp) -> None:
    """Record that all parts of a stamp have been copied to the run folder."""
    write_json(folder / _GATHERED, asdict(Gathered(stamp)))


def copy_held(folder: Path, disk: LocalDisk, entry: ShardEntry, stamp: Stamp) -> None:
    """Copy a part of this host to the run folder, where every host reads it, unless it is there.

    Args:
        folder: The store's folder in the run folder.
        disk: This host's.
        entry: The shard.
        stamp: What made it.

    Raises:
        ArtifactError: The file on this host is not what its marker says.
        DiskFullError: There is no space for it in the run folder.
    """
    if part_is_complete(folder, entry, stamp):
        return
    marker, source = read_held(folder, entry, stamp), disk.path(entry, stamp)
    target, marker_path = part_paths(folder, entry)
    if marker is None:
        raise ArtifactError(f"the marker of {source} is gone", remedy="start the same command again")
    marker_path.unlink(missing_ok=True)
    with write_atomically(target, num_bytes=marker.num_bytes) as temporary:
        shutil.copyfile(source, temporary)
        if (found := sha256_file(temporary)) != marker.sha256:
            raise ArtifactError(
                f"{source} on {disk.host} has sha256 {found}",
                expected=f"sha256 {marker.sha256}, as when it was written",
                remedy="delete it and start the same command again: it is encoded again",
            )
    whole = {name: value for name, value in asdict(marker).items() if name != "host"}
    write_json(marker_path, whole)


def clear_unnamed(disk: LocalDisk, indexes: Path, keep: Stamp) -> None:
    """Remove from this host's disk what no index of the run names any more.

    Args:
        disk: This host's.
        indexes: Folder of all indexes of the run.
        keep: What is about to be written.
    """
    if not disk.root.is_dir():
        return
    named = {_name_of(keep)}
    for path in indexes.glob("*/embeddings"):
        marker = next(iter(sorted(path.glob("part-*.held.json"))), None)
        if marker is not None:
            try:
                named.add(_name_of(read_record(marker, HeldMarker, "the marker of a part on a host").stamp))
            except ArtifactError:
                return  # nobody knows what it names
    for folder in disk.root.iterdir():
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def _name_of(stamp: Stamp) -> str:
    return f"{stamp.weights_sha256[:16]}-{stamp.corpus_sha256[:16]}"


def is_whole(folder: Path, entry: ShardEntry, stamp: Stamp, disk: LocalDisk, *, verify: bool = False) -> bool:
    """Tell whether a part of this host is as its marker says.

    Args:
        folder: The store's folder in the run folder.
        entry: The shard.
        stamp: What must have made it.
        disk: This host's.
        verify: Hash it too; without it, its size is looked at.
    """
    marker, path = read_held(folder, entry, stamp), disk.path(entry, stamp)
    if marker is None or not path.is_file() or path.stat().st_size != marker.num_bytes:
        return False
    return not verify or sha256_file(path) == marker.sha256


def _meet(entry: ShardEntry, documents: range) -> bool:
    return entry.documents.start < documents.stop and documents.start < entry.documents.stop

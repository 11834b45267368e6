"""Opens embeddings that lie on the hosts of this start, once all ranks know that they are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError
from engine.index.held.store import HeldStore, LocalDisk, is_gathered, is_whole, read_held
from shards.embeddings import EmbeddingStore, Stamp
from shards.errors import counted, listed
from shards.manifest import CorpusManifest

_LISTED = 8


def hosts_that_hold(
    coordinator: Coordinator,
    name: str,
    folder: Path,
    manifest: CorpusManifest,
    stamp: Stamp,
    disk: LocalDisk,
    *,
    dtype: str | None = None,
    verify: bool = False,
) -> list[str]:
    """Find out which parts are whole on the disk of a host of this start. All ranks call it alike.

    Args:
        coordinator: Between the ranks.
        name: Of the work, for progress and errors.
        folder: The store's folder in the run folder.
        manifest: The corpus.
        stamp: What must have made them.
        disk: This host's.
        dtype: Of the numbers; any if None.
        verify: Hash every part; without it, its size is looked at.

    Returns:
        Of each shard the host that has its part, the same on all ranks; empty where none has.
    """
    hosts = list(dict.fromkeys(coordinator.hosts))

    def named() -> list[int]:
        found = (read_held(folder, entry, stamp) for entry in manifest.shards)
        return [
            hosts.index(marker.host)
            if marker is not None and marker.host in hosts and dtype in (None, marker.dtype)
            else -1
            for marker in found
        ]

    places: list[int] = coordinator.only_rank_zero(f"{name}: look for parts", named)
    homes = [hosts[place] if place >= 0 else "" for place in places]
    own = [number for number, home in enumerate(homes) if home]
    if verify:
        with coordinator.agreement(f"{name}: look at parts"):
            units = coordinator.hand_out(f"{name}: look at parts", own, homes=[homes[number] for number in own])
            bad = [n for n in units if not is_whole(folder, manifest.shards[n], stamp, disk, verify=True)]
    else:
        mine = [number for number in own if homes[number] == disk.host and coordinator.is_first_of_host]
        bad = [number for number in mine if not is_whole(folder, manifest.shards[number], stamp, disk)]
    for numbers in coordinator.gather(f"{name}: parts that are not whole", bad):
        for number in numbers:
            homes[number] = ""
    return homes


def is_lost(
    coordinator: Coordinator, folder: Path, manifest: CorpusManifest, stamp: Stamp, disk: Callable[[], LocalDisk]
) -> bool:
    """Tell whether parts of a store that was whole are on no host of this start any more. All ranks call it alike.

    Args:
        coordinator: Between the ranks.
        folder: The store's folder in the run folder; where it is gone, nothing is lost: it is not to be kept.
        manifest: The corpus.
        stamp: What must have made the embeddings.
        disk: Returns this host's; not called for what was gathered.
    """
    name = f"embeddings@{stamp.iteration}"

    def is_kept() -> bool:
        return folder.is_dir() and not is_gathered(folder, stamp)

    if not coordinator.only_rank_zero(f"{name}: look", is_kept):
        return False
    return not all(hosts_that_hold(coordinator, name, folder, manifest, stamp, disk()))


def open_held(
    coordinator: Coordinator, folder: Path, manifest: CorpusManifest, stamp: Stamp, disk: Callable[[], LocalDisk]
) -> EmbeddingStore:
    """Open a store whose parts lie on the hosts of this start, or were gathered. All ranks call it alike.

    Args:
        coordinator: Between the ranks.
        folder: The store's folder in the run folder.
        manifest: The corpus.
        stamp: What must have made the embeddings.
        disk: Returns this host's; not called for what was gathered, which any host reads.

    Raises:
        ArtifactError: Parts are missing or on other hosts, and were not gathered; or the stamp names another corpus.
    """
    name = f"embeddings@{stamp.iteration}"
    if coordinator.only_rank_zero(f"{name}: look for all", lambda: is_gathered(folder, stamp)):
        return EmbeddingStore.open(folder, manifest, stamp)
    own = disk()
    homes = hosts_that_hold(coordinator, name, folder, manifest, stamp, own)
    if not all(homes):
        raise _lost(name, folder, manifest, stamp, homes, coordinator.hosts)
    markers = [read_held(folder, manifest.shards[number], stamp) for number in (0, len(homes) - 1)]
    first, last = (marker for marker in markers if marker is not None)
    if (first.shape[1], first.dtype) != (last.shape[1], last.dtype):
        raise ArtifactError(
            f"{name} mixes parts of {first.dtype} [{first.shape[1]}] and {last.dtype} [{last.shape[1]}]",
            remedy=f"delete {folder} and run the encoding again",
        )
    scattered = len(set(coordinator.hosts)) > 1
    return HeldStore(folder, manifest, stamp, first.shape[1], first.dtype, homes, own, scattered=scattered)


def _lost(
    name: str, folder: Path, manifest: CorpusManifest, stamp: Stamp, homes: Sequence[str], hosts: Sequence[str]
) -> ArtifactError:
    lost = [number for number, home in enumerate(homes) if not home]
    held = (read_held(folder, manifest.shards[number], stamp) for number in lost)
    there = sorted({marker.host for marker in held if marker is not None})
    where = f"were made on {listed(there, _LISTED)}" if there else "are nowhere"
    return ArtifactError(
        f"{counted(len(lost), 'part')} of {len(homes)} of {name} {where}, and not whole on "
        f"{listed(dict.fromkeys(hosts), _LISTED)}, where they are asked for",
        expected="all parts on the disks of these hosts, or in the run folder",
        remedy="let the run end with index.gather_embeddings=true, which copies those of the iteration that is taken "
        "into the run folder, start this on the hosts that have them, or measure by the command `evaluate`, which "
        "encodes again what is lost",
    )

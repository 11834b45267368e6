"""Where a dense retriever's embeddings of the corpus lie: in the run folder, or on the hosts that make them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.index.held.deal import Deal, deal_parts
from engine.index.held.opening import hosts_that_hold, is_lost, open_held
from engine.index.held.store import (
    HeldStore,
    LocalDisk,
    clear_unnamed,
    copy_held,
    note_gathered,
    require_room,
)
from engine.log import get_logger
from engine.results import LAST_STAGE
from engine.retrievers.choice import Choice
from engine.retrievers.encoding import stamp_of_weights
from engine.run import Run, RunFolder, Stage
from shards.embeddings import EmbeddingStore, Stamp
from shards.errors import listed

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GatheredEmbeddings:
    """Result of a stage `gather/ITERATION`: documents whose embeddings every host can read now."""

    documents: int


def keeps_on_hosts(run: Run, folder: RunFolder) -> bool:
    """Tell whether embeddings lie on the hosts that make them: of the run's own corpus, where the recipe says so."""
    return run.config.index.embeddings == "local" and folder == run.folder


def local_disk(run: Run, folder: RunFolder) -> LocalDisk | None:
    """Return where this host keeps embeddings of a corpus; None where they lie in the run folder.

    Raises:
        ConfigError: `index.local_folder` is none on this host.
    """
    return _disk_here(run) if keeps_on_hosts(run, folder) else None


def _disk_here(run: Run) -> LocalDisk:
    return LocalDisk.of(run.config.index.local_folder or "", run.folder.path, run.coordinator.host)


def open_embeddings(run: Run, data: Data, folder: RunFolder, choice: Choice) -> EmbeddingStore:
    """Open the embeddings that published weights made of a corpus. All ranks call it alike.

    Args:
        run: Whose weights.
        data: The corpus.
        folder: The run's own folder, or one below it for another corpus.
        choice: With the weights.

    Returns:
        The store; where they lie on the hosts' own disks, one that knows who has what.

    Raises:
        ArtifactError: They are missing, damaged, of other weights, or on hosts where no rank is.
    """
    embeddings = folder.index(run.timetable.artifact(choice.trained)) / "embeddings"
    manifest, stamp = data.shards.manifest, stamp_of_weights(run, data, choice)
    if keeps_on_hosts(run, folder):
        return open_held(run.coordinator, embeddings, manifest, stamp, lambda: _disk_here(run))
    return EmbeddingStore.open(embeddings, manifest, stamp)


def deal_embeddings(
    stage: Stage,
    data: Data,
    weights: WeightsOf,
    embeddings: Path,
    stamp: Stamp,
    disk: LocalDisk,
    bytes_each: Callable[[], int],
) -> Deal:
    """Decide which shards are encoded on which host, and make room for them. All ranks call it alike.

    Args:
        stage: Where this runs.
        data: The corpus.
        weights: Those that encode.
        embeddings: Folder of the markers.
        stamp: Of the weights and the corpus.
        disk: This host's.
        bytes_each: Returns the bytes of an embedding; called where some are missing.

    Raises:
        DiskFullError: A host has no room for its share.
    """
    run, coordinator, manifest = stage.run, stage.run.coordinator, data.shards.manifest
    stream, dtype = data.texts[weights.model].stream, run.config.index.embedding_dtype
    whole = hosts_that_hold(coordinator, stage.name, embeddings, manifest, stamp, disk, dtype=dtype, verify=True)
    deal = deal_parts(manifest, stream, whole, Counter(coordinator.hosts))
    with coordinator.agreement(f"{stage.name}: room on the hosts"):
        if coordinator.is_first_of_host:
            clear_unnamed(disk, run.folder.path / "index", stamp)
            num_documents = deal.documents_of(disk.host, manifest)
            require_room(disk, stamp, num_documents * bytes_each() if num_documents else 0)
    idle = [host for host in dict.fromkeys(coordinator.hosts) if host not in {*deal.homes, *whole}]
    if run.is_main and deal.missing and idle:
        log.warning(
            "%s: %s have no share of the corpus, which is cut into too few parts for so many hosts; "
            "index.embeddings=shared gives all of them work",
            *(stage.name, listed(idle, 8)),
        )
    return deal


def forget_lost_embeddings(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Let a finished encoding run again for what is lost with its host or disk. All ranks call it alike.

    Args:
        run: Whose ledger has it as finished.
        data: The corpus.
        folder: As for `open_embeddings`.
        choice: With the weights.
        prefix: Of the stage's name.
    """
    artifact = run.timetable.artifact(choice.trained)
    name = f"{prefix}encode/{artifact}"
    is_over = run.lock is not None and run.is_finished(LAST_STAGE)  # of a run that is at its end nothing is needed
    if is_over or not keeps_on_hosts(run, folder) or not run.is_finished(name):
        return
    embeddings, stamp = folder.index(artifact) / "embeddings", stamp_of_weights(run, data, choice)
    if is_lost(run.coordinator, embeddings, data.shards.manifest, stamp, lambda: _disk_here(run)):
        if run.is_main:
            log.warning("%s: embeddings are lost with a host or its disk, and are encoded again", name)
        run.forget([name])


def gather_embeddings(stage: Stage, data: Data, choice: Choice) -> GatheredEmbeddings:
    """Copy the embeddings of published weights from the hosts that have them to the run folder.

    Args:
        stage: Where this runs.
        data: The corpus.
        choice: With the weights.

    Raises:
        ArtifactError: A part is missing or damaged.
        DiskFullError: The run folder has no room for them.
    """
    run, coordinator = stage.run, stage.run.coordinator
    store = open_embeddings(run, data, run.folder, choice)
    if not isinstance(store, HeldStore):  # a start that was killed right after it has
        return GatheredEmbeddings(store.num_documents)
    entries = store.manifest.shards
    with coordinator.agreement(f"{stage.name}: copy"):
        for number in coordinator.hand_out(f"{stage.name}: copy", range(len(entries)), homes=store.homes):
            copy_held(store.folder, store.disk, entries[number], store.stamp)
    coordinator.only_rank_zero(f"{stage.name}: note", lambda: note_gathered(store.folder, store.stamp))
    return GatheredEmbeddings(store.num_documents)

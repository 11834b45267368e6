"""Embeddings on the disks of two hosts: the same index and the same hits as from one folder, and what is lost."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.sections import IndexConfig
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.reuse import take_over_same_weights
from engine.errors import ArtifactError, ConfigError
from engine.index.build import build_index
from engine.index.dense import DenseIndex, document_parts
from engine.index.exact import rescore, score_pairs
from engine.index.held.deal import deal_parts
from engine.index.held.opening import hosts_that_hold, open_held
from engine.index.held.store import (
    HeldStore,
    LocalDisk,
    clear_unnamed,
    copy_held,
    expanded,
    note_gathered,
    read_held,
    require_room,
    write_held,
)
from engine.index.plan import plan_index
from engine.retrievers.dense import DenseSearcher
from engine.retrievers.scattered import (
    Unanswered,
    answered,
    hits_path,
    is_scattered,
    search_in_rounds,
    search_over_hosts,
)
from engine.search import Searcher
from shards.embeddings import EmbeddingStore, Stamp
from shards.errors import DiskFullError
from shards.records import Query
from tests.embedding_stores import clustered, corpus_of, make_store
from tests.threads_as_ranks import on_ranks

SIZES = (200, 40, 1, 300, 59, 100, 80, 20, 250, 33)
D, K = 16, 10
NUM = sum(SIZES)
EMBEDDINGS_ND, QUERIES_QD = clustered(NUM, D, 0), clustered(30, D, 1)
MANIFEST = corpus_of(SIZES)
STAMP = Stamp("3", "b" * 64, MANIFEST.sha256)
HOSTS = ("one", "two", "two")


def disk_of(folder: Path, host: str) -> LocalDisk:
    return LocalDisk(folder / f"disk-of-{host}", host)


def encode_on_hosts(folder: Path, hosts: Sequence[str]) -> list[int]:
    """Write what is missing, as the deal says, and return which shards that were; by one process for all hosts."""
    disks, whole = {host: disk_of(folder, host) for host in hosts}, [""] * len(SIZES)
    coordinator = Coordinator(LocalTransport())
    for host, disk in disks.items():
        coordinator.hosts[:] = [host]
        held = hosts_that_hold(coordinator, "look", folder / "embeddings", MANIFEST, STAMP, disk, verify=True)
        whole = [known or new for known, new in zip(whole, held, strict=True)]
    deal = deal_parts(MANIFEST, "r", whole, Counter(hosts))
    for number, home in zip(deal.missing, deal.homes, strict=True):
        entry = MANIFEST.shards[number]
        rows_ND = EMBEDDINGS_ND[entry.documents.start : entry.documents.stop]
        write_held(folder / "embeddings", disks[home], STAMP, entry, rows_ND)
    return sorted(deal.missing)


def opened_in(folder: Path, coordinator: Coordinator, hosts: Sequence[str] = HOSTS) -> HeldStore:
    coordinator.hosts[:] = hosts
    store = open_held(coordinator, folder / "embeddings", MANIFEST, STAMP, lambda: disk_of(folder, coordinator.host))
    assert isinstance(store, HeldStore)
    return store


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.iterdir() if path.name not in ("manifest.json", "embeddings"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def built(coordinator: Coordinator, store: EmbeddingStore, folder: Path, job: dict[str, Any]) -> None:
    last = [folder.with_name(job["last"])] if "last" in job else []
    settings = IndexConfig(factory=job["factory"], kmeans_iterations=3, placement=job.get("placement", "auto"))
    plan = plan_index(settings, num_documents=NUM, dimension=D)
    found = build_index(
        *(coordinator, store, plan, folder),
        seed=0,
        audit_queries_QD=QUERIES_QD,
        recall_k=K,
        recall_floor=0.5,
        warm_start=True,
        last=last,
    )
    assert found.warm_start == bool(last)


class Encoded(DenseSearcher):
    """A searcher of queries whose ids are rows of `QUERIES_QD`."""

    def encode(self, queries: Sequence[Query]) -> np.ndarray:
        return QUERIES_QD[[int(query.id) for query in queries]]


class NoModel:
    def query_encoder(self) -> None:
        return None


def searcher_of(folder: Path, store: EmbeddingStore) -> Encoded:
    index = DenseIndex.open(folder, store)
    none: Any = NoModel()
    return Encoded(none, none, index, max_length=1, tokens_per_batch=1, device=torch.device("cpu"))


JOBS = [
    {"folder": "interleaved", "factory": "IVF20,PQ8x4fs"},
    {"folder": "again", "factory": "IVF20,PQ8x4fs", "last": "interleaved"},
    {"folder": "disk", "factory": "OPQ4,IVF20_HNSW8,PQ4x4", "placement": "disk"},
    {"folder": "parts", "factory": "IVF20,SQ8", "placement": "parts"},
    {"folder": "flat", "factory": "Flat"},
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbeddingStore]:
    folder = tmp_path_factory.mktemp("shared")
    store = make_store(folder, EMBEDDINGS_ND, SIZES)
    for job in JOBS:
        built(Coordinator(LocalTransport()), store, folder / job["folder"], job)
    return folder, store


def test_index_and_hits_are_those_of_one_folder(
    tmp_path: Path, shared: tuple[Path, EmbeddingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.retrievers.scattered._QUERIES_A_BLOCK", 8)  # four blocks, the last a smaller one
    assert encode_on_hosts(tmp_path, HOSTS) == list(range(len(SIZES)))
    queries = [Query(str(row), "") for row in range(len(QUERIES_QD))]

    def on_rank(coordinator: Coordinator) -> dict[str, tuple[list[Any], list[Any]]]:
        torch.set_num_threads(1)
        store, found = opened_in(tmp_path, coordinator), {}
        foreign = next(
            entry for entry, home in zip(MANIFEST.shards, store.homes, strict=True) if home != store.disk.host
        )
        with pytest.raises(ArtifactError, match=rf"shard {foreign.number} lie on .*asked for on {coordinator.host}"):
            store.rows(np.array([foreign.first_document]))
        for job in JOBS:
            folder = tmp_path / job["folder"]
            built(coordinator, store, folder, job)
            searcher = searcher_of(folder, store)
            assert is_scattered(searcher)
            own = queries[coordinator.rank :: 3]
            with answered(coordinator, searcher, queries, K, folder.with_suffix(".found"), name="search") as prepared:
                hits = prepared.search(own, K)
            found[job["folder"]] = (hits.documents_QK.tolist(), hits.scores_QK.tolist())
        return found

    ranks = on_ranks(3, on_rank, timeout_seconds=120)
    for job in JOBS:
        name = job["folder"]
        assert hashes(tmp_path / name) == hashes(shared[0] / name)
        expected = DenseIndex.open(shared[0] / name, shared[1]).search(QUERIES_QD, K)
        for rank, found in enumerate(ranks):
            assert isinstance(found, dict), found
            assert found[name] == (expected.documents_QK[rank::3].tolist(), expected.scores_QK[rank::3].tolist())
        assert not (tmp_path / name).with_suffix(".found").exists()


def test_who_asks_on_is_answered_by_all_hosts(tmp_path: Path, shared: tuple[Path, EmbeddingStore]) -> None:
    """Mining goes deeper for queries that keep too little: a block that does is begun again with deeper answers."""
    encode_on_hosts(tmp_path, HOSTS)
    queries = [Query(str(row), "") for row in range(6)]
    exact = DenseIndex.open(shared[0] / "disk", shared[1])

    def on_rank(coordinator: Coordinator) -> list[tuple[int, bool]]:
        searcher = searcher_of(shared[0] / "disk", opened_in(tmp_path, coordinator))
        done = []

        def work(unit: int, answers: Searcher) -> None:
            own = queries[2 * unit : 2 * unit + 2]
            answers.search(own, 5)
            depth = 5
            while unit and depth < 5 * 4**unit:  # unit 1 asks once more, unit 2 twice
                depth, own = 4 * depth, own[1:] or own
                hits, expected = answers.search(own, depth), exact.search(QUERIES_QD[[int(q.id) for q in own]], depth)
                assert hits.documents_QK.tolist() == expected.documents_QK.tolist()
                assert hits.scores_QK.tolist() == expected.scores_QK.tolist()
            done.append((unit, depth == 5 * 4**unit))

        search_in_rounds(coordinator, searcher, queries, 5, tmp_path / "rounds", [0, 1, 2], work, name="mine")
        return done

    ranks = on_ranks(3, on_rank)
    assert all(isinstance(done, list) for done in ranks), ranks
    assert sorted(pair for done in ranks if isinstance(done, list) for pair in done) == [
        (0, True),
        (1, True),
        (2, True),
    ]


def test_an_interrupted_search_goes_on_with_what_is_there(
    tmp_path: Path, shared: tuple[Path, EmbeddingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.retrievers.scattered._QUERIES_A_BLOCK", 8)
    encode_on_hosts(tmp_path, HOSTS)
    queries, found = [Query(str(row), "") for row in range(len(QUERIES_QD))], tmp_path / "found"

    def on_rank(coordinator: Coordinator, name: str) -> None:
        searcher = searcher_of(shared[0] / name, opened_in(tmp_path, coordinator))
        search_over_hosts(coordinator, searcher, queries, K, found, name="search")

    for name, lost in (("disk", ["scores-0003.npy"]), ("parts", ["found-0005.scores.npy", "found-0005.documents.npy"])):
        assert on_ranks(3, lambda coordinator, name=name: on_rank(coordinator, name)) == [None] * 3  # type: ignore[misc]
        for path in [*(found / one for one in lost), *found.glob("hits-0001.*")]:
            path.unlink()
        made = {path.name: path.stat().st_mtime_ns for path in found.iterdir()}
        assert on_ranks(3, lambda coordinator, name=name: on_rank(coordinator, name)) == [None] * 3  # type: ignore[misc]
        assert {name: (found / name).stat().st_mtime_ns for name in made} == made
        hits = DenseIndex.open(shared[0] / name, shared[1]).search(QUERIES_QD, K)
        for block in range(4):
            documents_QK = np.load(hits_path(found, block))
            assert documents_QK.tolist() == hits.documents_QK[8 * block : 8 * block + 8].tolist()
        shutil.rmtree(found)


def test_what_is_lost_is_encoded_again_and_nothing_else(tmp_path: Path) -> None:
    assert encode_on_hosts(tmp_path, HOSTS) == list(range(len(SIZES)))
    assert encode_on_hosts(tmp_path, HOSTS) == []
    folder = tmp_path / "embeddings"
    made = [(entry.number, read_held(folder, entry, STAMP)) for entry in MANIFEST.shards]
    of_two = [number for number, marker in made if marker is not None and marker.host == "two"]
    assert 0 < len(of_two) < len(SIZES)
    damaged = disk_of(tmp_path, "two").path(MANIFEST.shards[of_two[0]], STAMP)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-4] + b"\0\0\0\1")  # of the right size
    assert encode_on_hosts(tmp_path, HOSTS) == of_two[:1]
    assert damaged.read_bytes() == whole
    for path in disk_of(tmp_path, "two").folder(STAMP).iterdir():
        path.unlink()  # a scratch disk that was wiped
    assert encode_on_hosts(tmp_path, HOSTS) == of_two
    again = [(entry.number, read_held(folder, entry, STAMP)) for entry in MANIFEST.shards]
    assert [marker and marker.sha256 for _, marker in again] == [marker and marker.sha256 for _, marker in made]
    of_one = [number for number, marker in again if marker is not None and marker.host == "one"]
    assert set(of_one) >= set(range(len(SIZES))) - set(of_two), "which may take some of what the other has lost"
    # A host that is gone: the others take its parts, and encode none of their own again.
    assert encode_on_hosts(tmp_path, ("one", "three")) == sorted(set(range(len(SIZES))) - set(of_one))


def test_a_store_whose_host_is_gone_opens_once_it_was_gathered(tmp_path: Path) -> None:
    encode_on_hosts(tmp_path, HOSTS)
    folder = tmp_path / "embeddings"

    def elsewhere(coordinator: Coordinator) -> EmbeddingStore:
        coordinator.hosts[:] = ["three"]
        return open_held(coordinator, folder, MANIFEST, STAMP, lambda: disk_of(tmp_path, "three"))

    (error,) = on_ranks(1, elsewhere)
    assert isinstance(error, ArtifactError)
    assert "10 parts of 10 of embeddings@3 were made on one, two, and not whole on three" in str(error)

    def gather(coordinator: Coordinator) -> None:
        store = opened_in(tmp_path, coordinator)
        numbers = coordinator.hand_out("copy", range(len(SIZES)), homes=store.homes)
        for number in numbers:
            copy_held(folder, store.disk, MANIFEST.shards[number], STAMP)
        coordinator.only_rank_zero("note", lambda: note_gathered(folder, STAMP))

    assert on_ranks(3, gather) == [None] * 3
    (store,) = on_ranks(1, elsewhere)
    assert type(store) is EmbeddingStore
    np.testing.assert_array_equal(store.rows(np.arange(NUM)), EMBEDDINGS_ND)


def test_hosts_get_parts_by_their_ranks() -> None:
    deal = deal_parts(MANIFEST, "r", [""] * len(SIZES), {"one": 1, "two": 3})
    homes = dict(zip(deal.missing, deal.homes, strict=True))
    for part in document_parts(MANIFEST):
        assert len({homes[entry.number] for entry in MANIFEST.shards if entry.first_document in part}) == 1
    assert Counter(homes.values())["two"] > Counter(homes.values())["one"] > 0


def test_scores_of_pairs_have_the_bits_of_rescoring(tmp_path: Path) -> None:
    """Hits of hosts that score apart are ordered together, and are to be those of one that scores all."""
    for dimension in (7, 16, 129, 384):
        rows_ND, queries_QD = clustered(40, dimension, 2), clustered(5, dimension, 3)
        store = make_store(tmp_path / str(dimension), rows_ND, (40,))
        documents_QC = np.array([np.random.default_rng(row).permutation(40)[:17] for row in range(5)])
        hits = rescore(store, queries_QD, documents_QC, 17)
        queries = np.repeat(np.arange(5), 17)
        alone = score_pairs(rows_ND[hits.documents_QK.ravel()], queries_QD[queries])
        assert alone.tobytes() == hits.scores_QK.tobytes()


def test_what_no_index_names_any_more_is_cleared(tmp_path: Path) -> None:
    encode_on_hosts(tmp_path / "index" / "003", HOSTS)
    disk = disk_of(tmp_path / "index" / "003", "one")
    old, new = (Stamp(name, letter * 64, MANIFEST.sha256) for name, letter in (("001", "c"), ("004", "d")))
    for stamp in (old, new):
        disk.folder(stamp).mkdir()
    clear_unnamed(disk, tmp_path / "index", new)
    assert {path.name[0] for path in disk.root.iterdir()} == {"b", "d"}


def test_a_disk_without_room_is_refused_before_the_encoding(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path, "node-7")
    require_room(disk, STAMP, 1000)
    with pytest.raises(
        DiskFullError, match=rf"on host node-7: .*{tmp_path}.* needs {2**60} bytes .* are free.*Remedy: "
    ):
        require_room(disk, STAMP, 2**60)


def test_a_disk_that_fills_up_is_told_with_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: "the disk is full", and no word of which of 64 disks."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.index.held.store.save_array", full)
    entry, disk = MANIFEST.shards[0], disk_of(tmp_path, "node-7")
    told = rf"on host node-7: the disk is full: {disk.root}.* needs about {200 * D * 4} bytes.* were free in .*Remedy: "
    with pytest.raises(DiskFullError, match=told):
        write_held(tmp_path / "embeddings", disk, STAMP, entry, EMBEDDINGS_ND[:200])
    assert not list((tmp_path / "embeddings").glob("*"))


def test_an_iteration_of_the_same_weights_takes_the_markers(tmp_path: Path) -> None:
    """A phase without steps: nothing is encoded and nothing copied on the hosts."""
    encode_on_hosts(tmp_path / "003", HOSTS)
    later = replace(STAMP, iteration="4")
    assert take_over_same_weights(tmp_path / "004", later)
    coordinator = Coordinator(LocalTransport())
    coordinator.hosts[:] = ["two"]
    disk = disk_of(tmp_path / "003", "two")
    folder = tmp_path / "004" / "embeddings"
    held = hosts_that_hold(coordinator, "look", folder, MANIFEST, later, disk, verify=True)
    markers = [read_held(folder, entry, later) for entry in MANIFEST.shards]
    assert held == [marker.host if marker and marker.host == "two" else "" for marker in markers]
    assert "two" in held


@pytest.mark.parametrize("named", ["$NOT_SET_ANYWHERE/x", "~nobody-of-this-name/x"])
def test_a_folder_that_is_none_here_is_refused(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_OF_TEST", "/scratch")
    assert expanded("$SCRATCH_OF_TEST/x") == Path("/scratch/x")
    with pytest.raises(ConfigError, match=r"index\.local_folder is .*Remedy: "):
        expanded(named)


def test_units_go_to_their_hosts_alone_and_end_with_a_failure() -> None:
    homes = ["one", "two", "two", "one", "two", "one"]

    def take(coordinator: Coordinator, fails: Callable[[int], bool]) -> list[int]:
        coordinator.hosts[:] = HOSTS
        taken = []
        with coordinator.agreement("take"):
            for unit in coordinator.hand_out("units", range(6), homes=homes):
                assert homes[unit] == coordinator.host
                taken.append(unit)
                if fails(unit):
                    raise ArtifactError("unit one is damaged")
        return taken

    ranks = on_ranks(3, lambda c: take(c, lambda _: False))
    assert all(isinstance(taken, list) for taken in ranks), ranks
    assert sorted(unit for taken in ranks if isinstance(taken, list) for unit in taken) == list(range(6))
    failed = on_ranks(3, lambda c: take(c, lambda unit: unit == 0))
    assert all(isinstance(error, Exception) for error in failed)
    assert "unit one is damaged" in str(failed[2])

    def strange(coordinator: Coordinator) -> None:
        list(coordinator.hand_out("units", [0], homes=["elsewhere"]))

    assert "has units for elsewhere" in str(on_ranks(1, strange)[0])


def test_a_search_that_was_not_made_is_told_apart() -> None:
    more = Unanswered(20, ["q1", "q2"])
    assert (more.top_k, more.qids, str(more)) == (20, ["q1", "q2"], "2 queries to depth 20")

"""All ranks make one index; it finds what exact search finds, or the build stops and says why."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.coordinator import Coordinator, LocalTransport, PeerError
from engine.errors import ArtifactError, IndexQualityError
from engine.index import (
    DenseIndex,
    IndexManifest,
    IndexPlan,
    build_index,
    exact_search,
    measure_recall,
    plan_index,
    require_recall,
)
from engine.transports.star import Frame, StarTransport
from shards.embeddings import EmbeddingStore, Stamp, write_part
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name

SIZES = (200, 40, 1, 300, 59)
N, D, K = sum(SIZES), 16, 10


def clustered(num: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(99).standard_normal((12, D))
    rng = np.random.default_rng(seed)
    return (centers[rng.integers(12, size=num)] + 0.6 * rng.standard_normal((num, D))).astype(np.float32)


EMBEDDINGS_ND, QUERIES_QD = clustered(N, 0), clustered(40, 1)
PLAN = plan_index("ivfpq", num_documents=N, dimension=D, num_iterations=4)


def make_store(folder: Path, weights: str = "b" * 64) -> EmbeddingStore:
    firsts = np.cumsum([0, *SIZES]).tolist()
    entries = tuple(
        ShardEntry(shard_name(i), 1024, "a" * 64, size, firsts[i], "a" * 64, {"r": 1}) for i, size in enumerate(SIZES)
    )
    stream = TokenStream("r", "a" * 64, 8)
    manifest = CorpusManifest("a" * 64, "{text}", (stream,), entries, N, {"r": len(SIZES)}, "a" * 64)
    stamp = Stamp("3", weights, manifest.sha256)
    for entry in entries:
        write_part(folder / "embeddings", entry, EMBEDDINGS_ND[entry.documents], stamp)
    return EmbeddingStore.open(folder / "embeddings", manifest, stamp)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path)


class QueueTransport(StarTransport):
    """Ranks that are threads of one process."""

    kind = "local"

    def __init__(self, rank: int, queues: Sequence[queue.SimpleQueue[bytes]]) -> None:
        super().__init__(rank, len(queues))
        self._queues = queues

    def _send(self, receiver: int, message: bytes) -> None:
        self._queues[receiver].put(message)

    def _receive(self) -> list[Frame]:
        own = self._queues[self.rank]
        return [Frame.decode(own.get()) for _ in range(own.qsize())]

    def _flush(self, receivers: Sequence[int], seconds: float) -> None:
        pass


def build(coordinator: Coordinator, store: EmbeddingStore, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "plan": PLAN,
        "folder": store.folder.parent,
        "seed": 0,
        "audit_queries_QD": QUERIES_QD,
        "audit_k": K,
        "recall_floor": 0.9,
    } | changes
    return build_index(coordinator, store, store.manifest, settings.pop("plan"), settings.pop("folder"), **settings)


def build_alone(store: EmbeddingStore, **changes: Any) -> dict[str, Any]:
    return build(Coordinator(LocalTransport()), store, **changes)


def build_together(store: EmbeddingStore, world_size: int, **changes: Any) -> list[Any]:
    """Return what each rank returned or raised."""
    queues: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in range(world_size)]
    results: list[Any] = [None] * world_size

    def one_rank(rank: int) -> None:
        try:
            results[rank] = build(Coordinator(QueueTransport(rank, queues), timeout_seconds=20), store, **changes)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"embeddings"}


def test_one_rank_or_several_build_the_same_index(store: EmbeddingStore, tmp_path: Path) -> None:
    (tmp_path / "part-011.faiss").write_bytes(b"of an earlier build with more ranks")
    alone = build_alone(store)
    assert names(tmp_path) == {"trained.faiss", "trained.json", "index.faiss", "manifest.json"}
    assert alone["recall"] >= 0.95
    hits = DenseIndex.open(tmp_path, store).search(QUERIES_QD, K)
    for world_size in (3, 7):  # more ranks than shards too
        folder = tmp_path / f"world-{world_size}"
        results = build_together(store, world_size, folder=folder)
        assert results == [alone] * world_size
        assert names(folder) == names(tmp_path) - {"world-3", "world-7"}
        others = DenseIndex.open(folder, store).search(QUERIES_QD, K)
        np.testing.assert_array_equal(others.documents_QK, hits.documents_QK)
        np.testing.assert_array_equal(others.scores_QK, hits.scores_QK)


def test_scores_are_exact_and_ordered(store: EmbeddingStore, tmp_path: Path) -> None:
    build_alone(store)
    hits = DenseIndex.open(tmp_path, store).search(QUERIES_QD, 30)
    exact_QK = np.einsum("qkd,qd->qk", EMBEDDINGS_ND[hits.documents_QK].astype(np.float64), QUERIES_QD)
    np.testing.assert_allclose(hits.scores_QK, exact_QK, rtol=1e-5)
    assert (np.diff(hits.scores_QK, axis=1) <= 0).all()
    assert all(len(set(row)) == 30 for row in hits.documents_QK.tolist())


def test_codes_alone_rank_badly_and_rescoring_mends_it(store: EmbeddingStore, tmp_path: Path) -> None:
    coarse = IndexPlan("ivfpq", "IVF4,PQ2x4", 4, 4, 1, N, 4)
    recalls = []
    for refine_factor in (1, 12):
        plan = replace(coarse, refine_factor=refine_factor)
        recalls.append(build_alone(store, plan=plan, recall_floor=0.0)["recall"])
    assert recalls[0] < 0.6
    assert recalls[1] > recalls[0] + 0.2


def test_a_query_in_a_short_list_still_gets_top_k(store: EmbeddingStore, tmp_path: Path) -> None:
    """With one list visited, a query whose list is short had fewer negatives than were asked for."""
    build_alone(store, plan=IndexPlan("ivfpq", "IVF60,PQ8x4fs", 60, 1, 2, N, 4), recall_floor=0.0)
    index = DenseIndex.open(tmp_path, store)
    hits = index.search(QUERIES_QD, 50)
    assert (hits.documents_QK >= 0).all()
    everything = index.search(QUERIES_QD[:3], N + 4)
    np.testing.assert_array_equal(np.sort(everything.documents_QK[:, :N]), np.tile(np.arange(N), (3, 1)))
    assert (everything.documents_QK[:, N:] == -1).all()
    first = index.search(QUERIES_QD, K)
    again = DenseIndex.open(tmp_path, store).search(QUERIES_QD, K)  # the wide search has left no trace
    np.testing.assert_array_equal(first.documents_QK, again.documents_QK)


def test_results_do_not_depend_on_the_other_queries(store: EmbeddingStore, tmp_path: Path) -> None:
    build_alone(store)
    index = DenseIndex.open(tmp_path, store)
    together = index.search(QUERIES_QD, K)
    pieces = [index.search(QUERIES_QD[start : start + 7], K) for start in range(0, len(QUERIES_QD), 7)]
    np.testing.assert_array_equal(np.concatenate([piece.documents_QK for piece in pieces]), together.documents_QK)
    np.testing.assert_array_equal(np.concatenate([piece.scores_QK for piece in pieces]), together.scores_QK)
    assert index.search(QUERIES_QD[:0], K).documents_QK.shape == (0, K)


def test_low_recall_stops_every_rank_and_publishes_nothing(store: EmbeddingStore, tmp_path: Path) -> None:
    plan = IndexPlan("ivfpq", "IVF40,PQ2x4", 40, 1, 1, N, 4)
    first, second = build_together(store, 2, plan=plan, recall_floor=0.99)
    assert isinstance(first, IndexQualityError)
    for part in ("IVF40,PQ2x4", "of the 10 best", "1 of its 40 lists", "at least 0.99", "raise index.refine_factor"):
        assert part in str(first)
    assert isinstance(second, PeerError)
    assert "IVF40,PQ2x4" in str(second)
    assert "manifest.json" not in names(tmp_path)
    with pytest.raises(ArtifactError, match="index manifest"):
        DenseIndex.open(tmp_path, store)
    require_recall(0.99, K, 0.99, plan)


def test_a_rank_that_cannot_fill_its_part_stops_the_others(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_text("{}")  # what lay there is gone before anything is built

    def add_part(trained_path: Path, sha256: str, store: EmbeddingStore, own: list[int], out_path: Path) -> str:
        if out_path.name == "part-001.faiss":
            raise ArtifactError("part 3 is short")
        return sha256

    monkeypatch.setattr("engine.index.add_part", add_part)
    first, second = build_together(store, 2)
    assert "part 3 is short" in str(second)
    assert isinstance(first, PeerError)
    assert "rank 1" in str(first)
    assert "manifest.json" not in names(tmp_path)


def test_a_finished_index_is_kept_and_another_is_not(store: EmbeddingStore, tmp_path: Path) -> None:
    built = build_alone(store)
    written = (tmp_path / "index.faiss").stat().st_mtime_ns
    assert build_alone(store) == built | {"reused": True}
    assert (tmp_path / "index.faiss").stat().st_mtime_ns == written
    assert not build_alone(store, seed=1)["reused"]
    assert not build_alone(store, plan=replace(PLAN, nprobe=1), recall_floor=0.0)["reused"]
    with pytest.raises(IndexQualityError):
        build_alone(store, plan=replace(PLAN, nprobe=1), recall_floor=1.01)
    (tmp_path / "index.faiss").write_bytes(b"damaged")
    assert not build_alone(store, plan=replace(PLAN, nprobe=1), recall_floor=0.0)["reused"]


def test_an_interrupted_build_does_not_train_again(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_alone(store)
    hits = DenseIndex.open(tmp_path, store).search(QUERIES_QD, K)
    (tmp_path / "manifest.json").unlink()

    def train_index(*_: object) -> None:
        raise AssertionError("nothing was to be trained")

    with monkeypatch.context() as patch:
        patch.setattr("engine.index.train_index", train_index)
        build_alone(store)
        np.testing.assert_array_equal(
            DenseIndex.open(tmp_path, store).search(QUERIES_QD, K).documents_QK, hits.documents_QK
        )
        with pytest.raises(AssertionError, match="nothing was to be trained"):
            build_alone(store, seed=5)
    (tmp_path / "trained.faiss").write_bytes(b"damaged")
    assert not build_alone(store, seed=5)["reused"]


def test_embeddings_of_other_weights_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    build_alone(store)
    newer = make_store(tmp_path, weights="c" * 64)
    with pytest.raises(ArtifactError, match="was made from embeddings"):
        DenseIndex.open(tmp_path, newer)
    assert not build_alone(newer)["reused"]
    assert IndexManifest.load(tmp_path).stamp.weights_sha256 == "c" * 64


@pytest.mark.parametrize("damage", ["{", "{}", '{"version": 2}', "[]"])
def test_a_damaged_manifest_is_no_index(store: EmbeddingStore, tmp_path: Path, damage: str) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        DenseIndex.open(tmp_path, store)


def test_a_manifest_says_what_the_index_is(store: EmbeddingStore, tmp_path: Path) -> None:
    built = build_alone(store)
    manifest = IndexManifest.load(tmp_path)
    assert (manifest.plan, manifest.stamp, manifest.recall) == (PLAN, store.stamp, built["recall"])
    values = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"version": 2}))
    with pytest.raises(ArtifactError, match="version 2"):
        IndexManifest.load(tmp_path)


def test_flat_is_exact_and_needs_no_files(store: EmbeddingStore, tmp_path: Path) -> None:
    plan = plan_index("flat", num_documents=N, dimension=D)
    first, second = build_together(store, 2, plan=plan, recall_floor=1.0)
    assert first == second
    assert first["recall"] == 1.0
    assert names(tmp_path) == {"manifest.json"}
    hits, exact = DenseIndex.open(tmp_path, store).search(QUERIES_QD, K), exact_search(store, QUERIES_QD, K)
    np.testing.assert_array_equal(hits.documents_QK, exact.documents_QK)
    np.testing.assert_array_equal(hits.scores_QK, exact.scores_QK)


class TenthMissing(DenseIndex):
    """Finds all but the best document of every other query."""

    def search(self, queries_QD: np.ndarray, top_k: int) -> Any:
        hits = super().search(queries_QD, top_k + 1)
        odd = np.arange(len(hits)) % 2 == 1
        documents = np.where(odd[:, None], hits.documents_QK[:, 1:], hits.documents_QK[:, :-1])
        scores = np.where(odd[:, None], hits.scores_QK[:, 1:], hits.scores_QK[:, :-1])
        return type(hits)(documents, scores)


def test_recall_counts_what_exact_search_finds(store: EmbeddingStore) -> None:
    plan = plan_index("flat", num_documents=N, dimension=D)
    manifest = IndexManifest(plan, 0, store.stamp, N, D, None, None, 1.0, K)
    assert measure_recall(DenseIndex(manifest, store, None), QUERIES_QD, K) == 1.0
    assert measure_recall(TenthMissing(manifest, store, None), QUERIES_QD, K) == pytest.approx(0.95)
    assert measure_recall(DenseIndex(manifest, store, None), QUERIES_QD, N + 1) == 1.0
    with pytest.raises(ValueError, match="at least one query"):
        measure_recall(DenseIndex(manifest, store, None), QUERIES_QD[:0], K)

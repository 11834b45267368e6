"""An index is built once, kept, resumed, searched, and refused where it is not what its manifest says."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ArtifactError, IndexQualityError
from engine.index.build import BuiltIndex, build_index, require_recall
from engine.index.dense import DenseIndex, IndexManifest
from engine.index.exact import exact_search
from engine.index.plan import IndexPlan, plan_index
from shards.embeddings import EmbeddingStore
from tests.embedding_stores import clustered, make_store

SIZES = (200, 40, 1, 300, 59, 100, 80, 20, 250)
N, D, K = sum(SIZES), 16, 10
EMBEDDINGS_ND, QUERIES_QD = clustered(N, D, 0), clustered(40, D, 1)
FILES = {"trained.faiss", "trained.json", "labels.npy", "index.faiss", "manifest.json"}


def plan_of(factory: str = "IVF20,PQ8x4", **settings: Any) -> IndexPlan:
    asked = IndexConfig(factory=factory, **({"kmeans_iterations": 3} | settings))
    return plan_index(asked, num_documents=N, dimension=D)


PLAN = plan_of("IVF20,PQ8x4fs")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path, EMBEDDINGS_ND, SIZES)


def build(store: EmbeddingStore, **changes: Any) -> BuiltIndex:
    settings: dict[str, Any] = {
        "plan": PLAN,
        "folder": store.folder.parent,
        "seed": 0,
        "audit_queries_QD": QUERIES_QD,
        "recall_k": K,
        "recall_floor": 0.9,
    } | changes
    built = build_index(Coordinator(LocalTransport()), store, settings.pop("plan"), settings.pop("folder"), **settings)
    return replace(built, milliseconds_per_query=None, tuning_seconds=0.0)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"embeddings"}


def test_a_build_leaves_what_is_searched_and_says_what_it_is(
    store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "part-063.lists").write_bytes(b"of an earlier corpus")
    (tmp_path / ".part-000.lists.tmp-abc").write_bytes(b"of a killed build")
    with caplog.at_level(logging.INFO):
        built = build(store)
    assert names(tmp_path) == FILES
    manifest = IndexManifest.load(tmp_path)
    assert (manifest.plan, manifest.stamp, manifest.recall) == (PLAN, store.stamp, built.recall)
    assert manifest.plan.reasons == PLAN.reasons
    assert built.recall >= 0.95
    assert (built.nprobe, built.refine_factor) == (manifest.nprobe, manifest.refine_factor)
    assert manifest.milliseconds_per_query is not None
    for part in ("index@3: 1050 documents of 16 dimensions", "in memory: the index takes", "recall@10"):
        assert part in caplog.text


@pytest.mark.parametrize("placement", ["memory", "disk", "parts"])
def test_scores_are_exact_and_ordered(store: EmbeddingStore, tmp_path: Path, placement: Any) -> None:
    build(store, plan=plan_of(placement=placement))
    index = DenseIndex.open(tmp_path, store, verify=True)
    hits = index.search(QUERIES_QD, 30)
    exact_QK = np.einsum("qkd,qd->qk", EMBEDDINGS_ND[hits.documents_QK].astype(np.float64), QUERIES_QD)
    np.testing.assert_allclose(hits.scores_QK, exact_QK, rtol=1e-5)
    assert (np.diff(hits.scores_QK, axis=1) <= 0).all()
    assert all(len(set(row)) == 30 for row in hits.documents_QK.tolist())
    assert index.search(QUERIES_QD[:0], K).documents_QK.shape == (0, K)
    with pytest.raises(ValueError, match="top_k 0"):
        index.search(QUERIES_QD, 0)


@pytest.mark.parametrize(("factory", "placement"), [("IVF20,SQ8", "parts"), ("IVF20,SQ8", "disk"), ("Flat", "auto")])
def test_parts_that_are_dealt_give_what_one_search_gives(
    store: EmbeddingStore, tmp_path: Path, factory: str, placement: Any
) -> None:
    build(store, plan=plan_of(factory, placement=placement))
    index = DenseIndex.open(tmp_path, store)
    assert index.num_parts == (1 if placement == "disk" else 8)
    whole = index.search(QUERIES_QD, K)
    for deals in ([[0]], [[7, 0, 3], [], [1, 2], [4, 6, 5]]):
        if placement == "disk" or len(deals) > 1:
            given = [[0]] if placement == "disk" else deals
            found = [index.search_parts(QUERIES_QD, K, parts) for parts in given]
            together = index.finish(QUERIES_QD, found, K)
            np.testing.assert_array_equal(together.documents_QK, whole.documents_QK)
            np.testing.assert_array_equal(together.scores_QK, whole.scores_QK)


def test_long_lists_of_queries_are_searched_in_pieces(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(store)
    index = DenseIndex.open(tmp_path, store)
    together = index.search(QUERIES_QD, K)
    monkeypatch.setattr("engine.index.dense._CANDIDATES_AT_A_TIME", 7 * K * index.manifest.refine_factor)
    monkeypatch.setattr("engine.index.probe._QUERIES_AT_A_TIME", 3)
    pieces = index.search(QUERIES_QD, K)
    np.testing.assert_array_equal(pieces.documents_QK, together.documents_QK)
    np.testing.assert_array_equal(pieces.scores_QK, together.scores_QK)


def test_low_recall_publishes_nothing_and_says_what_was_tried(store: EmbeddingStore, tmp_path: Path) -> None:
    plan = plan_of("IVF40,PQ2x4", nprobe=1, refine_factor=1)
    with pytest.raises(IndexQualityError) as caught:
        build(store, plan=plan, recall_floor=0.99)
    for part in ("IVF40,PQ2x4 with 40 lists", "of the 10 best", "1 lists and 1 * k", "at least 0.99", "index.nprobe"):
        assert part in str(caught.value)
    assert "manifest.json" not in names(tmp_path)
    with pytest.raises(ArtifactError, match="index manifest"):
        DenseIndex.open(tmp_path, store)
    require_recall(0.99, K, 0.99, "all")


def test_a_target_out_of_reach_is_told(store: EmbeddingStore, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of("IVF40,PQ2x4", refine_factor=1, recall_target=0.99)
    built = build(store, plan=plan, recall_floor=0.1)
    assert 0.1 <= built.recall < 0.99
    assert "reaches index.recall_target 0.99" in caplog.text


def test_a_finished_index_is_kept_and_another_is_not(store: EmbeddingStore, tmp_path: Path) -> None:
    built = build(store)
    written = (tmp_path / "index.faiss").stat().st_mtime_ns
    assert build(store) == replace(built, reused=True)
    assert (tmp_path / "index.faiss").stat().st_mtime_ns == written
    assert not build(store, seed=1).reused
    other = plan_of("IVF20,PQ8x4fs", nprobe=1, refine_factor=1)
    assert not build(store, plan=other, recall_floor=0.0).reused
    with pytest.raises(IndexQualityError):
        build(store, plan=other, recall_floor=1.01)
    (tmp_path / "index.faiss").write_bytes(b"damaged")
    assert not build(store, plan=other, recall_floor=0.0).reused
    unmerged = plan_of(placement="parts")
    assert not build(store, plan=unmerged).reused
    assert build(store, plan=unmerged).reused
    assert "index.faiss" not in names(tmp_path)
    assert len(names(tmp_path)) == 4 + 2 * 8


@pytest.mark.parametrize("broken", ["fill_part", "merge_parts", "tune"])
def test_an_interrupted_build_goes_on_where_it_stopped(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    whole = tmp_path / "whole"
    expected = build(store, folder=whole)
    from engine.index import build as index_build
    from engine.index import publish

    module = publish if broken == "tune" else index_build
    real, calls = getattr(module, broken), []

    def breaks(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        if broken != "fill_part" or len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(module, broken, breaks)
    with pytest.raises(KeyboardInterrupt):
        build(store)
    monkeypatch.undo()
    assert "manifest.json" not in names(tmp_path)
    made = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.lists")}
    assert len(made) == (3 if broken == "fill_part" else 8)
    filled: list[int] = []
    fill = index_build.fill_part
    monkeypatch.setattr(index_build, "fill_part", lambda *given: (filled.append(given[3]), fill(*given))[1])
    monkeypatch.setattr("engine.index.train.train_index", lambda *_: pytest.fail("nothing was to be trained"))
    assert build(store) == expected
    assert filled == list(range(len(made), 8))
    assert (tmp_path / "index.faiss").read_bytes() == (whole / "index.faiss").read_bytes()


def test_embeddings_of_other_weights_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    build(store, plan=plan_of(placement="parts"))
    newer = make_store(tmp_path, EMBEDDINGS_ND, SIZES, weights="c" * 64)
    with pytest.raises(ArtifactError, match="was made from embeddings"):
        DenseIndex.open(tmp_path, newer)
    assert not build(newer, plan=plan_of(placement="parts")).reused
    assert IndexManifest.load(tmp_path).stamp.weights_sha256 == "c" * 64


@pytest.mark.parametrize("placement", ["memory", "disk", "parts"])
def test_damaged_files_are_refused(store: EmbeddingStore, tmp_path: Path, placement: Any) -> None:
    build(store, plan=plan_of(placement=placement))
    path = tmp_path / ("part-005.lists" if placement == "parts" else "index.faiss")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ArtifactError, match=f"{path.name} has sha256"):
        DenseIndex.open(tmp_path, store, verify=True)
    if placement == "memory":  # it is read whole, so it is always hashed
        with pytest.raises(ArtifactError, match="has sha256"):
            DenseIndex.open(tmp_path, store)
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=f"{path.name} has {len(whole) - 1} bytes"):
        DenseIndex.open(tmp_path, store)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{path.name} is missing"):
        DenseIndex.open(tmp_path, store)


@pytest.mark.parametrize("damage", ["{", "{}", '{"version": 1}', '{"version": 2}', "[]", '{"version": 2, "plan": {}}'])
def test_a_damaged_manifest_is_no_index(store: EmbeddingStore, tmp_path: Path, damage: str) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        DenseIndex.open(tmp_path, store)


def test_a_manifest_of_another_version_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    build(store)
    values = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"version": 3}))
    with pytest.raises(ArtifactError, match="version 3, expected 2"):
        IndexManifest.load(tmp_path)


def test_flat_is_exact_and_needs_no_files(store: EmbeddingStore, tmp_path: Path) -> None:
    built = build(store, plan=plan_of("Flat"), recall_floor=1.0)
    assert built.recall == 1.0
    assert names(tmp_path) == {"manifest.json"}
    hits, exact = DenseIndex.open(tmp_path, store).search(QUERIES_QD, K), exact_search(store, QUERIES_QD, K)
    np.testing.assert_array_equal(hits.documents_QK, exact.documents_QK)
    np.testing.assert_array_equal(hits.scores_QK, exact.scores_QK)
    assert build(store, plan=plan_of("Flat")).reused


def test_codes_alone_rank_badly_and_rescoring_mends_it(store: EmbeddingStore) -> None:
    recalls = []
    for refine_factor in (1, 12):
        plan = plan_of("IVF4,PQ2x4", nprobe=4, refine_factor=refine_factor)
        recalls.append(build(store, plan=plan, recall_floor=0.0).recall)
    assert recalls[0] < 0.6
    assert recalls[1] > recalls[0] + 0.2


def test_plans_with_other_goals_are_other_indexes() -> None:
    assert replace(PLAN, recall_target=0.9) != PLAN

"""A second index begins from the first one's lists, where these fit, and is measured as any other."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator
from engine.index.build import BuiltIndex, build_index
from engine.index.files import parse_index, sha256_file
from engine.index.plan import IndexPlan, plan_index
from engine.index.train import centroids_of, codebooks_of
from engine.index.warm import Audit, ListsAudit
from shards.embeddings import EmbeddingStore
from tests.embedding_stores import clustered, make_store
from tests.threads_as_ranks import on_ranks

SIZES = (900, 300, 500, 1, 399, 900)
N, D, K = sum(SIZES), 16, 10
EMBEDDINGS_ND, QUERIES_QD = clustered(N, D, 0), clustered(60, D, 1)
FACTORY = "OPQ8,IVF40,PQ8x4"


def plan_of(factory: str = FACTORY, **settings: Any) -> IndexPlan:
    asked = IndexConfig(factory=factory, **({"kmeans_iterations": 6, "recall_floor": 0.0} | settings))
    return plan_index(asked, num_documents=N, dimension=D)


def build(store: EmbeddingStore, last: list[Path], *, ranks: int = 1, **changes: Any) -> BuiltIndex:
    settings = {"plan": plan_of(), "folder": store.folder.parent, "seed": 1, "recall_floor": 0.0} | changes
    plan, folder = settings.pop("plan"), settings.pop("folder")

    def work(coordinator: Coordinator) -> BuiltIndex:
        more = {"audit_queries_QD": QUERIES_QD, "recall_k": K, "warm_start": True, "last": last}
        return build_index(coordinator, store, plan, folder, **(more | settings))

    built = on_ranks(ranks, work)
    assert all(isinstance(one, BuiltIndex) for one in built), built
    return replace(built[0], milliseconds_per_query=None, tuning_seconds=0.0)  # type: ignore[type-var]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an index at the iteration before."""
    folder = tmp_path_factory.mktemp("first")
    built = build(make_store(folder, EMBEDDINGS_ND, SIZES), [], seed=0)
    assert not built.warm_start
    assert built.train_iterations == 6
    return folder


def moved(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> EmbeddingStore:
    return make_store(folder, change(EMBEDDINGS_ND).astype(np.float32), SIZES, weights="c" * 64)


def rotated(rows_ND: np.ndarray) -> np.ndarray:
    rotation_DD = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0]
    return rows_ND @ rotation_DD


def test_embeddings_that_stay_keep_their_lists(first: Path, tmp_path: Path) -> None:
    store = moved(tmp_path, lambda rows_ND: rows_ND)
    again = build(store, [tmp_path / "there-is-none", first])
    assert (again.warm_start, again.train_iterations) == (True, 0)
    assert again.centroid_movement < 1e-6
    one, other = (parse_index(folder / "trained.faiss") for folder in (first, tmp_path))
    assert np.allclose(centroids_of(one), centroids_of(other), atol=1e-6)
    assert again.recall >= build(store, [], folder=tmp_path / "anew").recall - 0.01


def test_a_plan_is_told_in_full_once(first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Symptom: ten lines of the same plan at every refresh, among which what changes was hard to find."""
    whole, short = "because", f"as planned for the last index: {FACTORY}, placement memory"
    for last, plan, told, left in (
        ([], plan_of(), whole, short),
        ([first], plan_of(), short, whole),
        ([first], plan_of(kmeans_iterations=5), whole, short),
    ):
        caplog.clear()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with caplog.at_level(logging.INFO):
            build(moved(folder, lambda rows_ND: rows_ND), last, folder=folder, plan=plan)
        assert told in caplog.text
        assert left not in caplog.text


def test_lists_follow_a_movement_that_all_share_without_an_iteration(first: Path, tmp_path: Path) -> None:
    """Old centroids would be of no use: each vector has turned, and so has what lies near it."""
    rotation_DD = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0]
    store = make_store(tmp_path, (EMBEDDINGS_ND @ rotation_DD).astype(np.float32), SIZES, weights="c" * 64)
    queries_QD = (QUERIES_QD @ rotation_DD).astype(np.float32)
    built = build(store, [first], audit_queries_QD=queries_QD)
    assert (built.warm_start, built.train_iterations) == (True, 0)
    assert built.centroid_movement > 0.5
    anew = build(store, [], folder=tmp_path / "anew", audit_queries_QD=queries_QD)
    assert built.recall >= anew.recall - 0.01
    assert built.nprobe <= anew.nprobe


def test_lists_that_hold_less_than_before_take_iterations_until_they_do(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The documents went to other clusters each for itself, so the old lists hold what has nothing in common."""
    store = make_store(tmp_path, clustered(N, D, 77), SIZES, weights="c" * 64)
    with caplog.at_level(logging.INFO):
        built = build(store, [first])
    assert (built.warm_start, built.train_iterations) == (True, 1)
    assert "lists made anew from the last index's, iterations: 0;" in caplog.text
    assert "iterations of k-means: 1, centroids moved by" in caplog.text
    folder = tmp_path / "by-two"
    assert build(store, [first], ranks=2, folder=folder) == built
    for name in ("trained.faiss", "labels.npy", "start.json"):
        assert sha256_file(folder / name) == sha256_file(tmp_path / name)


@pytest.mark.parametrize("broken", ["recompute", "iterate", "train_codebooks", "fill_part"])
def test_an_interrupted_warm_start_goes_on_bit_equal(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    from engine.index import build as index_build
    from engine.index import lists, train

    store = make_store(tmp_path, clustered(N, D, 77), SIZES, weights="c" * 64)
    whole = build(store, [first], folder=tmp_path / "whole")
    places = {"recompute": lists.ListTraining, "iterate": lists.ListTraining, "train_codebooks": train}
    where = places.get(broken, index_build)
    real, calls = getattr(where, broken), []

    def breaks(*arguments: Any) -> Any:
        done = real(*arguments)
        calls.append(broken)
        if broken != "fill_part" or len(calls) == 3:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(where, broken, breaks)
        with pytest.raises(KeyboardInterrupt):
            build(store, [first])
    assert build(store, [first]) == whole
    assert sha256_file(tmp_path / "index.faiss") == sha256_file(tmp_path / "whole" / "index.faiss")


STALE: dict[str, tuple[dict[str, Any], str]] = {
    "another factory": ({"plan": plan_of("OPQ8,IVF40,PQ4x4")}, "its factory is OPQ8,IVF40,PQ8x4, not OPQ8,IVF40,PQ4x4"),
    "other lists": ({"plan": plan_of("OPQ8,IVF30,PQ8x4")}, "its factory is OPQ8,IVF40,PQ8x4, not OPQ8,IVF30,PQ8x4"),
    "another sample": ({"plan": plan_of(train_documents=900)}, "its training sample is 2560, not 900"),
    "damaged labels": ({}, "has sha256"),
    "damaged record": ({}, "is damaged"),
    "nothing": ({}, "is missing"),
}


@pytest.mark.parametrize("what", STALE)
def test_a_start_that_does_not_fit_is_not_used(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    last, (changes, reason) = tmp_path / "last", STALE[what]
    shutil.copytree(first, last, ignore=shutil.ignore_patterns("embeddings"))
    if what == "damaged labels":
        data = bytearray((last / "labels.npy").read_bytes())
        data[-1] ^= 1
        (last / "labels.npy").write_bytes(data)
    if what == "damaged record":
        (last / "start.json").write_text("{}")
    if what == "nothing":
        shutil.rmtree(last)
    store = moved(tmp_path, rotated)
    with caplog.at_level(logging.INFO):
        built = build(store, [last], ranks=2, **changes)
    assert "the lists are trained from nothing, not from" in caplog.text
    assert reason in caplog.text
    assert not built.warm_start
    build(store, [], folder=tmp_path / "anew", **changes)
    assert sha256_file(tmp_path / "trained.faiss") == sha256_file(tmp_path / "anew" / "trained.faiss")


def test_a_start_of_another_dimension_is_not_used(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = make_store(tmp_path, clustered(N, 2 * D, 0), SIZES)
    plan = plan_index(IndexConfig(factory=FACTORY, kmeans_iterations=2), num_documents=N, dimension=2 * D)
    with caplog.at_level(logging.INFO):
        assert not build(wide, [first], plan=plan, audit_queries_QD=clustered(60, 2 * D, 1)).warm_start
    assert "its dimension is 16, not 32" in caplog.text


def test_a_warm_start_below_the_floor_is_trained_from_nothing(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom guarded against: a run that stops for its recall, which training from nothing would have reached."""
    store, plan = moved(tmp_path, rotated), plan_of(nprobe=2, refine_factor=4)
    anew = build(store, [], folder=tmp_path / "anew", plan=plan)
    # As if the lists had been found as good as before, though documents of a list have nothing in common.
    monkeypatch.setattr(ListsAudit, "holds", lambda *_: True)
    labels = np.random.default_rng(0).integers(40, size=2560).astype(np.int32)
    monkeypatch.setattr("engine.index.warm.WarmStart.labels", lambda _: labels)
    built = build(store, [first], plan=plan, recall_floor=anew.recall - 0.02, ranks=2)
    assert "all is trained from nothing" in caplog.text
    assert built == anew
    assert sha256_file(tmp_path / "index.faiss") == sha256_file(tmp_path / "anew" / "index.faiss")


def test_the_audit_counts_what_lies_in_the_lists_that_are_visited(first: Path) -> None:
    """Against brute force in float64."""
    from engine.index.exact import exact_search
    from tests.embedding_stores import open_store

    store = open_store(first, SIZES)
    truth = exact_search(store, QUERIES_QD, K)
    centroids_LD = EMBEDDINGS_ND[::100] / np.linalg.norm(EMBEDDINGS_ND[::100], axis=1, keepdims=True)
    audit = Audit(store, QUERIES_QD, truth, K, np.arange(0, N, 7))
    found = audit.measure(centroids_LD, np.ascontiguousarray, 3, 2)
    lists_N = (EMBEDDINGS_ND.astype(np.float64) @ centroids_LD.T).argmax(axis=1)
    visits_QV = np.argsort(-(QUERIES_QD.astype(np.float64) @ centroids_LD.T), axis=1)[:, :3]
    pairs = list(zip(truth.documents_QK, visits_QV, strict=True))
    assert found.recall == pytest.approx(np.mean([np.isin(lists_N[best], visits).mean() for best, visits in pairs]))
    assert found.visited == pytest.approx(np.mean([np.isin(lists_N[::7], visits).mean() for _, visits in pairs]))
    assert found.holds(found)
    assert not replace(found, recall=found.recall - 0.01).holds(found)
    assert not replace(found, visited=found.visited * 1.2).holds(found)


def test_codebooks_begin_from_the_last_ones(first: Path, tmp_path: Path) -> None:
    build(moved(tmp_path, lambda rows_ND: rows_ND), [first])
    one, other = (codebooks_of(parse_index(folder / "trained.faiss")) for folder in (first, tmp_path))
    assert 0 < np.abs(one - other).max() < 0.5 * np.abs(one).max()

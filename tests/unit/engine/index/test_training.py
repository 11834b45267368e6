"""All ranks train an index: the same bytes for any number of them, after any break, and as good as FAISS alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator
from engine.errors import ConfigError
from engine.index import codebooks, lists, sample, train
from engine.index.plan import IndexPlan, plan_index
from engine.index.steps import Steps
from engine.index.train import TrainedIndex, centroids_of, codebooks_of, train_once
from shards.embeddings import EmbeddingStore
from tests.embedding_stores import clustered, make_store, trained_index
from tests.threads_as_ranks import on_ranks

SIZES = (900, 300, 500, 1, 399, 900)
N, D = sum(SIZES), 16
EMBEDDINGS_ND = clustered(N, D, 0)
FACTORIES = ("IVF40,PQ8x4fs", "OPQ4,IVF40_HNSW8,PQ4x4", "IVF40,SQ8")
ALL_IN_ONE = "IVF40,PQ8x4fs"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(tmp_path_factory.mktemp("store"), EMBEDDINGS_ND, SIZES)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_RANGE", 16)
    monkeypatch.setattr(sample, "_LEAST_ROWS", 256)


def plan_of(factory: str = ALL_IN_ONE, **settings: Any) -> IndexPlan:
    asked = IndexConfig(factory=factory, **({"kmeans_iterations": 4, "recall_floor": 0.0} | settings))
    return plan_index(asked, num_documents=N, dimension=D)


def trained_by(world_size: int, folder: Path, store: EmbeddingStore, plan: IndexPlan) -> list[Any]:
    def work(coordinator: Coordinator) -> TrainedIndex:
        return train_once(Steps(coordinator, "index@3", 30), folder, store, plan, 0)

    return on_ranks(world_size, work)


@pytest.mark.parametrize("factory", FACTORIES)
def test_any_number_of_ranks_trains_the_same_bytes(store: EmbeddingStore, tmp_path: Path, factory: str) -> None:
    plan = plan_of(factory)
    (alone,) = trained_by(1, tmp_path / "1", store, plan)
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        assert trained_by(world_size, folder, store, plan) == [alone] * world_size
        assert {path.name for path in folder.iterdir()} == {"trained.faiss", "trained.json", "labels.npy"}
        for name in ("trained.faiss", "labels.npy"):
            assert (folder / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_a_slow_rank_does_less_and_changes_nothing(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of()
    (alone,) = trained_by(1, tmp_path / "alone", store, plan)
    real, done = Steps.shared, [0, 0]

    def slowly(rank: int, units: Iterator[int]) -> Iterator[int]:
        for unit in units:
            time.sleep(0.02 * rank)
            done[rank] += 1
            yield unit

    @contextmanager
    def shared(steps: Steps, what: str, units: Sequence[int], *more: Any) -> Iterator[Iterator[int]]:
        with real(steps, what, units, *more) as own:
            yield slowly(steps.coordinator.rank, own)

    monkeypatch.setattr(Steps, "shared", shared)
    assert trained_by(2, tmp_path, store, plan) == [alone, alone]
    assert 0 < done[1] < done[0]
    assert (tmp_path / "trained.faiss").read_bytes() == (tmp_path / "alone" / "trained.faiss").read_bytes()


BREAKS = {
    "the sample": (sample.Sample, "write", 4),
    "the first iteration": (lists.ListSums, "add", 3),
    "the third iteration": (lists.ListSums, "add", 25),
    "adding up": (lists, "normalized", 5),
    "an iteration's centroids": (lists, "split_empty", 2),
    "an iteration's state": (lists, "write_scratch", 3),
    "rows of the codebooks": (codebooks, "_write_rows", 5),
    "the codebooks": (codebooks, "_cluster", 1),
    "putting it together": (train, "write_index", 2),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_an_interrupted_training_goes_on_bit_equal(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    plan = plan_of("OPQ4,IVF40,PQ8x4")
    (whole,) = trained_by(1, tmp_path / "whole", store, plan)
    where, name, at = BREAKS[broken]
    real, calls = getattr(where, name), []

    def breaks(*arguments: Any, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(where, name, breaks)
    with pytest.raises(KeyboardInterrupt):
        trained_by(1, tmp_path, store, plan)
    assert not (tmp_path / "trained.json").exists()
    work = tmp_path / "training"
    before = {path.name: path.stat().st_mtime_ns for path in [*work.glob("rows-*"), *work.glob("base.*")]}
    assert len(before) == (7 if broken == "the sample" else 21)
    rows_written, iterations = [], []
    write, iterate = sample.Sample.write, lists.ListTraining.iterate
    monkeypatch.setattr(where, name, real)
    monkeypatch.setattr(sample.Sample, "write", lambda *given: (rows_written.append(1), write(*given)))
    monkeypatch.setattr(lists.ListTraining, "iterate", lambda given: (iterations.append(1), iterate(given)))
    assert trained_by(2, tmp_path, store, plan) == [whole, whole]
    assert len(rows_written) == (7 if broken == "the sample" else 0)
    expected = {"adding up": 3, "the third iteration": 2, "an iteration's centroids": 3, "an iteration's state": 3}
    nothing_left = broken in ("rows of the codebooks", "the codebooks", "putting it together")
    assert len(iterations) == 2 * expected.get(broken, 0 if nothing_left else 4)
    assert (tmp_path / "trained.faiss").read_bytes() == (tmp_path / "whole" / "trained.faiss").read_bytes()
    assert not work.exists()


def test_what_another_training_left_behind_is_not_used(store: EmbeddingStore, tmp_path: Path) -> None:
    whole = [
        trained_by(1, tmp_path / str(seeds), store, replace(plan_of(), num_iterations=seeds))[0] for seeds in (2, 3)
    ]
    work = tmp_path / "training"
    work.mkdir()
    (work / "goal.json").write_text((tmp_path / "2" / "trained.json").read_text())
    (work / "lists.json").write_text("{}")
    (work / "rows-00003.npy").write_bytes(b"of another training")
    assert trained_by(1, tmp_path, store, replace(plan_of(), num_iterations=3)) == [whole[1]]
    assert whole[0].sha256 != whole[1].sha256


def test_a_rank_that_finds_nan_stops_all_and_names_the_document(tmp_path: Path) -> None:
    store = make_store(tmp_path, EMBEDDINGS_ND, SIZES)
    damaged = np.load(tmp_path / "embeddings" / "part-000002.npy", mmap_mode="r+")
    damaged[13] = np.nan
    damaged.flush()
    told = trained_by(2, tmp_path, store, replace(plan_of(), train_size=N))
    assert sorted(type(error).__name__ for error in told) == ["ArtifactError", "PeerError"]
    assert all(f"the embedding of document {900 + 300 + 13} is not finite" in str(error) for error in told)
    assert not (tmp_path / "trained.json").exists()


def test_lists_that_lose_all_members_are_filled_again(tmp_path: Path) -> None:
    """Half of the documents are alike here, so half of the first centroids are; all but one of these find no row."""
    rows_ND = np.concatenate([np.repeat(EMBEDDINGS_ND[:1], N // 2, axis=0), EMBEDDINGS_ND[: N // 2]])
    store, plan = make_store(tmp_path, rows_ND, SIZES), plan_of()
    one, two = (trained_by(ranks, tmp_path / str(ranks), store, plan) for ranks in (1, 2))
    assert [*one, *one] == two
    assert one[0].num_split > 0
    centroids_LD = centroids_of(train.parse_index(tmp_path / "1" / "trained.faiss"))
    assert np.isfinite(centroids_LD).all()
    assert np.allclose(np.linalg.norm(centroids_LD, axis=1), 1, atol=1e-5)
    held = set(np.load(tmp_path / "1" / "labels.npy").tolist())
    assert len(held) >= 12, "a list for all that are alike, and those of the others"


def squared_error(rows_ND: np.ndarray, entries_LD: np.ndarray, *, spherical: bool = False) -> float:
    """Return the mean squared distance of rows from their nearest entry, or from its nearest multiple, in float64."""
    rows_ND, entries_LD = rows_ND.astype(np.float64), entries_LD.astype(np.float64)
    products_NL = rows_ND @ entries_LD.T
    squares_N1 = np.square(rows_ND).sum(axis=1, keepdims=True)
    if spherical:
        return float((squares_N1[:, 0] - np.square(products_NL.max(axis=1))).mean())
    return float((squares_N1 - 2 * products_NL + np.square(entries_LD).sum(axis=1)).min(axis=1).mean())


def test_lists_and_codebooks_are_as_good_as_those_of_faiss(tmp_path: Path) -> None:
    """Quantization error in float64, over the rows that were learnt from."""
    rng = np.random.default_rng(5)
    centers = rng.standard_normal((60, D))
    rows_ND = (centers[rng.integers(60, size=N)] + 0.7 * rng.standard_normal((N, D))).astype(np.float32)
    store, plan = (
        make_store(tmp_path, rows_ND, SIZES),
        replace(plan_of("IVF40,PQ8x4fsr"), num_iterations=10, train_size=N),
    )
    ours, errors = trained_index(tmp_path, store, plan, 0), []
    for seed in (1, 2, 3):
        theirs: Any = faiss.index_factory(D, "IVF40,PQ8x4", faiss.METRIC_INNER_PRODUCT)
        theirs.do_polysemous_training = False
        theirs.cp.niter = theirs.pq.cp.niter = 10
        theirs.cp.seed = theirs.pq.cp.seed = seed
        theirs.cp.min_points_per_centroid = theirs.pq.cp.min_points_per_centroid = 1
        theirs.train(rows_ND)
        errors.append([squared_error(rows_ND, centroids_of(theirs), spherical=True), coded(rows_ND, theirs)])
    listed, whole = np.mean(errors, axis=0)
    assert squared_error(rows_ND, centroids_of(ours), spherical=True) < 1.01 * listed
    assert coded(rows_ND, ours) < 1.01 * whole


def coded(rows_ND: np.ndarray, index: Any) -> float:
    """Return the mean squared error of what an index's lists and codes keep of rows: by their codebooks, in float64."""
    index = faiss.downcast_index(index)
    assert index.by_residual
    centroids_LD, books_MCS = centroids_of(index), codebooks_of(index)
    nearest_N = (rows_ND.astype(np.float64) @ centroids_LD.T.astype(np.float64)).argmax(axis=1)
    left_NMS = (rows_ND - centroids_LD[nearest_N]).reshape(len(rows_ND), len(books_MCS), -1)
    return sum(squared_error(left_NMS[:, number], books_MCS[number]) for number in range(len(books_MCS)))


def test_lists_within_lists_are_refused() -> None:
    """FAISS failed to train them, with a word about its direct map, after the corpus had been encoded."""
    with pytest.raises(ConfigError, match="lists lie in lists themselves"):
        plan_of("IVF40(IVF4,Flat),PQ8x4")

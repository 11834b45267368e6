"""FAISS on a rank's GPU, by a stand-in that computes as FAISS does on a CPU and notes which device it was asked for.

The stand-in refuses what FAISS's own kernels refuse, whatever our tables say, and its copies have the few methods that
copies on GPUs have. The real thing is in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from engine.config.sections import IndexConfig
from engine.errors import ConfigError
from engine.index import tune
from engine.index.build import build_index
from engine.index.dense import DenseIndex
from engine.index.exact import exact_search
from engine.index.gpu import NUM_CODES, needs_half_tables, on_gpu, refusal_of, require_gpu_index
from engine.index.kmeans import Assigner
from engine.index.plan import empty_index, plan_index
from engine.index.probe import ProbedIndex
from tests.embedding_stores import make_store
from tests.threads_as_ranks import on_ranks

CPU = torch.device("cpu")
N, D, SHARED_BYTES = 900, 16, 49152
ROWS_ND = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
QUERIES_QD = np.random.default_rng(1).standard_normal((12, D)).astype(np.float32)


class Options:
    """As FAISS has them."""

    def __init__(self) -> None:
        self.useFloat16, self.use_cuvs = False, True


class OnGpu:
    """A copy on a GPU: what a copy of its kind can do, and no more."""

    def __init__(self, faiss_of_gpus: GpuFaiss, device: int, index: Any, half: bool) -> None:
        self._all, self._device, self._half = faiss_of_gpus, device, half
        self._index = faiss.deserialize_index(faiss.serialize_index(index))
        self.d = self._index.d

    def search(self, rows_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if k > 2048:
            raise RuntimeError("GPU index only supports min/max-K selection up to 2048")
        self._all.calls.append(("search", self._device))
        scores, documents = self._index.search(rows_ND, k)
        scores[documents < 0] = -3.4e38
        return scores, documents

    def add_with_ids(self, rows_ND: np.ndarray, ids_N: np.ndarray) -> None:
        self._all.calls.append(("add", self._device))
        self._index.add_with_ids(rows_ND, ids_N)

    def to_cpu(self) -> Any:
        self._all.calls.append(("copy back", self._device))
        return self._index

    def visit(self, nprobe: int) -> None:
        if nprobe > 2048:
            raise RuntimeError("GPU index only supports nprobe <= 2048")
        faiss.extract_index_ivf(self._index).nprobe = nprobe


@dataclass
class GpuFaiss:
    """A FAISS with GPUs."""

    gpus: int
    calls: list[tuple[str, int]] = field(default_factory=list)
    half: list[bool] = field(default_factory=list)

    def to_gpu(self, resources: object, device: int, index: Any, options: Options) -> OnGpu:
        assert resources is not None
        assert not options.use_cuvs
        if device >= self.gpus:
            raise RuntimeError(f"Invalid GPU device {device}")
        inner: Any = faiss.downcast_index(index)
        if isinstance(inner, faiss.IndexPreTransform):
            inner = faiss.downcast_index(inner.index)
        if isinstance(inner, faiss.IndexIVF) and not isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexFlat):
            raise RuntimeError("This index type is not implemented on GPU.")
        if isinstance(inner, faiss.IndexIVFPQ):
            table = (2 if options.useFloat16 else 4) * inner.pq.M * 2**inner.pq.nbits
            kernels = [*range(1, 5), *range(8, 33, 4), 40, 48, 56, 64, 96]
            if inner.pq.nbits != 8 or inner.pq.M not in kernels or not inner.by_residual or table > SHARED_BYTES:
                raise RuntimeError("Bits per code must be 8, or another limit")
        elif not isinstance(inner, faiss.IndexFlat | faiss.IndexIVFFlat):
            raise RuntimeError("This index type is not implemented on GPU.")
        self.calls.append(("copy", device))
        self.half.append(options.useFloat16)
        return OnGpu(self, device, index, options.useFloat16)


class ParameterSpace:
    """Sets what a search visits."""

    def set_index_parameter(self, index: OnGpu, name: str, value: int) -> None:
        assert name == "nprobe"
        index.visit(value)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> GpuFaiss:
    """Eight GPUs."""
    found = GpuFaiss(8)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: found.gpus)
    for name, value in {
        "StandardGpuResources": object,
        "GpuClonerOptions": Options,
        "index_cpu_to_gpu": found.to_gpu,
        "index_gpu_to_cpu": lambda copy: copy.to_cpu(),
        "GpuParameterSpace": ParameterSpace,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    return found


def test_the_table_says_of_every_kind_what_faiss_says(gpus: GpuFaiss) -> None:
    """Symptom: an index that FAISS refuses is found out after hours, or one that it takes stays on a CPU."""
    taken = 0
    for factory in (
        *(f"IVF4,PQ{codes}" for codes in (*NUM_CODES, 6, 10, 32, 192)),
        *(
            "IVF4,PQ8x4",
            "IVF4,PQ8x4fs",
            "IVF4_HNSW8,PQ8",
            "OPQ8,IVF4,PQ8",
            "OPQ8,IVF4,PQ8x4",
            "IVF4,Flat",
            "IVF4,PQ8x6",
        ),
    ):
        dimension = 5760  # which all numbers of codes divide
        codes = int(factory.partition("PQ")[2].partition("x")[0].split(",")[0] or 1) if ",PQ" in factory else 1
        index = empty_index(factory, dimension if codes not in (28, 56) else 56)
        copy = on_gpu(index, "cuda:5")
        assert (copy is not index) == (refusal_of(index) == ""), factory
        taken += copy is not index
    assert taken == len(NUM_CODES) + 3, "32 twice, OPQ, and vectors as they are"
    assert {device for _, device in gpus.calls} == {5}
    assert [needs_half_tables(codes) for codes in (1, 48, 56, 96)] == [False, False, True, True]
    assert sum(gpus.half) == 3
    index = faiss.IndexFlatIP(D)
    assert on_gpu(index, "cpu") is index, "a rank on a CPU has no GPU, whatever its host has"


def test_lists_are_searched_on_the_ranks_own_gpu_with_the_cpus_results(gpus: GpuFaiss) -> None:
    plain, ours = Assigner(ROWS_ND[:20], 1), Assigner(ROWS_ND[:20], 1, torch.device("cuda", 3))
    for found, expected in zip(ours.nearest(ROWS_ND), plain.nearest(ROWS_ND), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ours.best(ROWS_ND[:5], 4), plain.best(ROWS_ND[:5], 4))
    assert set(gpus.calls) == {("copy", 3), ("search", 3)}


def built(folder: Path, devices: Callable[[int], str]) -> DenseIndex:
    """Build an index by two ranks, each with a device."""
    store = make_store(folder, ROWS_ND, [150] * 6)
    settings = IndexConfig(factory="IVF6,PQ8", train_documents=N, kmeans_iterations=3, recall_floor=0.0)
    plan = plan_index(settings, num_documents=N, dimension=D)
    results = on_ranks(
        2,
        lambda coordinator: build_index(
            *(coordinator, store, plan, folder / "index"),
            seed=1,
            audit_queries_QD=QUERIES_QD,
            recall_k=5,
            recall_floor=0.0,
            device=devices(coordinator.rank),
            warm_start=True,
        ),
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
    return DenseIndex.open(folder / "index", store, device="cpu")


def test_each_rank_trains_fills_and_searches_on_its_own_gpu(
    gpus: GpuFaiss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: all ranks of a host used its first GPU, which ran out of memory beside seven that were idle."""
    # What torch computes stays where this machine can compute it.
    monkeypatch.setattr(
        tune, "exact_search", lambda *words, **options: exact_search(*words, **options | {"device": CPU})
    )
    on_gpus = built(tmp_path / "gpus", lambda rank: f"cuda:{4 + rank}")
    assert {device for what, device in gpus.calls if what in ("copy", "search")} == {4, 5}
    assert {device for what, device in gpus.calls if what == "add"} == {4, 5}
    assert ("copy back", 5) in gpus.calls
    num_calls = len(gpus.calls)
    plain = built(tmp_path / "cpus", lambda rank: "cpu")
    assert len(gpus.calls) == num_calls
    ours, theirs = on_gpus.search(QUERIES_QD, 10), plain.search(QUERIES_QD, 10)
    np.testing.assert_array_equal(ours.documents_QK, theirs.documents_QK)
    np.testing.assert_array_equal(ours.scores_QK, theirs.scores_QK)
    again = DenseIndex.open(tmp_path / "gpus" / "index", on_gpus.store, device="cuda:7")
    np.testing.assert_array_equal(again.search(QUERIES_QD, 10).documents_QK, theirs.documents_QK)
    assert gpus.calls[-1] == ("search", 7)


def test_what_a_gpu_cannot_select_is_scanned_by_the_cpu(gpus: GpuFaiss) -> None:
    """Symptom: a search of more than 2,048 candidates a query ended a run after the index was made."""
    index: Any = faiss.index_factory(D, "IVF3,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(ROWS_ND)
    index.add(ROWS_ND)
    plain, ours = ProbedIndex(index, in_memory=True), ProbedIndex(index, in_memory=True, device="cuda:2")
    for depth in (7, 2500):
        gpus.calls.clear()
        found = ours.search(QUERIES_QD, depth, nprobe=2, needed=5)
        expected = plain.search(QUERIES_QD, depth, nprobe=2, needed=5)
        np.testing.assert_array_equal(found.documents_QK, expected.documents_QK)
        np.testing.assert_allclose(found.scores_QK, expected.scores_QK, rtol=1e-5)
        assert gpus.calls == ([("search", 2)] if depth == 7 else [])
    assert np.isneginf(found.scores_QK[:, -1]).all()


@pytest.mark.parametrize(
    ("factory", "device", "num_gpus", "words"),
    [
        ("IVF6,PQ8", "cpu", 8, "this rank computes on cpu"),
        ("IVF6,PQ8", "cuda:1", 0, "sees 0 GPUs.*faiss-gpu-cuvs"),
        ("IVF6,PQ8", "cuda:3", 2, "sees 2 GPUs"),
        ("IVF6,PQ8x4fs", "cuda:1", 8, r"takes codes of 8 bits there, these have 4.*index\.factory=IVF6,PQ16"),
        ("IVF6_HNSW8,PQ8", "cuda:1", 8, "and not through IndexHNSWFlat"),
    ],
)
def test_an_index_that_must_be_on_gpus_and_cannot_is_refused_before_any_work(
    gpus: GpuFaiss, factory: str, device: str, num_gpus: int, words: str
) -> None:
    gpus.gpus = num_gpus
    settings = IndexConfig(factory=factory, gpu="always")
    plan = plan_index(settings, num_documents=N, dimension=D)
    with pytest.raises(ConfigError, match=f"(?s)index.gpu is always, but .*{words}"):
        require_gpu_index(settings, plan, D, torch.device(device))
    told = require_gpu_index(settings.model_copy(update={"gpu": "auto"}), plan, D, torch.device(device))
    assert bool(told) == (device != "cpu" and num_gpus > 0), "where there are GPUs, that they are not used is told"
    remedied = IndexConfig(factory="IVF6,PQ16", gpu="always")
    gpus.gpus = 8
    assert "on each rank's GPU" in require_gpu_index(
        remedied, plan_index(remedied, num_documents=N, dimension=D), D, torch.device("cuda", 1)
    )

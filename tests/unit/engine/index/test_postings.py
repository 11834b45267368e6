"""Search over postings gives what a product of the dense matrices in float64 gives, ties and lacks included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
import torch

import shards.postings
from engine.index import scan as scans
from engine.index.exact import merge_hits
from engine.index.postings import PostingsIndex
from engine.index.scan import CompiledScan, FewTermsScan, Found, ProductScan, Scan, add_postings
from engine.search import Hits
from shards.errors import ArtifactError
from tests.sparse_stores import make_postings, random_sparse

V, SIZES = 50, (30, 1, 45, 7, 60, 12, 33, 21, 40, 51)
N, Q = sum(SIZES), 25


class InterpretedScan(CompiledScan):
    """The code that numba compiles, run by Python, so that it is tested where there is no numba, too."""

    @staticmethod
    def _compiled() -> Callable[..., None]:
        return add_postings


SCANS = [
    ProductScan,
    FewTermsScan,
    InterpretedScan,
    pytest.param(
        CompiledScan,
        marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs the extra `numba`"),
    ),
]


def brute_force(queries_QV: np.ndarray, weights_NV: np.ndarray, top_k: int) -> Hits:
    scores_QN = (queries_QV.astype(np.float64) @ weights_NV.astype(np.float64).T).astype(np.float32)
    hits = Hits(np.full((len(queries_QV), top_k), -1), np.full((len(queries_QV), top_k), -np.inf, dtype=np.float32))
    for row, scores_N in enumerate(scores_QN):
        order = [document for document in np.lexsort((np.arange(len(scores_N)), -scores_N)) if scores_N[document] > 0]
        kept = order[:top_k]
        hits.documents_QK[row, : len(kept)], hits.scores_QK[row, : len(kept)] = kept, scores_N[kept]
    return hits


def assert_same(found: Hits, expected: Hits) -> None:
    np.testing.assert_array_equal(found.documents_QK, expected.documents_QK)
    np.testing.assert_array_equal(found.scores_QK, expected.scores_QK)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 documents, and little of everything at a time, so that there is much of all."""
    monkeypatch.setattr(shards.postings, "DOCUMENTS_PER_BLOCK", 16)
    for name, number in (
        ("_SCORES_AT_A_TIME", 64),
        ("_QUERIES_AT_A_TIME", 10),
        ("_WAITING", 240),
        ("_FEWEST_CHOSEN", 4),
    ):
        monkeypatch.setattr(f"engine.index.postings.{name}", number)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("top_k", [1, 10, N + 5])
@pytest.mark.parametrize("few_terms", [0, 10**6])
def test_the_same_as_brute_force(
    tmp_path: Path, scan: type[Scan], steps: int | None, top_k: int, few_terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three different weights most scores tie; to a depth beyond the corpus, all are asked for."""
    monkeypatch.setattr(scans, "_FEW_TERMS", few_terms)
    weights_NV = random_sparse(N, V, seed=1, steps=steps)
    queries_QV = random_sparse(Q, V, seed=2, share=0.3, steps=steps)
    expected = brute_force(queries_QV, weights_NV, top_k)
    for sums in (queries_QV.sum(1), weights_NV.sum(1), weights_NV.sum(0)):
        assert (sums == 0).any(), "queries and documents without terms, and terms that no document has"
    if steps and top_k == 10:
        assert (expected.scores_QK[:, 1:] == expected.scores_QK[:, :-1]).any(), "no ties: the test shows nothing"
    if top_k > N:
        assert N / 2 < expected.num_found_Q.max() < N
    index = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES), scan=scan)
    assert index.num_parts == 8
    assert_same(index.search(sparse.csr_array(queries_QV), top_k), expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("deal", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[7, 2], [0], [], [6, 1, 3], [5, 4]]])
def test_parts_however_dealt_give_the_same(tmp_path: Path, scan: type[Scan], deal: list[list[int]]) -> None:
    weights_NV, queries_QV = random_sparse(N, V, seed=3, steps=3), random_sparse(Q, V, seed=4, steps=3)
    index = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES), scan=scan)
    asked = sparse.csr_array(queries_QV)
    found = [index.search_parts(asked, 9, parts) for parts in deal]
    assert_same(index.finish(found, 9), brute_force(queries_QV, weights_NV, 9))
    assert_same(merge_hits(found, 9), index.search(asked, 9))


@pytest.mark.parametrize("scan", SCANS)
def test_a_score_does_not_depend_on_its_company(tmp_path: Path, scan: type[Scan]) -> None:
    weights_NV, queries_QV = random_sparse(N, V, seed=5, share=0.8), random_sparse(Q, V, seed=6, share=0.8)
    index = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES), scan=scan)
    together = index.search(sparse.csr_array(queries_QV), 20)
    for row in range(Q):
        alone = index.search(sparse.csr_array(queries_QV[row : row + 1]), 20)
        np.testing.assert_array_equal(alone.scores_QK[0], together.scores_QK[row])
        np.testing.assert_array_equal(alone.documents_QK[0], together.documents_QK[row])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("scan", SCANS)
def test_threads_share_the_queries_and_find_the_same(tmp_path: Path, scan: type[Scan]) -> None:
    weights_NV, queries_QV = random_sparse(N, V, seed=3, steps=3), random_sparse(Q, V, seed=4, steps=3)
    index, before = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES), scan=scan), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(index.search(sparse.csr_array(queries_QV), 9), brute_force(queries_QV, weights_NV, 9))
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_thread_stops_a_search(tmp_path: Path) -> None:
    class Failing(ProductScan):
        def find(self, rows: slice, least_Q: np.ndarray) -> Found:
            raise MemoryError("no room")

    index = PostingsIndex(make_postings(tmp_path, random_sparse(N, V, seed=1), SIZES), scan=Failing)
    with pytest.raises(MemoryError, match="no room"):
        index.search(sparse.csr_array(random_sparse(Q, V, seed=2)), 3)


@pytest.mark.parametrize("scan", SCANS)
def test_terms_of_a_query_may_come_in_any_order(tmp_path: Path, scan: type[Scan]) -> None:
    """Symptom: sums in another order differ in their last bit, and the same query gave other candidates."""
    weights_NV, queries_QV = random_sparse(N, V, seed=5, share=0.8), random_sparse(Q, V, seed=6, share=0.8)
    index = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES), scan=scan)
    ordered = sparse.csr_array(queries_QV)
    turned = ordered.copy()
    for start, stop in zip(ordered.indptr[:-1], ordered.indptr[1:], strict=True):
        turned.indices[start:stop] = ordered.indices[start:stop][::-1]
        turned.data[start:stop] = ordered.data[start:stop][::-1]
    turned.has_sorted_indices = False
    assert_same(index.search(turned, 20), index.search(ordered, 20))


@pytest.mark.parametrize("scan", SCANS)
def test_float16_weights_are_searched_as_they_are_stored(tmp_path: Path, scan: type[Scan]) -> None:
    weights_NV, queries_QV = random_sparse(N, V, seed=7), random_sparse(Q, V, seed=8)
    index = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES, dtype="float16"), scan=scan)
    rounded_NV = weights_NV.astype(np.float16).astype(np.float32)
    assert (rounded_NV != weights_NV).any()
    assert_same(index.search(sparse.csr_array(queries_QV), 12), brute_force(queries_QV, rounded_NV, 12))


@pytest.mark.parametrize("scan", SCANS)
def test_no_query_and_no_posting_at_all(tmp_path: Path, scan: type[Scan]) -> None:
    weights_NV, queries_QV = random_sparse(N, V, seed=1), random_sparse(Q, V, seed=2)
    index = PostingsIndex(make_postings(tmp_path / "some", weights_NV, SIZES), scan=scan)
    assert index.search(sparse.csr_array(queries_QV[:0]), 3).documents_QK.shape == (0, 3)
    empty = PostingsIndex(make_postings(tmp_path / "none", np.zeros_like(weights_NV), SIZES), scan=scan)
    assert (empty.search(sparse.csr_array(queries_QV), 3).num_found_Q == 0).all()
    assert (index.search(sparse.csr_array(np.zeros_like(queries_QV)), 3).num_found_Q == 0).all()


def test_queries_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    index = PostingsIndex(make_postings(tmp_path, random_sparse(N, V, seed=1), SIZES))
    with pytest.raises(ValueError, match=r"expected \[Q, 50\]"):
        index.search(sparse.csr_array(np.ones((2, V + 1), dtype=np.float32)), 3)
    with pytest.raises(ValueError, match="top_k 0"):
        index.search(sparse.csr_array(np.ones((2, V), dtype=np.float32)), 0)


def test_numba_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(name: str) -> object:
        raise ImportError("it needs an older numpy")

    for spec, module, expected in (
        (object(), lambda name: object(), CompiledScan),
        (None, broken, ProductScan),
        (object(), broken, ProductScan),
    ):
        assert "older numpy" not in caplog.text
        monkeypatch.setattr(scans.importlib.util, "find_spec", lambda name, spec=spec: spec)
        monkeypatch.setattr(scans.importlib, "import_module", module)
        assert scans.fastest_scan() is expected
    assert "older numpy" in caplog.text


def test_a_damaged_part_stops_a_search(tmp_path: Path) -> None:
    """Symptom: compiled code writes wherever a damaged number points to."""
    index = PostingsIndex(make_postings(tmp_path, random_sparse(N, V, seed=1), SIZES))
    path = tmp_path / "part-000004.npy"
    content = bytearray(path.read_bytes())
    content[-1] = 0xFF
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part-000004\.npy has postings beyond its 60 documents"):
        index.search(sparse.csr_array(random_sparse(Q, V, seed=2)), 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_documents_that_others_found_have_the_scores_of_a_search(tmp_path: Path, dtype: str) -> None:
    """A lexical retriever as a re-ranker (R2ANKER Table 4): any documents in any order, some with nothing in common."""
    weights_NV, queries_QV = random_sparse(N, V, seed=1), random_sparse(Q, V, seed=2, share=0.3)
    index = PostingsIndex(make_postings(tmp_path, weights_NV, SIZES, dtype=dtype))
    generator = np.random.default_rng(3)
    documents = [generator.permutation(N)[: generator.integers(0, N)].tolist() for _ in range(Q)]
    documents[0] = [5, 5, 2]
    found = index.score(sparse.csr_array(queries_QV), documents)
    hits = index.search(sparse.csr_array(queries_QV), N)
    for row, own in enumerate(documents):
        by_search = dict(zip(hits.documents_QK[row].tolist(), hits.scores_QK[row].tolist(), strict=True))
        assert found[row] == [by_search.get(document, 0.0) for document in own], "bit by bit"
    assert any(score == 0 for own in found for score in own)
    assert any(score > 0 for own in found for score in own)

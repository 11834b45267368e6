"""Exact search is exact, and a score does not depend on what else is searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.exact import blocks, exact_search, rescore
from shards.embeddings import EmbeddingStore, Stamp, write_part
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name

SIZES = (30, 1, 44)
N, D = sum(SIZES), 40


def make_store(folder: Path, embeddings_ND: np.ndarray) -> EmbeddingStore:
    firsts = np.cumsum([0, *SIZES]).tolist()
    entries = tuple(
        ShardEntry(shard_name(i), 1024, "a" * 64, size, firsts[i], "a" * 64, {"r": 1}) for i, size in enumerate(SIZES)
    )
    stream = TokenStream("r", "a" * 64, 8)
    manifest = CorpusManifest("a" * 64, "{text}", (stream,), entries, N, {"r": len(SIZES)}, "a" * 64)
    stamp = Stamp("0", "b" * 64, manifest.sha256)
    for entry in entries:
        write_part(folder, entry, embeddings_ND[entry.documents], stamp)
    return EmbeddingStore.open(folder, manifest, stamp)


@pytest.fixture
def embeddings_ND() -> np.ndarray:
    embeddings_ND = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    embeddings_ND[[3, 40, 70]] = embeddings_ND[29]  # four documents of equal scores, in three parts
    return embeddings_ND


@pytest.fixture
def queries_QD(embeddings_ND: np.ndarray) -> np.ndarray:
    queries_QD = np.random.default_rng(1).standard_normal((9, D)).astype(np.float32)
    queries_QD[0] = embeddings_ND[29]
    return queries_QD


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equals_brute_force(
    tmp_path: Path, embeddings_ND: np.ndarray, queries_QD: np.ndarray, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.exact._EXACT_ROWS", 7)
    monkeypatch.setattr("engine.exact._EXACT_QUERIES", 4)
    monkeypatch.setattr("engine.exact._RESCORE_BYTES", 4 * D * 90)  # two queries at a time
    monkeypatch.setattr("engine.exact._SPARE", 3)
    store = make_store(tmp_path, embeddings_ND.astype(dtype))
    scores_QN = queries_QD.astype(np.float64) @ embeddings_ND.astype(dtype).astype(np.float64).T
    order_QN = np.array([sorted(range(N), key=lambda d, row=row: (-row[d], d)) for row in scores_QN.round(9)])
    hits = exact_search(store, queries_QD, 12)
    np.testing.assert_array_equal(hits.documents_QK, order_QN[:, :12])
    assert hits.documents_QK[0, :4].tolist() == [3, 29, 40, 70]
    assert len(set(hits.scores_QK[0, :4].tolist())) == 1
    np.testing.assert_allclose(hits.scores_QK, np.take_along_axis(scores_QN, order_QN[:, :12], axis=1), rtol=1e-5)
    assert hits.scores_QK.dtype == np.float32


def test_a_small_corpus_is_padded(tmp_path: Path, embeddings_ND: np.ndarray, queries_QD: np.ndarray) -> None:
    hits = exact_search(make_store(tmp_path, embeddings_ND), queries_QD, N + 5)
    np.testing.assert_array_equal(np.sort(hits.documents_QK[:, :N]), np.tile(np.arange(N), (9, 1)))
    assert (hits.documents_QK[:, N:] == -1).all()
    assert np.isneginf(hits.scores_QK[:, N:]).all()


def test_scores_are_bit_equal_in_any_company(tmp_path: Path, embeddings_ND: np.ndarray, queries_QD: np.ndarray) -> None:
    store = make_store(tmp_path, embeddings_ND)
    together = exact_search(store, queries_QD, 20)
    for row in range(len(queries_QD)):
        alone = exact_search(store, queries_QD[row : row + 1], 20)
        np.testing.assert_array_equal(alone.documents_QK[0], together.documents_QK[row])
        np.testing.assert_array_equal(alone.scores_QK[0], together.scores_QK[row])
        some = np.random.default_rng(row).permutation(N)[: 2 * row + 31]
        by_document = dict(zip(together.documents_QK[row].tolist(), together.scores_QK[row].tolist(), strict=True))
        few = rescore(store, queries_QD[row : row + 1], some[None], N)
        shared = [place for place, document in enumerate(few.documents_QK[0].tolist()) if document in by_document]
        assert shared
        for place in shared:
            assert few.scores_QK[0, place] == by_document[int(few.documents_QK[0, place])]


def test_rescoring_orders_candidates_and_ignores_empty_places(
    tmp_path: Path, embeddings_ND: np.ndarray, queries_QD: np.ndarray
) -> None:
    store = make_store(tmp_path, embeddings_ND)
    hits = rescore(store, queries_QD[:1], np.array([[70, -1, 8, 29, -1]]), 4)
    assert hits.documents_QK[0].tolist() == [29, 70, 8, -1]
    assert hits.scores_QK[0, 2] == pytest.approx(float(queries_QD[0] @ embeddings_ND[8]), rel=1e-5)
    assert np.isneginf(hits.scores_QK[0, 3])


def test_queries_must_fit(tmp_path: Path, embeddings_ND: np.ndarray, queries_QD: np.ndarray) -> None:
    store = make_store(tmp_path, embeddings_ND)
    with pytest.raises(ValueError, match=r"\(9, 39\)"):
        exact_search(store, queries_QD[:, 1:], 5)
    with pytest.raises(ValueError, match="top_k 0"):
        exact_search(store, queries_QD, 0)


def test_blocks_cover_a_length() -> None:
    assert list(blocks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(blocks(0, 3)) == []

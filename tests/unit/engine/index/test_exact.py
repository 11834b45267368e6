"""Exact search is exact, and a score does not depend on what else is searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import ArtifactError
from engine.index.exact import blocks, exact_search, merge_hits, rescore, stream
from engine.search import Hits
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
    monkeypatch.setattr("engine.index.exact._EXACT_ROWS", 7)
    monkeypatch.setattr("engine.index.exact._EXACT_QUERIES", 4)
    monkeypatch.setattr("engine.index.exact._RESCORE_BYTES", 4 * D * 90)  # two queries at a time
    monkeypatch.setattr("engine.index.exact._SPARE", 3)
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


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_range_of_documents_is_streamed_in_order(tmp_path: Path, embeddings_ND: np.ndarray, dtype: str) -> None:
    store = make_store(tmp_path, embeddings_ND.astype(dtype))
    for documents in (range(N), range(29, 33), range(30, 31), range(7, 7), range(70, N)):
        pieces = list(stream(store, documents, 7))
        assert all(len(rows) <= 7 and rows.dtype == np.float32 for _, rows in pieces)
        seen = [first + row for first, rows in pieces for row in range(len(rows))]
        assert seen == list(documents)
        for first, rows_ND in pieces:
            np.testing.assert_array_equal(rows_ND, embeddings_ND[first : first + len(rows_ND)].astype(dtype))


def test_streaming_maps_nothing(tmp_path: Path, embeddings_ND: np.ndarray) -> None:
    """Mapped pages count as memory of the process: a build grew with the corpus."""
    store = make_store(tmp_path, np.tile(embeddings_ND, (1, 2000)))

    def resident_kilobytes() -> int:
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):  # the first line of a mapping names its file
                ours = str(tmp_path) in line
            elif ours and words[0] == "Rss:":
                total += int(words[1])
        return total

    for _ in stream(store, range(N), 10):
        pass
    assert resident_kilobytes() <= 4 * len(SIZES)
    mapped = [np.array(part_ND) for _, part_ND in store.parts()]
    assert len(mapped) == len(SIZES)
    assert resident_kilobytes() > 10_000  # the same embeddings, seen through their mappings


def test_a_part_that_has_become_shorter_is_refused(tmp_path: Path, embeddings_ND: np.ndarray) -> None:
    store = make_store(tmp_path, embeddings_ND)
    parts = list(store.parts())
    path = tmp_path / "part-000002.npy"
    assert str(parts[2][1].filename) == str(path)  # type: ignore[attr-defined]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ArtifactError, match=r"part-000002\.npy ends before row 44 of 44"):
        list(stream(store, range(N), 100))


def test_parts_searched_apart_are_the_whole(tmp_path: Path, embeddings_ND: np.ndarray, queries_QD: np.ndarray) -> None:
    store = make_store(tmp_path, embeddings_ND)
    ranges = (range(40, N), range(0, 3), range(3, 3), range(3, 40))
    found = [exact_search(store, queries_QD, 12, documents=documents) for documents in ranges]
    merged, whole = merge_hits(found, 12), exact_search(store, queries_QD, 12)
    np.testing.assert_array_equal(merged.documents_QK, whole.documents_QK)
    np.testing.assert_array_equal(merged.scores_QK, whole.scores_QK)


def test_merged_hits_are_padded_and_ties_go_by_document() -> None:
    one = Hits(np.array([[9, -1]]), np.array([[1.0, -np.inf]], dtype=np.float32))
    two = Hits(np.array([[4, 5]]), np.array([[1.0, 0.5]], dtype=np.float32))
    assert merge_hits([one, two], 2).documents_QK.tolist() == [[4, 9]]
    padded = merge_hits([one, two], 6)
    assert padded.documents_QK.tolist() == [[4, 9, 5, -1, -1, -1]]
    assert np.isneginf(padded.scores_QK[0, 3:]).all()

"""Postings are the sparse vectors turned over, and a store of them opens whole, of one stamp, or not at all."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse

import shards.postings
from shards.embeddings import EmbeddingStore, Stamp, write_part
from shards.errors import ArtifactError
from shards.postings import PostingsStore, postings_are_complete, write_postings
from tests.embedding_stores import corpus_of
from tests.sparse_stores import make_postings, random_sparse

SIZES, V = (4, 33, 5, 1), 21
N = sum(SIZES)
ALL_NV = random_sparse(N, V, seed=0, share=0.3)
MANIFEST = corpus_of(SIZES)
STAMP = Stamp("3", "b" * 64, MANIFEST.sha256)
ENTRY = MANIFEST.shards[1]


def dense_of(store: PostingsStore, shards: range | None = None) -> np.ndarray:
    dense_NV = np.zeros((store.num_documents, store.num_terms), dtype=np.float32)
    for block in store.blocks(shards):
        for term in range(store.num_terms):
            mine = slice(block.starts_V[term], block.starts_V[term + 1])
            assert (np.diff(block.documents_P[mine].astype(int)) > 0).all(), "ascending, none twice"
            dense_NV[block.first_document + block.documents_P[mine].astype(int), term] = block.weights_P[mine]
    return dense_NV


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("block_size", [2**16, 8])
def test_what_was_written_is_read(tmp_path: Path, dtype: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.postings, "DOCUMENTS_PER_BLOCK", block_size)
    store = make_postings(tmp_path, ALL_NV, SIZES, dtype=dtype)
    assert (store.num_documents, store.num_terms, store.dtype) == (N, V, dtype)
    assert store.num_postings == (ALL_NV > 0).sum()
    found = [(block.first_document, block.num_documents) for block in store.blocks()]
    assert found == (
        [(0, 4), (4, 33), (37, 5), (42, 1)]
        if block_size > N
        else [(0, 4), *((4 + 8 * number, 8) for number in range(4)), (36, 1), (37, 5), (42, 1)]
    )
    expected_NV = ALL_NV.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(dense_of(store), expected_NV)
    np.testing.assert_array_equal(dense_of(store, range(1, 3))[4:42], expected_NV[4:42])
    assert not dense_of(store, range(1, 3))[42:].any()


def test_arrays_are_mapped_and_not_writable(tmp_path: Path) -> None:
    (block, *_) = make_postings(tmp_path, ALL_NV, SIZES).blocks()
    assert not block.weights_P.flags.writeable
    assert not block.documents_P.flags.writeable
    assert (block.weights_P.dtype, block.documents_P.dtype) == (np.float32, np.uint16)


def test_the_order_of_terms_in_a_document_does_not_show(tmp_path: Path) -> None:
    """Equal vectors give equal bytes, however an encoder lists them, and whether or not it lists zeros."""
    rows_NV = sparse.csr_array(ALL_NV[ENTRY.documents])
    spans = [slice(*span) for span in pairwise(rows_NV.indptr.tolist())]
    turned_NV = sparse.csr_array(
        (
            np.concatenate([*(rows_NV.data[span][::-1] for span in spans), np.zeros(1, np.float32)]),
            np.concatenate([*(rows_NV.indices[span][::-1] for span in spans), [7]]),
            np.append(rows_NV.indptr[:-1], rows_NV.indptr[-1] + 1),
        ),
        shape=rows_NV.shape,
    )
    hashes = set()
    for name, vectors_NV in (("a", rows_NV), ("b", turned_NV)):
        before = vectors_NV.data.copy(), vectors_NV.indices.copy()
        write_postings(tmp_path / name, ENTRY, vectors_NV, STAMP)
        np.testing.assert_array_equal(vectors_NV.data, before[0])
        np.testing.assert_array_equal(vectors_NV.indices, before[1])
        files = sorted((tmp_path / name).iterdir())
        hashes.add(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest())
    assert len(hashes) == 1


def test_what_is_0_in_float16_is_no_posting(tmp_path: Path) -> None:
    weights_NV = np.full((4, V), 1e-9, dtype=np.float32)
    weights_NV[2, 3] = 1
    all_NV = np.concatenate([weights_NV, ALL_NV[4:]])
    store = make_postings(tmp_path, all_NV, SIZES, dtype="float16")
    assert store.num_postings == 1 + (ALL_NV[4:] > 0).sum()


@pytest.mark.parametrize(
    ("value", "dtype", "word"),
    [
        (np.nan, "float32", "nan"),
        (np.inf, "float32", "inf"),
        (-0.5, "float32", "-0.5"),
        (1e5, "float16", r"100000.*(?s:.*)65504"),
    ],
)
def test_weights_that_no_search_can_add_up_are_refused(tmp_path: Path, value: float, dtype: str, word: str) -> None:
    """A score above 0 tells the documents that share a term only where no weight is below 0."""
    bad_NV = ALL_NV[ENTRY.documents].copy()
    bad_NV[5, 2] = bad_NV[6, 3] = value
    pattern = rf"term 2 in document 9 \(shard 000001.tar\) is {word}"
    with pytest.raises(ArtifactError, match=pattern) as raised:
        write_postings(tmp_path, ENTRY, sparse.csr_array(bad_NV), STAMP, dtype=dtype)  # type: ignore[arg-type]
    assert "and 1 more of this shard" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [ALL_NV[:32], ALL_NV[:34], ALL_NV[:33].astype(np.float64), ALL_NV[:33, :0]])
def test_another_shape_or_type_is_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ArtifactError, match=r"(?s)shard 000001.tar are .*float32 \[33, V\]"):
        write_postings(tmp_path, ENTRY, sparse.csr_array(wrong), STAMP)


def test_missing_stale_short_and_damaged_parts_are_named(tmp_path: Path) -> None:
    make_postings(tmp_path, ALL_NV, SIZES)
    rows_NV = sparse.csr_array(ALL_NV[ENTRY.documents])
    path = tmp_path / "part-000001.npy"
    whole = path.read_bytes()

    def opened(pattern: str, *, verify: bool = False) -> None:
        with pytest.raises(ArtifactError, match=pattern):
            PostingsStore.open(tmp_path, MANIFEST, STAMP, verify=verify)

    path.write_bytes(whole[:-2])
    assert not postings_are_complete(tmp_path, ENTRY, STAMP)
    opened(r"(?s)postings@3 has 10 rows, the corpus manifest says 43; part 1 is short .*delete .*part-000001")
    path.write_bytes(whole[:-1] + b"\x09")
    assert postings_are_complete(tmp_path, ENTRY, STAMP)
    opened("part 1 is damaged", verify=True)
    path.unlink()
    opened("part 1 is missing")
    write_postings(tmp_path, ENTRY, rows_NV, Stamp("2", "c" * 64, MANIFEST.sha256))
    opened("part 1 is stale: it was made by iteration 2, weights cccccccccccc")
    write_postings(tmp_path, ENTRY, rows_NV, STAMP, dtype="float16")
    opened("mixes parts")
    write_postings(tmp_path, ENTRY, rows_NV, STAMP)
    assert PostingsStore.open(tmp_path, MANIFEST, STAMP, verify=True).num_documents == N


def test_embeddings_are_no_postings(tmp_path: Path) -> None:
    for entry in MANIFEST.shards:
        write_part(tmp_path, entry, ALL_NV[entry.documents], STAMP)
    EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    with pytest.raises(ArtifactError, match="part 0 has a damaged marker"):
        PostingsStore.open(tmp_path, MANIFEST, STAMP)


def test_a_marker_that_lies_about_the_array_is_found_at_first_use(tmp_path: Path) -> None:
    make_postings(tmp_path, ALL_NV, SIZES)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace('"float32"', '"float16"'))
    with pytest.raises(ArtifactError, match=r"part-000000\.npy holds \d+ bytes"):
        next(PostingsStore.open(tmp_path, MANIFEST, STAMP).blocks())


def test_a_crash_while_rewriting_leaves_no_marker_of_the_old_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_NV, old = sparse.csr_array(ALL_NV[ENTRY.documents]), Stamp("2", "c" * 64, STAMP.corpus_sha256)
    write_postings(tmp_path, ENTRY, rows_NV, old)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shards.embeddings.write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        write_postings(tmp_path, ENTRY, rows_NV, STAMP)
    assert not postings_are_complete(tmp_path, ENTRY, old)
    assert not postings_are_complete(tmp_path, ENTRY, STAMP)

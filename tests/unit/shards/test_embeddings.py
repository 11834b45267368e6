"""A store opens whole, of one stamp, or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shards.embeddings import EmbeddingStore, Stamp, part_is_complete, write_part
from shards.errors import ArtifactError
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name

HASH = "a" * 64
SIZES = (4, 3, 5, 1)
D = 6


def make_manifest(sizes: Sequence[int] = SIZES) -> CorpusManifest:
    firsts = np.cumsum([0, *sizes]).tolist()
    entries = tuple(
        ShardEntry(shard_name(number), 1024, HASH, size, firsts[number], HASH, {"retriever": size})
        for number, size in enumerate(sizes)
    )
    streams = (TokenStream("retriever", HASH, 8),)
    return CorpusManifest(HASH, "{text}", streams, entries, sum(sizes), {"retriever": sum(sizes)}, HASH)


MANIFEST = make_manifest()
STAMP = Stamp("3", "b" * 64, MANIFEST.sha256)
ALL_ND = np.random.default_rng(0).standard_normal((sum(SIZES), D)).astype(np.float32)


def write_all(folder: Path, dtype: npt.DTypeLike = np.float32, skip: Sequence[int] = ()) -> None:
    for entry in reversed(MANIFEST.shards):  # any order will do
        if entry.number not in skip:
            write_part(folder, entry, ALL_ND[entry.documents].astype(dtype), STAMP)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_in_any_order_with_repeats(tmp_path: Path, dtype: type[np.floating]) -> None:
    write_all(tmp_path, dtype)
    store = EmbeddingStore.open(tmp_path, MANIFEST, STAMP, verify=True)
    assert (store.num_documents, store.dimension, store.dtype) == (13, D, np.dtype(dtype).name)
    expected_ND = ALL_ND.astype(dtype).astype(np.float32)
    rng = np.random.default_rng(1)
    for indices_K in (rng.integers(0, 13, 50), np.arange(13)[::-1], np.array([12, 0, 12, 3, 4]), np.array([7])):
        rows_KD = store.rows(indices_K)
        assert rows_KD.dtype == np.float32
        np.testing.assert_array_equal(rows_KD, expected_ND[indices_K])
    assert store.rows(np.array([], dtype=np.int64)).shape == (0, D)


def test_parts_are_the_whole_in_order(tmp_path: Path) -> None:
    write_all(tmp_path, np.float16)
    store = EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    parts = list(store.parts())
    assert [first for first, _ in parts] == [0, 4, 7, 12]
    assert all(isinstance(part_ND, np.memmap) and not part_ND.flags.writeable for _, part_ND in parts)
    np.testing.assert_array_equal(np.concatenate([part_ND for _, part_ND in parts]), ALL_ND.astype(np.float16))


@pytest.mark.parametrize("indices", [[-1], [0, 13], [3, -1, 4]])
def test_rows_outside_the_corpus_are_refused(tmp_path: Path, indices: list[int]) -> None:
    """The -1 that pads a list of hits would otherwise read the last document."""
    write_all(tmp_path)
    with pytest.raises(IndexError):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP).rows(np.array(indices))


def test_a_store_pickles_to_spawned_workers(tmp_path: Path) -> None:
    write_all(tmp_path)
    store = EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    store.rows(np.arange(13))
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.rows(np.array([5, 1])), ALL_ND[[5, 1]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    """An index swallows NaN vectors without a word, and the documents are never found again."""
    entry = MANIFEST.shards[2]
    bad_ND = ALL_ND[entry.documents].copy()
    bad_ND[3, 2] = value
    bad_ND[4, 0] = value
    with pytest.raises(ArtifactError, match=r"document 10 .*not finite, as are 1 more"):
        write_part(tmp_path, entry, bad_ND, STAMP)
    assert list(tmp_path.iterdir()) == []


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    with np.errstate(over="ignore"):
        large_ND = np.full((4, D), 1e5, dtype=np.float32).astype(np.float16)
    with pytest.raises(ArtifactError, match=r"up to 65504. Remedy: start again with index.embedding_dtype=float32"):
        write_part(tmp_path, MANIFEST.shards[0], large_ND, STAMP)
    large_ND[2, 1] = np.nan
    with pytest.raises(ArtifactError, match=r"Remedy: look for a training run that diverged"):
        write_part(tmp_path, MANIFEST.shards[0], large_ND, STAMP)


def test_parts_of_another_type_are_made_again(tmp_path: Path) -> None:
    """Symptom: after a change to float32 the parts of float16 stayed, and the store refused the mixture."""
    write_all(tmp_path, np.float16)
    entry = MANIFEST.shards[1]
    assert part_is_complete(tmp_path, entry, STAMP)
    assert part_is_complete(tmp_path, entry, STAMP, "float16")
    assert not part_is_complete(tmp_path, entry, STAMP, "float32")


@pytest.mark.parametrize(
    "wrong", [ALL_ND[:3], ALL_ND[:5], ALL_ND[:4].astype(np.float64), ALL_ND[:4, 0], ALL_ND[:4, :0]]
)
def test_another_shape_or_type_is_refused(tmp_path: Path, wrong: npt.NDArray[np.floating]) -> None:
    with pytest.raises(ArtifactError, match=r"float16 or float32 \[4, D\]"):
        write_part(tmp_path, MANIFEST.shards[0], wrong, STAMP)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_all(tmp_path, skip=[1, 3])
    pattern = "embeddings@3 has 9 rows, the corpus manifest says 13; part 1 is missing, and 1 more"
    with pytest.raises(ArtifactError, match=pattern):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    complete = [part_is_complete(tmp_path, entry, STAMP) for entry in MANIFEST.shards]
    assert complete == [True, False, True, False]


@pytest.mark.parametrize(
    ("stamp", "made"),
    [
        (Stamp("2", STAMP.weights_sha256, STAMP.corpus_sha256), "iteration 2"),
        (Stamp("3", "c" * 64, STAMP.corpus_sha256), "weights cccccccccccc"),
        (Stamp("3", STAMP.weights_sha256, "d" * 64), "corpus dddddddddddd"),
    ],
)
def test_a_stale_part_is_named(tmp_path: Path, stamp: Stamp, made: str) -> None:
    write_all(tmp_path)
    entry = MANIFEST.shards[2]
    write_part(tmp_path, entry, ALL_ND[entry.documents], stamp)
    assert not part_is_complete(tmp_path, entry, STAMP)
    assert part_is_complete(tmp_path, entry, stamp)
    with pytest.raises(ArtifactError, match=f"(?s)8 rows.*part 2 is stale.*{made}.*part-000002"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)


def test_a_truncated_part_is_short(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "part-000002.npy"
    path.write_bytes(path.read_bytes()[: -D * 4])
    assert not part_is_complete(tmp_path, MANIFEST.shards[2], STAMP)
    with pytest.raises(ArtifactError, match=r"(?s)part 2 is short .*delete"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)


def test_a_part_of_another_split_is_short_and_its_rows_count(tmp_path: Path) -> None:
    write_all(tmp_path)
    other = ShardEntry("000002.tar", 1024, HASH, 4, 7, HASH, {"retriever": 4})
    write_part(tmp_path, other, ALL_ND[:4], STAMP)
    assert not part_is_complete(tmp_path, MANIFEST.shards[2], STAMP)
    with pytest.raises(ArtifactError, match=r"12 rows, the corpus manifest says 13; part 2 is short \(4 of 5 rows\)"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)


def test_an_array_without_its_marker_does_not_count(tmp_path: Path) -> None:
    """The state that a kill between the array and the marker leaves."""
    write_all(tmp_path)
    (tmp_path / "part-000000.json").unlink()
    assert not part_is_complete(tmp_path, MANIFEST.shards[0], STAMP)
    with pytest.raises(ArtifactError, match="part 0 is missing"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)


def test_a_crash_while_rewriting_leaves_no_marker_of_the_old_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = MANIFEST.shards[0]
    old = Stamp("2", "c" * 64, STAMP.corpus_sha256)
    write_part(tmp_path, entry, ALL_ND[:4], old)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shards.embeddings.write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path, entry, ALL_ND[4:8], STAMP)
    assert not part_is_complete(tmp_path, entry, old)
    assert not part_is_complete(tmp_path, entry, STAMP)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stamp": {}}', "null"])
def test_a_damaged_marker_is_no_marker(tmp_path: Path, content: str) -> None:
    write_all(tmp_path)
    (tmp_path / "part-000001.json").write_text(content)
    assert not part_is_complete(tmp_path, MANIFEST.shards[1], STAMP)
    with pytest.raises(ArtifactError, match="part 1 has a damaged marker"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)


def test_a_flipped_bit_is_found_when_asked_for(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "part-000001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    with pytest.raises(ArtifactError, match="part 1 is damaged"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP, verify=True)


def test_parts_of_different_dimensions_or_types_do_not_mix(tmp_path: Path) -> None:
    write_all(tmp_path)
    entry = MANIFEST.shards[3]
    write_part(tmp_path, entry, np.ones((1, D + 1), np.float32), STAMP)
    with pytest.raises(ArtifactError, match="mixes parts"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    write_part(tmp_path, entry, np.ones((1, D), np.float16), STAMP)
    with pytest.raises(ArtifactError, match="mixes parts"):
        EmbeddingStore.open(tmp_path, MANIFEST, STAMP)


def test_a_marker_that_lies_about_the_array_is_found_at_first_use(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = tmp_path / "part-000000.json"
    for name in sorted(tmp_path.glob("*.json")):
        name.write_text(json.dumps(json.loads(name.read_text()) | {"dtype": "float16"}))
    assert path.exists()
    store = EmbeddingStore.open(tmp_path, MANIFEST, STAMP)
    with pytest.raises(ArtifactError, match=r"part-000000\.npy holds float32"):
        store.rows(np.array([0]))


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path)
    with pytest.raises(ArtifactError, match="were asked for corpus"):
        EmbeddingStore.open(tmp_path, make_manifest((4, 3, 6)), STAMP)


@pytest.mark.parametrize(
    ("documents", "firsts"),
    [
        (range(13), [0, 4, 7, 12]),
        (range(4), [0]),
        (range(3, 5), [0, 4]),
        (range(4, 7), [4]),
        (range(12, 13), [12]),
        (range(5, 5), []),
    ],
)
def test_only_the_parts_of_some_documents_are_opened(tmp_path: Path, documents: range, firsts: list[int]) -> None:
    """Symptom: filling one of 64 index parts of a billion documents opened the files of all 50,000 shards."""
    write_all(tmp_path, skip=[entry.number for entry in MANIFEST.shards if entry.first_document not in firsts])
    store = EmbeddingStore(tmp_path, MANIFEST, STAMP, D, "float32")
    assert [first for first, _ in store.parts(documents)] == firsts

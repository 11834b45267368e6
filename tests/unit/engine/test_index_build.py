"""An index is trained once, holds every document once, and is made of parts of one training only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from engine.errors import ArtifactError, ConfigError
from engine.index_build import (
    IndexPlan,
    add_part,
    choose_factory,
    faiss_threads,
    fingerprint,
    merge_parts,
    plan_index,
    read_index,
    train_index,
    write_index,
)
from shards.embeddings import EmbeddingStore, Stamp, write_part
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name

SIZES = (150, 7, 93)
N, D = sum(SIZES), 8
EMBEDDINGS_ND = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
PLAN = IndexPlan("ivfpq", "IVF5,PQ4x4fs", 5, 2, 4, N, 4)


def make_store(folder: Path) -> EmbeddingStore:
    firsts = np.cumsum([0, *SIZES]).tolist()
    entries = tuple(
        ShardEntry(shard_name(i), 1024, "a" * 64, size, firsts[i], "a" * 64, {"r": 1}) for i, size in enumerate(SIZES)
    )
    stream = TokenStream("r", "a" * 64, 8)
    manifest = CorpusManifest("a" * 64, "{text}", (stream,), entries, N, {"r": len(SIZES)}, "a" * 64)
    stamp = Stamp("0", "b" * 64, manifest.sha256)
    for entry in entries:
        write_part(folder, entry, EMBEDDINGS_ND[entry.documents], stamp)
    return EmbeddingStore.open(folder, manifest, stamp)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "embeddings")


def trained(store: EmbeddingStore, path: Path, seed: int = 0, plan: IndexPlan = PLAN) -> str:
    return write_index(train_index(store, plan, seed), path)


def test_small_corpora_get_lists_they_can_train_and_are_scanned_whole() -> None:
    plan = plan_index("ivfpq", num_documents=5000, dimension=384)
    assert plan.factory == "IVF128,PQ192x4fs"
    assert (plan.num_lists, plan.nprobe, plan.train_size, plan.refine_factor) == (128, 128, 5000, 4)
    assert choose_factory(300, 32) == "IVF7,PQ16x4fs"
    assert choose_factory(20, 7) == "IVF1,PQ1x4fs"
    for num_documents in (20, 300, 5000, 60_000):
        plan = plan_index("ivfpq", num_documents=num_documents, dimension=24)
        assert plan.num_lists <= plan.train_size <= num_documents
        assert plan.nprobe <= plan.num_lists


def test_large_corpora_get_the_guidelines_sizes() -> None:
    assert choose_factory(8_841_823, 768) == "OPQ64,IVF16384,PQ64"
    assert choose_factory(21_015_324, 768) == "OPQ96,IVF65536_HNSW32,PQ96"
    plan = plan_index("ivfpq", num_documents=8_841_823, dimension=768)
    assert (plan.num_lists, plan.nprobe, plan.train_size) == (16384, 64, 40 * 16384)
    middle = plan_index("ivfpq", num_documents=500_000, dimension=64)
    assert middle.num_lists == 4 * 707
    assert 16384 <= middle.nprobe / middle.num_lists * 500_000 < 17_000


def test_what_is_given_is_kept() -> None:
    plan = plan_index(
        "ivfpq",
        num_documents=5000,
        dimension=16,
        factory="OPQ4,IVF20,PQ4x6",
        nprobe=3,
        refine_factor=9,
        train_size=700,
        num_iterations=2,
    )
    assert plan == IndexPlan("ivfpq", "OPQ4,IVF20,PQ4x6", 20, 3, 9, 700, 2)
    assert plan_index("ivfpq", num_documents=5000, dimension=16, factory="IVF20,SQ8", nprobe=99).nprobe == 20
    assert plan_index("flat", num_documents=3, dimension=16).kind == "flat"


@pytest.mark.parametrize(
    ("factory", "more", "message"),
    [
        ("IVF301,PQ4x4", {}, "301 inverted lists, but 300 embeddings"),
        ("IVF8,PQ4", {"num_documents": 200}, "256 entries in a codebook, but 200 embeddings"),
        (None, {"num_documents": 15}, "16 entries in a codebook, but 15"),
        ("IVF30,PQ4x4", {"train_size": 29}, "30 inverted lists, but 29 embeddings"),
        ("IVF8,PQ5x4", {}, "cannot make 'IVF8,PQ5x4' for embeddings of 16 dimensions"),
        ("IVF8,Nonsense", {}, "cannot make"),
        ("Flat", {}, "cannot make 'Flat'"),
        ("Flat", {"kind": "flat"}, "kind is flat"),
    ],
)
def test_what_cannot_be_built_is_refused(factory: str | None, more: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"kind": "ivfpq", "num_documents": 300, "dimension": 16, "factory": factory} | more
    with pytest.raises(ConfigError, match=message):
        plan_index(settings.pop("kind"), **settings)


def test_training_depends_on_the_seed_alone(store: EmbeddingStore) -> None:
    with faiss_threads(1):
        one = train_index(store, PLAN, 3)
    assert one.ntotal == 0
    assert fingerprint(one) == fingerprint(train_index(store, PLAN, 3))
    assert fingerprint(one) != fingerprint(train_index(store, PLAN, 4))


def test_only_the_sample_is_loaded(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = EmbeddingStore.rows
    monkeypatch.setattr(EmbeddingStore, "rows", lambda self, ids: asked.append(ids) or rows(self, ids))
    train_index(store, IndexPlan("ivfpq", "IVF4,PQ4x4", 4, 1, 4, 60, 2), 0)
    (sample,) = asked
    assert len(np.unique(sample)) == len(sample) == 60
    assert sample.max() > SIZES[0]


@pytest.mark.parametrize("factory", ["IVF5,PQ4x4fs", "IVF5,PQ4x5", "IVF5,SQ8"])
def test_parts_merge_to_what_one_would_have_made(
    store: EmbeddingStore, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.index_build._ADD_BYTES", 4 * D * 40)  # a shard is added in several pieces
    plan = IndexPlan("ivfpq", factory, 5, 5, 4, N, 4)
    start = tmp_path / "trained.faiss"
    sha256 = trained(store, start, plan=plan)
    shares: tuple[list[int], ...] = ([0, 2], [], [1])
    parts = {
        tmp_path / f"part-{rank}": add_part(start, sha256, store, own, tmp_path / f"part-{rank}")
        for rank, own in enumerate(shares)
    }
    merged_sha256 = merge_parts(start, sha256, parts, tmp_path / "index.faiss", N)
    merged = read_index(tmp_path / "index.faiss", merged_sha256)
    whole = read_index(start, sha256)
    whole.add_with_ids(EMBEDDINGS_ND, np.arange(N))
    scores, documents = merged.search(EMBEDDINGS_ND[:20], N)
    expected_scores, expected = whole.search(EMBEDDINGS_ND[:20], N)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(np.sort(documents), np.tile(np.arange(N), (20, 1)))
    for row in range(20):  # documents of equal codes tie in any order
        order, wanted = np.lexsort((documents[row], -scores[row])), np.lexsort((expected[row], -expected_scores[row]))
        np.testing.assert_array_equal(documents[row][order], expected[row][wanted])


def test_a_part_of_another_training_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    sha256 = trained(store, tmp_path / "trained.faiss")
    other = trained(store, tmp_path / "other.faiss", seed=1)
    good = add_part(tmp_path / "trained.faiss", sha256, store, [0], tmp_path / "good")
    stray = add_part(tmp_path / "other.faiss", other, store, [1, 2], tmp_path / "stray")
    with pytest.raises(ArtifactError, match="stray was made from another trained index"):
        merge_parts(
            tmp_path / "trained.faiss",
            sha256,
            {tmp_path / "good": good, tmp_path / "stray": stray},
            tmp_path / "index.faiss",
            N,
        )
    assert not (tmp_path / "index.faiss").exists()


@pytest.mark.parametrize("difference", ["codebook", "residual"])
def test_differences_that_faiss_merges_silently_are_refused(
    store: EmbeddingStore, tmp_path: Path, difference: str
) -> None:
    """The lists' centroids are equal, so FAISS sees nothing wrong, and codes would mean something else."""
    start = tmp_path / "trained.faiss"
    plan = IndexPlan("ivfpq", "IVF5,PQ4x4", 5, 5, 4, N, 4)
    sha256 = trained(store, start, plan=plan)
    index = read_index(start, sha256)
    if difference == "codebook":
        centroids = faiss.vector_to_array(index.pq.centroids)
        faiss.copy_array_to_vector(centroids[::-1].copy(), index.pq.centroids)
    else:
        index.by_residual = not index.by_residual
    stray = write_index(index, tmp_path / "stray.faiss")
    parts = {
        tmp_path / "a": add_part(start, sha256, store, [0, 1], tmp_path / "a"),
        tmp_path / "b": add_part(tmp_path / "stray.faiss", stray, store, [2], tmp_path / "b"),
    }
    faiss.merge_into(faiss.read_index(str(tmp_path / "a")), faiss.read_index(str(tmp_path / "b")), False)
    with pytest.raises(ArtifactError, match="another trained index"):
        merge_parts(start, sha256, parts, tmp_path / "index.faiss", N)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (([0], [2]), r"hold 243 documents in all; 7 are missing \(the first is 150\), 0 occur"),
        (([0, 1], [1, 2]), r"0 are missing \(the first is none\), 7 occur more than once \(the first is 150\)"),
        (([0, 1], [0]), r"93 are missing \(the first is 157\), 150 occur"),
    ],
)
def test_every_document_must_be_there_once(
    store: EmbeddingStore, tmp_path: Path, shares: tuple[list[int], ...], message: str
) -> None:
    start = tmp_path / "trained.faiss"
    sha256 = trained(store, start)
    parts = {
        tmp_path / f"p{i}": add_part(start, sha256, store, own, tmp_path / f"p{i}") for i, own in enumerate(shares)
    }
    with pytest.raises(ArtifactError, match=message):
        merge_parts(start, sha256, parts, tmp_path / "index.faiss", N)
    assert not (tmp_path / "index.faiss").exists()


def test_a_flipped_bit_a_missing_and_a_short_file_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    path = tmp_path / "trained.faiss"
    sha256 = trained(store, path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    faiss.read_index(str(path))  # FAISS takes it
    with pytest.raises(ArtifactError, match="has sha256"):
        add_part(path, sha256, store, [0], tmp_path / "part")
    path.write_bytes(whole[:-9])
    with pytest.raises(ArtifactError, match="has sha256"):
        read_index(path, sha256)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        read_index(path, sha256)
    assert not (tmp_path / "part").exists()

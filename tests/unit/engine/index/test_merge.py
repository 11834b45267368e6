"""Parts merge to what a single add would have made, whoever filled them, and only parts of one training do."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from engine.config.recipe import IndexConfig
from engine.errors import ArtifactError
from engine.index.dense import document_parts, open_files
from engine.index.files import (
    MappedLists,
    fingerprint,
    list_sizes,
    parse_index,
    part_is_complete,
    part_path,
    read_index,
    write_part,
)
from engine.index.merge import check_parts, merge_parts
from engine.index.plan import IndexPlan, plan_index
from engine.index.train import fill_part
from shards.embeddings import EmbeddingStore
from shards.errors import DiskFullError
from tests.embedding_stores import clustered, make_store, trained_in, trained_index
from tests.small_disk import run_on_small_disk

SIZES = (150, 7, 93, 61, 300, 1, 133, 40, 90)
N, D = sum(SIZES), 16
EMBEDDINGS_ND = clustered(N, D, 0)
FACTORIES = ("IVF5,PQ4x4fs", "IVF5,PQ4x5", "OPQ4,IVF5_HNSW4,PQ4x4", "OPQ4,IVF5,PQ4x4fsr", "IVF5,SQ8", "IVF5,Flat")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path, EMBEDDINGS_ND, SIZES)


def plan_of(factory: str, **settings: Any) -> IndexPlan:
    asked = IndexConfig(factory=factory, kmeans_iterations=3, recall_floor=0.0, **settings)
    return plan_index(asked, num_documents=N, dimension=D)


def fill(folder: Path, store: EmbeddingStore, plan: IndexPlan, order: Any = None) -> str:
    trained = trained_in(folder, store, plan, 0)
    parts = document_parts(store.manifest)
    for number in order or range(len(parts)):
        fill_part(folder, trained, store, number, parts[number])
    return trained


def merge(folder: Path, store: EmbeddingStore, plan: IndexPlan, trained: str) -> Any:
    return merge_parts(folder, plan.factory, document_parts(store.manifest), trained, store.stamp)


@pytest.mark.parametrize("factory", FACTORIES)
def test_merged_equals_a_single_add(
    store: EmbeddingStore, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAISS's own merge of interleaved 4-bit codes found other documents, and ended in a corrupted heap."""
    monkeypatch.setattr("engine.index.train._ADD_BYTES", 4 * D * 40)  # a part is added in several pieces
    monkeypatch.setattr("engine.index.merge._WINDOW_BYTES", 1000)
    plan = plan_of(factory)
    trained = fill(tmp_path, store, plan)
    merged = parse_index(tmp_path / merge(tmp_path, store, plan, trained).name)
    whole = read_index(tmp_path / "trained.faiss", trained)
    whole.add_with_ids(EMBEDDINGS_ND, np.arange(N))
    if "fs" in factory:
        outer, plain = faiss.downcast_index(whole), faiss.downcast_index(faiss.extract_index_ivf(whole))
        interleaved = faiss.IndexIVFPQFastScan(plain)
        if outer.this != plain.this:
            outer.own_fields, outer.index = False, interleaved
        else:
            whole, kept = interleaved, whole  # noqa: F841 - it owns the quantizer
    assert merged.ntotal == N
    for index in (merged, whole):
        faiss.extract_index_ivf(index).nprobe = 3
    scores, documents = merged.search(EMBEDDINGS_ND[:30], 60)
    expected_scores, expected = whole.search(EMBEDDINGS_ND[:30], 60)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(documents, expected)


@pytest.mark.parametrize("factory", ["IVF5,PQ8x6", "OPQ8,IVF5_HNSW4,PQ8x6", "IVF5,SQ8"])
def test_memory_disk_and_parts_find_the_same(store: EmbeddingStore, tmp_path: Path, factory: str) -> None:
    """An index that outgrows the memory must not find other documents than one that fits."""
    trained = fill(tmp_path, store, plan_of(factory))
    parts = document_parts(store.manifest)
    merged = merge(tmp_path, store, plan_of(factory), trained)
    markers = check_parts(tmp_path, parts, trained, store.stamp)
    start = replace(merged, name="trained.faiss", num_bytes=(tmp_path / "trained.faiss").stat().st_size, sha256=trained)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (*tmp_path.glob("*.faiss"), *tmp_path.glob("part-*")):
        shutil.move(path, moved)  # no file may hold the old folder's name
    found = {}
    for placement in ("memory", "disk", "parts"):
        files = [start, *(marker.file for marker in markers)] if placement == "parts" else [merged]
        probed = open_files(moved, files, plan_of(factory, placement=placement), verify=True)
        found[placement] = probed.search(EMBEDDINGS_ND[:40], 50, nprobe=2, needed=10)
        assert probed.num_parts == (len(parts) if placement == "parts" else 1)
    for placement in ("disk", "parts"):
        np.testing.assert_array_equal(found[placement].scores_QK, found["memory"].scores_QK)
        np.testing.assert_array_equal(found[placement].documents_QK, found["memory"].documents_QK)


def test_mapped_lists_are_mapped_and_given_back(store: EmbeddingStore, tmp_path: Path) -> None:
    """Lists that Python could not free kept the files of every index that was ever opened on the disk."""
    fill(tmp_path, store, plan_of("IVF5,PQ4x4"), [0])
    name = str(part_path(tmp_path, 0))
    held = [MappedLists(part_path(tmp_path, 0)) for _ in range(3)]
    assert list_sizes(held[0].lists).sum() == len(document_parts(store.manifest)[0])
    assert Path("/proc/self/maps").read_text().count(name) == 3
    del held
    assert name not in Path("/proc/self/maps").read_text()


def test_the_order_and_the_maker_of_parts_do_not_show(store: EmbeddingStore, tmp_path: Path) -> None:
    plan = plan_of("IVF5,PQ4x4fs")
    first = merge(tmp_path, store, plan, fill(tmp_path, store, plan))
    other = tmp_path / "other"
    trained = fill(other, store, plan, [7, 0, 3, 1, 2, 6, 5, 4])
    assert merge(other, store, plan, trained) == first
    assert (tmp_path / "index.faiss").read_bytes() == (other / "index.faiss").read_bytes()


def test_a_part_of_another_training_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    """FAISS merges codes of different codebooks without a word."""
    plan = plan_of("IVF5,PQ4x4")
    trained = fill(tmp_path, store, plan)
    other = tmp_path / "other"
    sha256 = trained_in(other, store, plan, 1)
    assert sha256 != trained
    parts = document_parts(store.manifest)
    fill_part(other, sha256, store, 2, parts[2])
    for suffix in (".lists", ".json"):
        shutil.copy(part_path(other, 2).with_suffix(suffix), part_path(tmp_path, 2).with_suffix(suffix))
    assert not part_is_complete(tmp_path, 2, parts[2], trained, store.stamp)
    with pytest.raises(ArtifactError, match=r"part-002\.lists was made from another trained index"):
        merge(tmp_path, store, plan, trained)
    assert not (tmp_path / "index.faiss").exists()


def test_parts_of_another_iteration_and_missing_ones_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    plan = plan_of("IVF5,PQ4x4")
    trained = fill(tmp_path, store, plan)
    parts = document_parts(store.manifest)
    with pytest.raises(ArtifactError, match=r"part-000\.lists was made from other embeddings"):
        check_parts(tmp_path, parts, trained, replace(store.stamp, iteration="4"))
    part_path(tmp_path, 3).unlink()
    with pytest.raises(ArtifactError, match=r"part-003\.lists is missing"):
        merge(tmp_path, store, plan, trained)
    part_path(tmp_path, 3).with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match=r"the marker of index part 3 is missing"):
        merge(tmp_path, store, plan, trained)
    part_path(tmp_path, 2).with_suffix(".json").write_text('{"stamp": {}}')
    with pytest.raises(ArtifactError, match=r"the marker of index part 2 .*part-002[.]json is damaged"):
        merge(tmp_path, store, plan, trained)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
@pytest.mark.parametrize("name", ["part-004.lists", "trained.faiss"])
def test_damage_is_found_before_anything_is_merged(
    store: EmbeddingStore, tmp_path: Path, damage: str, name: str
) -> None:
    """FAISS itself reads a file with a flipped bit as if nothing had happened."""
    plan = plan_of("IVF5,PQ4x4")
    trained = fill(tmp_path, store, plan)
    whole = bytearray((tmp_path / name).read_bytes())
    if damage == "flip":
        whole[len(whole) // 2] ^= 1
    (tmp_path / name).write_bytes(whole if damage == "flip" else whole[: -9 if damage == "cut" else 0])
    with pytest.raises(ArtifactError, match=rf"{name.replace('.', '[.]')} has"):
        merge(tmp_path, store, plan, trained)
    assert not (tmp_path / "index.faiss").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([*range(10, 19)], r"lacks 1 documents \(the first is 19\), holds 0 more than once"),
        ([*range(10, 20), 12], r"lacks 0 .* holds 1 more than once \(the first is 12\)"),
        ([*range(10, 20), 20], r"lacks 0 .* and 1 of other parts"),
    ],
)
def test_every_document_must_be_in_its_part_once(
    store: EmbeddingStore, tmp_path: Path, ids: list[int], message: str
) -> None:
    index = trained_index(tmp_path, store, plan_of("IVF5,PQ4x4"), 0)
    index.add_with_ids(EMBEDDINGS_ND[: len(ids)], np.array(ids))
    with pytest.raises(ArtifactError, match=message):
        write_part(tmp_path, 0, faiss.extract_index_ivf(index).invlists, range(10, 20), "a" * 64, store.stamp)
    assert not part_path(tmp_path, 0).exists()


def test_a_disk_without_room_is_seen_before_the_merge(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("IVF5,PQ4x4")
    trained = fill(tmp_path, store, plan)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("engine.index.merge.shutil.disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(DiskFullError, match="has 10 bytes free, the merged index needs"):
        merge(tmp_path, store, plan, trained)
    monkeypatch.undo()
    assert merge(tmp_path, store, plan, trained).num_bytes > 0


FULL_DISK = """
from engine.index import merge as index_merge
from shards.errors import DiskFullError
from tests.embedding_stores import clustered, make_store, trained_in, trained_index
from tests.unit.engine.index.test_merge import D, EMBEDDINGS_ND, N, SIZES, fill, merge, plan_of
import numpy as np
sizes = [20 * size for size in SIZES]
store = make_store(disk, np.tile(EMBEDDINGS_ND, (20, 1)), sizes)
plan = plan_of("IVF5,PQ4x4fs")
trained = fill(disk, store, plan)
index_merge._require_room = lambda *_: None  # as if others took the room after it was looked at
used = sum(path.stat().st_size for path in disk.rglob("*"))
free = sum(path.stat().st_blocks * 512 for path in disk.rglob("*")) + 150_000
enlarge(free)
try:
    merge(disk, store, plan, trained)
except DiskFullError as error:
    print(error)
print(sorted(path.name for path in disk.glob("*") if path.name.startswith("index") or ".tmp" in path.name))
enlarge("64m")
print(merge(disk, store, plan, trained).num_bytes > 0)
"""


def test_a_disk_that_fills_up_during_the_merge_keeps_the_parts(tmp_path: Path) -> None:
    told, left, merged = run_on_small_disk(tmp_path / "disk", "64m", FULL_DISK).strip().splitlines()
    assert "disk is full" in told
    assert "index.faiss" not in left
    assert merged == "True"


def test_training_depends_on_the_seed_alone(store: EmbeddingStore, tmp_path: Path) -> None:
    plan = plan_of("OPQ4,IVF5,PQ4x4")
    one = trained_index(tmp_path / "one", store, plan, 3)
    assert one.ntotal == 0
    assert fingerprint(one) == trained_in(tmp_path / "again", store, plan, 3)
    assert fingerprint(one) != trained_in(tmp_path / "other", store, plan, 4)


def test_a_trained_index_is_kept_and_another_is_not(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("IVF5,PQ4x4")
    trained = trained_in(tmp_path, store, plan, 0)
    with monkeypatch.context() as patch:
        patch.setattr("engine.index.train.train_index", lambda *_: pytest.fail("nothing was to be trained"))
        assert trained_in(tmp_path, store, plan, 0) == trained
        assert trained_in(tmp_path, store, replace(plan, nprobe=2, recall_target=0.5), 0) == trained
    assert trained_in(tmp_path, store, plan, 1) != trained
    (tmp_path / "trained.faiss").write_bytes(b"damaged")
    assert trained_in(tmp_path, store, plan, 0) == trained


def test_other_dimensions_and_numbers_that_are_not_finite_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    """FAISS counts an embedding of NaN and keeps it in no list."""
    plan = plan_of("IVF5,PQ4x4")
    trained = fill(tmp_path, store, plan, [0])
    wide = make_store(tmp_path / "wide", clustered(N, 2 * D, 0), SIZES)
    with pytest.raises(ArtifactError, match="takes embeddings of 16 dimensions, these have 32"):
        fill_part(tmp_path, trained, wide, 0, document_parts(wide.manifest)[0])
    damaged = np.load(tmp_path / "embeddings" / "part-000004.npy", mmap_mode="r+")
    damaged[13] = np.nan
    damaged.flush()
    first = sum(SIZES[:4])
    with pytest.raises(ArtifactError, match=f"the embedding of document {first + 13} is not finite"):
        fill(tmp_path, store, plan)
    with pytest.raises(ArtifactError, match=f"the embedding of document {first + 13} is not finite"):
        trained_in(tmp_path / "other", store, replace(plan, train_size=N), 0)

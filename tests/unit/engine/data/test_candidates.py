"""Candidates are what was mined, whole and of the right weights, in one piece whoever searched which part."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.data.candidates import Candidates, is_saved, join
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.errors import ArtifactError, DataError
from shards.embeddings import Stamp

STAMP = Stamp("3", "a" * 64, "c" * 64)


def make_candidates(qids: list[str], first_document: int = 0) -> Candidates:
    documents_QK = np.arange(first_document, first_document + 4 * len(qids), dtype=np.int64).reshape(len(qids), 4)
    scores_QK = -documents_QK.astype(np.float32) / 7
    documents_QK[-1:, 2:], scores_QK[-1:, 2:] = -1, -np.inf
    positives = FoundPositives.of([[FoundPositive(900 + row, row + 1, 2.5)] * (row % 2) for row in range(len(qids))])
    return Candidates("dense", STAMP, qids, documents_QK, scores_QK, Counter(positives=2, answers=5), positives)


def test_saved_candidates_come_back_equal(tmp_path: Path) -> None:
    saved = make_candidates(["q 1", "ü"])
    saved.save(tmp_path / "candidates")
    loaded = Candidates.load(tmp_path / "candidates", STAMP)
    assert (loaded.source, loaded.stamp, loaded.qids) == ("dense", STAMP, ["q 1", "ü"])
    assert (loaded.counts["positives"], loaded.counts["answers"]) == (2, 5)
    np.testing.assert_array_equal(loaded.documents_QK, saved.documents_QK)
    np.testing.assert_array_equal(loaded.scores_QK, saved.scores_QK)
    assert (loaded.documents_QK.dtype, loaded.scores_QK.dtype) == (np.int64, np.float32)
    assert sorted(os.listdir(tmp_path / "candidates")) == [
        "candidates.json",
        "documents.npy",
        "positives.npy",
        "scores.npy",
    ]
    assert (loaded.positives.at(0), loaded.positives.at(1)) == ([], [FoundPositive(901, 2, 2.5)])


def test_a_rank_without_queries_can_publish_its_part(tmp_path: Path) -> None:
    """Symptom: with more ranks than queries, the rank without a share fails."""
    empty = Candidates("dense", STAMP, [], np.empty((0, 4), np.int64), np.empty((0, 4), np.float32), Counter())
    empty.save(tmp_path / "empty")
    whole = joined(tmp_path, [make_candidates(["a", "b"]), Candidates.load(tmp_path / "empty")])
    assert whole.qids == ["a", "b"]


def test_row_leaves_out_the_padding() -> None:
    candidates = make_candidates(["a", "b"])
    assert candidates.row("a").tolist() == [0, 1, 2, 3]
    assert candidates.row("b").tolist() == [4, 5]
    with pytest.raises(DataError, match="'c' has no candidates of dense at iteration 3"):
        candidates.row("c")


@pytest.mark.parametrize(
    "other", [replace(STAMP, iteration="2"), replace(STAMP, weights_sha256="b" * 64), replace(STAMP, corpus_sha256="d")]
)
def test_stale_candidates_are_refused(tmp_path: Path, other: Stamp) -> None:
    """Symptom: after a crash a phase trains on the negatives of the iteration before."""
    make_candidates(["a"]).save(tmp_path)
    with pytest.raises(ArtifactError, match="stale"):
        Candidates.load(tmp_path, other)
    assert Candidates.load(tmp_path).stamp == STAMP


@pytest.mark.parametrize("name", ["documents.npy", "scores.npy", "positives.npy"])
def test_a_damaged_array_is_refused(tmp_path: Path, name: str) -> None:
    make_candidates(["a"]).save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=name):
        Candidates.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        Candidates.load(tmp_path)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    make_candidates(["a"]).save(tmp_path)
    (tmp_path / "candidates.json").unlink()
    with pytest.raises(ArtifactError, match="no finished candidates"):
        Candidates.load(tmp_path)


@pytest.mark.parametrize("damage", [{"qids": ["b"]}, {"version": 99}, {"stamp": {"iteration": "3"}}, {"sha256": {}}])
def test_an_altered_manifest_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    make_candidates(["a"]).save(tmp_path)
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ArtifactError):
        Candidates.load(tmp_path)


def test_a_save_that_dies_midway_never_vouches_for_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: new documents beside the manifest and the scores of the iteration before."""
    make_candidates(["a"]).save(tmp_path)
    saved: list[Path] = []

    def die_at_the_second(file: object, header: object) -> None:
        saved.append(tmp_path)
        if len(saved) == 2:
            raise OSError("no space left")
        original(file, header)  # type: ignore[arg-type]

    original = np.lib.format.write_array_header_1_0
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", die_at_the_second)
    with pytest.raises(OSError, match="no space"):
        make_candidates(["b"], 50).save(tmp_path)
    with pytest.raises(ArtifactError, match="no finished candidates"):
        Candidates.load(tmp_path)


def test_shapes_and_repeated_queries_are_refused() -> None:
    good = make_candidates(["a", "b"])
    with pytest.raises(ArtifactError, match="'a' twice"):
        replace(good, qids=["a", "a"])
    with pytest.raises(ArtifactError, match="3 query ids"):
        replace(good, qids=["a", "b", "c"])
    with pytest.raises(ArtifactError, match="shape"):
        replace(good, scores_QK=good.scores_QK[:, :2])


def joined(tmp_path: Path, parts: list[Candidates]) -> Candidates:
    join(parts, tmp_path / "whole")
    return Candidates.load(tmp_path / "whole")


def test_joining_keeps_the_order_and_adds_up(tmp_path: Path) -> None:
    whole = joined(tmp_path, [make_candidates(["c", "a"]), make_candidates(["b"], 100)])
    assert whole.qids == ["c", "a", "b"]
    assert whole.row("b").tolist() == [100, 101]
    assert whole.row("a").tolist() == [4, 5]
    assert (whole.counts["positives"], whole.counts["answers"]) == (4, 10)


def test_parts_of_different_searches_are_not_joined(tmp_path: Path) -> None:
    part = make_candidates(["b"])
    narrow = replace(part, documents_QK=part.documents_QK[:, :2], scores_QK=part.scores_QK[:, :2])
    for other, what in (
        (replace(part, stamp=replace(STAMP, weights_sha256="b" * 64)), "stamp"),
        (replace(part, source="bm25"), "source"),
        (narrow, "number of candidates"),
    ):
        with pytest.raises(ArtifactError, match=f"Part 1 of the candidates has {what}"):
            join([make_candidates(["a"]), other], tmp_path)
    with pytest.raises(ArtifactError, match="Two parts of the candidates list query 'b'"):
        join([part, part], tmp_path)
    with pytest.raises(ArtifactError, match="no candidates to join"):
        join([], tmp_path)


def test_saved_candidates_are_known_by_stamp_and_search(tmp_path: Path) -> None:
    """Symptom: after a change of top_k a resumed search joins parts of two depths."""
    make_candidates(["a"]).save(tmp_path, search="top 4")
    assert is_saved(tmp_path, STAMP, "top 4")
    assert not is_saved(tmp_path, STAMP, "top 5")
    assert not is_saved(tmp_path, replace(STAMP, weights_sha256="b" * 64), "top 4")
    assert not is_saved(tmp_path / "nothing", STAMP, "top 4")
    (tmp_path / "candidates.json").write_text("{")
    assert not is_saved(tmp_path, STAMP, "top 4")


def test_loaded_arrays_stay_on_disk(tmp_path: Path) -> None:
    """Symptom: each rank held all candidates of half a million queries in memory."""
    make_candidates(["a"]).save(tmp_path)
    loaded = Candidates.load(tmp_path)
    assert isinstance(loaded.documents_QK, np.memmap)
    assert isinstance(loaded.scores_QK, np.memmap)

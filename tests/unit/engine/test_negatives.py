"""Candidates are what was mined, whole and of the right weights; sampling is uniform and knows no rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ArtifactError, ConfigError, DataError
from engine.negatives import Candidates, merge, remove_known, sample_negatives, step_rng
from shards.embeddings import Stamp

STAMP = Stamp("3", "a" * 64, "c" * 64)
PINNED = 352463098085879063
"""Written down so that a change of the scheme, which would change every run's samples, is noticed."""


def make_candidates(qids: list[str], first_document: int = 0) -> Candidates:
    documents_QK = np.arange(first_document, first_document + 4 * len(qids), dtype=np.int64).reshape(len(qids), 4)
    scores_QK = -documents_QK.astype(np.float32) / 7
    documents_QK[-1:, 2:], scores_QK[-1:, 2:] = -1, -np.inf
    return Candidates("dense", STAMP, qids, documents_QK, scores_QK, 2, 5)


# ---- the artifact ------------------------------------------------------------------------------------------------


def test_saved_candidates_come_back_equal(tmp_path: Path) -> None:
    saved = make_candidates(["q 1", "ü"])
    saved.save(tmp_path / "candidates")
    loaded = Candidates.load(tmp_path / "candidates", STAMP)
    assert (loaded.source, loaded.stamp, loaded.qids) == ("dense", STAMP, ["q 1", "ü"])
    assert (loaded.num_removed_positives, loaded.num_removed_answers) == (2, 5)
    np.testing.assert_array_equal(loaded.documents_QK, saved.documents_QK)
    np.testing.assert_array_equal(loaded.scores_QK, saved.scores_QK)
    assert (loaded.documents_QK.dtype, loaded.scores_QK.dtype) == (np.int64, np.float32)
    assert sorted(os.listdir(tmp_path / "candidates")) == ["candidates.json", "documents.npy", "scores.npy"]


def test_a_rank_without_queries_can_publish_its_part(tmp_path: Path) -> None:
    """Symptom: with more ranks than queries, the rank without a share fails."""
    empty = Candidates("dense", STAMP, [], np.empty((0, 4), np.int64), np.empty((0, 4), np.float32), 0, 0)
    empty.save(tmp_path)
    whole = merge([make_candidates(["a", "b"]), Candidates.load(tmp_path)])
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


@pytest.mark.parametrize("name", ["documents.npy", "scores.npy"])
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

    def die_at_the_second(file: object, array: object, **_: object) -> None:
        saved.append(tmp_path)
        if len(saved) == 2:
            raise OSError("no space left")
        original(file, array)  # type: ignore[arg-type]

    original = np.save
    monkeypatch.setattr(np, "save", die_at_the_second)
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


def test_merge_keeps_the_order_and_adds_up() -> None:
    whole = merge([make_candidates(["c", "a"]), make_candidates(["b"], 100)])
    assert whole.qids == ["c", "a", "b"]
    assert whole.row("b").tolist() == [100, 101]
    assert whole.row("a").tolist() == [4, 5]
    assert (whole.num_removed_positives, whole.num_removed_answers) == (4, 10)


def test_merge_refuses_parts_of_different_searches() -> None:
    part = make_candidates(["b"])
    narrow = replace(part, documents_QK=part.documents_QK[:, :2], scores_QK=part.scores_QK[:, :2])
    for other, what in (
        (replace(part, stamp=replace(STAMP, weights_sha256="b" * 64)), "stamp"),
        (replace(part, source="bm25"), "source"),
        (narrow, "number of candidates"),
    ):
        with pytest.raises(ArtifactError, match=f"Part 1 of the candidates has {what}"):
            merge([make_candidates(["a"]), other])
    with pytest.raises(ArtifactError, match="twice"):
        merge([part, part])
    with pytest.raises(ArtifactError, match="no candidates to merge"):
        merge([])


# ---- taking out what is known ------------------------------------------------------------------------------------


def test_remove_known_keeps_order_aligns_left_and_counts() -> None:
    documents_QK = np.array([[7, 3, 9, 1, 5], [2, 4, 6, 8, -1]], dtype=np.int64)
    scores_QK = np.array([[5, 4, 3, 2, 1], [9, 8, 7, 6, -np.inf]], dtype=np.float32)
    found = remove_known(documents_QK, scores_QK, [{3, 77}, {8}], lambda row, document: (row, document) == (1, 2), 3)
    np.testing.assert_array_equal(found[0], [[7, 9, 1], [4, 6, -1]])
    np.testing.assert_array_equal(found[1], np.array([[5, 3, 2], [8, 7, -np.inf]], dtype=np.float32))
    assert [counts.tolist() for counts in found[2:]] == [[1, 1], [0, 1]]
    assert (found[0].dtype, found[1].dtype) == (np.int64, np.float32)


def test_remove_known_reads_no_further_than_it_must() -> None:
    """Symptom: mining is slow, because texts far below the cut are searched for answers."""
    asked: list[tuple[int, int]] = []

    def contains_answer(row: int, document: int) -> bool:
        asked.append((row, document))
        return document == 11

    documents_QK = np.array([[10, 11, 12, 13, 14, 15]], dtype=np.int64)
    scores_QK = np.zeros((1, 6), dtype=np.float32)
    kept, _, num_positives, num_answers = remove_known(documents_QK, scores_QK, [{10, 15}], contains_answer, 2)
    assert kept.tolist() == [[12, 13]]
    assert asked == [(0, 11), (0, 12), (0, 13)], "a positive needs no look at its text either"
    assert (num_positives.tolist(), num_answers.tolist()) == ([1], [1])


def test_remove_known_without_answers_and_without_rows() -> None:
    documents_QK = np.array([[4, 5]], dtype=np.int64)
    kept, scores, num_positives, num_answers = remove_known(
        documents_QK, np.ones((1, 2), np.float32), [frozenset({4, 5})], None, 2
    )
    assert kept.tolist() == [[-1, -1]]
    assert np.isneginf(scores).all()
    assert (num_positives.tolist(), num_answers.tolist()) == ([2], [0])
    kept, *_ = remove_known(documents_QK[:0], np.ones((0, 2), np.float32), [], None, 7)
    assert kept.shape == (0, 7)
    with pytest.raises(ValueError, match="0 sets of positives"):
        remove_known(documents_QK, np.ones((1, 2), np.float32), [], None, 2)


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_sampling_is_uniform_and_without_replacement() -> None:
    candidates_K = np.array([10, 20, -1, 30, 40, -1], dtype=np.int64)
    rng = step_rng(0, "test", 0, 0)
    draws = np.array([sample_negatives(candidates_K, 3, rng) for _ in range(4000)])
    assert draws.dtype == np.int64
    assert all(len(set(row)) == 3 for row in draws.tolist())
    for place in range(3):  # each place of the sample, not only the sample as a whole
        documents, counts = np.unique(draws[:, place], return_counts=True)
        assert documents.tolist() == [10, 20, 30, 40]
        assert np.abs(counts - 1000).max() < 130  # 4.7 standard deviations


def test_too_few_candidates_name_both_numbers() -> None:
    candidates_K = np.array([1, 2, -1], dtype=np.int64)
    assert sorted(sample_negatives(candidates_K, 2, step_rng(0, "s", 0, 0)).tolist()) == [1, 2]
    with pytest.raises(ConfigError, match=r"num_negatives is 3, but the query has 2 candidates.*Remedy: .*top_k"):
        sample_negatives(candidates_K, 3, step_rng(0, "s", 0, 0))


def test_step_rng_depends_on_all_four_and_on_nothing_else() -> None:
    def first(*arguments: object) -> int:
        return int(step_rng(*arguments).integers(2**63))  # type: ignore[arg-type]

    base = first(42, "ranker/3", 7, "q1")
    assert first(42, "ranker/3", 7, "q1") == base
    others = [
        (43, "ranker/3", 7, "q1"),
        (42, "ranker/2", 7, "q1"),
        (42, "ranker/3", 8, "q1"),
        (42, "ranker/3", 7, "q2"),
    ]
    # Two numbers side by side must not read as one: step 1 of item 12 is not step 11 of item 2.
    others += [(42, "ranker/3", 1, 12), (42, "ranker/3", 11, 2), (42, "ranker/3", 1, "12")]
    drawn = [base, *(first(*other) for other in others)]
    assert len(set(drawn)) == len(drawn)


def test_step_rng_is_the_same_in_another_process() -> None:
    """Symptom: ranks train on different samples, because Python's string hash is salted per process."""
    code = "from engine.negatives import step_rng; print(step_rng(1, 'retriever/2', 3, 'q').integers(2**63))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(printed.stdout) == int(step_rng(1, "retriever/2", 3, "q").integers(2**63)) == PINNED

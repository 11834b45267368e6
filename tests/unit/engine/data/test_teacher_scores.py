"""Teacher scores are a teacher's raw logits, whole and of the right weights, whoever scored which part."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.data.teacher_scores import TeacherScores, is_saved, join, scores_of_queries
from engine.errors import ArtifactError
from shards.embeddings import Stamp

STAMP = Stamp("000", "a" * 64, "c" * 64)


def of_queries(scored: dict[str, dict[int, float]], stamp: Stamp = STAMP) -> TeacherScores:
    pairs = [
        (qid, np.array(list(found), dtype=np.int64), np.array(list(found.values()), dtype=np.float32))
        for qid, found in scored.items()
    ]
    return scores_of_queries("ranker", stamp, pairs, counts=Counter(pairs=sum(map(len, scored.values()))))


SCORED: dict[str, dict[int, float]] = {"q 1": {7: 1.5, 2: -3.0, 11: 0.25}, "ü": {}, "c": {2: 8.0}}


def test_scores_are_looked_up_by_query_and_document() -> None:
    scores = of_queries(SCORED)
    found = scores.of("q 1", np.array([11, 3, 2, 7, 2, -1, 12]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [0.25, np.nan, -3.0, 1.5, -3.0, np.nan, np.nan])
    np.testing.assert_array_equal(scores.of("c", np.array([7, 2])), [np.nan, 8.0])
    assert np.isnan(scores.of("ü", np.array([2]))).all(), "no document of the query was scored"
    assert np.isnan(scores.of("unknown", np.array([2]))).all()
    assert scores.of("q 1", np.empty(0, np.int64)).shape == (0,)
    assert (scores.documents("q 1").tolist(), scores.documents("ü").tolist()) == ([2, 7, 11], [])
    assert (len(scores), scores.num_pairs, "ü" in scores, "x" in scores) == (3, 4, True, False)


def test_every_score_is_found_among_many() -> None:
    rng = np.random.default_rng(0)
    scored = {
        f"q{row}": dict(zip(rng.choice(500, 40, replace=False).tolist(), rng.normal(size=40).tolist(), strict=True))
        for row in range(30)
    }
    scores = of_queries(scored)
    for qid, found in scored.items():
        expected = np.array([found.get(document, np.nan) for document in range(500)], dtype=np.float32)
        np.testing.assert_array_equal(scores.of(qid, np.arange(500)), expected)


def test_saved_scores_come_back_equal_and_mapped(tmp_path: Path) -> None:
    saved = replace(of_queries(SCORED), margins_only=True)
    saved.save(tmp_path / "scores", asked="this")
    loaded = TeacherScores.load(tmp_path / "scores", STAMP)
    assert (loaded.source, loaded.stamp, loaded.qids) == ("ranker", STAMP, list(SCORED))
    assert (loaded.counts, loaded.margins_only) == (Counter(pairs=4), True)
    for name in ("offsets_Q1", "documents_P", "scores_P"):
        array = getattr(loaded, name)
        np.testing.assert_array_equal(array, getattr(saved, name))
        assert isinstance(array, np.memmap)
    assert loaded.scores_P.dtype == np.float32
    assert sorted(os.listdir(tmp_path / "scores")) == [
        "documents.npy",
        "offsets.npy",
        "scores.npy",
        "teacher_scores.json",
    ]
    assert is_saved(tmp_path / "scores", STAMP, "this")
    assert not is_saved(tmp_path / "scores", STAMP, "that")
    assert not is_saved(tmp_path / "scores", replace(STAMP, weights_sha256="b" * 64), "this")
    assert not is_saved(tmp_path / "none", STAMP, "this")


def test_parts_join_to_what_one_pass_gives(tmp_path: Path) -> None:
    of_queries(SCORED).save(tmp_path / "whole")
    parts = [of_queries({qid: found}) for qid, found in SCORED.items()]
    parts.insert(1, of_queries({}))
    join(parts, tmp_path / "joined")
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    "other", [replace(STAMP, iteration="2"), replace(STAMP, weights_sha256="b" * 64), replace(STAMP, corpus_sha256="d")]
)
def test_scores_of_another_ranker_or_corpus_are_refused(tmp_path: Path, other: Stamp) -> None:
    """Symptom: a student learns from the ranker of an earlier run, whose scores were left in the folder."""
    of_queries(SCORED).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"teacher scores .* stale: they were made by iteration 000, weights aaaa"):
        TeacherScores.load(tmp_path, other)
    with pytest.raises(ArtifactError, match="Part 1 of the teacher scores has stamp"):
        join([of_queries({"a": {1: 1.0}}), of_queries({"b": {1: 1.0}}, other)], tmp_path / "joined")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    """Symptom: one NaN of a diverged teacher, found days later as the student's loss."""
    scores = of_queries({"a": {1: 1.0}, "b": {4: 2.0, 9: bad}})
    with pytest.raises(ArtifactError, match=r"document 9 for query 'b' by ranker is (nan|inf|-inf), as are 0 more"):
        scores.save(tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_documents_that_a_lookup_would_miss_are_refused(tmp_path: Path) -> None:
    sound = of_queries({"a": {5: 1.0, 6: 1.0}, "b": {1: 2.0, 2: 0.0}})
    sound.save(tmp_path / "sound")
    for documents in ([6, 5, 1, 2], [5, 5, 1, 2], [5, 6, -1, 2]):
        with pytest.raises(ArtifactError, match="ascending order"):
            replace(sound, documents_P=np.array(documents)).save(tmp_path / "unsound")


def test_shapes_that_do_not_fit_and_repeated_queries_are_refused() -> None:
    sound = of_queries(SCORED)
    for change in (
        {"offsets_Q1": sound.offsets_Q1[:-1]},
        {"scores_P": sound.scores_P[:-1]},
        {"offsets_Q1": sound.offsets_Q1 + 1},
    ):
        with pytest.raises(ArtifactError, match=r"Expected: \[Q \+ 1\] from 0 to P"):
            replace(sound, **change)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="list query 'c' twice"):
        replace(sound, qids=["c", "ü", "c"])
    with pytest.raises(ArtifactError, match="list query 'c'"):
        join([of_queries({"c": {1: 1.0}}), of_queries({"c": {2: 1.0}})], Path("nowhere"))


@pytest.mark.parametrize("name", ["documents.npy", "scores.npy", "offsets.npy"])
def test_a_damaged_array_is_refused(tmp_path: Path, name: str) -> None:
    of_queries(SCORED).save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=name):
        TeacherScores.load(tmp_path)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    of_queries(SCORED).save(tmp_path)
    (tmp_path / "teacher_scores.json").unlink()
    with pytest.raises(ArtifactError, match="no finished teacher scores"):
        TeacherScores.load(tmp_path)

"""Each filter against a brute force over single documents; what it cannot judge, it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.data.filters import (
    Answers,
    Asked,
    Constrained,
    Filter,
    KnownDocuments,
    Listed,
    RankerThresholds,
    Redistributed,
    RetrieverMargin,
    TeacherMargin,
)
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.data.joint import Entries, JointLists
from engine.errors import ConfigError, DataError
from shards.embeddings import Stamp
from tests.unit.engine.data.test_joint import found_by

NUM_DOCUMENTS, NUM_LISTS, LENGTH = 60, 3, 20
STAMP = Stamp("ranker", "w", "corpus")
ASKED = Asked("q0", {1: "positives", 2: "positives", 7: "false_negatives"}, np.array([1, 2]))


@dataclass
class FakeTeacher:
    """Logits by document; NaN for the others."""

    logits: Mapping[int, float]
    stamp: Stamp = STAMP
    margins_only: bool = False
    asked: list[str] = field(default_factory=list)

    def of(self, qid: str, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        self.asked.append(qid)
        return np.array([self.logits.get(document, math.nan) for document in documents.tolist()], dtype=np.float32)


def made_up(seed: int) -> Entries:
    """Three lists of documents 3 to 59 with scores of either sign; two retrievers found positives."""
    rng = np.random.default_rng(seed)
    parts = []
    for number in range(NUM_LISTS):
        documents = 3 + rng.choice(NUM_DOCUMENTS - 3, LENGTH, replace=False)
        part = found_by(f"r{number}", [documents.tolist()], top_k=LENGTH)
        part.scores_QK[0] = -np.sort(-rng.normal(number - 1, 1, LENGTH))
        found = [FoundPositive(1, 3, float(rng.normal(0, 0.3))), FoundPositive(2, 9, -0.1)][: 2 - number]
        part.positives = FoundPositives.of([found])
        parts.append(part)
    return JointLists(parts).of("q0")


def documents_left(one: Filter, entries: Entries) -> set[int]:
    kept_E = one.kept(ASKED, entries)
    assert kept_E.shape == (len(entries),)
    assert kept_E.dtype == np.bool_
    left, out = set(entries.documents_E[kept_E].tolist()), set(entries.documents_E[~kept_E].tolist())
    assert isinstance(one, Redistributed) or not left & out, "a document is out in all lists, or in none"
    return left


def logits(seed: int) -> dict[int, float]:
    return dict(enumerate(np.random.default_rng(seed).normal(0, 3, NUM_DOCUMENTS).astype(np.float32).tolist()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("share", "difference"), [(0.95, 0.0), (1.0, 0.05), (0.8, 0.1), (1.2, 0.0)])
def test_the_retrievers_margin(seed: int, share: float, difference: float) -> None:
    entries = made_up(seed)
    expected = set()
    for document in set(entries.documents_E.tolist()):
        suspicious = False
        for place in np.flatnonzero(entries.documents_E == document):
            for positive in entries.positives[entries.sources_E[place]]:
                allowed = positive.score - (1 - share) * abs(positive.score) - difference
                suspicious |= bool(entries.scores_E[place] > allowed)
        if not suspicious:
            expected.add(document)
    left = documents_left(RetrieverMargin(share, difference), entries)
    assert left == expected
    assert 0 < len(left) < entries.num_documents, "a brute force that agrees on nothing proves nothing"


def test_a_share_lowers_a_negative_score_too() -> None:
    """Symptom: where scores are negative, 95 % of the positive's is above it, and every false negative passes."""
    part = found_by("r0", [[10, 11, 12]], positives=FoundPositives.of([[FoundPositive(1, 1, -10.0)]]))
    part.scores_QK[0, :3] = [-9.8, -10.2, -10.6]
    assert documents_left(RetrieverMargin(0.95, 0.0), JointLists([part]).of("q0")) == {12}


def test_without_a_found_positive_a_margin_takes_nothing_out() -> None:
    entries = JointLists([found_by("r0", [[10, 11, 12]])]).of("q0")
    assert documents_left(RetrieverMargin(0.95, 0.0), entries) == {10, 11, 12}


@pytest.mark.parametrize("seed", range(3))
def test_the_teachers_margin(seed: int) -> None:
    entries, scores = made_up(seed), logits(seed) | {1: 2.0, 2: 3.5}
    expected = {d for d in entries.documents_E.tolist() if scores[d] <= 0.95 * 2.0 - 0.1}
    left = documents_left(TeacherMargin(FakeTeacher(scores), 0.95, 0.1), entries)
    assert left == expected
    assert 0 < len(left) < entries.num_documents


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep_below", [None, 0.1])
def test_the_rankers_thresholds(seed: int, keep_below: float | None) -> None:
    entries, scores = made_up(seed), logits(seed)
    probability = {document: 1 / (1 + math.exp(-logit)) for document, logit in scores.items()}
    most = 0.9 if keep_below is None else keep_below
    expected = {document for document in entries.documents_E.tolist() if probability[document] <= most}
    left = documents_left(RankerThresholds(FakeTeacher(scores), 0.9, keep_below), entries)
    assert left == expected
    assert 0 < len(left) < entries.num_documents


def test_extreme_logits_are_probabilities_too() -> None:
    entries = JointLists([found_by("r0", [[10, 11, 12]])]).of("q0")
    teacher = FakeTeacher({10: 1000.0, 11: -1000.0, 12: 0.0})
    assert documents_left(RankerThresholds(teacher, 0.9, None), entries) == {11, 12}


@pytest.mark.parametrize("seed", range(3))
def test_constrained_keeps_what_another_found(seed: int) -> None:
    entries = made_up(seed)
    other = np.random.default_rng(seed + 50).permutation(NUM_DOCUMENTS)[:40]
    within = found_by("bm25", [other.tolist()], top_k=50)
    within.scores_QK[0, 25:] = -np.inf  # drawn by mining, not found
    for top_k, found in ((10, other[:10]), (50, other[:25])):
        left = documents_left(Constrained(within, top_k), entries)
        assert left == set(entries.documents_E.tolist()) & set(found.tolist())
        assert left
    with pytest.raises(ConfigError, match=r"within the top 1000 of bm25, whose candidates are the top 50"):
        Constrained(within, 1000)


@pytest.mark.parametrize("seed", range(3))
def test_redistributed_keeps_the_teachers_best_each_once(seed: int) -> None:
    entries, scores = made_up(seed), {document: float(document % 7) for document in range(NUM_DOCUMENTS)}
    kept_E = Redistributed(FakeTeacher(scores), 10).kept(ASKED, entries)
    found = set(entries.documents_E.tolist())
    expected = sorted(found, key=lambda document: (-scores[document], document))[:10]
    assert sorted(entries.documents_E[kept_E].tolist()) == sorted(expected), "ties by index, no document twice"
    assert Redistributed(FakeTeacher(scores), 500).kept(ASKED, entries).sum() == len(found)


def test_known_and_listed_documents_are_out_and_never_drawn_at_random() -> None:
    entries = JointLists([found_by("r0", [[7, 10, 1]]), found_by("r1", [[2, 10, 11]])]).of("q0")
    known, listed = KnownDocuments(), Listed("additions", {"q0": [11, 40], "q1": [10]})
    assert documents_left(known, entries) == {10, 11}
    assert documents_left(listed, entries) == {7, 10, 1, 2}
    assert set(known.forbids(ASKED)) == {1, 2, 7}
    assert set(listed.forbids(ASKED)) == {11, 40}
    assert documents_left(Listed("additions", {}), entries) == {7, 10, 1, 2, 11}


def test_answers_are_asked_for_once_a_document() -> None:
    asked: list[tuple[str, int]] = []

    def contains_answer(qid: str, document: int) -> bool:
        asked.append((qid, document))
        return document == 12

    entries = JointLists([found_by("r0", [[10, 12]]), found_by("r1", [[12, 11]])]).of("q0")
    assert documents_left(Answers(contains_answer), entries) == {10, 11}
    assert sorted(asked) == [("q0", 10), ("q0", 11), ("q0", 12)]


NEED_A_TEACHER: list[Callable[[FakeTeacher], Filter]] = [
    lambda teacher: TeacherMargin(teacher, 0.95, 0.0),
    lambda teacher: RankerThresholds(teacher, 0.9, None),
    lambda teacher: Redistributed(teacher, 2),
]


@pytest.mark.parametrize("make", NEED_A_TEACHER)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_candidate_without_a_teachers_score_is_refused(make: Callable[[FakeTeacher], Filter], bad: float) -> None:
    """Symptom guarded against: a comparison with NaN is false, so what was never scored passes, or goes, in silence."""
    entries = JointLists([found_by("r0", [[10, 11, 12]])]).of("q0")
    one = make(FakeTeacher({1: 1.0, 2: 1.0, 10: 0.0, 11: bad, 12: bad}))
    with pytest.raises(DataError, match=r"scores of 3 candidates of query 'q0', 2 of which have none that is finite"):
        one.kept(ASKED, entries)


@pytest.mark.parametrize("make", NEED_A_TEACHER)
def test_margins_alone_are_no_scores(make: Callable[[FakeTeacher], Filter]) -> None:
    with pytest.raises(DataError, match="margins alone"):
        make(FakeTeacher({}, margins_only=True))


def test_a_teacher_that_has_not_scored_the_positives_is_refused() -> None:
    entries = JointLists([found_by("r0", [[10]])]).of("q0")
    with pytest.raises(DataError, match="2 positives of query 'q0', 1 of which"):
        TeacherMargin(FakeTeacher({1: 1.0, 10: 0.0}), 0.95, 0.0).kept(ASKED, entries)


def test_no_candidates_are_no_error() -> None:
    entries = JointLists([found_by("r0", [[]])]).of("q0")
    teacher = FakeTeacher({1: 1.0, 2: 1.0})
    for one in (
        KnownDocuments(),
        Listed("additions", {"q0": [3]}),
        RetrieverMargin(0.95, 0.0),
        Answers(lambda qid, document: True),
        Constrained(found_by("bm25", [[1]]), 2),
        *(make(teacher) for make in NEED_A_TEACHER),
    ):
        assert one.kept(ASKED, entries).tolist() == []

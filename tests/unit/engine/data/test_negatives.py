"""What is known is taken out and counted; sampling is uniform and knows no rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.found_positives import FoundPositive
from engine.data.negatives import draw_from_corpus, remove_known, sample_negatives, step_rng
from engine.errors import ConfigError

PINNED = 352463098085879063
"""Written down so that a change of the scheme, which would change every run's samples, is noticed."""


# ---- taking out what is known ------------------------------------------------------------------------------------


def test_remove_known_keeps_order_aligns_left_and_counts() -> None:
    documents_QK = np.array([[7, 3, 9, 1, 5], [2, 4, 6, 8, -1]], dtype=np.int64)
    scores_QK = np.array([[5, 4, 3, 2, 1], [9, 8, 7, 6, -np.inf]], dtype=np.float32)
    found = remove_known(
        documents_QK,
        scores_QK,
        [{3: "positives", 77: "positives"}, {8: "false_negatives"}],
        lambda row, document: (row, document) == (1, 2),
        3,
    )
    np.testing.assert_array_equal(found.documents_QK, [[7, 9, 1], [4, 6, -1]])
    np.testing.assert_array_equal(found.scores_QK, np.array([[5, 3, 2], [8, 7, -np.inf]], dtype=np.float32))
    assert found.removed == [{"positives": 1}, {"answers": 1, "false_negatives": 1}]
    assert found.positives == [[FoundPositive(3, 2, 4.0)], []], "ranks from 1, among all that was retrieved"
    assert (found.documents_QK.dtype, found.scores_QK.dtype) == (np.int64, np.float32)


def test_remove_known_reads_no_further_than_it_must() -> None:
    """Symptom: mining is slow, because texts far below the cut are searched for answers."""
    asked: list[tuple[int, int]] = []

    def contains_answer(row: int, document: int) -> bool:
        asked.append((row, document))
        return document == 11

    documents_QK = np.array([[10, 11, 12, 13, 14, 15]], dtype=np.int64)
    scores_QK = np.zeros((1, 6), dtype=np.float32)
    known = dict.fromkeys((10, 15), "positives")
    kept = remove_known(documents_QK, scores_QK, [known], contains_answer, 2)
    assert kept.documents_QK.tolist() == [[12, 13]]
    assert asked == [(0, 11), (0, 12), (0, 13)], "a positive needs no look at its text either"
    assert kept.removed == [{"positives": 1, "answers": 1}]


def test_remove_known_without_answers_and_without_rows() -> None:
    documents_QK = np.array([[4, 5]], dtype=np.int64)
    known = dict.fromkeys((4, 5), "positives")
    kept = remove_known(documents_QK, np.ones((1, 2), np.float32), [known], None, 2)
    assert kept.documents_QK.tolist() == [[-1, -1]]
    assert np.isneginf(kept.scores_QK).all()
    assert kept.removed == [{"positives": 2}]
    kept = remove_known(documents_QK[:0], np.ones((0, 2), np.float32), [], None, 7)
    assert kept.documents_QK.shape == (0, 7)
    with pytest.raises(ValueError, match="known of 0"):
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
    code = "from engine.data.negatives import step_rng; print(step_rng(1, 'retriever/2', 3, 'q').integers(2**63))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4]), "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(printed.stdout) == int(step_rng(1, "retriever/2", 3, "q").integers(2**63)) == PINNED


# ---- what a retriever did not find -------------------------------------------------------------------------------


def test_documents_are_drawn_from_the_whole_corpus_and_none_that_is_taken() -> None:
    rngs = [step_rng(1, "x", 0, f"q{query}") for query in range(300)]
    drawn = [draw_from_corpus(10, 3, rng, taken={4, 7}, contains_answer=None) for rng in rngs]
    assert all(len(set(documents)) == 3 for documents in drawn)
    assert {document for documents in drawn for document in documents} == set(range(10)) - {4, 7}
    assert sorted(draw_from_corpus(10, 9, rngs[0], taken={4, 7}, contains_answer=None)) == [0, 1, 2, 3, 5, 6, 8, 9]
    assert draw_from_corpus(10, 0, rngs[0], taken=(), contains_answer=None) == []


def test_a_corpus_full_of_answers_is_not_gone_through() -> None:
    """Symptom guarded against: an answer that stands everywhere has all texts of a large corpus read for one query."""
    asked: list[int] = []

    def contains_answer(document: int) -> bool:
        asked.append(document)
        return True

    assert draw_from_corpus(10**9, 5, step_rng(1, "x", 0, "q"), taken=(), contains_answer=contains_answer) == []
    assert len(asked) == 1000

"""Measures against values computed by hand, and the two places where evaluation goes wrong quietly."""

from __future__ import annotations

import math

import pytest

from engine.errors import DataError
from engine.evaluation.measures import answer_measures, score_run


def ranking(*docids: str) -> dict[str, float]:
    return {docid: 10.0 - place for place, docid in enumerate(docids)}


def test_values_by_hand() -> None:
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"c": 3, "d": 1, "x": 0}}
    run = {"q1": ranking("x", "a", "y", "z", "w", "b"), "q2": ranking("d", "x", "c")}
    found = score_run(run, qrels)
    assert list(found) == ["R@1", "R@5", "R@20", "R@100", "MRR@10", "nDCG@10"]
    dcg_1 = 1 / math.log2(3) + 1 / math.log2(7)
    ideal_1 = 1 + 1 / math.log2(3)
    dcg_2 = 1 + 3 / math.log2(4)
    ideal_2 = 3 + 1 / math.log2(3)
    assert found == pytest.approx(
        {
            "R@1": (0 + 0.5) / 2,
            "R@5": (0.5 + 1) / 2,
            "R@20": 1.0,
            "R@100": 1.0,
            "MRR@10": (0.5 + 1) / 2,
            "nDCG@10": (dcg_1 / ideal_1 + dcg_2 / ideal_2) / 2,
        }
    )


def test_reciprocal_rank_and_gain_are_cut_at_10() -> None:
    qrels = {"q": {"a": 1}}
    tenth = score_run({"q": ranking(*"0123456789"[:9], "a")}, qrels)
    eleventh = score_run({"q": ranking(*"0123456789", "a")}, qrels)
    assert tenth["MRR@10"] == pytest.approx(0.1)
    assert (eleventh["MRR@10"], eleventh["nDCG@10"], eleventh["R@20"]) == (0, 0, 1)


def test_a_query_without_a_ranking_counts_as_zero() -> None:
    """Symptom: a retriever that answers half of the queries looks twice as good."""
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 1}, "q4": {"d": 1}}
    found = score_run({"q1": ranking("a"), "q2": {}, "q9": ranking("a")}, qrels, cutoffs=(1,))
    assert found == pytest.approx({"R@1": 0.25, "MRR@10": 0.25, "nDCG@10": 0.25})


def test_queries_without_a_relevant_document_are_left_out() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"b": 0}, "q3": {}}
    assert score_run({"q1": ranking("a"), "q2": ranking("b")}, qrels)["R@1"] == 1.0
    with pytest.raises(DataError, match="None of 1 queries"):
        score_run({}, {"q2": {"b": 0}})


def test_equal_scores_keep_the_order_of_the_run() -> None:
    """Symptom: the exact order of a search is re-sorted by document id, and R@1 changes."""
    qrels = {"q": {"a": 1}}
    assert score_run({"q": {"a": 1.0, "z": 1.0}}, qrels)["R@1"] == 1.0
    assert score_run({"q": {"z": 1.0, "a": 1.0}}, qrels)["R@1"] == 0.0
    nearly = {"q": {"z": 30_000_000.0, "a": 30_000_000.5}}  # one number in single precision
    assert score_run(nearly, qrels)["R@1"] == 1.0


def test_scores_decide_before_the_order() -> None:
    assert score_run({"q": {"z": -2.0, "a": -1.0}}, {"q": {"a": 1}})["R@1"] == 1.0


def test_answer_measures_by_hand() -> None:
    run = {"q1": ranking("x", "a", "b"), "q2": ranking("c"), "q3": ranking("x"), "no answers": ranking("x")}
    answered = {"q1": {"a", "b"}, "q2": {"c"}, "q3": set(), "not ranked": set()}
    assert answer_measures(run, answered) == {"A@1": 0.25, "A@5": 0.5, "A@20": 0.5, "A@100": 0.5}
    assert answer_measures({"q": ranking("x")}, {"q": set()}, cutoffs=(5,)) == {"A@5": 0.0}
    with pytest.raises(DataError, match="No query has answers"):
        answer_measures(run, {})


def test_a_hit_counts_once_however_many_documents_have_the_answer() -> None:
    assert answer_measures({"q": ranking(*"abcde")}, {"q": set("abcde")}, cutoffs=(1, 5)) == {"A@1": 1.0, "A@5": 1.0}

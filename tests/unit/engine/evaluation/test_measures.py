"""Measures against values computed by hand, and the two places where evaluation goes wrong quietly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.errors import DataError
from engine.evaluation.measures import answer_measures, check_trec_ids, read_trec, score_run, write_trec


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


def test_a_run_file_has_trecs_lines_and_comes_back(tmp_path: Path) -> None:
    run = {"q1": {"b": 0.1, "a": 2 / 3, "c": 0.1}, "q2": {"é": -1e-30}}
    write_trec(tmp_path / "results" / "G.trec", run, "G@3")
    lines = (tmp_path / "results" / "G.trec").read_text(encoding="utf-8").splitlines()
    assert lines == [
        "q1 Q0 a 1 0.6666666666666666 G@3",
        "q1 Q0 b 2 0.1 G@3",
        "q1 Q0 c 3 0.1 G@3",
        "q2 Q0 é 1 -1e-30 G@3",
    ]
    back = read_trec(tmp_path / "results" / "G.trec")
    assert back == run
    assert list(back["q1"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 a 1 0.5", "line 2 reads 'q1 Q0 a 1 0.5'"),
        ("q1 Q0 a 1 high tag", "line 2 reads"),
        ("", "line 2 reads ''"),
        ("q0 Q0 z 1 0.5 tag", "line 2 ranks document 'z' of query 'q0' again"),
    ],
)
def test_a_broken_run_file_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "broken.trec"
    path.write_text(f"q0 Q0 z 1 1.0 tag\n{line}\nq2 Q0 z 1 1.0 tag\n")
    with pytest.raises(DataError, match=message):
        read_trec(path)
    with pytest.raises(DataError, match="does not exist"):
        read_trec(tmp_path / "none.trec")


def test_what_a_run_file_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    for run, tag, message in (
        ({"q": {"a b": 1.0}}, "tag", "document id 'a b'"),
        ({"q\t1": {"a": 1.0}}, "tag", "query id"),
        ({"q": {"": 1.0}}, "tag", "document id ''"),
        ({"q": {"a": 1.0}}, "two words", "run id 'two words'"),
        ({"q": {"a": math.nan}}, "tag", "not a number"),
    ):
        with pytest.raises(DataError, match=message):
            write_trec(path, run, tag)
    assert list(tmp_path.iterdir()) == []
    check_trec_ids(["a", "é-1"], "document")
    with pytest.raises(DataError, match="white space"):
        check_trec_ids(["a", " a"], "document")

"""Run files come back as they were written, and a broken one is refused with its line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.data.trec import check_trec_ids, read_trec, run_lines, write_trec
from engine.errors import DataError


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
    with pytest.raises(DataError, match=message + r".*Remedy: "):
        read_trec(path)
    with pytest.raises(DataError, match=r"does not exist.*Remedy"):
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


def test_ranks_alone_are_taken_where_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "ranks.tsv"
    path.write_text("q1\td2\t1\nq1\td1\t2\nq2\td1\t1\n")
    lines = [(line.number, line.qid, line.docid, line.score) for line in run_lines(path, or_ranks_alone=True)]
    assert lines == [(1, "q1", "d2", -1.0), (2, "q1", "d1", -2.0), (3, "q2", "d1", -1.0)]
    with pytest.raises(DataError, match=r"line 1 reads.*Expected: qid Q0 docid rank score tag"):
        list(run_lines(path))


@pytest.mark.parametrize(
    ("first", "second"), [("q d 1", "q Q0 e 2 0.5 tag"), ("q Q0 d 1 0.5 tag", "q e 2"), ("q d 1", "q e second")]
)
def test_one_file_has_one_layout(tmp_path: Path, first: str, second: str) -> None:
    """Symptom guarded against: in a file put together from two, ranks are sorted among scores."""
    path = tmp_path / "mixed.tsv"
    path.write_text(f"{first}\n{second}\n")
    with pytest.raises(DataError, match=r"line 2 reads.*as the first line has it"):
        list(run_lines(path, or_ranks_alone=True))


def test_the_top_of_a_file_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    write_trec(path, {"q1": {"a": 1.0, "b": 3.0, "c": 2.0}, "q2": {"d": 5.0}}, tag="t")
    assert read_trec(path, top=2) == {"q1": {"b": 3.0, "c": 2.0}, "q2": {"d": 5.0}}

"""Files of candidates are read as sets, and refused where they are of other queries or another corpus."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from engine.data.candidate_sets import read_candidate_sets
from engine.errors import DataError
from shards.records import Query

QUERIES = [Query("7", "where do owls sleep"), Query("8", "what do foxes eat"), Query("9", "is the moon a planet")]


def index_of(docid: str) -> int | None:
    return int(docid) if int(docid) < 100 else None


def line(qid: str, docid: int, text: str | None = None) -> str:
    return f"{qid}\t{docid}\t{text or {query.id: query.text for query in QUERIES}.get(qid, 'other')}\tA passage.\n"


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "top.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_sets_are_those_of_the_queries_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    """The official files are sorted by nothing that a ranking could be read from."""
    lines = [line("8", 5), line("7", 30), line("1", 1), line("8", 2), line("7", 4), line("2", 999)]
    first = read_candidate_sets(written(tmp_path, *lines), QUERIES, index_of)
    assert first.documents == {"7": [4, 30], "8": [2, 5], "9": []}
    assert (first.num_passed_over, first.lacking, first.largest) == (2, ["9"], 2)
    assert read_candidate_sets(written(tmp_path, *reversed(lines)), QUERIES, index_of) == first
    told = first.told(tmp_path / "top.tsv")
    assert "2 of 3 queries, 2.0 on average and 2 at most" in told
    assert "the 1 that it lacks count as 0 hits: 9" in told
    assert "2 of its queries are not measured" in told


def test_a_compressed_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "top.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(line(query.id, 3) for query in QUERIES))
    found = read_candidate_sets(path, QUERIES, index_of)
    assert found.documents == {"7": [3], "8": [3], "9": [3]}
    assert "count as 0" not in found.told(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [line("7", 1), line("7", 100), line("8", 3000)],
            r"2 documents that the corpus does not have: '100' in line 2",
        ),
        ([line("7", 1), line("8", 1), line("7", 1)], r"1 queries with a document twice: '7'"),
        ([line("7", 1), "7\t2\n"], r"line 2 has 2 columns. Expected: qid, docid, query and passage"),
        (["7 Q0 2 1 3.5 bm25\n"], r"line 1 has 1 columns"),
        ([line("70", 1), line("71", 1)], r"none of the 3 queries: it has 70, 71. Expected: .* such as 7, 8, 9"),
        (
            [line("7", 1, "why is grass green"), line("8", 1, "who wrote it")],
            r"other texts for 2 of 2 queries: 7 is 'why",
        ),
        ([], r"is empty"),
    ],
)
def test_what_cannot_be_candidates_of_these_queries_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_candidate_sets(written(tmp_path, *lines), QUERIES, index_of)


def test_a_text_that_was_repaired_since_is_no_other_query(tmp_path: Path) -> None:
    lines = [line("7", 1), line("8", 1, "what  do foxes\u00e2 eat"), line("9", 1, "is the  moon a planet ")]
    assert read_candidate_sets(written(tmp_path, *lines), QUERIES, index_of).lacking == []


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    """The official candidates are offered so; read as they are, their first line is a header of the archive."""
    with pytest.raises(DataError, match=r"is an archive of files.*Remedy: unpack it"):
        read_candidate_sets(tmp_path / "top1000.dev.tar.gz", QUERIES, index_of)

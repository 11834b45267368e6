"""What a reader of one layout hands over, and the judgements while they are being read.

A reader reads queries and judgements; the corpus, which may not fit in memory, is checked against them afterwards in
one streamed pass, the same for all layouts (`shards.formats`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import DataError
from shards.formats.stream import OR_LEAVE_OUT, BadRecord, place
from shards.records import Document, GivenNegatives, Qrels, Query


@dataclass
class Judgements:
    """The judgements of all splits, each row checked as it comes.

    Attributes:
        queries: qid -> query: the queries that may be judged.
        qrels: split -> judgements.
        named: docid -> file and line that first name it; the corpus must have each.
        dropped: reason -> number of rows left out.
    """

    queries: Mapping[str, Query]
    qrels: dict[str, Qrels] = field(default_factory=dict)
    named: dict[str, tuple[Path, int]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, split: str, qid: str, docid: str, grade: int, path: Path, line: int) -> None:
        """Take one row.

        Raises:
            DataError: The query is unknown, or the same pair was given another grade before.
        """
        if qid not in self.queries:
            raise DataError(
                f"{place(path, line)} judges query {qid!r}, which is not among the {len(self.queries)} queries",
                expected="the id of a query of this folder",
                remedy="add the query, remove the row, or put files together that belong together",
            )
        judged = self.qrels.setdefault(split, {}).setdefault(qid, {})
        if docid in judged:
            if judged[docid] != grade:
                raise DataError(
                    f"{place(path, line)} gives query {qid!r} and document {docid!r} the grade {grade}, an earlier row "
                    f"of the split {judged[docid]}",
                    expected="one grade for each pair",
                    remedy="remove one of the rows",
                )
            self.dropped["judgement given twice"] += 1
            return
        judged[docid] = grade
        self.named.setdefault(docid, (path, line))


def grade_of(text: str, path: Path, line: int) -> int:
    """Read a grade, such as `1`, `0` or `2.0`.

    Raises:
        BadRecord: It is not a whole number.
    """
    try:
        grade = float(text)
        if grade.is_integer():
            return int(grade)
    except ValueError:
        pass
    raise BadRecord(
        "malformed grade",
        f"{place(path, line)} has the grade {text[:40]!r}",
        expected="a whole number; above 0 is relevant",
        remedy=f"write 1 for what is relevant and 0 for what is not, or whole grades, {OR_LEAVE_OUT}",
    )


def add_query(queries: dict[str, Query], lines: dict[str, int], query: Query, path: Path, line: int) -> None:
    """Add a query to those of one file.

    Args:
        queries: qid -> query, to be added to.
        lines: qid -> its line, to be added to.
        query: The query.
        path: The file.
        line: The query's line.

    Raises:
        DataError: The id was on an earlier line, or the query has no text.
    """
    if query.id in queries:
        raise repeated("query", query.id, path, lines[query.id], line)
    if not query.text.strip():
        raise DataError(f"{place(path, line)}: query {query.id!r} has no text", remedy="give it one, or remove it")
    queries[query.id], lines[query.id] = query, line


def repeated(what: str, identifier: str, path: Path, first: int, second: int) -> DataError:
    """Describe an id that two lines of a file have."""
    return DataError(
        f"{what} id {identifier!r} is on line {first} and on line {second} of {path}",
        expected=f"each {what} once",
        remedy="remove one of them, or give it an id of its own",
    )


@dataclass
class Layout:
    """A folder as its reader sees it, the corpus not yet looked at.

    Attributes:
        corpus: The corpus file.
        files: All files that were read, the corpus included.
        queries: qid -> query.
        judgements: Judgements of all splits.
        read_corpus: Streams (line, document) from the corpus file, documents without text too.
        answer_splits: Splits whose queries are kept without judgements, because answers are known of them.
        dropped: reason -> number of records left out.
        exclusions: split -> qid -> docids that are known to be no negatives of the query.
        read_given: Streams the negatives that the files give the training queries; None where they give none.
    """

    corpus: Path
    files: list[Path]
    queries: dict[str, Query]
    judgements: Judgements
    read_corpus: Callable[[], Iterator[tuple[int, Document]]]
    answer_splits: frozenset[str] = frozenset()
    dropped: Counter[str] = field(default_factory=Counter)
    exclusions: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    read_given: Callable[[], Iterator[GivenNegatives]] | None = None

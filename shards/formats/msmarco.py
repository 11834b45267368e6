"""MS MARCO passage ranking: `collection.tsv`, `queries.{train,dev.small,...}.tsv`, `qrels.{train,dev.small,...}.tsv`.

    collection.tsv   pid TAB passage          no header; quotes are ordinary characters
    queries.*.tsv    qid TAB query            most training queries have no judgement: they are counted and left out
    qrels.*.tsv      qid 0 pid grade          the columns of TREC; two columns (qid, pid) are read as grade 1

Source: Bajaj et al. 2016 and the task's official files; the two-column form is RocketQA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shards.errors import DataError
from shards.formats.compressed import find_file
from shards.formats.items import Consumed, Item, Judgement, Outcome, documents_of, read_lines_as, require_good
from shards.formats.layout import Judgements, Layout, add_query, grade_of
from shards.formats.lines import id_of
from shards.formats.stream import OR_LEAVE_OUT, BadRecord, Mark, place
from shards.records import Document, Query

# The names a split's files may have, the better one first: published numbers are those of dev.small.
SPLIT_FILES = {"train": ("train",), "dev": ("dev.small", "dev"), "test": ("test",)}


def read_layout(path: Path, *, needs_queries: bool = True) -> Layout:
    """Read queries and judgements of a folder of MS MARCO's files.

    Args:
        path: The folder; any of the splits may be missing.
        needs_queries: Whether all of them may not.

    Raises:
        DataError: A file is missing, empty or malformed, or judges a query that is not there.
    """
    corpus = find_file(path / "collection.tsv")
    files = [corpus]
    queries: dict[str, Query] = {}
    judgements = Judgements(queries)
    for split, names in SPLIT_FILES.items():
        name = next((name for name in names if find_file(path / f"qrels.{name}.tsv").exists()), None)
        if name is None:
            continue
        query_file, judgement_file = (find_file(path / f"{what}.{name}.tsv") for what in ("queries", "qrels"))
        files += [query_file, judgement_file]
        judgements.qrels[split] = {}
        _read_queries(query_file, queries)
        for line, item in require_good(read_judgements(judgement_file, split)):
            if isinstance(item, Judgement):
                judgements.add(split, item.qid, item.docid, item.grade, judgement_file, line)
    if not judgements.qrels and needs_queries:
        raise DataError(
            f"{path} has no judgements",
            expected="qrels.train.tsv, qrels.dev.small.tsv or qrels.test.tsv, each with its queries file",
            remedy="put the files of at least one split there, by these names",
        )
    return Layout(
        corpus=corpus,
        files=files,
        queries=queries,
        judgements=judgements,
        read_corpus=lambda: documents_of(read_passages(corpus)),
    )


def _read_queries(path: Path, queries: dict[str, Query]) -> None:
    found: dict[str, Query] = {}
    lines: dict[str, int] = {}
    for line, item in require_good(read_queries(path)):
        if isinstance(item, Query):
            add_query(found, lines, item, path, line)
    for qid, query in found.items():
        if queries.get(qid, query) != query:
            raise DataError(
                f"{place(path, lines[qid])}: query id {qid!r} has another text than in the files read before",
                expected="one text for each id",
                remedy="take queries and judgements of one release, or give one of the two another id",
            )
    queries |= found


def read_passages(path: Path, mark: Mark | None = None, consumed: Consumed | None = None) -> Iterator[Outcome]:
    """Stream the passages of a collection.

    Args:
        path: The file.
        mark: Where to begin; moved along.
        consumed: Told of the bytes of the file that were read.

    Raises:
        DataError: The file is missing, empty, damaged or cut short.
    """

    def passage(text: str, line: int) -> list[Item]:
        row = id_and_text(text, "a passage", path, line)
        return [Document(row[0], "", row[1])] if row else []

    return read_lines_as(path, passage, mark, consumed)


def read_queries(path: Path, mark: Mark | None = None, consumed: Consumed | None = None) -> Iterator[Outcome]:
    """Stream the queries of a file, `qid TAB text`; as `read_passages`."""

    def query(text: str, line: int) -> list[Item]:
        row = id_and_text(text, "a query", path, line)
        return [Query(*row)] if row else []

    return read_lines_as(path, query, mark, consumed)


def read_judgements(
    path: Path, split: str, folder: str = "qrels", mark: Mark | None = None, consumed: Consumed | None = None
) -> Iterator[Outcome]:
    """Stream judgements of four columns (qid, 0, docid, grade) or two (qid, docid); as `read_passages`.

    Args:
        path: The file.
        split: Its split.
        folder: `qrels`, or `exclusions` as `Judgement.folder` says it.
        mark: Where to begin; moved along.
        consumed: Told of the bytes of the file that were read.
    """

    def judgement(text: str, line: int) -> list[Item]:
        columns = text.split()
        if len(columns) == 4:
            return [Judgement(split, columns[0], columns[2], grade_of(columns[3], path, line), folder)]
        if len(columns) == 2:
            return [Judgement(split, columns[0], columns[1], 1, folder)]
        if columns:
            raise BadRecord(
                "wrong number of columns",
                f"{place(path, line)} has {len(columns)} columns",
                expected="four (qid, 0, pid, grade) or two (qid, pid)",
                remedy=f"write the row again, {OR_LEAVE_OUT}",
            )
        return []

    return read_lines_as(path, judgement, mark, consumed)


def id_and_text(row: str, what: str, path: Path, line: int) -> tuple[str, str] | None:
    """Split a line into id and text; None for a blank one. A tab inside the text is white space like any other.

    Args:
        row: The line.
        what: What the text is, for the error.
        path: The file, and
        line: the line's number in it, for the error.

    Raises:
        BadRecord: It has no tab, or a malformed id before it.
    """
    if not row or row.isspace():
        return None
    identifier, tab, text = row.partition("\t")
    if not tab:
        raise BadRecord(
            "wrong number of columns",
            f"{place(path, line)} has no tab",
            expected=f"an id, a tab and {what}",
            remedy=f"write the row again, with a tab and no blanks behind the id, {OR_LEAVE_OUT}",
        )
    if not identifier.isalnum():  # what is holds no white space, and to write the place down for each line takes time
        identifier = id_of(identifier, "id", place(path, line))
    return identifier, text.replace("\t", " ")

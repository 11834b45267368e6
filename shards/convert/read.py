"""From the bytes of a source to items, record by record, from any mark on.

A reader yields, for each record, the line it ends on and its items, or what is wrong with it; the mark then stands
behind that record, so that a conversion that was interrupted there goes on with the next one. What a damaged file
raises (cut short, malformed beyond one record) ends the conversion whatever the options say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shards.convert import fields, parse
from shards.convert.options import Options
from shards.convert.sources import Source
from shards.errors import DataError
from shards.formats import dpr, msmarco
from shards.formats.items import Consumed, Item, Outcome, Training, attempt, read_lines_as
from shards.formats.lines import json_object, read_jsonl
from shards.formats.stream import MAX_LINE_BYTES, OR_LEAVE_OUT, BadRecord, Mark, decoded, place, raw_lines
from shards.formats.tables import columns_of, read_rows
from shards.records import Document

_GROUP_ROWS = 10_000


def read_source(source: Source, mark: Mark, options: Options, consumed: Consumed) -> Iterator[Outcome]:
    """Stream a source's items.

    Args:
        source: The file.
        mark: Where to begin; moved along.
        options: The conversion's options.
        consumed: Told of the bytes of the file that were read.

    Yields:
        Line, and the items of the record that ends there or what is wrong with it.

    Raises:
        DataError: The file is missing, empty, damaged or cut short, or lacks a column.
    """
    kind = source.kind
    if kind == "questions":
        keeps = options.questions == "all"
        return dpr.read_questions(
            source.path, source.split, with_negatives=True, keeps_unjudged=keeps, mark=mark, consumed=consumed
        )
    if kind == "topics":
        return _topics(source, mark, consumed)
    if kind in ("triples", "top1000"):
        return _groups(source, mark, consumed)
    if kind.startswith("table"):
        return _rows(source, mark, options, consumed)
    # A text may be as long as the options allow, and a column is noticed a little later than a document.
    limit = options.max_document_characters + 1
    if kind == "passages":
        return dpr.read_passages(source.path, max_characters=limit, mark=mark, consumed=consumed)
    if kind == "answers":
        known = dpr.read_texts(source.known) if source.known else None
        return dpr.read_answers(
            source.path, source.split, known=known, max_characters=limit, mark=mark, consumed=consumed
        )
    if source.beside is not None:
        return _titled(source, mark, consumed)
    if kind == "collection":
        return msmarco.read_passages(source.path, mark, consumed)
    if kind == "queries":
        return msmarco.read_queries(source.path, mark, consumed)
    if kind in ("judgements", "exclusions"):
        return msmarco.read_judgements(source.path, source.split, parse.folder_of(source), mark, consumed)
    return read_lines_as(source.path, _line_parser(source, options), mark, consumed)


def _line_parser(source: Source, options: Options) -> Callable[[str, int], list[Item]]:
    """Choose what turns a line of the file into items."""
    path = source.path
    if source.kind in ("documents", "json queries", "json judgements"):
        first = (
            next((record for _, record in read_jsonl(path)), None) if options.on_error == "error" else _first(source)
        )
        make = fields.record_parser(source, list(first or {}), options)
        return lambda text, line: make(json_object(text, path, line), place(path, line)) if text.strip() else []
    if source.kind == "json training":
        return lambda text, line: (
            fields.training_of(json_object(text, path, line), source.split, place(path, line)) if text.strip() else []
        )
    by_line = parse.run_line if source.kind == "run" else parse.beir_judgement_line
    return lambda text, line: by_line(source, text, line)


def _first(source: Source) -> dict[str, Any] | None:
    """Find the first record that is whole, where others are dropped."""
    mark = Mark()
    for raw in raw_lines(source.path, mark):
        if not isinstance(raw, BadRecord) and raw.strip():
            try:
                return json_object(decoded(raw, source.path, mark.line), source.path, mark.line)
            except BadRecord:
                continue
    return None


def _titled(source: Source, mark: Mark, consumed: Consumed) -> Iterator[Outcome]:
    """Read passages along with their titles, which stand in another file in the same order, some left out."""
    assert source.beside is not None
    titles, beside = Mark(mark.beside_offset, mark.beside_line), source.beside
    held = _next_title(lines := raw_lines(beside, titles, consumed=consumed), beside, titles)
    before = titles.copy() if held is None else Mark(mark.beside_offset, mark.beside_line)

    def make(text: str, line: int) -> list[Item]:
        nonlocal held, before
        row = msmarco.id_and_text(text, "a passage", source.path, line)
        if row is None:
            return []
        title = ""
        if held is not None and held[0] == row[0]:
            title, before = held[1], titles.copy()
            held = _next_title(lines, beside, titles)
        mark.beside_offset, mark.beside_line = before.offset, before.line
        return [Document(row[0], "" if title.strip() == "-" else title, row[1])]

    yield from read_lines_as(source.path, make, mark, consumed)
    if held is not None:
        raise DataError(
            f"{place(beside, titles.line)} has the title of passage {held[0]!r}, which does not come after it",
            expected=f"titles in the order of {source.path.name}",
            remedy="sort both files by id in the same way",
        )


def _next_title(lines: Iterator[bytes | BadRecord], path: Any, mark: Mark) -> tuple[str, str] | None:
    for raw in lines:
        if isinstance(raw, BadRecord):
            raise raw
        if found := msmarco.id_and_text(decoded(raw, path, mark.line), "a title", path, mark.line):
            return found
    return None


def _groups(source: Source, mark: Mark, consumed: Consumed) -> Iterator[Outcome]:
    """Join rows of one query that follow each other into one record; rows further apart are joined in the end."""
    ahead, group, line = mark.copy(), None, 0
    end = mark.copy()

    def moved() -> None:
        mark.offset, mark.line, mark.row = end.offset, end.line, end.row

    make = parse.triple if source.kind == "triples" else parse.candidate
    for line, found in read_lines_as(source.path, lambda text, line: make(source, text, line), ahead, consumed):
        row = found[0] if not isinstance(found, BadRecord) and found else None
        if group is not None and (not isinstance(row, Training) or not _joins(group, row)):
            moved()
            yield end.line, [group]
            group = None
        if isinstance(row, Training):
            if group is None:
                group = row
            else:
                group.positives += [docid for docid in row.positives if docid not in group.positives]
                for docid, score, retrievers in zip(row.negatives, row.scores, row.proposed_by, strict=True):
                    group.add_negative(docid, score, retrievers)
        end = ahead.copy()
        if group is None:
            moved()
            yield line, found
    if group is not None:
        moved()
        yield end.line, [group]


def _joins(group: Training, row: Training) -> bool:
    return group.qid == row.qid and len(group.negatives) < _GROUP_ROWS


def _topics(source: Source, mark: Mark, consumed: Consumed) -> Iterator[Outcome]:
    """Read queries as `qid TAB text` or in TREC's form, `<top> <num> Number: 1 <title> words </top>`."""
    head = Mark()
    is_tagged = any(
        not isinstance(raw, BadRecord) and raw.lstrip().startswith(b"<")
        for raw, _ in zip(raw_lines(source.path, head), range(20), strict=False)
    )
    if not is_tagged:
        yield from msmarco.read_queries(source.path, mark, consumed)
        return
    ahead, topic = mark.copy(), parse.Topic(source)
    for line, found in read_lines_as(source.path, topic.take, ahead, consumed):
        if isinstance(found, BadRecord):
            topic = parse.Topic(source)
        if found:
            mark.offset, mark.line, mark.row = ahead.offset, ahead.line, ahead.row
            yield line, found
    if topic.is_open:
        raise DataError(f"{source.path} ends inside a topic", expected="</top>", remedy="fetch the file again")


def _rows(source: Source, mark: Mark, options: Options, consumed: Consumed) -> Iterator[Outcome]:
    names = columns_of(source.path)
    make = fields.record_parser(source, names, options)
    wanted = [name for name in make.columns if name in names]
    for record in read_rows(source.path, wanted, mark.row, consumed):
        mark.row += 1
        mark.line = mark.row
        where = f"{source.path} row {mark.row}"
        if sum(len(value) for value in record.values() if isinstance(value, (str, bytes))) > MAX_LINE_BYTES:
            yield (
                mark.line,
                BadRecord(
                    "line too long",
                    f"{where} has more than {MAX_LINE_BYTES} characters",
                    expected="a record of at most as many",
                    remedy=f"cut the text into several documents, {OR_LEAVE_OUT}",
                ),
            )
        else:
            yield mark.line, attempt(lambda: make(record, where))  # noqa: B023  # called at once

"""What a record of a source turns into: documents, queries, judgements, training records, rows of runs.

`Document` and `Query` are those of `shards.records`; the rest is here. One record may give several of them: a question
of DPR is a query, a judgement and a training record. Readers give them line by line, with what is wrong where something
is: a folder that is read in place must be good, a conversion may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.formats.stream import BadRecord, Mark, decoded, raw_lines
from shards.records import Document, Query


@dataclass(frozen=True, slots=True)
class AnsweredQuery:
    """A query of which answers alone are known: it belongs to a split although no judgement says so."""

    query: Query
    split: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A grade of a document for a query; above 0 is relevant."""

    split: str
    qid: str
    docid: str
    grade: int
    folder: str = "qrels"
    """`qrels`; or `exclusions`, for a document that is no negative of the query though nobody judged it relevant."""


@dataclass(slots=True)
class Training:
    """Positives and negatives of a query, as far as one record knows them.

    Attributes:
        split: `train`, `dev` or `test`.
        qid: The query.
        positives: Docids; none stands for those that the judgements name.
        negatives: Docids.
        scores: Of each negative the score that its first retriever gave it; None where there is none.
        proposed_by: Of each negative the retrievers that proposed it.
    """

    split: str
    qid: str
    positives: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    proposed_by: list[list[str]] = field(default_factory=list)

    def add_negative(self, docid: str, score: float | None, proposed_by: list[str]) -> None:
        """Append a negative."""
        self.negatives.append(docid)
        self.scores.append(score)
        self.proposed_by.append(proposed_by)


@dataclass(frozen=True, slots=True)
class RunRow:
    """One row of a retriever's ranking; the score stays as it was written."""

    name: str
    qid: str
    docid: str
    rank: int
    score: str
    tag: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is whole but of no use, such as a question without a positive passage."""

    reason: str


Item = Document | Query | AnsweredQuery | Judgement | Training | RunRow | Dropped
Outcome = tuple[int, list[Item] | BadRecord]
"""The line on which a record ends, and its items or what is wrong with it."""
Consumed = Callable[[int], None]
"""Told of the bytes of a file that were read."""


def attempt(parsed: Callable[[], list[Item]]) -> list[Item] | BadRecord:
    """Return the items of a record, or what is wrong with it."""
    try:
        return parsed()
    except BadRecord as error:
        return error


def read_lines_as(
    path: Path, parse: Callable[[str, int], list[Item]], mark: Mark | None = None, consumed: Consumed | None = None
) -> Iterator[Outcome]:
    """Stream the items of a file with a record on each line.

    Args:
        path: The file, plain or compressed.
        parse: Turns a line and its number into items.
        mark: Where to begin; moved along.
        consumed: Told of the bytes of the file that were read.

    Raises:
        DataError: The file is missing, empty, damaged or cut short.
    """
    mark = Mark() if mark is None else mark
    for raw in raw_lines(path, mark, consumed=consumed):
        mark.row += 1
        if isinstance(raw, BadRecord):
            yield mark.line, raw
            continue
        try:
            items: list[Item] | BadRecord = parse(decoded(raw, path, mark.line), mark.line)
        except BadRecord as error:
            items = error
        yield mark.line, items


def require_good(outcomes: Iterator[Outcome]) -> Iterator[tuple[int, Item]]:
    """Yield line and item, one by one.

    Raises:
        BadRecord: A record cannot be used.
    """
    for line, found in outcomes:
        if isinstance(found, BadRecord):
            raise found
        for item in found:
            yield line, item


def documents_of(outcomes: Iterator[Outcome]) -> Iterator[tuple[int, Document]]:
    """Yield line and document of a corpus, in which all must be good; as `require_good`."""
    return ((line, item) for line, item in require_good(outcomes) if isinstance(item, Document))

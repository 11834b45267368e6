"""TREC run files: rankings as text, one line for a query and a document, as trec_eval and everybody else has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError
from shards.files import write_atomically

Rankings = Mapping[str, Mapping[str, float]]
"""Query id -> document id -> score; higher is better, equal scores in the order of the mapping."""

_SIX = "qid Q0 docid rank score tag"
_THREE = "qid docid rank"


@dataclass(frozen=True, slots=True)
class RunLine:
    """One line of a run file."""

    number: int
    """In the file, from 1."""
    qid: str
    docid: str
    rank: int
    """As the file has it; some begin with 0, and some have the same number everywhere."""
    score: float
    """May be NaN or infinite, if the file says so."""


def check_trec_ids(ids: Iterable[str], what: str) -> None:
    """Refuse ids that a TREC run file cannot hold; called before a run, so that none is lost at its end.

    Args:
        ids: Query or document ids.
        what: What they are, for the message, such as `document`.

    Raises:
        DataError: An id is empty or contains white space, which separates the fields of such a file.
    """
    for identifier in ids:
        if len(identifier.split()) != 1 or identifier != identifier.strip():
            raise DataError(
                f"The {what} id {identifier!r} is empty or contains white space",
                expected="ids without white space, as in every TREC run file",
                remedy="replace the white space in the ids, in the qrels too",
            )


def write_trec(path: Path, run: Rankings, tag: str) -> None:
    """Write a ranking as a TREC run file, `qid Q0 docid rank score tag`, atomically.

    Args:
        path: The file; an older one is replaced.
        run: Rankings; written best first, ranks from 1, scores with all their digits.
        tag: Name of the system; one word.

    Raises:
        DataError: An id or the tag is not one word, or a score is not a number.
    """
    check_trec_ids([tag], "run")
    check_trec_ids(run, "query")
    with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for qid, scores in run.items():
            check_trec_ids(scores, "document")
            for rank, docid in enumerate(best_first(qid, scores), start=1):
                file.write(f"{qid} Q0 {docid} {rank} {float(scores[docid])!r} {tag}\n")


def read_trec(path: Path, top: int | None = None) -> dict[str, dict[str, float]]:
    """Read a TREC run file.

    Args:
        path: The file.
        top: Leave out what has a higher rank, counted from 1; None reads all.

    Returns:
        Query id -> document id -> score, in the order of the file.

    Raises:
        DataError: The file is missing, or a line is not `qid Q0 docid rank score tag`, or repeats a document; the
            line is named.
    """
    run: dict[str, dict[str, float]] = {}
    for line in run_lines(path, top=top):
        _add_line(path, line, run.setdefault(line.qid, {}))
    return run


def run_lines(path: Path, *, or_ranks_alone: bool = False, top: int | None = None) -> Iterator[RunLine]:
    """Read a run file line by line, so that one of any size can be taken.

    Args:
        path: The file.
        or_ranks_alone: Take also a file whose lines are `qid docid rank`, as MS MARCO has them; the score is then minus
            the rank. The first line decides for the whole file.
        top: Leave out lines with a higher rank; None reads all.

    Yields:
        The lines in order.

    Raises:
        DataError: The file is missing, or a line has another form; it is named.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", expected="a TREC run file", remedy="correct the path")
    layout = None if or_ranks_alone else _SIX
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            fields = text.split()
            if layout is None:
                layout = _THREE if len(fields) == 3 else _SIX
            try:
                if layout == _SIX:
                    qid, _, docid, rank, score, _ = fields
                    if top is not None and int(rank) > top:  # most lines of a deep ranking, so it is seen first
                        continue
                    yield RunLine(number, qid, docid, int(rank), float(score))
                else:
                    qid, docid, rank = fields
                    if top is not None and int(rank) > top:
                        continue
                    yield RunLine(number, qid, docid, int(rank), -float(int(rank)))
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} reads {text.strip()!r}",
                    expected=layout if not or_ranks_alone else f"{layout}, as the first line has it",
                    remedy="write the line again; ids have no blanks in them",
                ) from error


def rankings_by_query(path: Path, depth: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Read a run file that a run has written, query by query, so that no more than one query's lines are held.

    Args:
        path: The file; the lines of a query stand together, as they are written.
        depth: Documents of a query to read, from the first.

    Yields:
        Query id, and docid -> score in the order of the file.

    Raises:
        DataError: A line has another form or repeats a document, or a query's lines do not stand together.
    """
    seen: set[str] = set()
    qid, scores = "", dict[str, float]()
    for line in run_lines(path, top=depth):
        if line.qid != qid:
            if scores:
                yield qid, scores
            if line.qid in seen:
                raise DataError(
                    f"{path}, line {line.number} comes back to query {line.qid!r}",
                    expected="the lines of a query together, as a run writes them",
                    remedy="measure the system again by `sparring evaluate`",
                )
            seen.add(line.qid)
            qid, scores = line.qid, {}
        _add_line(path, line, scores)
    if scores:
        yield qid, scores


def best_first(qid: str, scores: Mapping[str, float]) -> list[str]:
    """Return the documents of a query, best first; equal scores keep their order.

    Args:
        qid: The query, for the error.
        scores: Of its documents.

    Raises:
        DataError: A score is NaN, which would make the order arbitrary.
    """
    for docid, score in scores.items():
        if math.isnan(score):
            raise DataError(f"The score of document {docid!r} for query {qid!r} is not a number")
    return sorted(scores, key=lambda docid: -scores[docid])  # sorted() is stable


def _add_line(path: Path, line: RunLine, scores: dict[str, float]) -> None:
    """Add a line to the scores of its query."""
    if line.docid in scores:
        raise DataError(
            f"{path}, line {line.number} ranks document {line.docid!r} of query {line.qid!r} again",
            expected="every document once for a query",
            remedy="take one of the two lines out",
        )
    scores[line.docid] = line.score

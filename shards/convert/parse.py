"""Lines of the downloads that have no in-place layout to items: runs, triples, candidates, topics of TREC."""

from __future__ import annotations

import math
import re

from shards.convert.sources import Source
from shards.formats import beir
from shards.formats.items import Item, Judgement, RunRow, Training
from shards.formats.lines import id_of
from shards.formats.stream import OR_LEAVE_OUT, BadRecord, place
from shards.records import Query

# Who proposed the negatives of a file that does not say so itself.
_TOP1000_SOURCE, _TRIPLES_SOURCE = "bm25", "triples"


def folder_of(source: Source) -> str:
    """Return the folder of the outputs that a file's judgements go to."""
    return "exclusions" if source.kind.endswith("exclusions") else "qrels"


def beir_judgement_line(source: Source, text: str, line: int) -> list[Item]:
    """Read a judgement of BEIR's three columns; the header is none."""
    row = beir.judgement_of(text, source.path, line)
    if row is None:
        return []
    where = place(source.path, line)
    qid, docid = id_of(row[0], "query-id", where), id_of(row[1], "corpus-id", where)
    return [Judgement(source.split, qid, docid, row[2], folder_of(source))]


def run_line(source: Source, text: str, line: int) -> list[Item]:
    """Read a row of a run: TREC's six columns, or qid, docid, rank.

    A run of training or development queries also proposes negatives, under its tag.

    Raises:
        BadRecord: It has another number of columns, or no number where a rank or score must be.
    """
    columns = text.split()
    if not columns:
        return []
    where = place(source.path, line)
    if len(columns) not in (3, 6):
        raise BadRecord(
            "wrong number of columns",
            f"{where} has {len(columns)} columns",
            expected="six (qid, Q0, docid, rank, score, tag) or three (qid, docid, rank)",
            remedy=f"write the row again, {OR_LEAVE_OUT}",
        )
    is_short = len(columns) == 3
    qid, docid, rank = (columns[0], columns[1], columns[2]) if is_short else (columns[0], columns[2], columns[3])
    # Without scores the rank is the score, so that the order stays.
    score, tag = (f"-{rank}", source.run_name) if is_short else (columns[4], columns[5])
    try:
        value, number = float(score), int(rank)
    except ValueError:
        value, number = math.nan, 0
    if not math.isfinite(value):
        raise BadRecord(
            "malformed score",
            f"{where} has the rank {rank[:20]!r} and the score {score[:20]!r}",
            expected="numbers",
            remedy=f"write the row again, {OR_LEAVE_OUT}",
        )
    items: list[Item] = [RunRow(source.run_name, qid, docid, number, score, tag)]
    if split := _named_split(source):
        training = Training(split, qid)
        training.add_negative(docid, None if is_short else value, [tag])
        items.append(training)
    return items


def _named_split(source: Source) -> str | None:
    """Return the split that the file's own name says; the test split's rankings are never negatives."""
    words = set(re.findall(r"[a-z]+", source.name.lower()))
    return source.split if source.split != "test" and words & {source.split, "train", "dev", "val"} else None


def triple(source: Source, text: str, line: int) -> list[Item]:
    """Read a triple of ids: query, positive, negative.

    Raises:
        BadRecord: It has another number of columns.
    """
    columns = text.split()
    if not columns:
        return []
    if len(columns) != 3:
        raise BadRecord(
            "wrong number of columns",
            f"{place(source.path, line)} has {len(columns)} columns",
            expected="three: qid, positive pid, negative pid",
            remedy=f"write the row again, {OR_LEAVE_OUT}",
        )
    training = Training(source.split, columns[0], [columns[1]])
    training.add_negative(columns[2], None, [_TRIPLES_SOURCE])
    return [training]


def candidate(source: Source, text: str, line: int) -> list[Item]:
    """Read a row of a `top1000`: qid, pid, and the texts of both, which other files have.

    Raises:
        BadRecord: It has fewer than two columns.
    """
    columns = text.split("\t", 2)
    if not text or text.isspace():
        return []
    where = place(source.path, line)
    if len(columns) < 2:
        raise BadRecord(
            "wrong number of columns",
            f"{where} has no tab",
            expected="qid, pid, query, passage",
            remedy=f"write the row again, {OR_LEAVE_OUT}",
        )
    training = Training(source.split, id_of(columns[0], "qid", where))
    training.add_negative(id_of(columns[1], "pid", where), None, [_TOP1000_SOURCE])
    return [training]


class Topic:
    """Collects the lines of one `<top>` block of TREC; the title is the query.

    Args:
        source: The file.
    """

    def __init__(self, source: Source) -> None:
        self._source, self._tag, self.is_open = source, "", False
        self._parts: dict[str, list[str]] = {}

    def take(self, text: str, line: int) -> list[Item]:
        """Take a line; the one that closes the block returns its query.

        Raises:
            BadRecord: The block has no number or no title.
        """
        for tag, words in re.findall(r"(</?\w+>)?([^<]*(?:<(?!/?\w+>)[^<]*)*)", text):
            if tag == "<top>":
                self.is_open, self._parts, self._tag = True, {}, ""
            elif tag == "</top>":
                self.is_open = False
                return [self._query(line)]
            elif tag:
                self._tag = tag.strip("</>").lower() if not tag.startswith("</") else ""
            if self._tag in ("num", "title") and words.strip():
                self._parts.setdefault(self._tag, []).append(words.strip())
        return []

    def _query(self, line: int) -> Query:
        where = place(self._source.path, line)
        number = re.sub(r"^Number:\s*", "", " ".join(self._parts.get("num", [])), flags=re.IGNORECASE)
        title = re.sub(r"^Topic:\s*", "", " ".join(self._parts.get("title", [])), flags=re.IGNORECASE)
        if not title:
            raise BadRecord(
                "missing field",
                f"{where} ends a topic without a title",
                expected="<num> and <title>",
                remedy=f"give it one, {OR_LEAVE_OUT}",
            )
        return Query(id_of(number.strip() or None, "num", where), title)

"""The files of DPR: Wikipedia passages as TSV, training questions as one JSON list, test questions as `.qa.csv`.

    psgs*.tsv (or corpus*.tsv)       header id, text, title; tab-separated with doubled quotes
    biencoder-*-{train,dev}.json     [{"question", "answers", "positive_ctxs": [{"passage_id" or "psg_id" or "id"}]}]
    *-{dev,test}.qa.csv              question TAB Python list of answers; no header

The first of `positive_ctxs` is the gold passage and the only positive taken; the others contain an answer, no more,
and their `score` is BM25's. Questions of a `.qa.csv` have answers only: they are scored by answer match. Where a split
has both files, the one with passages is read. Questions have no ids; theirs are `train-1`, `train-2`, by row.

Source: Karpukhin et al. 2020 and the released files of DPR (facebookresearch/DPR).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.formats.compressed import find_files
from shards.formats.json_list import read_json_list
from shards.formats.layout import Judgements, Layout
from shards.formats.lines import answers_of, id_of, read_quoted_tsv, text_of
from shards.formats.stream import BadRecord, place
from shards.records import Document, Query

ID_FIELDS = ("passage_id", "psg_id", "id")
"""Natural Questions has the first, TriviaQA the second, AR2's own files the third."""
PASSAGE_COLUMNS = ["id", "text", "title"]
"""The columns of a file of passages without a header."""


def read_layout(path: Path) -> Layout:
    """Read questions and gold passages of a folder of DPR's files.

    Args:
        path: The folder, with the files of one data set.

    Raises:
        DataError: A file is missing, empty, malformed, or there twice (for two data sets).
    """
    corpus = _only(path, "psgs*.tsv") or _only(path, "corpus*.tsv")
    if corpus is None:
        raise DataError(f"{path} has no passages", expected="psgs_w100.tsv, or another psgs*.tsv or corpus*.tsv")
    queries: dict[str, Query] = {}
    dropped: Counter[str] = Counter()
    judgements, files, answer_splits = Judgements(queries), [corpus], set()
    for split in ("train", "dev"):
        if file := _only(path, f"biencoder-*{split}.json"):
            files.append(file)
            judgements.qrels[split] = {}
            _read_questions(file, split, queries, judgements, dropped)
    for split in ("dev", "test"):
        file = _only(path, f"*{split}.qa.csv")
        if file and split not in judgements.qrels:
            files.append(file)
            answer_splits.add(split)
            read = _read_answers(file, split, dropped)
            queries |= read
            judgements.qrels[split] = {qid: {} for qid in read}
    if not judgements.qrels:
        raise DataError(
            f"{path} has passages but no questions",
            expected="biencoder-*-train.json, biencoder-*-dev.json, *-dev.qa.csv or *-test.qa.csv",
        )
    return Layout(
        corpus=corpus,
        files=files,
        queries=queries,
        judgements=judgements,
        read_corpus=lambda: _read_corpus(corpus),
        answer_splits=frozenset(answer_splits),
        dropped=dropped,
    )


def _only(path: Path, pattern: str) -> Path | None:
    found = find_files(path, pattern)
    if len(found) > 1:
        raise DataError(
            f"{path} has {' and '.join(file.name for file in found)}",
            expected=f"one file named {pattern}",
            remedy="keep one data set in a folder; links to files elsewhere will do",
        )
    return found[0] if found else None


def clean(text: str) -> str:
    """Write a text as DPR does: straight apostrophes, and one line."""
    return text.replace("\u2019", "'").replace("\n", " ").strip()


def _read_questions(
    path: Path, split: str, queries: dict[str, Query], judgements: Judgements, dropped: Counter[str]
) -> None:
    for row, (line, record) in enumerate(read_json_list(path), 1):
        question = question_of(record, f"{split}-{row}", place(path, line))
        if question is None:
            dropped[f"question without a positive passage ({split})"] += 1
            continue
        query, gold = question
        queries[query.id] = query
        judgements.add(split, query.id, gold, 1, path, line)


def question_of(record: dict[str, Any], qid: str, where: str) -> tuple[Query, str] | None:
    """Read one training question and the id of its gold passage; None where it has no positive passage.

    Raises:
        BadRecord: A field is missing, malformed or empty.
    """
    question = clean(text_of(record, "question", where))
    answers = answers_of(record.get("answers"), where)
    contexts = contexts_of(record, "positive_ctxs", where)
    if not question:
        raise BadRecord("empty text", f"{where} has an empty question", remedy="remove the record")
    if not contexts:
        return None
    gold = passage_id(contexts[0])
    if gold is None:
        raise BadRecord(
            "missing field",
            f"{where}: the gold passage (the first of 'positive_ctxs') has no id",
            expected=f"one of the fields {', '.join(ID_FIELDS)}",
        )
    return Query(qid, question, answers), id_of(gold, "passage_id", where)


def contexts_of(record: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Return the passages of a field of a question.

    Raises:
        BadRecord: The field is no list of objects.
    """
    contexts = record.get(name)
    if not isinstance(contexts, list) or not all(isinstance(context, dict) for context in contexts):
        raise BadRecord(
            "malformed field", f"{where} has {str(contexts)[:40]!r} as {name!r}", expected="a list of passages"
        )
    return contexts


def passage_id(context: dict[str, Any]) -> object:
    """Return the id of a passage under whichever name it has; None where it has none."""
    return next((context[name] for name in ID_FIELDS if context.get(name) is not None), None)


def _read_answers(path: Path, split: str, dropped: Counter[str]) -> dict[str, Query]:
    queries: dict[str, Query] = {}
    for row, (line, columns) in enumerate(read_quoted_tsv(path), 1):
        query = answered_of(columns, f"{split}-{row}", place(path, line))
        if query is None:
            dropped[f"question without an answer ({split})"] += 1
        else:
            queries[query.id] = query
    return queries


def answered_of(columns: list[str], qid: str, where: str) -> Query | None:
    """Read one row of a `.qa.csv`; None where it has no answer.

    Raises:
        BadRecord: The row has other columns than a question and a Python list of strings.
    """
    if len(columns) != 2:
        raise BadRecord(
            "wrong number of columns",
            f"{where} has {len(columns)} columns",
            expected="two: question TAB ['answer', ...]",
        )
    try:
        value = ast.literal_eval(columns[1].strip())  # a literal only: never code
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise BadRecord(
            "malformed field", f"{where} has {columns[1][:60]!r} as answers", expected="a Python list of strings"
        ) from None
    answers, question = answers_of(value, where), clean(columns[0])
    if not question:
        raise BadRecord("empty text", f"{where} has an empty question", remedy="remove the row")
    return Query(qid, question, answers) if answers else None


def _read_corpus(path: Path) -> Iterator[tuple[int, Document]]:
    names = PASSAGE_COLUMNS
    for row, (line, columns) in enumerate(read_quoted_tsv(path)):
        if row == 0 and columns[0] == "id":
            names = header_of(columns, place(path, line))
        else:
            yield line, passage_of(columns, names, place(path, line))


def header_of(columns: list[str], where: str) -> list[str]:
    """Check the header of a file of passages.

    Raises:
        DataError: It lacks the columns id or text.
    """
    if not {"id", "text"} <= set(columns):
        raise DataError(f"{where} is the header {columns}", expected="id, text and title")
    return columns


def passage_of(columns: list[str], names: list[str], where: str) -> Document:
    """Read one row of a file of passages.

    Raises:
        BadRecord: It has another number of columns than names, or a malformed id.
    """
    if len(columns) != len(names):
        raise BadRecord(
            "wrong number of columns",
            f"{where} has {len(columns)} columns",
            expected=f"{len(names)}: {', '.join(names)}, separated by tabs",
        )
    docid = id_of(columns[names.index("id")], "id", where)
    title = columns[names.index("title")] if "title" in names else ""
    return Document(docid, title, columns[names.index("text")].replace("\n", " "))

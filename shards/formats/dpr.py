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
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.formats.compressed import find_files
from shards.formats.items import (
    AnsweredQuery,
    Consumed,
    Dropped,
    Item,
    Judgement,
    Outcome,
    Training,
    attempt,
    documents_of,
    require_good,
)
from shards.formats.json_list import read_json_list
from shards.formats.layout import Judgements, Layout
from shards.formats.lines import MAX_COLUMN_CHARACTERS, answers_of, id_of, quoted_rows, text_of
from shards.formats.stream import OR_LEAVE_OUT, BadRecord, Mark, place
from shards.records import Document, GivenNegatives, Query

ID_FIELDS = ("passage_id", "psg_id", "id")
"""Natural Questions has the first, TriviaQA the second, AR2's own files the third."""
PASSAGE_COLUMNS = ["id", "text", "title"]
"""The columns of a file of passages without a header."""
# Who proposed the negatives, of which the file says nothing.
_NEGATIVES = {"hard_negative_ctxs": "bm25", "negative_ctxs": "random"}


def read_layout(path: Path, *, needs_queries: bool = True) -> Layout:
    """Read questions and gold passages of a folder of DPR's files.

    Args:
        path: The folder, with the files of one data set.
        needs_queries: Whether passages alone are refused.

    Raises:
        DataError: A file is missing, empty, malformed, or there twice (for two data sets).
    """
    corpus = _only(path, "psgs*.tsv") or _only(path, "corpus*.tsv")
    if corpus is None:
        raise DataError(
            f"{path} has no passages",
            expected="psgs_w100.tsv, or another psgs*.tsv or corpus*.tsv",
            remedy="put the passages, or a link to them, beside the questions",
        )
    queries: dict[str, Query] = {}
    dropped: Counter[str] = Counter()
    judgements, files, answer_splits = Judgements(queries), [corpus], set()
    for split in ("train", "dev"):
        if file := _only(path, f"biencoder-*{split}.json"):
            files.append(file)
            judgements.qrels[split] = {}
            for line, item in require_good(read_questions(file, split, with_negatives=False)):
                if isinstance(item, Query):
                    queries[item.id] = item
                elif isinstance(item, Judgement):
                    judgements.add(split, item.qid, item.docid, item.grade, file, line)
                elif isinstance(item, Dropped):
                    dropped[item.reason] += 1
    for split in ("dev", "test"):
        file = _only(path, f"*{split}.qa.csv")
        if file and split not in judgements.qrels:
            files.append(file)
            answer_splits.add(split)
            judgements.qrels[split] = {}
            for _, item in require_good(read_answers(file, split)):
                if isinstance(item, AnsweredQuery):
                    queries[item.query.id] = item.query
                    judgements.qrels[split][item.query.id] = {}
                elif isinstance(item, Dropped):
                    dropped[item.reason] += 1
    if not judgements.qrels and needs_queries:
        raise DataError(
            f"{path} has passages but no questions",
            expected="biencoder-*-train.json, biencoder-*-dev.json, *-dev.qa.csv or *-test.qa.csv",
            remedy="put the questions of at least one split there, by these names",
        )
    return Layout(
        corpus=corpus,
        files=files,
        queries=queries,
        judgements=judgements,
        read_corpus=lambda: documents_of(read_passages(corpus)),
        answer_splits=frozenset(answer_splits),
        dropped=dropped,
        read_given=partial(read_given, train) if (train := _only(path, "biencoder-*train.json")) else None,
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


def read_questions(
    path: Path,
    split: str,
    *,
    with_negatives: bool,
    keeps_unjudged: bool = False,
    mark: Mark | None = None,
    consumed: Consumed | None = None,
) -> Iterator[Outcome]:
    """Stream the training questions of a file: of each a query and a judgement of its gold passage.

    Args:
        path: The file.
        split: Its split.
        with_negatives: Whether the passages that are proposed as negatives are read, too.
        keeps_unjudged: Whether questions without a positive passage stay with their answers, if they have any.
        mark: Where to begin; moved along.
        consumed: Told of the bytes of the file that were read.

    Raises:
        DataError: The file is no list of objects.
    """
    mark = Mark() if mark is None else mark
    start = mark.row  # a list is read from its beginning again: its objects are no lines
    for row, (line, record) in enumerate(read_json_list(path, consumed), 1):
        if row > start:
            mark.row, mark.line = row, line
            where = place(path, line)
            make = partial(_question, record, split, row, where, with_negatives, keeps_unjudged)
            yield line, attempt(make)


def read_texts(path: Path) -> frozenset[str]:
    """Return the texts of all questions of a file of training questions.

    Args:
        path: The file.

    Raises:
        DataError: The file is no list of objects.
    """
    texts = (record.get("question") for _, record in read_json_list(path))
    return frozenset(clean(text) for text in texts if isinstance(text, str))


def _question(
    record: dict[str, Any], split: str, row: int, where: str, with_negatives: bool, keeps_unjudged: bool
) -> list[Item]:
    question = clean(text_of(record, "question", where))
    answers = answers_of(record.get("answers"), where)
    passages = _passages(record, "positive_ctxs", where)
    if not question:
        raise BadRecord("empty text", f"{where} has an empty question", remedy="remove the record")
    if not passages and keeps_unjudged and answers:
        return [AnsweredQuery(Query(f"{split}-{row}", question, answers), split)]
    if not passages:
        return [Dropped(f"question without a positive passage ({split})")]
    gold = _passage_id(passages[0])
    if gold is None:
        raise BadRecord(
            "missing field",
            f"{where}: the gold passage (the first of 'positive_ctxs') has no id",
            expected=f"one of the fields {', '.join(ID_FIELDS)}",
            remedy=f"give it the id that it has among the passages, {OR_LEAVE_OUT}",
        )
    query, gold_id = Query(f"{split}-{row}", question, answers), id_of(gold, "passage_id", where)
    items: list[Item] = [query, Judgement(split, query.id, gold_id, 1)]
    return [*items, *_negatives(record, Training(split, query.id, [gold_id]), where)] if with_negatives else items


def _negatives(record: dict[str, Any], training: Training, where: str) -> list[Item]:
    items: list[Item] = []
    for name, retriever in _NEGATIVES.items():
        for passage in _passages(record, name, where) if record.get(name) is not None else []:
            docid = _passage_id(passage)
            if docid is None:
                items.append(Dropped("negative passage without an id"))
                continue
            training.add_negative(id_of(docid, "passage_id", where), _score(passage.get("score")), [retriever])
    return [*([training] if training.negatives else []), *items]


def read_given(path: Path) -> Iterator[GivenNegatives]:
    """Stream the negatives of the training questions: `hard_negative_ctxs`, then `negative_ctxs`.

    Args:
        path: The file of the questions.

    Raises:
        DataError: The file is no list of objects, or a record cannot be used.
    """
    for _, item in require_good(read_questions(path, "train", with_negatives=True)):
        if isinstance(item, Training):
            yield GivenNegatives(item.qid, item.negatives, item.proposed_by)


def _score(value: object) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]  # a number, as was just found


def _passages(record: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    passages = record.get(name)
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        raise BadRecord(
            "malformed field",
            f"{where} has {str(passages)[:40]!r} as {name!r}",
            expected="a list of passages",
            remedy=f"write it as a list of objects, {OR_LEAVE_OUT}",
        )
    return passages


def _passage_id(passage: dict[str, Any]) -> object:
    return next((passage[name] for name in ID_FIELDS if passage.get(name) is not None), None)


def read_answers(
    path: Path,
    split: str,
    *,
    known: frozenset[str] | None = None,
    max_characters: int = MAX_COLUMN_CHARACTERS,
    mark: Mark | None = None,
    consumed: Consumed | None = None,
) -> Iterator[Outcome]:
    """Stream the questions of a `.qa.csv`, of which answers alone are known.

    Args:
        path: The file.
        split: Its split.
        known: Texts of the split's questions that have passages in another file, which are left out here; the ids of
            the others are `dev-qa-1`, by row. None where there is no such file.
        max_characters: The longest column.
        mark: Where to begin; moved along.
        consumed: Told of the bytes of the file that were read.

    Raises:
        DataError: The file is missing, empty or damaged.
    """
    mark = Mark() if mark is None else mark
    for columns in quoted_rows(path, mark, max_characters=max_characters, consumed=consumed):
        if isinstance(columns, BadRecord):
            yield mark.line, columns
        else:
            where = place(path, mark.line)
            yield mark.line, attempt(partial(_answered, columns, split, mark.row, where, known))


def _answered(columns: list[str], split: str, row: int, where: str, known: frozenset[str] | None) -> list[Item]:
    if len(columns) != 2:
        raise BadRecord(
            "wrong number of columns",
            f"{where} has {len(columns)} columns",
            expected="two: question TAB ['answer', ...]",
            remedy=f"write the row again, {OR_LEAVE_OUT}",
        )
    try:
        value = ast.literal_eval(columns[1].strip())  # a literal only: never code
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise BadRecord(
            "malformed field",
            f"{where} has {columns[1][:60]!r} as answers",
            expected="a Python list of strings, such as ['Paris']",
            remedy=f"write the answers so, {OR_LEAVE_OUT}",
        ) from None
    answers, question = answers_of(value, where), clean(columns[0])
    if not question:
        raise BadRecord("empty text", f"{where} has an empty question", remedy="remove the row")
    if not answers:
        return [Dropped(f"question without an answer ({split})")]
    if known is not None and question in known:
        return [Dropped(f"question that has passages in another file ({split})")]
    return [AnsweredQuery(Query(f"{split}-{row}" if known is None else f"{split}-qa-{row}", question, answers), split)]


def read_passages(
    path: Path,
    *,
    max_characters: int = MAX_COLUMN_CHARACTERS,
    mark: Mark | None = None,
    consumed: Consumed | None = None,
) -> Iterator[Outcome]:
    """Stream the passages of a file; its arguments are those of `read_answers`.

    Raises:
        DataError: The file is missing, empty or damaged, or its header lacks the columns id or text.
    """
    names = PASSAGE_COLUMNS
    mark, head = Mark() if mark is None else mark, Mark()
    first = next(quoted_rows(path, head), [])
    if not isinstance(first, BadRecord) and first and first[0] == "id":
        names = first
        if not {"id", "text"} <= set(names):
            raise DataError(
                f"{place(path, head.line)} is the header {names}",
                expected="id, text and title",
                remedy="rename the columns there",
            )
    for columns in quoted_rows(path, mark, max_characters=max_characters, consumed=consumed):
        if isinstance(columns, BadRecord):
            yield mark.line, columns
        elif not (mark.row == 1 and columns[0] == "id"):
            where = place(path, mark.line)
            yield mark.line, attempt(lambda: [_passage(columns, names, where)])  # noqa: B023  # called at once


def _passage(columns: list[str], names: list[str], where: str) -> Document:
    if len(columns) != len(names):
        raise BadRecord(
            "wrong number of columns",
            f"{where} has {len(columns)} columns",
            expected=f"{len(names)}: {', '.join(names)}, separated by tabs",
            remedy=f"write the row again, a text with tabs in quotes, {OR_LEAVE_OUT}",
        )
    docid = id_of(columns[names.index("id")], "id", where)
    title = columns[names.index("title")] if "title" in names else ""
    return Document(docid, title, columns[names.index("text")].replace("\n", " "))

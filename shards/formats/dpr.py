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
from shards.formats.json_list import read_json_list
from shards.formats.layout import Judgements, Layout
from shards.formats.lines import answers_of, id_of, place, read_quoted_tsv, text_of
from shards.records import Document, Query

ID_FIELDS = ("passage_id", "psg_id", "id")
"""Natural Questions has the first, TriviaQA the second, AR2's own files the third."""


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
    found = sorted(path.glob(pattern))
    if len(found) > 1:
        raise DataError(
            f"{path} has {' and '.join(file.name for file in found)}",
            expected=f"one file named {pattern}",
            remedy="keep one data set in a folder; links to files elsewhere will do",
        )
    return found[0] if found else None


def _clean(text: str) -> str:
    """Write a text as DPR does: straight apostrophes, and one line."""
    return text.replace("\u2019", "'").replace("\n", " ").strip()


def _read_questions(
    path: Path, split: str, queries: dict[str, Query], judgements: Judgements, dropped: Counter[str]
) -> None:
    for row, (line, record) in enumerate(read_json_list(path), 1):
        where = place(path, line)
        question = _clean(text_of(record, "question", where))
        answers = answers_of(record.get("answers"), where)
        contexts = record.get("positive_ctxs")
        if not isinstance(contexts, list) or not all(isinstance(context, dict) for context in contexts):
            raise DataError(f"{where} has {str(contexts)[:40]!r} as 'positive_ctxs'", expected="a list of passages")
        if not question:
            raise DataError(f"{where} has an empty question", remedy="remove the record")
        if not contexts:
            dropped[f"question without a positive passage ({split})"] += 1
            continue
        query = Query(f"{split}-{row}", question, answers)
        queries[query.id] = query
        judgements.add(split, query.id, _passage_id(contexts[0], where), 1, path, line)


def _passage_id(context: dict[str, Any], where: str) -> str:
    name = next((name for name in ID_FIELDS if context.get(name) is not None), None)
    if name is None:
        raise DataError(
            f"{where}: the gold passage (the first of 'positive_ctxs') has no id",
            expected=f"one of the fields {', '.join(ID_FIELDS)}",
        )
    return id_of(context[name], name, where)


def _read_answers(path: Path, split: str, dropped: Counter[str]) -> dict[str, Query]:
    queries: dict[str, Query] = {}
    for row, (line, columns) in enumerate(read_quoted_tsv(path), 1):
        where = place(path, line)
        if len(columns) != 2:
            raise DataError(f"{where} has {len(columns)} columns", expected="two: question TAB ['answer', ...]")
        try:
            value = ast.literal_eval(columns[1].strip())  # a literal only: never code
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(
                f"{where} has {columns[1][:60]!r} as answers", expected="a Python list of strings"
            ) from None
        answers, question = answers_of(value, where), _clean(columns[0])
        if not question:
            raise DataError(f"{where} has an empty question", remedy="remove the row")
        if not answers:
            dropped[f"question without an answer ({split})"] += 1
            continue
        queries[f"{split}-{row}"] = Query(f"{split}-{row}", question, answers)
    return queries


def _read_corpus(path: Path) -> Iterator[tuple[int, Document]]:
    names = ["id", "text", "title"]
    for row, (line, columns) in enumerate(read_quoted_tsv(path)):
        if row == 0 and columns[0] == "id":
            names = columns
            if not {"id", "text"} <= set(names):
                raise DataError(f"{place(path, line)} is the header {columns}", expected="id, text and title")
            continue
        if len(columns) != len(names):
            raise DataError(
                f"{place(path, line)} has {len(columns)} columns",
                expected=f"{len(names)}: {', '.join(names)}, separated by tabs",
            )
        docid = id_of(columns[names.index("id")], "id", place(path, line))
        title = columns[names.index("title")] if "title" in names else ""
        yield line, Document(docid, title, columns[names.index("text")].replace("\n", " "))

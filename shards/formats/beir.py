"""The BEIR layout: `corpus.jsonl`, `queries.jsonl` and `qrels/{train,dev,test}.tsv`; `exclusions/*.tsv` if there are.

    corpus.jsonl    {"_id": ..., "title": ..., "text": ...}      the title may be left out
    queries.jsonl   {"_id": ..., "text": ..., "answers": [...]}  answers may be left out, or lie under "metadata"
    qrels/*.tsv     query-id TAB corpus-id TAB score, under a header
    exclusions/*.tsv  the same columns: documents that are no negatives of a query, though not judged relevant

Source: the BEIR benchmark's data format (Thakur et al. 2021); `answers` and `exclusions` are additions of ours.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shards.errors import DataError, listed
from shards.files import fsync, write_json
from shards.formats.compressed import find_file
from shards.formats.layout import Judgements, Layout, add_query, grade_of
from shards.formats.lines import answers_of, id_of, read_jsonl, read_lines, text_of
from shards.formats.stream import OR_LEAVE_OUT, BadRecord, Mark, place
from shards.records import Document, Qrels, Query

SPLITS = ("train", "dev", "test")
_PROVENANCE = "provenance.json"
_OTHER_NAMES = {"train": ("training",), "dev": ("val", "valid", "validation", "development"), "test": ("testing",)}
"""What a split's file is called elsewhere."""


def read_layout(path: Path, *, needs_queries: bool = True) -> Layout:
    """Read queries and judgements of a folder in the BEIR layout.

    Args:
        path: The folder; any of the three splits may be missing.
        needs_queries: Whether all of them may not, nor the queries.

    Raises:
        DataError: A file is missing, empty or malformed, or judges a query that is not there.
    """
    corpus, query_file = find_file(path / "corpus.jsonl"), find_file(path / "queries.jsonl")
    has_queries = needs_queries or query_file.exists()
    queries = _read_queries(query_file) if has_queries else {}
    judgements = Judgements(queries)
    splits = {split: find_file(path / "qrels" / f"{split}.tsv") for split in SPLITS}
    splits = {split: file for split, file in splits.items() if file.exists()}
    _require_no_other_name(path / "qrels", splits)
    if not splits and needs_queries:
        there = listed(sorted(file.name for file in (path / "qrels").glob("*")), 6)
        raise DataError(
            f"{path / 'qrels'} has none of {', '.join(f'{split}.tsv' for split in SPLITS)}"
            + (f"; it holds {there}" if there else ""),
            expected="one file of judgements for each split",
            remedy="add train.tsv to train on the data, test.tsv to score on it",
        )
    for split, file in splits.items():
        judgements.qrels[split] = {}
        read_judgements(file, split, judgements)
    return Layout(
        corpus=corpus,
        files=[corpus, *[query_file] * has_queries, *splits.values(), *sorted((path / "exclusions").glob("*.tsv"))],
        queries=queries,
        judgements=judgements,
        read_corpus=lambda: read_corpus(corpus),
        exclusions=read_exclusions(path),
    )


def _require_no_other_name(folder: Path, splits: Mapping[str, Path]) -> None:
    """Refuse a split that would be left out for its name.

    Raises:
        DataError: A split is missing, and its judgements lie there by another name.
    """
    for split in SPLITS:
        for name in _OTHER_NAMES[split] if split not in splits else ():
            if (file := find_file(folder / f"{name}.tsv")).exists():
                raise DataError(
                    f"{file} would not be read, and there is no {split}.tsv",
                    expected=f"judgements by the names {', '.join(f'{one}.tsv' for one in SPLITS)}",
                    remedy=f"rename it to {split}{file.name.removeprefix(name)}",
                )


def read_exclusions(path: Path) -> dict[str, dict[str, list[str]]]:
    """Read which documents are known to be no negatives: split -> qid -> docids.

    Args:
        path: The data folder; without `exclusions/SPLIT.tsv` there are none.

    Raises:
        BadRecord: A row is malformed.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        file = path / "exclusions" / f"{split}.tsv"
        for line, text in read_lines(file) if file.exists() else ():
            if row := judgement_of(text, file, line):
                found.setdefault(split, {}).setdefault(row[0], []).append(row[1])
    return found


def _read_queries(path: Path) -> dict[str, Query]:
    queries: dict[str, Query] = {}
    lines: dict[str, int] = {}
    for line, record in read_jsonl(path):
        add_query(queries, lines, query_of(record, place(path, line)), path, line)
    return queries


def query_of(record: dict[str, Any], where: str) -> Query:
    """Read one record of `queries.jsonl`.

    Raises:
        BadRecord: A field is missing or malformed.
    """
    _require_fields(record, where)
    answers = record.get("answers")
    if answers is None and isinstance(metadata := record.get("metadata"), dict):
        answers = metadata.get("answers")
    return Query(id_of(record.get("_id"), "_id", where), text_of(record, "text", where), answers_of(answers, where))


def read_judgements(path: Path, split: str, judgements: Judgements) -> None:
    """Add the judgements of a split's file.

    Raises:
        DataError: The file cannot be read, or a row is malformed, contradicts another or names an unknown query.
    """
    for line, text in read_lines(path):
        if row := judgement_of(text, path, line):
            judgements.add(split, *row, path, line)


def judgement_of(text: str, path: Path, line: int) -> tuple[str, str, int] | None:
    """Read one line of `qrels/*.tsv` as qid, docid and grade; None for a header or a blank line.

    Raises:
        BadRecord: It has other than three columns, or a grade that is no whole number.
    """
    columns = text.split("\t")
    # A header is known by its words, not by its place, so that a file without one loses no row.
    is_header = line == 1 and len(columns) == 3 and not any(character.isdigit() for character in columns[2])
    if is_header or not text.strip():
        return None
    if len(columns) != 3:
        raise BadRecord(
            "wrong number of columns",
            f"{place(path, line)} has {len(columns)} columns",
            expected="three, separated by tabs: query-id, corpus-id, score",
            remedy=_remedy_for_columns(text, len(columns)),
        )
    qid, docid, grade = (column.strip() for column in columns)
    return qid, docid, grade_of(grade, path, line)


def _remedy_for_columns(text: str, num_columns: int) -> str:
    """Say what to do with a row of another form than BEIR's, which mostly is the form of all rows."""
    of_others = (
        "let `sparring convert` write the folder: it reads judgements of four columns and of two, as TREC has them"
    )
    if num_columns == 1 and len(text.split()) == 3:
        return "put tabs where the blanks are"
    return {2: f"add the score, 1 for a relevant document; or {of_others}", 4: of_others}.get(
        num_columns, f"write the row again, {OR_LEAVE_OUT}"
    )


def read_corpus(path: Path, mark: Mark | None = None) -> Iterator[tuple[int, Document]]:
    """Stream line and document of a corpus file, from a mark on where there is one.

    Raises:
        DataError: The file cannot be read, or a record is malformed.
    """
    for line, record in read_jsonl(path, mark):
        yield line, document_of(record, place(path, line))


def document_of(record: dict[str, Any], where: str) -> Document:
    """Read one record of `corpus.jsonl`.

    Raises:
        BadRecord: A field is missing or malformed.
    """
    _require_fields(record, where)
    docid = id_of(record.get("_id"), "_id", where)
    # A null text is a document without text; a missing one is a file of another form.
    text = text_of(record, "text", where, default="" if "text" in record else None)
    return Document(docid, text_of(record, "title", where, default=""), text)


def _require_fields(record: Mapping[str, Any], where: str) -> None:
    for name in ("_id", "text"):
        if name not in record:
            raise BadRecord(
                "missing field",
                f"{where} has no field {name!r}",
                expected=f"a string; the fields there are {', '.join(map(repr, record)) or 'none'}",
                remedy="fields of other names are read by `sparring convert`, with --id, --title and --text",
            )


def write_folder(
    path: Path,
    documents: Iterable[Document],
    queries: Iterable[Query],
    qrels: Mapping[str, Qrels],
    provenance: Mapping[str, object],
) -> None:
    """Write a data folder in the BEIR layout; it appears as a whole, or not at all.

    Args:
        path: The folder to make. One that an earlier call wrote is replaced; anything else there is not touched.
        documents: The corpus.
        queries: The queries; answers are written where there are any.
        qrels: split (`train`, `dev`, `test`) -> judgements.
        provenance: What the data was made of, kept beside it as `provenance.json`.

    Raises:
        DataError: `path` is a file, or a folder with other things in it.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / _PROVENANCE).exists()):
        raise DataError(
            f"{path} exists, and was not written as a data folder",
            expected="a new folder, or one with provenance.json",
            remedy="choose another folder, or remove what is there",
        )
    nonce = secrets.token_hex(6)
    new, old = path.with_name(f".{path.name}.tmp-{nonce}"), path.with_name(f".{path.name}.old-{nonce}")
    try:
        (new / "qrels").mkdir(parents=True)
        _write_jsonl(new / "corpus.jsonl", ({"_id": d.id, "title": d.title, "text": d.text} for d in documents))
        _write_jsonl(
            new / "queries.jsonl",
            ({"_id": q.id, "text": q.text} | ({"answers": list(q.answers)} if q.answers else {}) for q in queries),
        )
        for split, judged in qrels.items():
            rows = [f"{qid}\t{docid}\t{grade}" for qid, grades in judged.items() for docid, grade in grades.items()]
            text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
            (new / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
        write_json(new / _PROVENANCE, provenance)
        for file in (*new.rglob("*"), new):
            fsync(file)
        if path.exists():
            os.rename(path, old)  # a folder with content cannot be replaced by one rename
        os.rename(new, path)
        fsync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

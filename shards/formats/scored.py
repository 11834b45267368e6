"""Scored documents as others publish them: what a teacher says of a query's documents, record by record.

The form of a record is told by its fields:

    {"query_id", "document_ids": [...], "scores": [...]}                  by id; also corpus_id, score as lists
    {"query_id", "corpus_id", "score"}                                    by id, one pair
    {"qid", "scores": {docid: score}}, {qid: {docid: score}}              by id
    {"qid", "pos": [{"pid", "ce-score"}], "neg": {retriever: [the same]}} by id
    {"query", "pos": [...], "neg": [...], "pos_scores", "neg_scores"}     by text
    {"query", "positive", "negative" or "negatives" or "negative_1", ..., "label" or "score" or "scores"}  by text
    {"query", "documents": [...], "scores": [...]}                        by text

In the form with `positive`, as many numbers as documents are scores, the positive's first; one fewer are margins: how
far the positive is above each negative.

Source: the data sets for distillation of LightOn (PyLate), Sentence Transformers and FlagEmbedding, and the
cross-encoder scores that Sentence Transformers published for MS MARCO.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.formats.compressed import plain_name
from shards.formats.json_list import read_json_list
from shards.formats.lines import id_of, read_jsonl, text_of
from shards.formats.pickled import read_plain_pickle
from shards.formats.stream import BadRecord, place
from shards.formats.tables import columns_of, hf_files, read_rows

_QUERY_IDS = ("query_id", "qid", "query-id")
_DOCUMENT_IDS = ("document_ids", "doc_ids", "document_id", "corpus_id", "corpus-id", "docid", "doc_id", "pid")
_SCORES = ("scores", "score", "label", "labels")
_TEXTS = ("documents", "docs", "passages")
_CE_SCORE = "ce-score"
_SCORED = "scored"
_FORMS = (
    "query_id with document_ids and scores; qid with scores; query with positive, negatives and scores; or query with "
    "pos, neg, pos_scores and neg_scores"
)

_REMEDY_FORM = "rename the fields, or write the records in one of these forms"


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """What a record says.

    Attributes:
        where: File and line, for messages.
        query: Id or text.
        documents: Ids or texts, at least one.
        scores: One for each document, all finite.
        by_text: Whether query and documents are texts.
        are_margins: Whether the scores are margins: 0 for the first document, the positive, and below it for the others
            what each lacks.
    """

    where: str
    query: str
    documents: list[str]
    scores: list[float]
    by_text: bool
    are_margins: bool = False


def scored_files(path: Path) -> list[Path]:
    """List the files with scores of a path.

    Args:
        path: A file; a folder with such files, or that the library `datasets` saved. Of a folder's files, those with
            the texts of its ids are left to `text_tables`.

    Raises:
        DataError: There are none.
    """
    if path.is_file():
        return [path]
    found = [file for file in _files(path) if _role(path, file) == _SCORED]
    if not found:
        raise DataError(
            f"{path} holds no scores" if path.is_dir() else f"there is no file {path}",
            expected="a .jsonl, .json, .parquet, .arrow or .pkl file, or a folder with such files",
            remedy="check the path",
        )
    return found


def text_tables(path: Path) -> dict[str, list[Path]]:
    """List the files of a folder that hold the texts of its ids: `query` and `document` to files; empty for a file."""
    tables: dict[str, list[Path]] = {}
    for file in _files(path) if path.is_dir() else []:
        if (role := _role(path, file)) != _SCORED:
            tables.setdefault(role, []).append(file)
    return tables


def _files(folder: Path) -> list[Path]:
    return hf_files(folder) or [file for file in sorted(folder.rglob("*")) if file.is_file() and _kind_of(file)]


def _role(folder: Path, file: Path) -> str:
    """Tell by the fields of a file's first record whether it has scores, or texts of queries or documents."""
    if _kind_of(file) == ".pkl":
        return _SCORED
    _, first = next(read_records(file), ("", {}))
    if "text" not in first or _name(first, _SCORES) or "query" in first:
        return _SCORED
    if _name(first, _QUERY_IDS):
        return "query"
    name = "/".join(file.relative_to(folder).parts).lower()
    return "document" if _name(first, _DOCUMENT_IDS) or "quer" not in name else "query"


def _kind_of(file: Path) -> str:
    suffix = Path(plain_name(file.name)).suffix
    return {".pickle": ".pkl"}.get(suffix, suffix) if suffix in (*_RECORDS, ".pkl", ".pickle") else ""


_RECORDS = (".jsonl", ".json", ".parquet", ".arrow")


def read_records(file: Path, *, trust_pickle: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the records of a file, whatever they mean.

    Args:
        file: One of `scored_files` or `text_tables`.
        trust_pickle: Whether a pickle may be read; it is read whole.

    Yields:
        File and line (or row), and the record.

    Raises:
        DataError: The file is missing, damaged, or a pickle that is not trusted or holds more than plain values.
    """
    kind = _kind_of(file)
    if kind in (".parquet", ".arrow"):
        yield from ((f"{file} row {row}", record) for row, record in enumerate(_rows(file), start=1))
    elif kind == ".pkl":
        if not trust_pickle:
            raise DataError(
                f"{file} is a pickle, which can hold code",
                expected=".jsonl or .parquet",
                remedy="where you know who made it, set trust_pickle to true: plain values are read then and nothing "
                "is run; or write it again as .jsonl",
            )
        yield from ((f"{file} key {key!r}", {str(key): value}) for key, value in read_plain_pickle(file).items())
    elif kind == ".json":
        yield from ((place(file, line), record) for line, record in read_json_list(file))
    else:
        yield from ((place(file, line), record) for line, record in read_jsonl(file))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    return read_rows(file, columns_of(file), 0, None)


def read_scored(path: Path, *, trust_pickle: bool = False) -> Iterator[ScoredRecord]:
    """Stream what a teacher says.

    Args:
        path: As `scored_files`.
        trust_pickle: As `read_records`.

    Raises:
        DataError: A file cannot be read, or a record has another form, lacks a score, or has one that is no number.
    """
    for file in scored_files(path):
        for where, record in read_records(file, trust_pickle=trust_pickle):
            yield from scored_records(record, where)


def scored_records(record: dict[str, Any], where: str) -> list[ScoredRecord]:
    """Read a record by its fields.

    Args:
        record: A JSON object or a table's row.
        where: File and line, for messages.

    Returns:
        One, but for records that hold several queries.

    Raises:
        BadRecord: It has another form, lacks a score, or has one that is no finite number.
    """
    if (name := _name(record, _QUERY_IDS)) is not None:
        return [_by_id(record, id_of(record[name], name, where), where)]
    if "query" in record:
        return [_by_text(record, text_of(record, "query", where), where)]
    if record and all(isinstance(value, dict) for value in record.values()):
        return [_mapped(id_of(qid, "the query", where), scores, where) for qid, scores in record.items()]
    raise BadRecord(
        "unknown form",
        f"{where} has the fields {', '.join(map(repr, record)) or 'of no record'}",
        expected=_FORMS,
        remedy=_REMEDY_FORM,
    )


def _by_id(record: dict[str, Any], qid: str, where: str) -> ScoredRecord:
    if "pos" in record:
        return _hard_negatives(record, qid, where)
    said = record.get(_name(record, _SCORES) or "")
    if isinstance(said, dict):
        return _mapped(qid, said, where)
    if (name := _name(record, _DOCUMENT_IDS)) is None:
        raise BadRecord("unknown form", f"{where} has no document for {qid!r}", expected=_FORMS, remedy=_REMEDY_FORM)
    value = _listed(record[name])
    values = value if isinstance(value, list) else [value]
    return _record(where, qid, [id_of(one, name, where) for one in values], said, by_text=False)


def _mapped(qid: str, scores: dict[Any, Any], where: str) -> ScoredRecord:
    return _record(where, qid, [id_of(one, "a docid", where) for one in scores], list(scores.values()), by_text=False)


def _hard_negatives(record: dict[str, Any], qid: str, where: str) -> ScoredRecord:
    """Read positives, and negatives by retriever; a document that several retrievers found has one score."""
    negatives = record.get("neg")
    groups = list(negatives.values()) if isinstance(negatives, dict) else [negatives or []]
    found: dict[str, Any] = {}
    for group in [record["pos"], *groups]:
        for one in group if isinstance(group, list) else []:
            if not isinstance(one, dict) or _CE_SCORE not in one:
                raise BadRecord(
                    "no score",
                    f"{where} has {str(one)[:40]!r} for {qid!r}, without a score",
                    expected=f'{{"pid": ..., "{_CE_SCORE}": ...}} for each document',
                    remedy="score the pair, or take the document out of the record",
                )
            found.setdefault(id_of(one.get("pid"), "pid", where), one[_CE_SCORE])
    return _record(where, qid, list(found), list(found.values()), by_text=False)


def _by_text(record: dict[str, Any], query: str, where: str) -> ScoredRecord:
    if "pos" in record:
        documents = [*_texts(record, "pos", where), *_texts(record, "neg", where)]
        both = [_list_of(record, name, where) for name in ("pos_scores", "neg_scores")]
        return _record(where, query, documents, [*both[0], *both[1]], by_text=True)
    said = record.get(_name(record, _SCORES) or "")
    if "positive" in record:
        positive = text_of(record, "positive", where)
        names = [name for name in record if name == "negative" or name.startswith("negative_")]
        negatives = _texts(record, "negatives", where) if "negatives" in record else []
        documents = [positive, *negatives, *(text_of(record, name, where) for name in names)]
        return _record(where, query, documents, said, by_text=True, may_be_margins=True)
    if (name := _name(record, _TEXTS)) is not None:
        return _record(where, query, _texts(record, name, where), said, by_text=True)
    raise BadRecord("unknown form", f"{where} has no documents for its query", expected=_FORMS, remedy=_REMEDY_FORM)


def _record(
    where: str, query: str, documents: list[str], said: Any, *, by_text: bool, may_be_margins: bool = False
) -> ScoredRecord:
    said = _listed(said)
    scores = [_number(score, where) for score in (said if isinstance(said, list) else [said])]
    if may_be_margins and len(scores) == len(documents) - 1:
        return ScoredRecord(where, query, documents, [0.0, *(-margin for margin in scores)], by_text, True)
    if len(scores) != len(documents):
        raise BadRecord(
            "other number of scores",
            f"{where} has {len(scores)} scores for {len(documents)} documents",
            expected="a score for each document" + (", or a margin for each negative" if may_be_margins else ""),
            remedy="score the record again, or take it out",
        )
    return ScoredRecord(where, query, documents, scores, by_text)


def _number(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise BadRecord(
            "no number" if value is not None else "no score",
            f"{where} has the score {str(value)[:40]!r}",
            expected="a finite number for each document",
            remedy="score the pair again, or take the document out of the record",
        )
    return float(value)


def _listed(value: Any) -> Any:
    """Read a list that a table holds as its text; everything else stays."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return ast.literal_eval(value)  # a literal only: never code
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return value
    return value


def _texts(record: dict[str, Any], name: str, where: str) -> list[str]:
    values = _list_of(record, name, where)
    return [text_of({name: value}, name, where) for value in values]


def _list_of(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = record.get(name)
    if value is None and name in ("pos_scores", "neg_scores"):
        raise BadRecord(
            "no score",
            f"{where} has no {name}",
            expected="a score for each document",
            remedy="score the records by a ranker first, such as FlagEmbedding's add_reranker_score.py",
        )
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRecord(
            "malformed field",
            f"{where} has {str(value)[:40]!r} in {name!r}",
            expected="a list",
            remedy="write a single one in brackets, too",
        )
    return value


def _name(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)

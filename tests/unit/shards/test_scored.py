"""Scored documents: each published form comes out as the same thing, and what is no score stops with file and line."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import DataError
from shards.formats.scored import ScoredRecord, read_records, read_scored, text_tables

BY_ID = ScoredRecord("", "7", ["11", "12", "13"], [9.5, -1.0, 0.25], by_text=False)
BY_TEXT = ScoredRecord("", "what is it?", ["this", "that", "those"], [9.5, -1.0, 0.25], by_text=True)
MARGINS = ScoredRecord(
    "", "what is it?", ["this", "that", "those"], [0.0, -10.5, -9.25], by_text=True, are_margins=True
)

TEXTS = {"query": "what is it?", "positive": "this"}
FORMS: dict[str, tuple[dict[str, Any], ScoredRecord]] = {
    "lists by id": ({"query_id": 7, "document_ids": [11, 12, 13], "scores": [9.5, -1, 0.25]}, BY_ID),
    "lists as texts": ({"query_id": "7", "document_ids": "['11', '12', '13']", "scores": "[9.5, -1.0, 0.25]"}, BY_ID),
    "lists, other names": ({"query_id": "7", "corpus_id": ["11", "12", "13"], "score": [9.5, -1.0, 0.25]}, BY_ID),
    "mapped": ({"qid": 7, "scores": {"11": 9.5, "12": -1.0, "13": 0.25}}, BY_ID),
    "mapped by query": ({"7": {"11": 9.5, "12": -1.0, "13": 0.25}}, BY_ID),
    "hard negatives": (
        {
            "qid": 7,
            "pos": [{"pid": 11, "ce-score": 9.5}],
            "neg": {
                "bm25": [{"pid": 12, "ce-score": -1.0, "bm25-score": 3.0}],
                "dense": [{"pid": 12, "ce-score": -1.0}, {"pid": 13, "ce-score": 0.25}],
            },
        },
        BY_ID,
    ),
    "pos and neg": (
        {
            "query": "what is it?",
            "pos": ["this"],
            "neg": ["that", "those"],
            "pos_scores": [9.5],
            "neg_scores": [-1.0, 0.25],
        },
        BY_TEXT,
    ),
    "texts": ({"query": "what is it?", "documents": ["this", "that", "those"], "scores": [9.5, -1.0, 0.25]}, BY_TEXT),
    "negatives": (TEXTS | {"negatives": ["that", "those"], "scores": [9.5, -1.0, 0.25]}, BY_TEXT),
    "numbered": (TEXTS | {"negative_1": "that", "negative_2": "those", "label": [9.5, -1.0, 0.25]}, BY_TEXT),
    "margins": (TEXTS | {"negative_1": "that", "negative_2": "those", "label": [10.5, 9.25]}, MARGINS),
    "a margin": (
        TEXTS | {"negative": "that", "label": 10.5},
        ScoredRecord("", "what is it?", ["this", "that"], [0.0, -10.5], by_text=True, are_margins=True),
    ),
    "a pair": (
        {"query_id": "7", "corpus_id": "11", "score": 9.5},
        ScoredRecord("", "7", ["11"], [9.5], by_text=False),
    ),
}


def read(path: Path, **options: Any) -> list[ScoredRecord]:
    from dataclasses import replace

    return [replace(record, where="") for record in read_scored(path, **options)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    record, expected = FORMS[form]
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert read(path) == [expected]


def as_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path = path / "scores.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def as_json(path: Path, records: list[dict[str, Any]]) -> Path:
    (path / "scores.json").write_text(json.dumps(records))
    return path / "scores.json"


def as_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path / "scores.parquet")
    return path / "scores.parquet"


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_parquet])
def test_every_kind_of_file_is_read(tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path]) -> None:
    records = [{"query_id": str(row), "document_ids": ["a", "b"], "scores": [row + 0.5, -1.0]} for row in range(300)]
    expected = [ScoredRecord("", str(row), ["a", "b"], [row + 0.5, -1.0], by_text=False) for row in range(300)]
    assert read(write(tmp_path, records)) == expected


def test_a_record_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, [FORMS["mapped"][0], FORMS["a pair"][0]])
    assert [record.where for record in read_scored(path)] == [f"{path} line 1", f"{path} line 2"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query_id": "7", "document_ids": ["1", "2"], "scores": [1.0]}, "has 1 scores for 2 documents"),
        ({"query_id": "7", "document_ids": ["1", "2"], "scores": [1.0, float("nan")]}, "has the score 'nan'"),
        ({"query_id": "7", "document_ids": ["1", "2"], "scores": [1.0, float("inf")]}, "has the score 'inf'"),
        ({"query_id": "7", "document_ids": ["1", "2"], "scores": [1.0, None]}, "has the score 'None'"),
        ({"query_id": "7", "document_ids": ["1", "2"], "scores": [1.0, True]}, "has the score 'True'"),
        ({"query_id": "7", "document_ids": ["1", "2"]}, "has the score 'None'"),
        ({"query_id": "7", "document_ids": ["1 2"], "scores": [1.0]}, "an id: a string without white space"),
        ({"query_id": "7", "text": "7"}, "has no document for '7'"),
        ({"qid": "7", "pos": ["1"], "neg": {"bm25": ["2"]}}, "has '1' for '7', without a score"),
        ({"query": "a", "pos": ["b"], "neg": ["c"]}, r"has no pos_scores.*score the records by a ranker first"),
        ({"query": "a", "positive": "b", "negative": "c", "label": [1.0, 2.0, 3.0]}, "or a margin for each negative"),
        ({"query": "a", "text": "b"}, "has no documents for its query"),
        ({"text": "a"}, "has the fields 'text'"),
    ],
)
def test_what_is_no_score_is_refused_by_file_and_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = as_jsonl(tmp_path, [FORMS["mapped"][0], record])
    with pytest.raises(DataError, match=rf"scores.jsonl.gz line 2.*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("names", "identifiers"),
    [
        (("train/0", "queries/0", "documents/0"), ("query_id", "document_id")),
        (("dataset", "english_queries.train", "english_collection"), ("query_id", "document_id")),
        (("train", "queries", "corpus"), ("_id", "_id")),
    ],
)
def test_a_folder_is_read_without_its_tables_of_texts(
    tmp_path: Path, names: tuple[str, str, str], identifiers: tuple[str, str]
) -> None:
    """As LightOn's data sets for distillation lie on the hub: lists of scores, queries and documents apart."""
    rows = (
        FORMS["lists by id"][0] | {"query_id": "7", "document_ids": ["11", "12", "13"]},
        {identifiers[0]: "7", "text": "q"},
        {identifiers[1]: "11", "text": "d"},
    )
    for name, row in zip(names, rows, strict=True):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), path)
    assert read(tmp_path) == [BY_ID]
    tables = text_tables(tmp_path)
    assert {what: [file.stem for file in files] for what, files in tables.items()} == {
        "query": [Path(names[1] + ".parquet").stem],
        "document": [Path(names[2] + ".parquet").stem],
    }
    assert [record for _, record in read_records(tables["document"][0])] == [{identifiers[1]: "11", "text": "d"}]


def test_a_place_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no scores"):
        read(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "none.jsonl")


# --- pickles ---------------------------------------------------------------------------------------------------------


def test_a_pickle_of_plain_values_is_read_where_it_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "scores.pkl.gz"
    scores = {7: {11: 9.5, 12: np.float32(-1.0), 13: np.float64(0.25)}}
    path.write_bytes(gzip.compress(pickle.dumps(scores)))
    assert read(path, trust_pickle=True) == [BY_ID]
    with pytest.raises(DataError, match=r"is a pickle, which can hold code.*set trust_pickle to true"):
        read(path)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/nowhere/at/all", "w"))


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    """Symptom guarded against: a file of scores from the web that runs a program on every machine of a cluster."""
    path = tmp_path / "scores.pkl"
    path.write_bytes(pickle.dumps({7: {11: Code()}}))
    with pytest.raises(DataError, match=r"is no pickle of plain values: it asks for \w+.open"):
        read(path, trust_pickle=True)


@pytest.mark.parametrize("content", [[1.0], {7: [1.0]}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "scores.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="dict of dicts"):
        read(path, trust_pickle=True)


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.pkl"
    path.write_bytes(pickle.dumps({7: {11: 1.0}})[:-5])
    with pytest.raises(DataError, match="no pickle of plain values"):
        read(path, trust_pickle=True)

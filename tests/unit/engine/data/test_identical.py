"""Queries that are documents: known by their ids, as BEIR knows them, and counted."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from engine.data.identical import find_own_documents
from shards.records import Query

DOCIDS = {"a": 7, "b": 3, "c": 0, "d": 1}


def own_of(qrels: dict[str, dict[str, dict[str, int]]], ignored: Literal["auto"] | bool = "auto") -> dict[str, int]:
    queries = {qid: Query(qid, "text") for judged in qrels.values() for qid in judged}
    dataset: Any = SimpleNamespace(queries=queries, qrels=qrels)
    return find_own_documents(dataset, DOCIDS.get, ignored)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.mark.parametrize("ignored", ["auto", True])
def test_a_query_with_the_id_of_a_document_is_that_document(
    ignored: Literal["auto"] | bool, log: pytest.LogCaptureFixture
) -> None:
    """Symptom: on a set whose queries are documents, every query's own text was its first hit and hard negative."""
    qrels = {"train": {"a": {"c": 1}, "q": {"b": 1}}, "test": {"b": {"d": 1}}}
    assert own_of(qrels, ignored) == {"a": 7, "b": 3}
    assert "2 of 3 queries have the id of a document, which is left out" in log.text
    assert "as a positive" not in log.text


def test_where_no_id_coincides_or_none_is_to_be_left_out_nothing_happens(log: pytest.LogCaptureFixture) -> None:
    assert own_of({"test": {"q1": {"a": 1}, "q2": {"b": 1}}}) == {}
    assert own_of({"test": {"a": {"c": 1}}}, ignored=False) == {}
    assert log.text == ""


def test_a_judgement_changes_nothing_and_is_told(log: pytest.LogCaptureFixture) -> None:
    """As in BEIR; a grade of 0 is no positive."""
    assert own_of({"test": {"a": {"a": 1, "c": 1}, "b": {"b": 0, "d": 1}, "c": {"c": 1}}}) == {"a": 7, "b": 3, "c": 0}
    assert "2 queries have the document with their own id as a positive: as in BEIR" in log.text


def test_pairs_that_are_numbered_alike_are_no_queries_that_are_documents(log: pytest.LogCaptureFixture) -> None:
    """Symptom guarded against: query 17 belongs to document 17, and every metric of such a set is 0."""
    qrels = {"train": {"a": {"a": 1}, "b": {"b": 1}}, "test": {"c": {"c": 2, "d": 0}, "d": {"a": 1}}}
    assert own_of(qrels) == {}
    assert "4 of 4 queries have the id of a document, and for 3 this document is the only positive" in log.text
    assert len(own_of(qrels, ignored=True)) == 4

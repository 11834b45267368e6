"""What the log tells of a data folder at the start."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from engine.data.told import count_trained_on, tell_data
from shards.records import Dataset, Query


def data_of(**splits: list[str]) -> Dataset:
    """A query is named by split and place, and has this text."""
    queries = {
        f"{split}-{place}": Query(f"{split}-{place}", text)
        for split, texts in splits.items()
        for place, text in enumerate(texts)
    }
    qrels = {split: {f"{split}-{place}": {"d": 1} for place in range(len(own))} for split, own in splits.items()}
    return Dataset(
        Path("data"), "beir", queries, qrels, Counter({"query without a judgement": 2}), "", 9, lambda: iter([])
    )


def test_measured_queries_that_are_trained_on_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Symptom: a dev split that was cut out of the training queries, and left among them, looked like any other."""
    data = data_of(train=["a", "b", " c "], dev=["c", "d"], test=["e"])
    assert [count_trained_on(data, split) for split in ("dev", "test", "other")] == [1, 0, 0]
    with caplog.at_level(logging.INFO):
        tell_data(data, warns=True)
    assert caplog.messages[:2] == [
        "data data: 9 documents, queries: train 3, dev 2, test 1",
        "  dropped 2: query without a judgement",
    ]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith("1 of 2 queries of dev have the text of a training query: what is measured")


def test_data_without_train_queries_in_other_splits_warn_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for data, warns in ((data_of(train=["a"], dev=["b"]), True), (data_of(train=["a"], dev=["a"]), False)):
        tell_data(data, warns=warns)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING], "whatever the level is"

"""The made-up data is valid, the same for the same seed, and something can be learnt from it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from engine.data.answers import contains_answer
from shards.errors import DataError
from shards.formats import open_dataset
from shards.made.generated import _new_words, generate_dataset


def test_counts_and_splits(tmp_path: Path) -> None:
    counts = generate_dataset(tmp_path / "data", num_documents=60, num_queries=100, seed=1)
    dataset = open_dataset(tmp_path / "data")
    assert not dataset.dropped
    assert dataset.num_documents == counts["documents"] == 60
    assert {split: len(qrels) for split, qrels in dataset.qrels.items()} == {
        split: counts[f"{split} queries"] for split in ("train", "dev", "test")
    }
    assert sum(map(len, dataset.qrels.values())) == 100
    owners = [{docid for grades in qrels.values() for docid in grades} for qrels in dataset.qrels.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)), "a document has queries in two splits"


def test_the_smallest_has_all_three_splits(tmp_path: Path) -> None:
    generate_dataset(tmp_path / "data", num_documents=20, num_queries=20)
    assert set(open_dataset(tmp_path / "data").qrels) == {"train", "dev", "test"}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate_dataset(tmp_path / name, num_documents=40, seed=seed)
    fingerprints = [open_dataset(tmp_path / name).fingerprint for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_query_shares_more_words_with_its_document_than_with_any_other(tmp_path: Path) -> None:
    generate_dataset(tmp_path / "data", num_documents=80)
    dataset = open_dataset(tmp_path / "data")
    words = {document.id: set(document.text.strip(".").split()) for document in dataset.documents()}
    for qrels in dataset.qrels.values():
        for qid, grades in qrels.items():
            query = set(dataset.queries[qid].text.split())
            overlap = Counter({docid: len(query & own) for docid, own in words.items()})
            (positive,) = grades
            assert overlap[positive] == 4
            assert all(overlap[positive] > shared for docid, shared in overlap.items() if docid != positive), qid
            assert sum(shared > 0 for shared in overlap.values()) > 3, "no negative would be hard"


def test_every_other_query_has_an_answer_that_its_document_holds_and_few_others(tmp_path: Path) -> None:
    generate_dataset(tmp_path / "data", num_documents=80)
    dataset = open_dataset(tmp_path / "data")
    texts = {document.id: document.text for document in dataset.documents()}
    answered = [query for query in dataset.queries.values() if query.answers]
    assert len(answered) == len(dataset.queries) / 2
    positives = {qid: docid for qrels in dataset.qrels.values() for qid, grades in qrels.items() for docid in grades}
    elsewhere = 0
    for query in answered:
        holders = {docid for docid, text in texts.items() if contains_answer(text, query.answers)}
        assert positives[query.id] in holders
        elsewhere += len(holders) - 1
    assert 0 < elsewhere < len(answered)


def test_too_small_a_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="19 documents"):
        generate_dataset(tmp_path / "data", num_documents=19)
    with pytest.raises(DataError, match="10 queries"):
        generate_dataset(tmp_path / "data", num_queries=10)


def test_a_corpus_of_more_topics_than_there_are_short_words_gets_longer_ones() -> None:
    """Symptom: a million documents were never made, as there are not so many words of three syllables."""
    topics = _new_words(random.Random(0), 800_000)
    every = [word for own in topics for word in own]
    assert len(topics) == 40_000
    assert len(set(every)) == len(every) == 12 * len(topics) > 70**3
    assert topics[:50] == _new_words(random.Random(0), 1000), "a small corpus is no longer the same"

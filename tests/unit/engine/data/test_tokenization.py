"""What is tokenised once, and how a corpus of any size is cut into shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.config.file import load_config
from engine.data.tokenization import ModelText, plan_corpus
from engine.errors import ConfigError
from engine.models.wording import PLAIN
from shards.manifest import MAX_SHARDS
from shards.records import Dataset, Query

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"


class Counting:
    """A tokenizer that gives the letters' numbers and notes what it was given."""

    def __init__(self) -> None:
        self.special_tokens_map: dict[str, str] = {}
        self.given: list[str] = []

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        self.given += texts
        return {"input_ids": [[ord(letter) for letter in text[: options["max_length"]]] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def text_with(tokenizer: Counting, known: dict[str, list[int]]) -> ModelText:
    return ModelText(tokenizer, cast(Any, SimpleNamespace(queries=PLAIN, documents=PLAIN)), "retriever", 4, known=known)


def test_a_training_query_is_tokenised_once_for_all_refreshes_and_models() -> None:
    """Symptom: at each refresh all 503,000 training queries were tokenised anew, on one core."""
    tokenizer, known = Counting(), dict[str, list[int]]()
    retriever, ranker = text_with(tokenizer, known), text_with(tokenizer, known)
    queries = [Query("1", "first"), Query("2", "second"), Query("3", "first")]
    first = retriever.remember_queries(queries)
    assert first == [[ord(letter) for letter in query.text[:4]] for query in queries]
    assert tokenizer.given == ["first", "second"]
    assert retriever.tokenize_queries(queries[::-1]) == first[::-1]
    assert ranker.tokenize_queries(queries) == first
    assert tokenizer.given == ["first", "second"]
    other = [Query("2", "of another set, with the same id"), queries[0]]
    assert retriever.tokenize_queries(other) == [[ord(letter) for letter in "of a"], first[0]]
    retriever.tokenize_queries(other)
    assert Counter(tokenizer.given)["of another set, with the same id"] == 2, "what nobody asked to keep is not kept"
    assert retriever.tokenize_queries([]) == []


@pytest.mark.parametrize(
    ("num_documents", "size"),
    [(300, 250), (8_841_823, 17_683), (10**9, 20_000), (2 * 10**10, 20_000), (10**11, 100_000), (10**11 + 1, 100_001)],
)
def test_shards_are_never_too_many(num_documents: int, size: int) -> None:
    config = load_config(TINY, ["run.path=x", "data.documents_per_shard=null"])
    dataset = cast(Dataset, SimpleNamespace(num_documents=num_documents, fingerprint="a"))
    texts = {"retriever": text_with(Counting(), {}), "ranker": text_with(Counting(), {})}
    plan = plan_corpus(config, dataset, texts)
    assert plan.documents_per_shard == size
    assert -(-num_documents // size) <= MAX_SHARDS
    few = load_config(TINY, ["run.path=x", "data.documents_per_shard=10"])
    if num_documents > 10 * MAX_SHARDS:
        with pytest.raises(ConfigError, match=r"would lie in \d+ shards"):
            plan_corpus(few, dataset, texts)


@pytest.mark.parametrize(("words", "tokens"), [([], 128), (["encoder.document_length=50"], 50)])
def test_shards_hold_more_of_a_document_than_one_of_its_spans(words: list[str], tokens: int) -> None:
    """Symptom: coCondenser drew both spans of a document's first `max_length` tokens, and the rest was in no shard."""
    config = load_config(TINY.with_name("cocondenser_tiny.yaml"), ["run.path=x", *words])
    dataset = cast(Dataset, SimpleNamespace(num_documents=300, fingerprint="a"))
    plan = plan_corpus(config, dataset, {"encoder": text_with(Counting(), {})})
    assert [stream.max_tokens for stream in plan.streams] == [tokens]

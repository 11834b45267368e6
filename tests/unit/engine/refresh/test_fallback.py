"""Fallback positives: the best passage with an answer, the same for any number of ranks and after any interruption."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.file import load_config
from engine.data.corpus import Data, TrainingQueries
from engine.data.requirements import require_training_queries
from engine.errors import ConfigError, DataError
from engine.refresh import fallback
from engine.refresh.fallback import (
    FallbackPositives,
    require_fallback,
    trained_questions,
    unjudged_questions,
    with_fallback_positives,
)
from engine.run import Run
from engine.search import Hits
from shards.embeddings import Stamp
from shards.records import Dataset, Document, Query
from tests.unit.engine.conftest import TINY

Open = Callable[..., Run]
N, NUM_UNJUDGED = 40, 9
ANSWER = "data.fallback_positive=answer"


@dataclass
class ShuffledSearcher:
    """Ranks all documents in an order that each query has of its own."""

    source: str = "bm25"
    block_size: int = 4
    dies_at: str = ""
    asked: list[str] = field(default_factory=list)

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        if self.dies_at in [query.id for query in queries]:
            raise KeyboardInterrupt
        self.asked += [query.id for query in queries]
        documents_QK = np.array([ranking_of(query.id)[:top_k] for query in queries])
        return Hits(documents_QK, np.tile(-np.arange(top_k, dtype=np.float32), (len(queries), 1)))


def ranking_of(qid: str) -> list[int]:
    order: list[int] = np.random.default_rng(int(qid[1:])).permutation(N).tolist()
    return order


def texts() -> list[str]:
    """Of answer `a1` few documents have it, of `a8` most."""
    draw = np.random.default_rng(3)
    return [" ".join(f"a{row}" for row in range(9) if draw.random() < row / 12) + " text" for _ in range(N)]


def dataset_of(**changes: Any) -> Dataset:
    """q0 to q8 have answers alone, d is judged, x has nothing. Of q8 a document is judged irrelevant, one is known."""
    queries = {f"q{row}": Query(f"q{row}", "text", (f"a{row}",)) for row in range(NUM_UNJUDGED)}
    queries |= {"d": Query("d", "judged", ("a8",)), "x": Query("x", "no answer")}
    first, second = [document for document in ranking_of("q8") if "a8" in texts()[document]][:2]
    train: dict[str, dict[str, int]] = {qid: {} for qid in queries}
    train |= {"d": {"p3": 1}, "q8": {f"p{first}": 0}}
    dataset = Dataset(
        path=Path("data"),
        format="beir",
        queries=queries,
        qrels={"train": train},
        dropped=Counter(),
        fingerprint="f",
        num_documents=N,
        read_documents=lambda: iter(()),
        exclusions={"train": {"q8": [f"p{second}"]}},
    )
    return replace(dataset, **changes)


def data_of(dataset: Dataset) -> Data:
    documents = [Document(f"p{index}", "a0 stands in titles alone", text) for index, text in enumerate(texts())]
    shards: Any = SimpleNamespace(
        num_documents=N, document=documents.__getitem__, index_of=lambda docid: int(docid[1:]), manifest=None
    )
    tokenized: Any = SimpleNamespace(stream="s", remember_queries=lambda queries: [[len(one.id)] for one in queries])
    train = TrainingQueries([dataset.queries["d"]], [np.array([3])], {"s": [[7]]}, [np.array([], dtype=np.int64)])
    return Data(dataset, shards, {"retriever": tokenized}, train, {"q7": ranking_of("q7")[0]})


@pytest.fixture
def searcher(monkeypatch: pytest.MonkeyPatch) -> ShuffledSearcher:
    made = ShuffledSearcher()
    monkeypatch.setattr(fallback, "build", lambda *_: None)
    monkeypatch.setattr(fallback, "open_searcher", lambda *_: made)
    monkeypatch.setattr(fallback, "stamp_of", lambda *_: Stamp("bm25", "a" * 64, "b" * 64))
    return made


def by_brute_force(depth: int) -> dict[str, int]:
    """The best of the top with an answer in its text; not the question itself, nor what is judged or known."""
    dataset, found = dataset_of(), {}
    for row in range(NUM_UNJUDGED):
        qid = f"q{row}"
        barred = {int(docid[1:]) for docid in [*dataset.qrels["train"][qid], *dataset.exclusions["train"].get(qid, [])]}
        ranked = [one for one in ranking_of(qid) if not (qid == "q7" and one == ranking_of("q7")[0])][:depth]
        good = [one for one in ranked if f"a{row}" in texts()[one].split() and one not in barred]
        if good:
            found[qid] = good[0]
    return found


@pytest.mark.parametrize("depth", [5, 10, N])
def test_the_best_passage_with_an_answer_becomes_the_positive(
    open_run: Open, searcher: ShuffledSearcher, depth: int
) -> None:
    run = open_run(ANSWER, f"data.fallback_depth={depth}")
    train = with_fallback_positives(run, data_of(dataset_of())).train
    expected = by_brute_force(depth)
    assert [query.id for query in train.queries] == ["d", *expected], "behind the judged ones, in the order of the data"
    assert [row.tolist() for row in train.positives] == [[3], *([document] for document in expected.values())]
    assert train.tokens["s"] == [[7], *[[2]] * len(expected)]
    assert train.known(len(train) - 1) == {
        expected["q8"]: "positives",
        int(dataset_of().exclusions["train"]["q8"][0][1:]): "false_negatives",
    }
    assert run.result_of("positives", FallbackPositives) == FallbackPositives(
        NUM_UNJUDGED, len(expected), NUM_UNJUDGED - len(expected)
    )
    assert 0 < len(expected) < NUM_UNJUDGED, "a title counts for nothing"


def test_what_is_searched_together_changes_nothing(open_run: Open, searcher: ShuffledSearcher) -> None:
    """Blocks are what is handed out to the ranks."""
    found = []
    for searcher.block_size in (1, 4, 100):
        run = open_run(ANSWER)
        shutil.rmtree(run.folder.path / "positives", ignore_errors=True)
        train = with_fallback_positives(run, data_of(dataset_of())).train
        found.append([(query.id, row.tolist()) for query, row in zip(train.queries, train.positives, strict=True)])
    assert found[0] == found[1] == found[2]


def test_an_interrupted_search_goes_on_and_a_finished_one_is_not_repeated(
    open_run: Open, searcher: ShuffledSearcher
) -> None:
    data, searcher.dies_at = data_of(dataset_of()), "q8"
    with pytest.raises(KeyboardInterrupt):
        with_fallback_positives(open_run(ANSWER), data)
    searcher.dies_at, searcher.asked = "", []
    first = with_fallback_positives(open_run(ANSWER), data).train
    assert searcher.asked == ["q8"]
    again = with_fallback_positives(open_run(ANSWER), data).train
    assert searcher.asked == ["q8"]
    assert again.queries == first.queries
    shutil.rmtree(open_run(ANSWER).folder.path / "positives")
    third = with_fallback_positives(open_run(ANSWER), data).train
    assert len(searcher.asked) == 1 + NUM_UNJUDGED, "what is lost is made again"
    assert [row.tolist() for row in third.positives] == [row.tolist() for row in first.positives]


def test_by_default_such_questions_are_left_out(open_run: Open, caplog: pytest.LogCaptureFixture) -> None:
    """AR2's paper trains on the 58,880 questions of Natural Questions that have a gold passage, of 79,168."""
    config, dataset = open_run().config, dataset_of()
    assert [query.id for query in unjudged_questions(dataset)] == [f"q{row}" for row in range(NUM_UNJUDGED)]
    with caplog.at_level(logging.INFO):
        require_fallback(config, dataset)
    assert "9 training questions have answers and no positive: not trained on" in caplog.text
    assert trained_questions(config, dataset) == ["d"]
    assert trained_questions(open_run(ANSWER, "run.force_resume=true").config, dataset)[:2] == ["d", "q0"]


def test_what_cannot_be_is_refused_before_any_work(open_run: Open, searcher: ShuffledSearcher) -> None:
    run, none = open_run(ANSWER), dataset_of(qrels={"train": {"d": {"p3": 1}, "x": {}}})
    with pytest.raises(DataError, match=r"no training question with answers and without a positive.*--questions all"):
        require_fallback(run.config, none)
    epochs = load_config(
        TINY.with_name("r2anker_tiny.yaml"), [ANSWER, "r2anker.ranker.epochs=1", "r2anker.ranker.steps="]
    )
    with pytest.raises(ConfigError, match=r"counted in epochs.*name the steps"):
        require_fallback(epochs, dataset_of())
    unjudged = dataset_of(qrels={"train": {"q1": {}, "x": {}}})
    require_training_queries(unjudged, finds_positives=True)
    with pytest.raises(DataError, match="no training query with a positive"):
        require_training_queries(unjudged)
    lost = dataset_of(qrels={"train": {"q0": {}}})
    bare = replace(data_of(lost), train=TrainingQueries([], [], {"s": []}))
    with pytest.raises(
        DataError, match=r"none of 1 training questions has a passage with an answer among the best 100"
    ):
        with_fallback_positives(run, bare)

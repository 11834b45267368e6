"""The data's own negatives are a retriever like any other, and data that have too few are refused before any work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.ar2 import Ar2Config, WarmupRankerConfig, WarmupRetrieverConfig, ar2_timetable
from engine.config.negatives import Joint
from engine.config.timetable import Timetable
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.given import require_given, require_given_documents
from engine.data.joint import JointLists
from engine.errors import DataError
from engine.refresh.mining import mine
from engine.retrievers.kinds import Choice, build, choice_of, open_searcher, stamp_of
from engine.run import Run, Stage
from shards.records import Dataset, Document, GivenNegatives, Query

Open = Callable[..., Run]
N = 12
TEXTS = [f"word{index} common" for index in range(N)]
GIVEN = [
    GivenNegatives("q0", ["d5", "d3", "d0", "d5", "d7"], [["bm25"], ["bm25"], ["bm25"], ["ann"], ["bm25", "ann"]]),
    GivenNegatives("q1", ["d2", "d9"], [["ann"], ["ann"]]),
    GivenNegatives("dev0", ["d1"], [["bm25"]]),
    GivenNegatives("q3", [], []),
]
"""d0 is q0's positive, d7 holds its answer, d2 is known to be no negative of q1; q2 and q3 have none."""


TRAINED = ["q0", "q1", "q2", "q3"]


def read_given() -> Iterator[GivenNegatives]:
    return iter(GIVEN)


def dataset_of(**changes: Any) -> Dataset:
    queries = {f"q{row}": Query(f"q{row}", f"word{row + 8}", ("word7",) if row == 0 else ()) for row in range(4)}
    dataset = Dataset(
        path=Path("data"),
        format="beir",
        queries=queries,
        qrels={"train": {f"q{row}": {f"d{row}": 1} for row in range(4)} | {"unanswered": {}}},
        dropped=Counter(),
        fingerprint="f",
        num_documents=N,
        read_documents=lambda: iter(Document(f"d{index}", "", text) for index, text in enumerate(TEXTS)),
        read_given=read_given,
    )
    return replace(dataset, **changes)


def data_of(dataset: Dataset, folder: Path) -> Data:
    queries = list(dataset.queries.values())
    false_negatives = [np.array([2] if row == 1 else [], dtype=np.int64) for row in range(4)]
    shards: Any = SimpleNamespace(
        manifest=SimpleNamespace(template="{text}", sha256="c" * 64, shards=[SimpleNamespace(num_documents=N)]),
        folder=folder,
        num_documents=N,
        documents=lambda _: iter(Document(f"d{index}", "", text) for index, text in enumerate(TEXTS)),
        docids=SimpleNamespace(index_of={f"d{index}": index for index in range(N)}.get),
        document=lambda index: Document(f"d{index}", "", TEXTS[index]),
    )
    train = TrainingQueries(queries, [np.array([row]) for row in range(4)], {}, false_negatives)
    return Data(dataset, shards, {}, train)


def table_of(candidates: str = "given", **game: Any) -> Timetable:
    warm = WarmupRetrieverConfig(candidates=candidates, bm25_depth=3)
    return ar2_timetable(Ar2Config(iterations=1, top_k=20, **game), warm, WarmupRankerConfig())


def mined(run: Run, data: Data, choice: Choice, needed: int = 2, rows: int = 4) -> Candidates:
    build(run, data, run.folder, choice)
    searcher, stamp = open_searcher(run, data, run.folder, choice), stamp_of(run, data, choice)
    mine(Stage(run, "candidates/x"), data, searcher, np.arange(rows), stamp, top_k=3, needed=needed, name="x")
    return Candidates.load(run.folder.candidates("x"), stamp)


def test_what_is_given_is_mined_as_what_is_found(open_run: Open, tmp_path: Path) -> None:
    """Positives, false negatives and documents with an answer go; what a step lacks is drawn from the corpus."""
    data = data_of(dataset_of(), tmp_path)
    found = mined(open_run("data.without_given=random"), data, Choice("given"))
    assert found.source == "given"
    assert found.row("q0").tolist() == [5, 3], "in the order of the data, each once"
    assert found.scores_QK[0, :2].tolist() == [-1.0, -2.0]
    assert found.row("q1")[0] == 9
    assert [len(found.row(qid)) for qid in ("q1", "q2", "q3")] == [2, 2, 2]
    assert np.isneginf(found.scores_QK[2:]).all(), "drawn at random"
    counts = {"positives": 1, "answers": 1, "false_negatives": 1, "drawn": 1 + 2 + 2, "without_hits": 2, "short": 4}
    assert found.counts == counts
    assert [one.document for one in found.positives.at(0)] == [0]


def test_bm25_stands_in_where_nothing_is_given(open_run: Open, tmp_path: Path) -> None:
    data = data_of(dataset_of(), tmp_path)
    run = open_run("data.without_given=bm25")
    found = mined(run, data, Choice("given"), needed=1)
    assert found.row("q0").tolist() == [5, 3]
    assert (found.row("q2").tolist(), found.row("q3").tolist()) == ([10], [11]), "which share a word with them"
    assert found.counts["without_hits"] == 0
    stamps = {stamp_of(run, data, Choice("given", proposed_by=name)).weights_sha256 for name in ("", "ann")}
    stamps.add(stamp_of(open_run("data.without_given=error", "run.force_resume=true"), data, Choice("given")))  # type: ignore[arg-type]
    assert len(stamps) == 3, "other candidates have other stamps"


def test_those_of_one_proposer_are_taken_by_name(open_run: Open, tmp_path: Path) -> None:
    data = data_of(dataset_of(), tmp_path)
    found = mined(open_run(), data, Choice("given", proposed_by="ann"), needed=1, rows=2)
    assert [found.row(qid).tolist() for qid in ("q0", "q1")] == [[5], [9]], "5 was proposed by both"
    run = open_run()
    searcher = open_searcher(run, data, run.folder, Choice("given", proposed_by="ann"))
    with pytest.raises(DataError, match="2 of 2 training queries have no negatives of ann"):
        searcher.search(data.train.queries[2:], 3)


def test_data_that_give_too_little_are_refused_before_any_work(caplog: pytest.LogCaptureFixture) -> None:
    """Symptom guarded against: queries without given negatives are trained on random ones, and nobody is told."""
    with pytest.raises(DataError, match=r"2 of 4 training queries have no negatives in the data: 'q2', 'q3'.*bm25"):
        require_given(table_of(), dataset_of(), TRAINED, "error")
    with pytest.raises(DataError, match="data gives no negatives"):
        require_given(table_of(), dataset_of(read_given=None), TRAINED, "bm25")
    with pytest.raises(DataError, match=r"of 'anne'; .* proposed by bm25 \(5\), ann \(4\).*name one of these"):
        require_given(table_of("given@anne"), dataset_of(), TRAINED, "bm25")
    with pytest.raises(DataError, match="gives no training query a negative"):
        require_given(table_of(), dataset_of(read_given=lambda: iter(GIVEN[2:])), TRAINED, "random")
    require_given(table_of("bm25"), dataset_of(read_given=None), TRAINED, "error")
    with caplog.at_level(logging.INFO):
        require_given(table_of("given@bm25"), dataset_of(), TRAINED, "bm25")
    assert "given@bm25: 4 negatives of 1 training queries; 3 have none: what BM25 finds stands in" in caplog.text


def test_negatives_of_another_corpus_are_refused() -> None:
    index = {f"d{number}": number for number in range(N) if number != 7}
    with pytest.raises(DataError, match="give 1 negatives that the corpus does not have: 'd7' of query 'q0'"):
        require_given_documents(table_of(), dataset_of(), index.get)
    require_given_documents(table_of("bm25"), dataset_of(), {}.get)


def test_they_have_a_place_in_the_timetable() -> None:
    table = table_of("given@a/b", further_retrievers=("given", "given@a/b", "bm25"))
    assert table.phase("warmup_retriever").candidates == ("given-a%2Fb",)
    assert {mining.name: (mining.retriever, mining.proposed_by, mining.top_k) for mining in table.minings} == {
        "given-a%2Fb": ("given", "a/b", 20),
        "000": ("dense", "", 20),
        "001": ("dense", "", 20),
        "given": ("given", "", 20),
        "bm25": ("bm25", "", 20),
    }
    assert table.joint["001"].members == ("001", "given", "given-a%2Fb", "bm25")
    assert table.joint["given-a%2Fb"] == Joint(("given-a%2Fb",), 3), "the warm-up draws from its own depth"
    assert choice_of(table.mining("given-a%2Fb")) == Choice("given", proposed_by="a/b")
    assert "bm25" not in {mining.name for mining in table_of().minings}, "not searched where nobody draws from it"


def test_a_warm_up_may_draw_from_a_ranking_in_a_file() -> None:
    table = table_of("lists/run.trec", further_retrievers=("lists/run.trec", "other.trec"))
    assert table.phase("warmup_retriever").candidates == ("run-file-0",)
    paths = {mining.name: mining.path for mining in table.minings if mining.path}
    assert paths == {"run-file-0": "lists/run.trec", "run-file-1": "other.trec"}


def test_they_join_a_pool(open_run: Open, tmp_path: Path) -> None:
    data = data_of(dataset_of(), tmp_path)
    given = mined(open_run("data.without_given=random"), data, Choice("given"))
    entries = JointLists([given]).of("q0")
    assert entries.documents_E.tolist() == [5, 3]
    assert entries.ranks_E.tolist() == [1, 2]
    assert len(JointLists([given]).of("q2")) == 0, "what was drawn in their place, nobody gave"

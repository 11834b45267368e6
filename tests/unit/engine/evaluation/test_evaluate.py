"""Rankings are re-ordered and measured as the tables of the paper have them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.timetable import Sizes
from engine.data.answers import AnswerFinder, haystacks_of
from engine.data.candidate_sets import CandidateSets
from engine.data.trec import read_trec
from engine.errors import ConfigError, ModelError
from engine.evaluation import evaluate
from engine.evaluation.candidates import evaluate_candidates
from engine.evaluation.evaluate import (
    evaluate_iteration,
    evaluate_system,
    record_ranking,
    require_measurable_splits,
    rerank,
    retrieve,
    retriever_of,
    split_queries,
)
from engine.evaluation.examples import show_examples
from engine.evaluation.measures import query_entropies
from engine.evaluation.systems import System, WeightsOf, pairs_of, trained_systems, yardsticks
from engine.retrievers.kinds import Choice
from engine.run import Run, Stage
from engine.search import Hits
from shards.records import Document, Query
from tests.unit.engine.conftest import TINY

Open = Callable[..., Run]
DOCIDS = [f"d{number}" for number in range(12)]


def data_of(num_queries: int = 3, answers: tuple[str, ...] = ()) -> Any:
    """Query qi has the one positive di."""
    queries = {f"q{row}": Query(f"q{row}", f"question {row}", answers) for row in range(num_queries)}
    qrels = {f"q{row}": {f"d{row}": 1} for row in range(num_queries)}
    shards = SimpleNamespace(
        docids=DOCIDS,
        num_documents=len(DOCIDS),
        index_of=DOCIDS.index,
        document=lambda index: Document(DOCIDS[index], "", "in Paris" if index % 2 else "elsewhere"),
    )
    dataset = SimpleNamespace(
        queries=queries, qrels={"dev": qrels, "test": qrels}, positives=lambda split, qid: list(qrels[qid])
    )
    return SimpleNamespace(
        dataset=dataset,
        shards=shards,
        answer_finder=AnswerFinder(haystacks_of(lambda docid: shards.document(shards.index_of(docid)).text)),
        queries_of=lambda split, limit, seed: list(queries.values())[:limit],
        own_documents={},
    )


def scores_by(preference: dict[str, float]) -> Any:
    """Stands for the ranker: a fixed score for each document."""

    def score(queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[preference[DOCIDS[document]] for document in own] for own in documents]

    return SimpleNamespace(open=lambda run, data, model, state, folder: SimpleNamespace(score=score))


def order_of(ranking: dict[str, float]) -> list[str]:
    return sorted(ranking, key=lambda docid: -ranking[docid])


# --- re-ranking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [-5.0, 40.0])
def test_the_top_is_reordered_and_what_lies_deeper_keeps_its_order_below(
    open_run: Open, monkeypatch: pytest.MonkeyPatch, lowest: float
) -> None:
    """Symptom guarded against: with raw logits below the retriever's scores, unscored documents come out on top."""
    preference = {docid: lowest + place for place, docid in enumerate(DOCIDS)}
    monkeypatch.setattr(evaluate, "PairScorer", scores_by(preference))
    run = open_run("evaluation.rerank_depth=3", "evaluation.depth=6")
    found = {"q0": {docid: 9.0 - place for place, docid in enumerate(DOCIDS[:6])}}
    data = data_of(1)
    ranking = rerank(Stage(run, "evaluate/1"), data, D, list(data.dataset.queries.values()), found)
    assert order_of(ranking["q0"]) == ["d2", "d1", "d0", "d3", "d4", "d5"]
    assert [ranking["q0"][docid] for docid in ("d2", "d1", "d0")] == [lowest + 2, lowest + 1, lowest]


def test_equal_scores_keep_the_retrievers_order(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PairScorer", scores_by(dict.fromkeys(DOCIDS, 0.5)))
    run = open_run("evaluation.rerank_depth=4")
    found = {"q0": {"d3": 4.0, "d1": 3.0, "d7": 2.0, "d2": 1.0}}
    data = data_of(1)
    ranking = rerank(Stage(run, "evaluate/1"), data, D, list(data.dataset.queries.values()), found)
    assert order_of(ranking["q0"]) == ["d3", "d1", "d7", "d2"]


def test_a_ranking_shorter_than_the_depth_is_reranked_whole(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PairScorer", scores_by({"d0": 1.0, "d1": 2.0}))
    data = data_of(2)
    found = {"q0": {"d0": 0.2, "d1": 0.1}, "q1": {}}
    ranking = rerank(Stage(open_run(), "evaluate/1"), data, D, list(data.dataset.queries.values()), found)
    assert order_of(ranking["q0"]) == ["d1", "d0"]
    assert ranking["q1"] == {}


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_cannot_be_ordered_stops_with_who_gave_it(
    open_run: Open, monkeypatch: pytest.MonkeyPatch, score: float
) -> None:
    monkeypatch.setattr(evaluate, "PairScorer", scores_by({"d0": 1.0, "d1": score}))
    data = data_of(1)
    with pytest.raises(ModelError, match=f"D gives document 'd1' the score {score} for query 'q0'.*diverged"):
        rerank(Stage(open_run(), "e"), data, D, list(data.dataset.queries.values()), {"q0": {"d0": 2.0, "d1": 1.0}})


def test_given_candidates_are_all_re_ranked_and_measured_by_recall_alone(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in no order: of the metrics, only a recall that looks deeper than every set means anything."""
    monkeypatch.setattr(evaluate, "PairScorer", scores_by({docid: float(place) for place, docid in enumerate(DOCIDS)}))
    run, data = open_run("evaluation.metrics=[R@1,R@3,R@5,MRR@10]", "evaluation.rerank_depth=3"), data_of(3)
    sets = CandidateSets({"q0": [0, 4, 5], "q1": [2, 3], "q2": []}, 0)
    given = System("top.tsv", "candidates", None)
    over = replace(D, over=given, names_over=True)
    stage = Stage(run, "evaluate dev")
    evaluate_candidates(stage, data, run.folder, "dev", sets, [given, over])
    rows = json.loads(run.folder.summary.read_text())
    assert [(row["system"], row["over"], row["rerank_depth"]) for row in rows] == [
        ("top.tsv", None, None),
        ("D", "top.tsv", 3),
    ]
    assert rows[0]["metrics"] == pytest.approx({"R@3": 1 / 3, "R@5": 1 / 3})
    assert rows[1]["metrics"] == pytest.approx({"R@1": 0, "R@3": 1 / 3, "R@5": 1 / 3, "MRR@10": 1 / 9})
    ranked = read_trec(run.folder.results / over.run_file_name("dev"))
    assert {qid: order_of(scores) for qid, scores in ranked.items()} == {"q0": ["d5", "d4", "d0"], "q1": ["d3", "d2"]}
    assert read_trec(run.folder.results / "dev-top.tsv.trec").keys() == {"q0", "q1"}
    many = CandidateSets({"q0": list(range(7))}, 0)
    evaluate_candidates(stage, data, run.folder, "dev", many, [given])
    assert json.loads(run.folder.summary.read_text())[-1]["metrics"] == {"R@7": 1.0}, "none of the recipe's is as deep"


# --- retrieving ------------------------------------------------------------------------------------------------------


class Finder:
    """Finds the documents from the last to the first, and has only four of them."""

    source = "dense"

    def __init__(self) -> None:
        self.depths: list[int] = []

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        self.depths.append(top_k)
        row = np.full(top_k, -1, dtype=np.int64)
        row[:4] = [11, 10, 9, 8]
        scores = np.where(row >= 0, row, -np.inf).astype(np.float32)
        return Hits(np.tile(row, (len(queries), 1)), np.tile(scores, (len(queries), 1)))


def test_retrieving_names_documents_and_leaves_out_empty_places(open_run: Open) -> None:
    data, finder = data_of(2), Finder()
    queries = list(data.dataset.queries.values())
    ranking = retrieve(Stage(open_run("evaluation.depth=100"), "evaluate/1"), data, finder, queries, "G")
    assert ranking == {qid: {"d11": 11.0, "d10": 10.0, "d9": 9.0, "d8": 8.0} for qid in ("q0", "q1")}
    assert finder.depths == [len(DOCIDS)], "no deeper than the corpus"


def test_the_document_that_is_the_query_is_left_out_and_none_is_missing(open_run: Open) -> None:
    """Symptom: on data whose queries are documents, each query found itself first, and that was measured as a miss."""
    data, finder = data_of(2), Finder()
    data.own_documents = {"q0": 10}
    queries = list(data.dataset.queries.values())
    run = open_run("evaluation.depth=3", "evaluation.rerank_depth=3", "evaluation.metrics=[R@1, MRR@3]")
    ranking = retrieve(Stage(run, "evaluate/1"), data, finder, queries, "G")
    assert {qid: list(found) for qid, found in ranking.items()} == {
        "q0": ["d11", "d9", "d8"],
        "q1": ["d11", "d10", "d9"],
    }
    assert finder.depths == [4], "one deeper, for all queries alike"


class Empty:
    """Finds something for the first query alone."""

    source = "bm25"

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        documents_QK = np.full((len(queries), top_k), -1, dtype=np.int64)
        documents_QK[0, 0] = 7
        return Hits(documents_QK, np.where(documents_QK >= 0, 1.0, -np.inf).astype(np.float32))


def test_queries_without_hits_go_through_and_are_told_of(
    open_run: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Symptom guarded against: a TREC file has no line for a query without hits, and re-ranking it stops the run."""
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    monkeypatch.setattr(evaluate, "open_searcher", lambda *_: Empty())
    monkeypatch.setattr(evaluate, "PairScorer", scores_by(dict.fromkeys(DOCIDS, 0.5)))
    run, data = open_run(), data_of(3)
    data.dataset.qrels["dev"]["q0"] = {"d7": 1}
    stage = Stage(run, "evaluate/1")
    for system in (G, D):
        (score,) = evaluate_system(stage, data, run.folder, system, "dev")
        assert score.metrics["R@1"] == pytest.approx(1 / 3), "a query without hits counts as 0"
        assert read_trec(run.folder.results / system.run_file_name("dev")).keys() == {"q0"}
    show_examples(run, data, split_queries(run, data, "dev"), G, D)
    assert "G finds nothing for 2 of 3 queries" in caplog.text
    assert "bm25.language" in caplog.text


def test_each_split_has_its_own_limit(open_run: Open) -> None:
    run, data = open_run("evaluation.max_dev_queries=1", "evaluation.max_test_queries=2"), data_of(3)
    assert [len(split_queries(run, data, split)) for split in ("dev", "test")] == [1, 2]


# --- recording -------------------------------------------------------------------------------------------------------


CONFIG = load_config(TINY)
G0, D0, G, D = trained_systems(CONFIG, [0, 1])
BM25, ZERO_SHOT = yardsticks(CONFIG)


def record(
    run: Run, data: Any, ranking: dict[str, dict[str, float]], system: System = G, *, sample: int | None = None
) -> Any:
    return record_ranking(Stage(run, "evaluate/1"), data, run.folder, ranking, system, "dev", sample)


def test_a_record_is_a_row_a_trec_file_and_points_of_a_curve(open_run: Open) -> None:
    run, data = open_run(), data_of(2)
    shown = record(run, data, {"q0": {"d0": 2.0, "d1": 1.0}, "q1": {"d5": 3.0, "d1": 1.0}})
    (row,) = json.loads(run.folder.summary.read_text())
    assert {key: value for key, value in row.items() if key not in {"metrics", "headline"}} == {
        **{"system": "G", "kind": "retriever", "retriever": "G", "over": None},
        **{"iteration": 1, "split": "dev", "over_iteration": None, "relevance_threshold": 1},
        **{"num_queries": 2, "split_queries": 2, "rerank_depth": None},
    }
    assert row["metrics"]["R@1"] == 0.5
    assert row["metrics"]["MRR@10"] == 0.75
    assert (shown.kind, shown.metrics["MRR@10"]) == ("retriever", 0.75)
    assert read_trec(run.folder.results / "dev-G-001.trec")["q1"] == {"d5": 3.0, "d1": 1.0}
    line = json.loads((run.folder.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["step"], line["dev/retriever/MRR@10"], line["dev/retriever/num_queries"]) == (1, 0.75, 2)
    assert "A@1" not in row["metrics"], "there are no answers"


def test_a_sample_replaces_neither_the_row_nor_the_ranking_of_the_whole_split(open_run: Open) -> None:
    """Symptom: `--max-queries 3` left a table and rankings of 3 queries, and the numbers of the split were lost."""
    run, data = open_run(), data_of(3)
    whole = {f"q{row}": {f"d{row}": 1.0} for row in range(3)}
    for system in (G, D):
        record(run, data, whole, system)
        record(run, data, {"q1": {"d5": 1.0}}, system, sample=1)
    rows = json.loads(run.folder.summary.read_text())
    assert [(row["system"], row["num_queries"], row["split_queries"], row["metrics"]["R@1"]) for row in rows] == [
        *[("G", 3, 3, 1.0), ("G", 1, 3, 0.0), ("D", 3, 3, 1.0), ("D", 1, 3, 0.0)]
    ]
    assert sorted(path.name for path in run.folder.results.glob("*.trec")) == [
        *["dev-D-001-1-queries.trec", "dev-D-001.trec", "dev-G-001-1-queries.trec", "dev-G-001.trec"]
    ]
    assert read_trec(run.folder.results / "dev-G-001.trec") == whole


def test_a_sample_is_re_ranked_from_the_ranking_of_the_sample(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PairScorer", scores_by({"d5": 1.0, "d6": 2.0}))
    run, data = open_run("evaluation.max_dev_queries=2"), data_of(3)
    record(run, data, {f"q{row}": {"d0": 1.0} for row in range(3)})
    record(run, data, {"q0": {"d5": 2.0, "d6": 1.0}, "q1": {}}, sample=2)
    evaluate_system(Stage(run, "evaluate/1"), data, run.folder, D, "dev", sample=2)
    ranked = read_trec(run.folder.results / "dev-D-001-2-queries.trec")
    assert {qid: order_of(scores) for qid, scores in ranked.items()} == {"q0": ["d6", "d5"]}


def test_metrics_and_grades_are_those_of_the_recipe(open_run: Open) -> None:
    run = open_run("evaluation.metrics=[nDCG@5,A@2,R@3,MRR@10]", "evaluation.relevance_threshold=2")
    data = data_of(1, ("Paris",))
    data.dataset.qrels["dev"]["q0"] |= {"d3": 2, "d4": 3}
    record(run, data, {"q0": {"d0": 9.0, "d2": 8.0, "d3": 7.0}})
    (row,) = json.loads(run.folder.summary.read_text())
    assert list(row["metrics"]) == ["nDCG@5", "A@2", "R@3", "MRR@10"]
    assert row["metrics"] | {"nDCG@5": 0} == pytest.approx({"nDCG@5": 0, "A@2": 0.0, "R@3": 0.5, "MRR@10": 1 / 3})
    assert row["relevance_threshold"] == 2


def test_a_search_goes_as_deep_as_the_deepest_metric(open_run: Open) -> None:
    """Symptom: R@1000 was measured on 100 documents, and came out as R@100."""
    for words, depth in (
        (("evaluation.metrics=[MRR@10,R@1000]", "evaluation.depth=100"), 1000),
        (("evaluation.metrics=[MRR@10]", "evaluation.depth=200"), 200),
        ((), 1000),
    ):
        data, finder = data_of(1), Finder()
        data.shards.num_documents = 5000
        run = open_run("run.force_resume=true", *words)
        retrieve(Stage(run, "evaluate/1"), data, finder, list(data.dataset.queries.values()), "G")
        assert finder.depths == [depth]


def test_a_row_that_is_measured_again_is_replaced(open_run: Open) -> None:
    run, data = open_run(), data_of(1)
    record(run, data, {"q0": {"d5": 1.0}})
    record(run, data, {"q0": {"d5": 1.0}}, system=D)
    record(run, data, {"q0": {"d0": 1.0}})
    rows = json.loads(run.folder.summary.read_text())
    assert [(row["system"], row["metrics"]["R@1"]) for row in rows] == [("D", 0.0), ("G", 1.0)]


def test_answers_are_looked_for_in_the_documents(open_run: Open) -> None:
    run = open_run()
    record(run, data_of(2, ("Paris",)), {"q0": {"d2": 3.0, "d4": 2.0, "d1": 1.0}, "q1": {"d3": 1.0}})
    (row,) = json.loads(run.folder.summary.read_text())
    assert (row["metrics"]["A@1"], row["metrics"]["A@5"]) == (0.5, 1.0)


@pytest.mark.parametrize("num_judged", [0, 1])
def test_dev_may_have_answers_alone(open_run: Open, num_judged: int) -> None:
    """The papers choose on all dev questions, by their answers; those with a gold passage are measured by it, too."""
    run, data = open_run("run.keep_best=A@1", "run.force_resume=true"), data_of(2, ("Paris",))
    for row in range(num_judged, 2):
        data.dataset.qrels["dev"][f"q{row}"] = {}
    score = record(run, data, {"q0": {"d2": 3.0, "d1": 2.0, "d0": 1.0}, "q1": {"d3": 1.0}})
    (row,) = json.loads(run.folder.summary.read_text())
    by_judgements = {"R@1": 0.0, "MRR@10": 1 / 3} if num_judged else {}
    assert {name: row["metrics"].get(name) for name in ("A@1", "A@5", "R@1", "MRR@10")} == (
        {"A@1": 0.5, "A@5": 1.0} | (dict.fromkeys(("R@1", "MRR@10")) | by_judgements)
    )
    assert (score.metrics["A@1"], row["num_queries"]) == (0.5, 2)


def test_the_best_iteration_is_not_chosen_by_what_dev_cannot_tell(open_run: Open) -> None:
    """Symptom: with answers alone, a run that keeps its best by MRR@10 stopped after its first iteration."""
    for metric, data, expected in (
        ("MRR@10", data_of(2, ("Paris",)), "no dev query of .* has judgements.*such as A@20"),
        ("A@20", data_of(2), "no dev query of .* has answers.*such as MRR@10"),
    ):
        data.dataset.path = "data"
        if metric == "MRR@10":
            data.dataset.qrels["dev"] = {qid: {} for qid in data.dataset.queries}
        metrics = "evaluation.metrics=[MRR@10,A@20]"
        config = open_run(f"run.keep_best={metric}", metrics, "run.force_resume=true").config
        with pytest.raises(ConfigError, match=f"(?s){expected}"):
            require_measurable_splits(config, data.dataset, ["dev"])
        other = open_run(
            f"run.keep_best={'A@20' if metric == 'MRR@10' else 'MRR@10'}", metrics, "run.force_resume=true"
        )
        require_measurable_splits(other.config, data.dataset, ["dev"])


def test_a_split_without_queries_is_not_measured(open_run: Open) -> None:
    data: Any = SimpleNamespace(queries_of=lambda split, limit, seed: [])
    run = open_run()
    assert evaluate_iteration(Stage(run, "evaluate/1"), data, [G, D]).scores == ()
    assert not run.folder.summary.exists()


# --- entropy -----------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_top_fifteen() -> None:
    """AR2 Table 6."""
    even = {"q0": {f"d{number}": 1.0 for number in range(40)}}
    assert query_entropies(even, 1.0) == {"q0": pytest.approx(math.log(15))}
    sure: dict[str, dict[str, float]] = {"q0": {"d0": 1000.0, "d1": 0.0}, "q1": {}}
    assert query_entropies(sure, 1.0) == {"q0": pytest.approx(0.0, abs=1e-9)}, "of nothing there is none"
    tilted = {"q0": {"d0": 1.0, "d1": 0.0}}
    p = 1 / (1 + math.exp(-2))
    assert query_entropies(tilted, 2.0) == {"q0": pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))}


# --- which curve, which file, which retriever ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "curve", "file", "kind"),
    [
        (BM25, "BM25", "dev-BM25.trec", "bm25"),
        (ZERO_SHOT, "zero-shot", "dev-zero-shot.trec", "dense"),
        (G0, "retriever", "dev-G0-000.trec", "dense"),
        (G, "retriever", "dev-G-001.trec", "dense"),
        (System("D", "retriever", WeightsOf("retriever", 12)), "retriever", "dev-D-012.trec", "dense"),
        (System("G", "sparse", WeightsOf("retriever", 2)), "sparse", "dev-G-002.trec", "sparse"),
    ],
)
def test_a_systems_fields_say_its_curve_its_file_and_its_retriever(
    system: System, curve: str, file: str, kind: str
) -> None:
    assert (system.curve, system.run_file_name("dev")) == (curve, file)
    assert retriever_of(system) == Choice(kind, system.weights)


def test_rankers_of_all_iterations_are_one_curve() -> None:
    assert [system.curve for system in (D0, D)] == ["ranker", "ranker"]
    assert [system.run_file_name("test") for system in (D0, D)] == ["test-D0-000.trec", "test-D-001.trec"]
    assert (D.over, D0.first_stage) == (G, G0)


def test_rankers_of_any_iteration_over_retrievers_of_any_other_have_a_file_of_their_own() -> None:
    """Symptom: D over G0 would have replaced D over G (AR2 Table 3 has both)."""
    retrievers, rankers = [WeightsOf("retriever", 0), WeightsOf("retriever", 2)], [0, 1, 2]
    groups = pairs_of(CONFIG, retrievers, [WeightsOf("ranker", iteration) for iteration in rankers])
    assert [[system.run_file_name("test") for system in systems] for systems in groups] == [
        ["test-G0-000.trec", "test-D0-000.trec", "test-D-001-over-G0-000.trec", "test-D-002-over-G0-000.trec"],
        ["test-G-002.trec", "test-D0-000-over-G-002.trec", "test-D-001-over-G-002.trec", "test-D-002.trec"],
    ]
    assert all(system.over in (None, systems[0]) for systems in groups for system in systems)
    assert groups[1][2].run_file_name("test", 30) == "test-D-001-over-G-002-30-queries.trec"
    assert (groups[0][1], groups[1][0]) == (D0, trained_systems(CONFIG, [2])[0]), "the usual systems are among them"


def test_a_ranker_that_re_orders_several_lists_in_its_own_table_names_them_here_too() -> None:
    """Else R over D1, both of the first state, would have the file of R over D2."""
    config = load_config(TINY.with_name("r2anker_tiny.yaml")).sized(Sizes(queries=40, documents=100))
    states = [WeightsOf("dense", 1), WeightsOf("dense", 2)]
    names = [
        [system.run_file_name("dev") for system in systems]
        for systems in pairs_of(config, states, [WeightsOf("ranker", 1)])
    ]
    assert names == [
        ["dev-D1-001.trec", "dev-R-001-over-D1-001.trec"],
        ["dev-D2-002.trec", "dev-R-001-over-D2-002.trec"],
    ]


def test_a_ranking_in_a_file_is_measured_like_any_system(open_run: Open, tmp_path: Path) -> None:
    path = tmp_path / "given.trec"
    path.write_text("q0 Q0 d0 1 2.0 other\nq0 Q0 d5 2 1.0 other\nq1 Q0 d4 1 1.0 other\n")
    run, data = open_run(), data_of(2)

    class Docids(list[str]):
        index_of = list.index

    data.shards.docids = Docids(DOCIDS)
    system, stage = System("someone's", "run_file", None), Stage(run, "evaluate/given")
    (score,) = evaluate_system(stage, data, run.folder, system, "dev", Choice("run_file", path=str(path)))
    assert (score.system, score.metrics) == ("someone's", {"MRR@10": 0.5, "R@1": 0.5})
    assert read_trec(run.folder.results / "dev-someone's.trec")["q0"] == {"d0": 2.0, "d5": 1.0}

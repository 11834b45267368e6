"""Measures against values computed by hand, and the two places where evaluation goes wrong quietly."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_measures
import numpy as np
import pytest
import pytrec_eval  # type: ignore[import-untyped]
from ir_measures import RR, R, nDCG

from engine.config.metric_names import DEFAULT_METRICS
from engine.config.sections import EvaluationConfig
from engine.data.corpus import sample_queries
from engine.errors import DataError, SparringError
from engine.evaluation.measures import answer_measures, answer_values, query_values, require_measurable, score_run
from shards.formats import open_dataset
from shards.records import Query


def ranking(*docids: str) -> dict[str, float]:
    return {docid: 10.0 - place for place, docid in enumerate(docids)}


def test_values_by_hand() -> None:
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"c": 3, "d": 1, "x": 0}}
    run = {"q1": ranking("x", "a", "y", "z", "w", "b"), "q2": ranking("d", "x", "c")}
    names = ["R@1", "R@5", "R@20", "R@100", "MRR@10", "nDCG@10"]
    found = score_run(run, qrels, names)
    assert list(found) == names
    dcg_1 = 1 / math.log2(3) + 1 / math.log2(7)
    ideal_1 = 1 + 1 / math.log2(3)
    dcg_2 = 1 + 3 / math.log2(4)
    ideal_2 = 3 + 1 / math.log2(3)
    assert found == pytest.approx(
        {
            "R@1": (0 + 0.5) / 2,
            "R@5": (0.5 + 1) / 2,
            "R@20": 1.0,
            "R@100": 1.0,
            "MRR@10": (0.5 + 1) / 2,
            "nDCG@10": (dcg_1 / ideal_1 + dcg_2 / ideal_2) / 2,
        }
    )


def test_reciprocal_rank_and_gain_are_cut_at_10() -> None:
    qrels = {"q": {"a": 1}}
    tenth = score_run({"q": ranking(*"0123456789"[:9], "a")}, qrels)
    eleventh = score_run({"q": ranking(*"0123456789", "a")}, qrels)
    assert tenth["MRR@10"] == pytest.approx(0.1)
    assert (eleventh["MRR@10"], eleventh["nDCG@10"], eleventh["R@20"]) == (0, 0, 1)


def test_a_query_without_a_ranking_counts_as_zero() -> None:
    """Symptom: a retriever that answers half of the queries looks twice as good."""
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 1}, "q4": {"d": 1}}
    found = score_run({"q1": ranking("a"), "q2": {}, "q9": ranking("a")}, qrels, ("R@1", "MRR@10", "nDCG@10"))
    assert found == pytest.approx({"R@1": 0.25, "MRR@10": 0.25, "nDCG@10": 0.25})


def test_queries_without_a_relevant_document_are_left_out() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"b": 0}, "q3": {}}
    assert score_run({"q1": ranking("a"), "q2": ranking("b")}, qrels)["R@1"] == 1.0
    with pytest.raises(DataError, match="None of 1 queries"):
        score_run({}, {"q2": {"b": 0}})


def test_equal_scores_keep_the_order_of_the_run() -> None:
    """Symptom: the exact order of a search is re-sorted by document id, and R@1 changes."""
    qrels = {"q": {"a": 1}}
    assert score_run({"q": {"a": 1.0, "z": 1.0}}, qrels)["R@1"] == 1.0
    assert score_run({"q": {"z": 1.0, "a": 1.0}}, qrels)["R@1"] == 0.0
    nearly = {"q": {"z": 30_000_000.0, "a": 30_000_000.5}}  # one number in single precision
    assert score_run(nearly, qrels)["R@1"] == 1.0


def test_scores_decide_before_the_order() -> None:
    assert score_run({"q": {"z": -2.0, "a": -1.0}}, {"q": {"a": 1}})["R@1"] == 1.0


def test_answer_measures_by_hand() -> None:
    run = {"q1": ranking("x", "a", "b"), "q2": ranking("c"), "q3": ranking("x"), "no answers": ranking("x")}
    answered = {"q1": {"a", "b"}, "q2": {"c"}, "q3": set(), "not ranked": set()}
    assert answer_measures(run, answered) == {"A@1": 0.25, "A@5": 0.5, "A@20": 0.5, "A@100": 0.5}
    assert answer_values(run, answered, "A@1") == {"q1": 0.0, "q2": 1.0, "q3": 0.0, "not ranked": 0.0}
    assert answer_values(run, answered, "A@5") == {"q1": 1.0, "q2": 1.0, "q3": 0.0, "not ranked": 0.0}
    assert answer_measures({"q": ranking("x")}, {"q": set()}, ("A@5", "R@1")) == {"A@5": 0.0}
    with pytest.raises(DataError, match="No query has answers"):
        answer_measures(run, {})


def test_a_hit_counts_once_however_many_documents_have_the_answer() -> None:
    found = answer_measures({"q": ranking(*"abcde")}, {"q": set("abcde")}, ("A@1", "A@5"))
    assert found == {"A@1": 1.0, "A@5": 1.0}


# --- grades ----------------------------------------------------------------------------------------------------------


def test_relevance_begins_at_a_grade_and_ndcg_has_the_grades_as_gains() -> None:
    """Symptom: on TREC's Deep Learning tracks, where grade 1 is not relevant, MRR and recall came out far too high."""
    qrels = {"q1": {"a": 1, "b": 2, "c": 3}, "q2": {"d": 1, "e": 0}}
    run = {"q1": ranking("a", "x", "b", "c"), "q2": ranking("d")}
    names = ("R@3", "MRR@10", "nDCG@3")
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    ndcg = (((1 + 2 / 2) / ideal) + 1) / 2
    assert score_run(run, qrels, names, relevance_threshold=2) == pytest.approx(
        {"R@3": (1 / 2 + 0) / 2, "MRR@10": (1 / 3 + 0) / 2, "nDCG@3": ndcg}
    )
    assert score_run(run, qrels, names) == pytest.approx(
        {"R@3": (2 / 3 + 1) / 2, "MRR@10": (1 + 1) / 2, "nDCG@3": ndcg}
    )


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_all_metrics_are_those_of_ir_measures(threshold: int) -> None:
    random = np.random.default_rng(7)
    docids = [f"d{number}" for number in range(1200)]
    qrels = {
        f"q{row}": {docid: int(random.integers(0, 4)) for docid in random.choice(docids, 30, replace=False)}
        for row in range(8)
    }
    run = {}
    for qid, grades in qrels.items():
        noise = dict(zip(docids, random.permutation(1200).tolist(), strict=True))
        run[qid] = {docid: noise[docid] + 300.3 * grades.get(docid, 0) for docid in docids}
    run["q7"] = {}
    judged = [name for name in DEFAULT_METRICS if not name.startswith("A@")]
    assert len(judged) == 9
    theirs = {f"R@{k}": R(rel=threshold) @ k for k in (1, 5, 10, 20, 50, 100, 1000)}
    theirs |= {"MRR@10": RR(rel=threshold) @ 10, "nDCG@10": nDCG @ 10}
    values = ir_measures.calc_aggregate(list(theirs.values()), qrels, run)
    found = score_run(run, qrels, relevance_threshold=threshold)
    assert list(found) == judged
    assert found == pytest.approx({name: values[measure] for name, measure in theirs.items()}, abs=1e-12)
    assert 0 < found["R@50"] < found["R@1000"] < 1


def test_a_threshold_that_no_grade_reaches_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"highest grade is 1.*at least 2.*evaluation\.relevance_threshold to at most 1"
    ):
        score_run({"q": ranking("a")}, {"q": {"a": 1}}, relevance_threshold=2)


# --- what a split allows ---------------------------------------------------------------------------------------------


def dataset_of(qrels: dict[str, dict[str, int]], *answers: str) -> Any:
    queries = {qid: Query(qid, qid, answers) for qid in qrels}
    return SimpleNamespace(path="data", qrels={"test": qrels}, queries=queries)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (dataset_of({"q": {"a": 1}}), {"metrics": ["A@20"]}, "has no answers, which A@20 .* such as MRR@10"),
        (dataset_of({"q": {}}, "Paris"), {"metrics": ["R@5"]}, "has no judgements, which R@5 .* such as A@20"),
        (dataset_of({"q": {"a": 2}}), {"relevance_threshold": 3}, "highest grade is 2"),
    ],
)
def test_metrics_that_a_split_cannot_have_are_refused(dataset: Any, settings: dict[str, Any], message: str) -> None:
    """Symptom: a run came to its end with a table that had no column."""
    with pytest.raises(SparringError, match=message):
        require_measurable(dataset, "test", ["q"], EvaluationConfig(**settings))


def test_one_metric_that_can_be_measured_is_enough() -> None:
    require_measurable(dataset_of({"q": {}}, "Paris"), "test", ["q"], EvaluationConfig())
    require_measurable(dataset_of({"q": {"a": 1}}), "test", ["q"], EvaluationConfig())


def test_metrics_by_answers_alone_ask_nothing_of_judgements() -> None:
    """Symptom: a test split whose passages are judged 0 ended a run that measures answers, behind all training."""
    settings, dataset = EvaluationConfig(metrics=("A@1",)), dataset_of({"q": {"a": 0}}, "Paris")
    require_measurable(dataset, "test", ["q"], settings)
    assert score_run({"q": ranking("a")}, dataset.qrels["test"], settings.metrics) == {}


def test_average_precision_by_hand() -> None:
    qrels = {"q": {"a": 2, "b": 1, "c": 1, "x": 0}}
    run = {"q": ranking("a", "x", "b", "y")}
    found = score_run(run, qrels, ("MAP@10", "MAP@2"))
    assert found == pytest.approx({"MAP@10": (1 + 2 / 3) / 3, "MAP@2": 1 / 3})
    assert score_run(run, qrels, ("MAP@10",), relevance_threshold=2) == pytest.approx({"MAP@10": 1.0})


def graded_track(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """As TREC's Deep Learning track of 2019: 200 queries are ranked, 43 are judged with grades 0 to 3."""
    generator = np.random.default_rng(seed)
    qids = [str(number) for number in generator.choice(100_000, 200, replace=False)]
    docids = [str(number) for number in range(500)]
    run = {qid: ranking(*generator.permutation(docids)[:150]) for qid in qids}
    qrels = {
        qid: {
            docid: int(grade)
            for docid, grade in zip(docids, generator.choice(4, 500, p=(0.6, 0.2, 0.15, 0.05)), strict=True)
        }
        for qid in qids[:43]
    }
    return qrels, run


def test_a_graded_track_is_measured_as_trec_eval_does_over_the_judged_queries_alone(tmp_path: Path) -> None:
    """Threshold 2 for MRR, MAP and recall, the grades themselves for nDCG; 157 of 200 queries have no judgement."""
    qrels, run = graded_track(19)
    (tmp_path / "collection.tsv").write_text("".join(f"{number}\tpassage {number}\n" for number in range(500)))
    (tmp_path / "queries.test.tsv").write_text("".join(f"{qid}\tquery {qid}\n" for qid in run))
    lines = [f"{qid} 0 {docid} {grade}\n" for qid, grades in qrels.items() for docid, grade in grades.items()]
    (tmp_path / "qrels.test.tsv").write_text("".join(lines))
    dataset = open_dataset(tmp_path)
    assert {query.id for query in sample_queries(dataset, "test", None, seed=0)} == set(qrels), "these are searched"

    metrics = ("nDCG@10", "MRR@10", "MAP@1000", "R@100")
    found = score_run(run, dataset.qrels["test"], metrics, relevance_threshold=2)
    names = {"ndcg_cut_10", "recip_rank", "map_cut_1000", "recall_100"}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, names, relevance_level=2).evaluate(run)
    assert len(by_query) == 43

    def mean(name: str) -> float:
        return sum(values[name] for values in by_query.values()) / 43

    within = sum(rank if rank >= 0.1 else 0.0 for rank in (values["recip_rank"] for values in by_query.values())) / 43
    expected = (mean("ndcg_cut_10"), within, mean("map_cut_1000"), mean("recall_100"))
    assert found == pytest.approx(dict(zip(metrics, expected, strict=True)))
    assert len({round(value, 6) for value in found.values()}) == 4


def test_values_of_queries_make_the_mean() -> None:
    qrels, run = graded_track(20)
    gone = next(iter(qrels))
    del run[gone]
    for name in ("MRR@10", "nDCG@10", "MAP@100"):
        values = query_values(run, qrels, name, relevance_threshold=2)
        assert list(values) == list(qrels), "in the order of the judgements"
        assert values[gone] == 0.0
        mean = score_run(run, qrels, (name,), relevance_threshold=2)[name]
        assert sum(values.values()) / len(values) == pytest.approx(mean, abs=1e-12)
        assert len(set(values.values())) > 2

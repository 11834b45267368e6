"""What a row is compared with, and by how much it differs, from rankings that were recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.metric_names import compared_by
from engine.config.timetable import Sizes
from engine.data.answers import AnswerFinder, haystacks_of
from engine.evaluation.evaluate import record_ranking
from engine.evaluation.headline import built_on
from engine.evaluation.significance import bootstrap, randomisation_test, standard_error
from engine.evaluation.systems import System, WeightsOf, fused_system, trained_systems, yardsticks
from engine.run import Run, Stage
from tests.distributed.processes import ROOT
from tests.unit.engine.conftest import TINY

Open = Callable[..., Run]
CONFIG = load_config(TINY)
BM25, ZERO_SHOT = yardsticks(CONFIG)
G0, D0, G, D = trained_systems(CONFIG, [0, 2])
NUM_QUERIES, NUM_DOCUMENTS = 30, 12


@pytest.mark.parametrize(
    ("system", "other"),
    [(BM25, None), (ZERO_SHOT, None), (G0, ZERO_SHOT), (G, G0), (D, G), (D0, G0), (replace(D, over=G0), G0)],
)
def test_a_system_should_be_above_what_it_builds_on(system: System, other: System | None) -> None:
    assert built_on(CONFIG, system) == other


def test_a_mixture_should_be_above_its_first_retriever_and_a_run_may_lack_zero_shot() -> None:
    assert built_on(CONFIG, fused_system(CONFIG, taken=2, candidates="retriever")) == G
    assert built_on(load_config(TINY, ["evaluation.zero_shot=false"]), G0) is None


def test_a_second_stage_should_be_above_the_first() -> None:
    """R2ANKER's retrievers are trained twice, from their beginning."""
    config = load_config(ROOT / "configs" / "r2anker_tiny.yaml").sized(Sizes(100, 300))
    model = config.timetable.encoders[0]
    states = config.timetable.states(model)
    second = System("any", config.models[model].kind, states[1])
    found = built_on(config, second)
    assert found is not None
    assert found.weights == states[0]


def test_a_student_should_be_above_the_retriever_that_was_not_distilled() -> None:
    """Symptom: the last table had a distilled retriever beside nothing, where D2 is what one asks about."""
    config = load_config(ROOT / "configs" / "r2anker_tiny.yaml").sized(Sizes(100, 300))
    student = System("any", config.models["student"].kind, config.timetable.states("student")[0])
    found = built_on(config, student)
    assert found is not None
    assert (found.name, found.weights) == ("D2", config.timetable.states("dense")[1])


def test_rows_are_compared_by_one_metric() -> None:
    assert compared_by({"R@1": 0.1, "MRR@10": 0.2}) == "MRR@10"
    assert compared_by({"A@1": 0.1, "nDCG@10": 0.2}) == "nDCG@10"
    assert compared_by({"A@5": 0.1}) == "A@5"
    assert compared_by({"MRR@10": 0.2, "A@5": 0.1}, "A@5") == "A@5", "by which iterations are chosen, too"
    assert compared_by({"R@5": 0.2}, "A@5") == "R@5"
    assert compared_by({}) is None


class Made:
    """A run without models: rankings are noise, and a positive has the score that a test gives it."""

    def __init__(self, run: Run, *, answers: bool = False) -> None:
        self.run, self.noise = run, np.random.default_rng(3)
        qids = [f"q{number}" for number in range(NUM_QUERIES)]
        docids = [f"d{number}" for number in range(NUM_DOCUMENTS)]
        queries = {qid: SimpleNamespace(answers=("right",) if answers else ()) for qid in qids}
        qrels = {qid: {} if answers else {"d0": 1} for qid in qids}
        shards = SimpleNamespace(
            index_of=docids.index,
            document=lambda number: SimpleNamespace(text="right" if number == 0 else "wrong"),
        )
        self.qids, self.docids = qids, docids
        self.data: Any = SimpleNamespace(
            dataset=SimpleNamespace(queries=queries, qrels={"dev": qrels, "test": qrels}),
            shards=shards,
            answer_finder=AnswerFinder(haystacks_of(lambda docid: shards.document(shards.index_of(docid)).text)),
        )

    def record(self, system: System, better: float = 0.0, split: str = "dev", num_queries: int = NUM_QUERIES) -> Any:
        """Record a ranking of some queries and return its row."""
        ranking = {}
        for qid in self.qids[:num_queries]:
            scores = self.noise.normal(size=NUM_DOCUMENTS)
            scores[0] += better
            order = np.argsort(-scores)
            ranking[qid] = {self.docids[place]: float(scores[place]) for place in order}
        record_ranking(Stage(self.run, "evaluate/2"), self.data, self.run.folder, ranking, system, split, None)
        self.places = {qid: list(own).index("d0") + 1 for qid, own in ranking.items()}
        return json.loads(self.run.folder.summary.read_text())[-1]


def test_a_row_is_compared_query_by_query_with_the_recorded_ranking(open_run: Open) -> None:
    made = Made(open_run())
    assert made.record(G0)["headline"]["to"] is None, "nothing was measured before any training"
    before = np.array([1 / place if place <= 10 else 0 for place in made.places.values()])
    row = made.record(G, better=1.0)
    after = np.array([1 / place if place <= 10 else 0 for place in made.places.values()])
    assert row["metrics"]["MRR@10"] == pytest.approx(after.mean())
    assert row["headline"] == {
        **{"metric": "MRR@10", "to": "G0", "to_iteration": 0, "standard_error": pytest.approx(standard_error(after))},
        "difference": pytest.approx((after - before).mean()),
        "difference_error": pytest.approx(standard_error(after - before)),
        "p": pytest.approx(randomisation_test(after, before, seed=made.run.config.run.seed)),
        **dict(zip(("low", "high"), bootstrap(after, before, seed=made.run.config.run.seed), strict=True)),
    }
    over = made.record(D, better=1.0)
    assert (over["headline"]["to"], over["headline"]["to_iteration"]) == ("G", 2)


def test_a_metric_by_answers_is_compared_where_there_is_no_other(open_run: Open) -> None:
    made = Made(open_run("evaluation.metrics=[A@5]"), answers=True)
    made.record(G0)
    before = np.array([float(place <= 5) for place in made.places.values()])
    row = made.record(G, better=2.0)
    after = np.array([float(place <= 5) for place in made.places.values()])
    assert row["metrics"] == {"A@5": pytest.approx(after.mean())}
    assert row["headline"]["difference"] == pytest.approx((after - before).mean())
    assert row["headline"]["standard_error"] == pytest.approx(standard_error(after))


def test_what_was_measured_on_other_queries_is_not_compared(open_run: Open) -> None:
    made = Made(open_run())
    made.record(G0, num_queries=NUM_QUERIES - 1)
    assert made.record(G)["headline"]["to"] is None
    made.record(G0, split="test")
    assert made.record(G)["headline"]["to"] is None
    weights = WeightsOf("retriever", 1)
    assert made.record(replace(D, over=replace(G, weights=weights)))["headline"]["to"] is None, "no file of it"
    made.record(G0)
    assert made.record(G)["headline"]["to"] == "G0"


def test_one_query_has_no_standard_error(open_run: Open) -> None:
    made = Made(open_run())
    made.record(G0, num_queries=1)
    headline = made.record(G, num_queries=1)["headline"]
    assert (headline["standard_error"], headline["difference_error"]) == (None, None)
    assert headline["p"] == 1.0

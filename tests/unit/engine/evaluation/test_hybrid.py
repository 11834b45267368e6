"""A mixture over what all retrievers found: whose lists take turns, who is asked for which scores, what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.timetable import Sizes
from engine.data.trec import read_trec, write_trec
from engine.evaluation import evaluate, part_scores
from engine.evaluation.fusion import evaluate_fused, fit_on_dev, identity_of
from engine.evaluation.headline import built_on
from engine.evaluation.mixture import Fusion, Part, fitted_system
from engine.evaluation.summary import Row, add_row, read_rows
from engine.evaluation.systems import HYBRID, System, behind, fused_system
from engine.results import Measured
from engine.run import Run, Stage
from shards.files import read_record, write_json
from shards.records import Query
from tests.unit.engine.conftest import TINY

Open = Callable[..., Run]
NUM_QUERIES, NUM_DOCUMENTS, FOUND, DEPTH = 60, 30, 12, 6
DOCIDS = [f"d{number:02d}" for number in range(NUM_DOCUMENTS)]
NAMES = ("G", "D", "BM25")


class Asked:
    """Scores of one system for all documents; notes who asks for which."""

    def __init__(self, scores_QD: Any) -> None:
        self.scores, self.pairs = scores_QD, set[tuple[int, int]]()

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        rows = [int(query.id[1:]) for query in queries]
        for row, own in zip(rows, documents, strict=True):
            assert len(set(own)) == len(own)
            assert not self.pairs & {(row, one) for one in own}, "no pair is scored twice"
            self.pairs |= {(row, one) for one in own}
        return [[float(self.scores[row, one]) for one in own] for row, own in zip(rows, documents, strict=True)]


class Made:
    """Two retrievers that find half of the positives each, and a ranker that knows them all."""

    def __init__(self, run: Run, split: str, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.run, self.split, self.system = run, split, fused_system(run.config, taken=2)
        self.queries = [Query(f"q{row}", f"q{row}") for row in range(NUM_QUERIES)]
        scores = {name: generator.normal(size=(NUM_QUERIES, NUM_DOCUMENTS)) for name in NAMES}
        positives = generator.integers(NUM_DOCUMENTS, size=NUM_QUERIES)
        rows = np.arange(NUM_QUERIES)
        scores["D"][rows, positives] = 9.0
        scores["G"][rows, positives] = np.where(rows % 2, 5.0, -9.0)  # found among its first, or not at all
        scores["BM25"][rows, positives] = np.where(rows % 2, -9.0, 5.0)
        self.asked = {name: Asked(own) for name, own in scores.items()}
        self.scores, self.positives = scores, positives
        qrels = {f"q{row}": {DOCIDS[own]: 1} for row, own in enumerate(positives)}
        self.lists = {name: np.argsort(-scores[name], axis=1)[:, :FOUND] for name in ("G", "BM25")}
        first = self.system.parts[0]
        ranker = behind(run.config, first, self.system.parts[1])
        for part in (first, self.system.parts[2]):
            write_trec(run.folder.results / part.run_file_name(split), self.found_by(part.name), part.name)
        write_trec(run.folder.results / ranker.run_file_name(split), self.over_first(), "D")
        add_row(
            run.folder.summary,
            Row.of(ranker, split, {}, num_queries=NUM_QUERIES, split_queries=NUM_QUERIES, rerank_depth=DEPTH),
        )
        self.data: Any = SimpleNamespace(
            dataset=SimpleNamespace(path="data", queries={one.id: one for one in self.queries}, qrels={split: qrels}),
            shards=SimpleNamespace(docids=DOCIDS, num_documents=NUM_DOCUMENTS, index_of=DOCIDS.index),
            queries_of=lambda *_: self.queries,
        )
        monkeypatch.setattr(part_scores, "build", lambda *_: None)
        monkeypatch.setattr(evaluate, "build_prior", lambda *_: None)
        opened = {"dense": self.asked["G"], "bm25": self.asked["BM25"]}
        monkeypatch.setattr(part_scores, "open_searcher", lambda _run, _data, _folder, choice: opened[choice.kind])
        monkeypatch.setattr(evaluate.PairScorer, "open", lambda *_: self.asked["D"])

    def found_by(self, name: str) -> dict[str, dict[str, float]]:
        return {
            f"q{row}": {DOCIDS[one]: float(self.scores[name][row, one]) for one in own}
            for row, own in enumerate(self.lists[name])
        }

    def over_first(self) -> dict[str, dict[str, float]]:
        """D over G: scores of the first, places for those below."""
        return {
            f"q{row}": {DOCIDS[one]: float(self.scores["D"][row, one]) for one in own[:DEPTH]}
            | {DOCIDS[one]: -100.0 - place for place, one in enumerate(own[DEPTH:])}
            for row, own in enumerate(self.lists["G"])
        }

    def in_turn(self, row: int) -> list[int]:
        pairs = zip(self.lists["G"][row], self.lists["BM25"][row], strict=True)
        return list(dict.fromkeys(int(one) for pair in pairs for one in pair))

    def stage(self) -> Stage:
        return Stage(self.run, f"fusion/{self.split}")

    def ranking(self, name: str) -> Any:
        return read_trec(self.run.folder.results / name)


@pytest.fixture
def run(open_run: Open) -> Run:
    limits = [f"evaluation.max_{one}_queries=null" for one in ("dev", "test")]
    run = open_run(f"evaluation.rerank_depth={DEPTH}", "run.keep_best=null", "evaluation.metrics=[MRR@10]", *limits)
    for model in ("retriever", "ranker"):
        write_json(run.folder.weights(model, "002") / "weights.json", {"sha256": "first", "files": {}})
    return run


def names(systems: Sequence[System]) -> list[str]:
    return [system.name for system in systems]


def test_all_that_search_take_turns() -> None:
    game = fused_system(load_config(TINY), taken=1)
    assert game.over is not None
    assert (game.over.kind, names(game.over.parts), game.over.iteration) == (HYBRID, ["G", "BM25"], 1)
    assert (game.first_stage, game.iteration) == (game.over, 1)
    assert (names(game.parts), game.parts[1].over) == (["G", "D", "BM25"], game.over)
    files = [one.run_file_name("test") for one in (game.over, game.parts[1], game)]
    assert files == ["test-hybrid-001.trec", "test-D-001-over-hybrid-001.trec", "test-fused-001.trec"]
    curves = [one.curve for one in (game.over, game.parts[1], game)]
    assert curves == ["hybrid", "ranker_over_hybrid", "fused"], "the ranker's own curve is another"
    joint = load_config(TINY.with_name("r2anker_tiny.yaml")).sized(Sizes(queries=40, documents=100))
    system = fused_system(joint, taken=0)
    assert system.over is not None
    assert names(system.over.parts) == ["D2", "L2", "BM25"]
    assert names(system.parts) == ["D2", "R", "L2", "BM25"]


def test_where_one_alone_searches_nothing_takes_turns() -> None:
    words = ["bm25.enabled=false", "warmup_retriever.candidates=zero_shot"]
    system = fused_system(load_config(TINY, words), taken=1)
    assert (names(system.parts), system.over, system.parts[1].over) == (["G", "D"], system.parts[0], system.parts[0])


def test_a_row_is_compared_with_the_search_in_two_stages() -> None:
    config = load_config(TINY)
    system = fused_system(config, taken=1)
    alone = behind(config, system.parts[0], system.parts[1])
    assert system.over is not None
    assert alone.run_file_name("dev") == "dev-D-001.trec"
    assert built_on(config, system.over) == system.parts[0]
    assert built_on(config, system.parts[1]) == alone
    assert built_on(config, system) == alone


def test_positives_that_either_has_found_are_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(run, "dev", monkeypatch)
    (score,) = fit_on_dev(made.stage(), made.data, made.system).scores
    rows = {(row.system, row.over): row for row in read_rows(run.folder.summary)}
    assert list(rows) == [("D", "G"), ("hybrid", None), ("D", "hybrid"), ("fused", "hybrid")]
    values = {name: row.metrics.get("MRR@10") for name, row in rows.items()}
    assert values["D", "hybrid"] == 1.0
    assert score.metrics["MRR@10"] == 1.0
    assert (values["hybrid", None] or 1.0) < 1.0
    headline = rows["fused", "hybrid"].headline
    assert headline is not None
    assert (headline.to, headline.to_iteration) == ("D over G", 2)
    kept = read_record(run.folder.fusion, Fusion, "it")
    assert (kept.candidates, kept.weights) == (HYBRID, {"G": 0.0, "D": 1.0, "BM25": 0.0})
    assert "over what G and BM25 found" in kept.told


@pytest.mark.parametrize("candidates", ["hybrid", "retriever"])
def test_data_without_a_test_split_end_with_the_mixture_of_dev(
    open_run: Open, monkeypatch: pytest.MonkeyPatch, candidates: str
) -> None:
    """Symptom: after all training, `test-hybrid-000.trec does not exist ... correct the path`; nothing was exported."""
    run = open_run(f"evaluation.fusion_candidates={candidates}")
    system = fused_system(run.config, taken=2)
    for model in ("retriever", "ranker"):
        write_json(run.folder.weights(model, "002") / "weights.json", {"sha256": "first", "files": {}})
    parts = [
        Part(one.name, one.kind, identity_of(run, one), float(place == 0), 0.5, None)
        for place, one in enumerate(system.parts)
    ]
    depth = run.config.evaluation.rerank_depth
    fusion = Fusion(1, 2, "dev", "MRR@10", 1, depth, 9, tuple(parts), 0.5, None, 0.5, "G", 1.0, candidates)
    write_json(run.folder.fusion, asdict(fusion))
    data: Any = SimpleNamespace(queries_of=lambda *_: [])
    assert evaluate_fused(Stage(run, "fusion/test"), data, run.folder, "test", system) == Measured()


def test_documents_are_those_in_turn_with_everyones_scores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(run, "dev", monkeypatch)
    fit_on_dev(made.stage(), made.data, made.system)
    for row, (qid, ranking) in enumerate(made.ranking("dev-hybrid-002.trec").items()):
        assert list(ranking) == [DOCIDS[one] for one in made.in_turn(row)], qid
    over = made.ranking("dev-D-002-over-hybrid-002.trec")
    for row in range(NUM_QUERIES):
        top = made.in_turn(row)[:DEPTH]
        own = sorted(top, key=lambda one: -made.scores["D"][row, one])
        assert list(over[f"q{row}"])[:DEPTH] == [DOCIDS[one] for one in own]
        assert [over[f"q{row}"][DOCIDS[one]] for one in own] == [made.scores["D"][row, one] for one in own]


def test_the_ranker_is_asked_for_what_it_has_not_scored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(run, "dev", monkeypatch)
    fit_on_dev(made.stage(), made.data, made.system)
    tops = {(row, one) for row in range(NUM_QUERIES) for one in made.in_turn(row)[:DEPTH]}
    said = {(row, int(one)) for row, own in enumerate(made.lists["G"]) for one in own[:DEPTH]}
    assert made.asked["D"].pairs == tops - said
    assert 0 < len(tops - said) < len(tops)
    assert made.asked["G"].pairs == made.asked["BM25"].pairs == tops


def test_scores_to_another_depth_are_not_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom guarded against: below its depth a ranker's file has places for scores."""
    made = Made(run, "dev", monkeypatch)
    ranker = behind(run.config, made.system.parts[0], made.system.parts[1])
    sizes = {"num_queries": NUM_QUERIES, "split_queries": NUM_QUERIES}
    add_row(run.folder.summary, Row.of(ranker, "dev", {}, **sizes, rerank_depth=DEPTH - 2))
    fit_on_dev(made.stage(), made.data, made.system)
    assert made.asked["D"].pairs == {(row, one) for row in range(NUM_QUERIES) for one in made.in_turn(row)[:DEPTH]}


def test_other_splits_have_the_candidates_that_the_weights_were_fitted_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = Made(run, "dev", monkeypatch)
    fit_on_dev(dev.stage(), dev.data, dev.system)
    object.__setattr__(run.config.evaluation, "fusion_candidates", "retriever")
    system = fitted_system(run.folder, run.config, taken=2)
    assert system == dev.system
    test = Made(run, "test", monkeypatch, seed=3)
    (score,) = evaluate_fused(test.stage(), test.data, run.folder, "test", system).scores
    assert score.metrics["MRR@10"] == 1.0
    assert Path(run.folder.results / "test-hybrid-002.trec").exists()
    run.folder.fusion.unlink()
    assert fitted_system(run.folder, run.config, taken=2).over == system.parts[0]


def test_weights_that_were_fitted_before_there_were_such_candidates_keep_theirs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(run, "dev", monkeypatch)
    fit_on_dev(made.stage(), made.data, made.system)
    kept = read_record(run.folder.fusion, dict[str, Any], "it")
    del kept["candidates"]
    write_json(run.folder.fusion, kept)
    assert fitted_system(run.folder, run.config, taken=2).over == made.system.parts[0]

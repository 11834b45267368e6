"""A mixture as a system: whose scores are read, what is fitted on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.timetable import Sizes
from engine.data.trec import read_trec, write_trec
from engine.errors import ArtifactError, ConfigError, DataError
from engine.evaluation import fusion, part_scores
from engine.evaluation.fusion import (
    evaluate_fused,
    export_fusion,
    fit_on_dev,
    read_fusion,
    require_fusable,
)
from engine.evaluation.mixture import Fusion
from engine.evaluation.part_scores import score_parts
from engine.evaluation.summary import read_rows, summary_table
from engine.evaluation.systems import FUSED, System, fused_system
from engine.results import Measured
from engine.run import Run, Stage
from shards.files import read_record, write_json
from shards.records import Query
from tests.unit.engine.conftest import TINY

Open = Callable[..., Run]
NUM_QUERIES, NUM_DOCUMENTS, DEPTH = 60, 12, 8
DOCIDS = [f"d{number}" for number in range(NUM_DOCUMENTS)]
BEST = {"G": 0.5, "D": 0.3, "BM25": 0.2}


class OnlyDev(dict[str, Any]):
    """Judgements of dev; whoever asks for those of another split is caught."""

    def __getitem__(self, split: str) -> Any:
        assert split == "dev", f"the judgements of {split} were read"
        return super().__getitem__(split)

    def get(self, split: str, default: Any = None) -> Any:
        return self[split]


class Made:
    """Scores of three systems; a query's positive is what a mixture by `BEST` has first, so no other finds them all."""

    def __init__(self, run: Run, split: str = "dev", seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.run, self.split, self.system = run, split, fused_system(run.config, taken=2)
        self.scores = {name: generator.normal(size=(NUM_QUERIES, DEPTH)) for name in BEST}
        self.scores["BM25"][:, ::3] = 0.0  # documents that share no word with the query
        mixed = sum(weight * normal(self.scores[name]) for name, weight in BEST.items())
        self.order = np.argsort(-np.asarray(mixed), axis=1, kind="stable")
        qrels = {f"q{row}": {DOCIDS[own[0]]: 1} for row, own in enumerate(self.order)}
        self.queries = [Query(qid, qid) for qid in qrels]
        # G finds the first documents in the order of its scores, and the others below.
        places = np.argsort(-self.scores["G"], axis=1)
        self.found = {
            f"q{row}": {DOCIDS[place]: float(self.scores["G"][row, place]) for place in own}
            | {docid: -100.0 - rank for rank, docid in enumerate(DOCIDS[DEPTH:])}
            for row, own in enumerate(places)
        }
        by_ranker = {
            qid: {docid: float(self.scores["D"][row, place]) for place, docid in enumerate(DOCIDS[:DEPTH])}
            | {docid: -100.0 - rank for rank, docid in enumerate(DOCIDS[DEPTH:])}
            for row, qid in enumerate(qrels)
        }
        by_words = {qid: {docid: float(-rank) for rank, docid in enumerate(DOCIDS)} for qid in qrels}
        for part, ranking in zip(self.system.parts, (self.found, by_ranker, by_words), strict=True):
            write_trec(run.folder.results / part.run_file_name(split), ranking, part.name)
        dataset = SimpleNamespace(path="data", queries={one.id: one for one in self.queries}, qrels={split: qrels})
        self.data: Any = SimpleNamespace(
            dataset=dataset,
            shards=SimpleNamespace(docids=DOCIDS, num_documents=NUM_DOCUMENTS, index_of=DOCIDS.index),
            queries_of=lambda asked, limit, seed: list(dataset.qrels[asked] and self.queries)[:limit],
        )

    def bm25(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        rows = [int(query.id[1:]) for query in queries]
        return [[float(self.scores["BM25"][row, one]) for one in own] for row, own in zip(rows, documents, strict=True)]

    def stage(self) -> Stage:
        return Stage(self.run, f"fusion/{self.split}")

    def fused(self) -> Mapping[str, Mapping[str, float]]:
        return read_trec(self.run.folder.results / self.system.run_file_name(self.split))


def normal(scores_QK: np.ndarray) -> np.ndarray:
    """Brute force of what is mixed."""
    return np.asarray((scores_QK - scores_QK.mean(1, keepdims=True)) / scores_QK.std(1, keepdims=True))


@pytest.fixture
def make(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Return a function that makes scores of a split; of another one in the same run, if it is called again."""
    runs: list[Run] = []

    def make_(split: str = "dev", *words: str, seed: int = 0) -> Made:
        if not runs:
            limits = [f"evaluation.max_{one}_queries=null" for one in ("dev", "test")]
            settings = ["run.keep_best=null", "evaluation.fusion_candidates=retriever", *limits]
            runs.append(open_run(f"evaluation.rerank_depth={DEPTH}", *settings, *words))
            for model in ("retriever", "ranker"):
                publish(runs[0], model, "first")
        made = Made(runs[0], split, seed)
        monkeypatch.setattr(part_scores, "build", lambda *_: None)
        scorer = SimpleNamespace(score=made.bm25)
        monkeypatch.setattr(part_scores, "open_searcher", lambda *_: scorer)
        return made

    return make_


def publish(run: Run, model: str, sha256: str) -> None:
    write_json(run.folder.weights(model, "002") / "weights.json", {"sha256": sha256, "files": {}})


# --- the systems -----------------------------------------------------------------------------------------------------


def test_what_is_mixed_is_what_a_run_leaves_behind() -> None:
    game = load_config(TINY, ["evaluation.fusion_candidates=retriever"])
    system = fused_system(game, taken=1)
    assert [(part.name, part.iteration) for part in system.parts] == [("G", 1), ("D", 1), ("BM25", None)]
    assert (system.kind, system.iteration, system.first_stage.name) == (FUSED, 1, "G")
    assert system.run_file_name("test") == "test-fused-001.trec"
    words = ["evaluation.fusion_candidates=retriever"]
    joint = load_config(TINY.with_name("r2anker_tiny.yaml"), words).sized(Sizes(queries=40, documents=100))
    system = fused_system(joint, taken=0)
    assert [part.name for part in system.parts] == ["D2", "R", "L2", "BM25"]
    assert system.parts[1].run_file_name("dev") == "dev-R-001-over-D2-002.trec", "as the table's own row has it"


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_weights_that_the_positives_were_made_by(make: Callable[..., Made]) -> None:
    made = make()
    (score,) = fit_on_dev(made.stage(), made.data, made.system).scores
    kept = read_record(made.run.folder.fusion, Fusion, "it")
    assert kept.weights == BEST
    assert score.metrics["MRR@10"] == kept.value == 1.0
    assert (kept.num_queries, kept.rerank_depth, kept.split) == (NUM_QUERIES, DEPTH, "dev")
    assert [part.weights_sha256 for part in kept.parts][:2] == ["first", "first"]
    assert kept.beats_its_parts
    ranks = [list(own).index(DOCIDS[order[0]]) for own, order in zip(made.found.values(), made.order, strict=True)]
    expected = [1 / (rank + 1) for rank in ranks]
    assert kept.parts[0].value == pytest.approx(np.mean(expected), abs=1e-12), "the retriever's own ranking"
    (row,) = read_rows(made.run.folder.summary)
    assert (row.system, row.kind, row.over, row.iteration, row.rerank_depth) == ("fused", FUSED, "G", 2, DEPTH)
    assert summary_table(made.run.folder).endswith(kept.told)


def test_a_fit_to_other_queries_than_the_recipes_reads_and_writes_files_of_their_own(make: Callable[..., Made]) -> None:
    """Symptom: weights for all of dev were fitted to the rankings of the recipe's sample, and replaced its file."""
    made = make()
    results = made.run.folder.results
    for part in made.system.parts:
        (results / part.run_file_name("dev")).rename(results / part.run_file_name("dev", NUM_QUERIES))
    fit_on_dev(made.stage(), made.data, made.system, NUM_QUERIES)
    assert read_record(made.run.folder.fusion, Fusion, "it").weights == BEST
    assert (results / f"dev-fused-002-{NUM_QUERIES}-queries.trec").exists()
    assert not (results / "dev-fused-002.trec").exists()


def test_a_fit_is_the_same_again(make: Callable[..., Made]) -> None:
    made = make()
    fit_on_dev(made.stage(), made.data, made.system)
    first, ranking = made.run.folder.fusion.read_bytes(), made.fused()
    fit_on_dev(made.stage(), made.data, made.system)
    assert (made.run.folder.fusion.read_bytes(), made.fused()) == (first, ranking)


def test_nothing_of_test_is_read_in_fitting(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = make(), []

    def spy(path: Path, top: int | None = None) -> Any:
        read.append(path.name)
        return read_trec(path, top)

    for module in (fusion, part_scores):
        monkeypatch.setattr(module, "read_trec", spy)
    made.data.dataset.qrels = OnlyDev(made.data.dataset.qrels)
    fit_on_dev(made.stage(), made.data, made.system)
    assert set(read) == {"dev-G-002.trec", "dev-D-002.trec", "dev-BM25.trec"}
    with pytest.raises(AssertionError, match="of test were read"):
        evaluate_fused(made.stage(), made.data, made.run.folder, "test", made.system)


def test_the_metric_is_the_options(make: Callable[..., Made]) -> None:
    made = make("dev", "evaluation.fusion_metric=R@1")
    fit_on_dev(made.stage(), made.data, made.system)
    kept = read_record(made.run.folder.fusion, Fusion, "it")
    assert (kept.metric, kept.value) == ("R@1", 1.0)
    assert kept.parts[0].value == np.mean(
        [own.argmax() == order[0] for own, order in zip(made.scores["G"], made.order, strict=True)]
    )


# --- mixing ----------------------------------------------------------------------------------------------------------


def test_a_split_is_ordered_by_the_weights_of_dev_and_what_lies_deeper_stays_below(make: Callable[..., Made]) -> None:
    dev = make()
    fit_on_dev(dev.stage(), dev.data, dev.system)
    before = dev.run.folder.fusion.read_bytes()
    test = make("test", seed=5)
    evaluate_fused(test.stage(), test.data, test.run.folder, "test", test.system)
    assert dev.run.folder.fusion.read_bytes() == before
    expected = sum(weight * normal(test.scores[name]) for name, weight in BEST.items())
    for row, (qid, ranking) in enumerate(test.fused().items()):
        assert list(ranking) == [*(DOCIDS[place] for place in test.order[row]), *DOCIDS[DEPTH:]], qid
        own = [ranking[docid] for docid in DOCIDS[:DEPTH]]
        np.testing.assert_allclose(own, np.asarray(expected)[row], rtol=1e-12, atol=1e-12)


def test_queries_with_one_document_or_none_go_through(make: Callable[..., Made]) -> None:
    made = make()
    first, ranker, _ = made.system.parts
    for part in (first, ranker):
        path = made.run.folder.results / part.run_file_name("dev")
        ranking = read_trec(path)
        del ranking["q0"]
        ranking["q1"] = {"d3": 7.0}
        write_trec(path, ranking, part.name)
    fit_on_dev(made.stage(), made.data, made.system)
    fused = made.fused()
    assert "q0" not in fused
    assert fused["q1"] == {"d3": 0.0}
    assert read_record(made.run.folder.fusion, Fusion, "it").num_queries == NUM_QUERIES, "a query without hits counts"


@pytest.mark.parametrize("candidates", ["retriever", "hybrid"])
def test_a_split_without_queries_has_no_mixture(
    make: Callable[..., Made], candidates: Literal["retriever", "hybrid"]
) -> None:
    """Symptom: on data without a test split a run ended behind its training: test-hybrid-001.trec does not exist."""
    made = make()
    fit_on_dev(made.stage(), made.data, made.system)
    made.data.queries_of = lambda split, limit, seed: []
    system = fused_system(made.run.config, taken=2, candidates=candidates)
    assert evaluate_fused(made.stage(), made.data, made.run.folder, "test", system) == Measured()
    assert [row.split for row in read_rows(made.run.folder.summary)] == ["dev"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_queries(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    made = make()
    monkeypatch.setattr(part_scores, "_SCORED_TOGETHER", 7)
    arguments = (made.data, made.run.folder, made.system, made.queries, "dev")
    alone = score_parts(made.stage(), *arguments)
    shared: dict[str, Any] = {}
    own = made.run.coordinator
    for rank in range(world_size):
        place = SimpleNamespace(rank=rank, world_size=world_size, agreement=own.agreement)
        made.run.coordinator = place  # type: ignore[assignment]
        part = score_parts(made.stage(), *arguments)
        assert 0 < len(part) < NUM_QUERIES
        assert not shared.keys() & part.keys()
        shared |= part
    assert shared == alone


# --- refusals --------------------------------------------------------------------------------------------------------


def test_weights_of_other_models_are_refused_and_fitted_anew_on_dev(make: Callable[..., Made]) -> None:
    made = make()
    with pytest.raises(
        ConfigError, match=r"no weights of a mixture were fitted.*--split dev --set evaluation.fuse=true"
    ):
        read_fusion(made.run, made.system)
    fit_on_dev(made.stage(), made.data, made.system)
    publish(made.run, "ranker", "second")
    with pytest.raises(ConfigError, match=r"fitted for G first, D first, BM25 \w+\. Expected: G first, D second"):
        evaluate_fused(made.stage(), made.data, made.run.folder, "dev", made.system)
    fit_on_dev(made.stage(), made.data, made.system)
    assert read_fusion(made.run, made.system).parts[1].weights_sha256 == "second"


def test_another_list_of_parts_is_refused(make: Callable[..., Made]) -> None:
    made = make()
    fit_on_dev(made.stage(), made.data, made.system)
    fewer = System("fused", FUSED, None, made.system.over, parts=made.system.parts[:2])
    with pytest.raises(ConfigError, match="the run has now"):
        read_fusion(made.run, fewer)


def test_a_ranking_of_other_documents_is_refused(make: Callable[..., Made]) -> None:
    made = make()
    path = made.run.folder.results / made.system.parts[1].run_file_name("dev")
    ranking = read_trec(path)
    del ranking["q4"]["d2"]
    write_trec(path, ranking, "D")
    with pytest.raises(ArtifactError, match="the ranking of D lacks document 'd2' of query 'q4'"):
        fit_on_dev(made.stage(), made.data, made.system)


def test_a_ranking_to_another_depth_is_refused(make: Callable[..., Made]) -> None:
    """Symptom guarded against: below its depth a ranker's file has places for scores, and they would be mixed."""
    made = make()
    row = {"system": "D", "retriever": "G", "iteration": 2, "split": "dev", "metrics": {}, "kind": "ranker"}
    row |= {"over": "G", "over_iteration": 2, "num_queries": NUM_QUERIES, "rerank_depth": DEPTH - 3}
    write_json(made.run.folder.summary, [row])
    with pytest.raises(ArtifactError, match=f"D has re-ranked the top {DEPTH - 3} .*Expected: the top {DEPTH}"):
        fit_on_dev(made.stage(), made.data, made.system)


def test_data_without_judged_dev_queries_are_refused_before_any_work(make: Callable[..., Made]) -> None:
    made = make()
    require_fusable(made.run.config, made.data.dataset)
    made.data.dataset.qrels["dev"] = {query.id: {} for query in made.queries}
    with pytest.raises(DataError, match=r"set evaluation\.fuse=false"):
        require_fusable(made.run.config, made.data.dataset)


def test_a_metric_by_answers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fusion_metric.*A@20 is made of answers"):
        load_config(TINY, ["evaluation.fusion_metric=A@20"])


def test_a_metric_that_looks_deeper_than_a_search_is_refused_before_any_work(make: Callable[..., Made]) -> None:
    made = make("dev", "evaluation.metrics=[R@10]", "evaluation.depth=50", "evaluation.fusion_metric=R@200")
    with pytest.raises(ConfigError, match=r"R@200 looks deeper than the 50 documents.*evaluation\.depth=200"):
        require_fusable(made.run.config, made.data.dataset)


def test_an_export_has_the_files_of_the_engine_or_none_of_other_models(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    made, target = make(), tmp_path / "export"
    export_fusion(made.run, made.system, target)
    assert not target.exists(), "nothing was fitted"
    fit_on_dev(made.stage(), made.data, made.system)
    export_fusion(made.run, made.system, target)
    assert {path.name for path in target.iterdir()} == {"fusion.json", "fuse.py"}
    assert json.loads((target / "fusion.json").read_text()) == json.loads(made.run.folder.fusion.read_text())
    publish(made.run, "ranker", "second")
    export_fusion(made.run, made.system, target)
    assert not list(target.iterdir())

"""`evaluate` on a run that was made up, without models: which rows, files and weights a measurement replaces."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ConfigError
from engine.evaluation.mixture import Fusion, Part
from engine.evaluation.summary import read_rows
from engine.evaluation.systems import BM25, RANKER, RETRIEVER, System, trained_systems
from launcher.commands import evaluate
from launcher.commands.evaluate import Asked, evaluate_run
from shards.files import write_json
from shards.records import Dataset
from tests.unit.launcher.commands.made_runs import MadeRun, made_data
from tests.unit.launcher.commands.test_compare import run_command

RECIPE = 6
"""Queries of dev and of test that the recipe measures."""
ALONE = {"retrievers": "all", "rankers": "none"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return made_data(tmp_path_factory.mktemp("data") / "data")


class Stubs:
    """In the place of what measures: makes up rankings of as many queries as the settings say, and notes who fits.

    Args:
        made: The run.
    """

    def __init__(self, made: MadeRun) -> None:
        self.made = made
        self.fitted: list[int | None] = []
        self.applied: list[int | None] = []

    def systems(self, stage: Any, data: Any, folder: Any, split: str, systems: Sequence[System], sample: Any) -> None:
        for system in systems:
            most = stage.run.config.evaluation.most_queries(split) or len(self.made.dataset.qrels[split])
            self.made.record(system, split, limit=most, file=system.run_file_name(split, sample))

    def fit(self, stage: Any, data: Any, system: System, sample: int | None = None) -> None:
        self.fitted.append(sample)
        self.systems(stage, data, None, "dev", [system], sample)
        write_fusion(self.made, stage.run.config.evaluation.max_dev_queries or len(self.made.dataset.qrels["dev"]))

    def apply(self, stage: Any, data: Any, folder: Any, split: str, system: System, sample: int | None) -> None:
        self.applied.append(sample)
        self.systems(stage, data, folder, split, [system], sample)


def write_fusion(made: MadeRun, num_queries: int) -> None:
    """Write the weights of a mixture as a fit to so many queries leaves them."""
    kinds = {"G": RETRIEVER, "D": RANKER, "BM25": BM25}
    parts = [Part(name, kind, "sha", 0.5, 0.5, None) for name, kind in kinds.items()]
    terms = ("dev", "MRR@10", 1, 10, num_queries, tuple(parts), 0.5, None, 0.5, "G", 1.0, "hybrid")
    write_json(made.folder / "results" / "fusion.json", asdict(Fusion(1, 2, *terms)))


@pytest.fixture
def made(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stubs]:
    """Return a function that makes a run whose recipe measures samples, and measures on it by `evaluate`."""
    for name in ("drop_old_indexes", "keep_others_out", "data_of"):
        monkeypatch.setattr(evaluate, name, lambda *_: None)
    world = SimpleNamespace(coordinator=Coordinator(LocalTransport()), device=torch.device("cpu"))
    monkeypatch.setattr(evaluate, "open_world", lambda: world)
    monkeypatch.setattr("engine.evaluation.fusion.identity_of", lambda *_: "sha")

    def make(*words: str) -> Stubs:
        limits = [f"evaluation.max_{split}_queries={RECIPE}" for split in ("dev", "test")]
        run = MadeRun(tmp_path / "run", dataset, "run.seed=1", *limits, *words)
        run.record(System("BM25", BM25, None), "dev")
        for model in ("retriever", "ranker"):
            for state in ("zero-shot", "000", "001", "002"):
                write_json(run.folder / "weights" / model / state / "weights.json", {"sha256": "sha", "files": {}})
        write_fusion(run, RECIPE)
        stubs = Stubs(run)
        monkeypatch.setattr(evaluate, "evaluate_systems", stubs.systems)
        monkeypatch.setattr(evaluate, "fit_on_dev", stubs.fit)
        monkeypatch.setattr(evaluate, "evaluate_fused", stubs.apply)
        return stubs

    return make


def files_of(made: MadeRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (made.folder / "results").glob("*.trec")}


def rows_of(made: MadeRun, num_queries: int) -> list[Any]:
    return [row for row in read_rows(made.folder / "results" / "summary.json") if row.num_queries == num_queries]


def compared(made: MadeRun, out: Path, split: str = "dev") -> set[str]:
    """Numbers of queries on which `compare` finds the run's systems."""
    words = ("compare", f"a={made.folder}", "--split", split, "--metric", "MRR@10", "--out", str(out), "--no-figure")
    run_command(*words)
    with (out / f"compare-{split}-MRR@10.csv").open(newline="") as lines:
        return {row["num_queries"] for row in csv.DictReader(lines)}


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("word", ["--set", "--max-queries"])
def test_a_smaller_sample_leaves_what_the_recipe_measured(
    made: Callable[..., Stubs], tmp_path: Path, split: str, word: str
) -> None:
    """Symptom: `--set evaluation.max_dev_queries=3` overwrote the recipe's rankings, whose rows stayed, so that
    `compare` failed; and the mixture was fitted to 3 queries."""
    stubs = made()
    files, rows = files_of(stubs.made), rows_of(stubs.made, RECIPE)
    fusion = (stubs.made.folder / "results" / "fusion.json").read_bytes()
    sizes = {"max_queries": 3} if word == "--max-queries" else {"settings": (f"evaluation.max_{split}_queries=3",)}
    evaluate_run(stubs.made.folder, Asked(split=split, **sizes))
    after = files_of(stubs.made)
    assert {name: after[name] for name in files} == files
    assert {f"{split}-G-002-3-queries.trec", f"{split}-D-002-3-queries.trec"} <= after.keys()
    assert (rows_of(stubs.made, RECIPE), (stubs.fitted, stubs.applied)) == (rows, ([], [3]))
    assert (stubs.made.folder / "results" / "fusion.json").read_bytes() == fusion
    assert compared(stubs.made, tmp_path / "out", split) >= {f"{RECIPE}"}


def test_all_of_dev_stands_beside_the_recipes_sample(made: Callable[..., Stubs], tmp_path: Path) -> None:
    """The words of the documentation for retrievers alone: their rows are of more queries than the ranker's."""
    stubs = made()
    files, rows = files_of(stubs.made), rows_of(stubs.made, RECIPE)
    whole = len(stubs.made.dataset.qrels["dev"])
    evaluate_run(stubs.made.folder, Asked(split="dev", **ALONE, settings=("evaluation.max_dev_queries=null",)))
    after = files_of(stubs.made)
    assert {name: after[name] for name in files} == files
    assert after.keys() - files.keys() == {f"dev-{name}-{whole}-queries.trec" for name in ("G0-000", "G-001", "G-002")}
    assert (rows_of(stubs.made, RECIPE), len(rows_of(stubs.made, whole))) == (rows, 3)
    assert compared(stubs.made, tmp_path / "out") == {f"{whole}", f"{RECIPE}"}
    assert (stubs.fitted, stubs.applied) == ([], [])
    evaluate_run(stubs.made.folder, Asked(split="dev", max_queries=10**6, **ALONE))
    assert files_of(stubs.made).keys() == after.keys(), "more than there are is all of them"


def test_the_recipes_own_number_is_the_recipes_measurement(made: Callable[..., Stubs], tmp_path: Path) -> None:
    stubs = made()
    files = files_of(stubs.made)
    for asked in (Asked(split="dev", max_queries=RECIPE), Asked(split="dev")):
        evaluate_run(stubs.made.folder, asked)
    assert not [name for name in files_of(stubs.made) if "queries" in name]
    assert files_of(stubs.made).keys() >= files.keys()
    assert stubs.fitted == [None, None]
    assert compared(stubs.made, tmp_path / "out") == {f"{RECIPE}"}


def test_a_mixture_is_fitted_to_more_queries_and_not_again_to_fewer(
    made: Callable[..., Stubs], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stubs = made()
    whole, kept = len(stubs.made.dataset.qrels["dev"]), stubs.made.folder / "results" / "fusion.json"
    evaluate_run(stubs.made.folder, Asked(split="dev", settings=("evaluation.max_dev_queries=null",)))
    assert stubs.fitted == [whole]
    assert json.loads(kept.read_text())["num_queries"] == whole
    assert (stubs.made.folder / "results" / f"dev-fused-002-{whole}-queries.trec").exists()
    evaluate_run(stubs.made.folder, Asked(split="dev"))
    assert (stubs.fitted, stubs.applied) == ([whole], [None])
    assert f"keeps the weights that were fitted on {whole} queries of dev, more than these {RECIPE}" in caplog.text
    other = json.loads(kept.read_text())
    other["parts"][0]["weights_sha256"] = "of another iteration"
    write_json(kept, other)
    evaluate_run(stubs.made.folder, Asked(split="dev"))
    assert stubs.fitted == [whole, None], "weights of other models are no reason"
    kept.unlink()
    with pytest.raises(ConfigError, match="no weights of a mixture were fitted"):
        evaluate_run(stubs.made.folder, Asked(split="dev", settings=("evaluation.max_dev_queries=3",)))


def test_a_file_that_is_not_the_rows_is_passed_over_for_one_that_is(made: Callable[..., Stubs], tmp_path: Path) -> None:
    """Symptom: `report` took the second name's file, and `compare` failed at the first's."""
    stubs = made()
    results = stubs.made.folder / "results"
    shutil.copy(results / "dev-G0-000.trec", results / f"dev-G-002-{RECIPE}-queries.trec")
    (retriever, _) = trained_systems(stubs.made.config, [2])
    assert retriever.name == "G"
    assert compared(stubs.made, tmp_path / "out") == {f"{RECIPE}"}

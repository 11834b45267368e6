"""`compare` on run folders that were made up: what is read, pooled and tested, and what cannot be compared."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.trec import read_trec
from engine.errors import ArtifactError, ConfigError, DataError, SparringError
from engine.evaluation.measures import query_values
from engine.evaluation.significance import bootstrap, randomisation_test, standard_error
from engine.evaluation.systems import trained_systems
from launcher.__main__ import COMMANDS, main, words_of
from launcher.commands.run_groups import runs_in_groups
from shards.formats import open_dataset
from shards.records import Dataset
from tests.unit.launcher.commands.made_runs import MadeRun, made_data

Compare = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return made_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def runs(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings with two seeds each: `good/1`, `good/2`, `poor/1`, `poor/2`; `poor` has another n."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        MadeRun(folder / "good" / f"{seed}", dataset, f"run.seed={seed}", better=1.0)
        MadeRun(folder / "poor" / f"{seed}", dataset, f"run.seed={seed}", "ar2.num_negatives=1", on=seed + 10)
    return folder


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Return a function that runs the command without figures and returns the rows of the CSV."""

    def compare_(*words: str, file: str = "compare-dev-MRR@10") -> list[dict[str, str]]:
        run_command("compare", *words, "--out", str(tmp_path / "out"), "--no-figure")
        with (tmp_path / "out" / f"{file}.csv").open(newline="") as lines:
            return list(csv.DictReader(lines))

    return compare_


def run_command(*words: str) -> None:
    """Run a command; an error of ours comes out as it is."""
    import argparse
    import importlib

    module = importlib.import_module(COMMANDS[words[0]][0])
    parser = argparse.ArgumentParser()
    words_of(words[0]).add_arguments(parser)
    module.run_command(parser.parse_args(words[1:]))


def values_of(run: Path, file: str, dataset: Dataset, split: str = "dev", metric: str = "MRR@10") -> dict[str, float]:
    ranking = read_trec(run / "results" / file)
    return query_values(ranking, {qid: dataset.qrels[split][qid] for qid in ranking}, metric)


def test_seeds_are_pooled_query_by_query_and_tested_against_one(
    runs: Path, dataset: Dataset, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{name}={runs / name / '1'},{runs / name / '2'}" for name in ("poor", "good")]
    rows = {(row["metric"], row["role"], row["name"]): row for row in compare(*words)}
    assert set(rows) == {
        *(("MRR@10", role, name) for role in ("retriever", "ranker", "fused") for name in ("poor", "good")),
        *(("entropy@15", "retriever", name) for name in ("poor", "good")),
    }
    by_run = {
        (name, seed): values_of(runs / name / seed, "dev-G-002.trec", dataset)
        for name in ("good", "poor")
        for seed in "12"
    }
    qids = list(by_run["good", "1"])
    pooled = {
        name: np.array([np.mean([by_run[name, seed][qid] for seed in "12"]) for qid in qids])
        for name in ("good", "poor")
    }
    good, poor = rows["MRR@10", "retriever", "good"], rows["MRR@10", "retriever", "poor"]
    difference = pooled["good"] - pooled["poor"]
    low, high = bootstrap(pooled["good"], pooled["poor"], seed=1)
    expected = {
        "num_runs": 2,
        "num_queries": len(qids),
        "mean": pooled["good"].mean(),
        "standard_error": standard_error(pooled["good"]),
        "sd_of_seeds": np.std([np.mean(list(by_run["good", seed].values())) for seed in "12"], ddof=1),
        "difference_to_poor": difference.mean(),
        "difference_standard_error": standard_error(difference),
        "low": low,
        "high": high,
        "p_corrected": randomisation_test(pooled["good"], pooled["poor"], seed=1),
    }
    assert {key: float(good[key]) for key in expected} == pytest.approx(expected, abs=1e-9)
    assert poor["difference_to_poor"] == poor["p_corrected"] == ""
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith("G ") and " good " in line)
    assert "better, p " in line
    assert max(map(len, told.splitlines()[:-1])) <= 120


def test_a_difference_within_noise_is_called_so(
    runs: Path, dataset: Dataset, tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    MadeRun(tmp_path / "other", dataset, "run.seed=1", "ar2.num_negatives=2", better=1.0, on=77)
    compare(f"good={runs}/good/1", f"other={tmp_path}/other", "--metric", "MRR@10")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("G ") and " other " in line)
    assert "within noise, p " in line
    assert "better" not in line
    assert "worse" not in line


def test_the_entropy_is_that_of_the_retrievers_distribution(runs: Path, dataset: Dataset, compare: Compare) -> None:
    """AR2 Table 6: by hand, from the scores in the file."""
    (row,) = [row for row in compare(f"a={runs}/good/1") if row["metric"] == "entropy@15"]
    entropies = []
    for scores in read_trec(runs / "good" / "1" / "results" / "dev-G-002.trec", top=15).values():
        p = np.exp(np.array(list(scores.values())))
        p /= p.sum()
        entropies.append(float(-(p * np.log(p)).sum()))
    assert float(row["mean"]) == pytest.approx(np.mean(entropies), abs=1e-9)


def test_curves_have_every_iteration_and_what_differs_in_it(runs: Path, dataset: Dataset, compare: Compare) -> None:
    """AR2 Figures 3 and 4."""
    rows = compare(f"good={runs}/good/1", f"poor={runs}/poor/1", "--metric", "R@5", file="curves-dev-R@5")
    assert [(row["iteration"], row["role"], row["name"]) for row in rows] == [
        (str(iteration), role, name)
        for iteration in (0, 1, 2)
        for role in ("retriever", "ranker")
        for name in ("good", "poor")
    ]
    for row in rows:
        system = {"retriever": "G", "ranker": "D"}[row["role"]] + "0" * (row["iteration"] == "0")
        file = f"dev-{system}-00{row['iteration']}.trec"
        values = values_of(runs / row["name"] / "1", file, dataset, metric="R@5")
        assert float(row["mean"]) == pytest.approx(np.mean(list(values.values())), abs=1e-9)


def test_test_is_read_where_it_was_measured(runs: Path, dataset: Dataset, compare: Compare) -> None:
    rows = compare(f"a={runs}/good/1", "--split", "test", file="compare-test-MRR@10")
    assert {row["role"] for row in rows} == {"retriever", "ranker"}, "no mixture was measured there"
    values = values_of(runs / "good" / "1", "test-D-002.trec", dataset, "test")
    (ranker,) = [row for row in rows if row["role"] == "ranker"]
    assert float(ranker["mean"]) == pytest.approx(np.mean(list(values.values())))


def test_efficiency_by_kind_of_work(runs: Path, compare: Compare) -> None:
    """AR2 Tables 4 and 8."""
    rows = compare(f"good={runs}/good/1,{runs}/good/2", f"n1={runs}/poor/1", "--efficiency", file="efficiency")
    found: dict[str, Any] = {row["what"]: row for row in rows}
    assert (found["negatives of a query (n), retriever"]["good"], found["ranks"]["n1"]) == ("4.0", "2.0")
    assert found["negatives of a query (n), retriever"]["n1"] == "1.0"
    # Visits take 10, 11, ... seconds: two warm-ups, two of the retriever, two of the ranker.
    expected = {"warm-up": 21.0, "training, retriever": 25.0, "training, ranker": 29.0, "encoding": 6.0, "index": 9.0}
    expected |= {"mining": 12.0, "evaluation": 15.0, "other": 2.0}
    assert {key: float(found[f"seconds: {key}"]["good"]) for key in expected} == expected
    assert float(found["seconds: overall"]["good"]) == sum(expected.values())
    assert float(found["milliseconds of a step, retriever"]["good"]) == pytest.approx(250.0)
    assert float(found["peak GiB of a rank, retriever"]["good"]) == 1.5, "the most that a point has"
    assert float(found["milliseconds of a search, last index"]["good"]) == 2.5
    assert float(found["documents encoded a second"]["good"]) == pytest.approx(40.0)


def test_figures_are_drawn_and_reach_tensorboard(runs: Path, tmp_path: Path) -> None:
    words = [f"good={runs}/good", f"poor={runs}/poor", "--out", str(tmp_path)]
    run_command("compare", *words)
    run_command("compare", *words, "--efficiency")
    for name in ("compare-dev-MRR@10", "curves-dev-MRR@10", "efficiency", "latency"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert list((tmp_path / "tensorboard" / name).glob("events.*"))


def test_words_name_runs_in_groups(runs: Path) -> None:
    def named(*words: str) -> dict[str, list[str]]:
        return {
            name: [str(run.folder.path.relative_to(runs)) for run in own] for name, own in runs_in_groups(words).items()
        }

    both = {"good": ["good/1", "good/2"], "poor": ["poor/1", "poor/2"]}
    assert named(f"{runs}") == both, "a folder of runs: alike but for the seed is one name"
    assert named(f"{runs}/good", f"{runs}/poor") == both
    assert named(f"{runs}/*/*") == both
    assert named(f"x={runs}/good/*") == {"x": ["good/1", "good/2"]}
    assert named(f"{runs}/good/2", f"b={runs}/poor/2,{runs}/poor/1") == {"good": ["good/2"], "b": ["poor/1", "poor/2"]}


def test_tasks_of_a_job_array_are_named_without_number_and_seed(runs: Path, tmp_path: Path) -> None:
    names = ("0_num-negatives-4_seed-1", "1_num-negatives-4_seed-2", "2_num-negatives-1_seed-1")
    for name, source in zip(names, ("good/1", "good/2", "poor/1"), strict=True):
        shutil.copytree(runs / source, tmp_path / "array" / name)
    groups = runs_in_groups([str(tmp_path / "array")])
    assert {name: len(own) for name, own in groups.items()} == {"num-negatives-4": 2, "2_num-negatives-1_seed-1": 1}


def refused(kind: type[SparringError], *words: str, names: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        run_command("compare", *words, "--no-figure")
    for name in names:
        assert name in str(caught.value)


def test_runs_that_are_no_seeds_of_one_setting_are_refused(runs: Path, tmp_path: Path) -> None:
    mixed = f"a={runs}/good/1,{runs}/poor/2"
    refused(ConfigError, mixed, names=("no seeds of one setting", "ar2.num_negatives: 4 -> 1", "OTHER=RUN"))
    shutil.copytree(runs / "good" / "1", tmp_path / "again")
    refused(
        ConfigError, f"a={runs}/good/1,{tmp_path}/again", names=("two runs of a have the seed 1", "good/1", "again")
    )
    refused(ConfigError, f"a={runs}/good/1", f"b={runs}/good/1", names=("twice",))
    refused(ConfigError, f"{runs}/nothing", names=("there is no such folder",))
    refused(ConfigError, f"a={runs}/good/1", "--against", "b", names=("--against b is no name here", "one of a"))
    refused(ConfigError, f"a={runs}/good/1", "--metric", "MRR@10,ERR@5", names=("'ERR@5' is no metric", "entropy@15"))


def test_other_data_thresholds_and_metrics_are_refused_by_name(runs: Path, dataset: Dataset, tmp_path: Path) -> None:
    pair = (f"a={runs}/good/1", f"b={tmp_path}/b")
    b = MadeRun(tmp_path / "b", dataset, "run.seed=1", "evaluation.relevance_threshold=2")
    names = ("evaluation.relevance_threshold", "a has 1", "b has 2", "--relevance-threshold")
    refused(ConfigError, *pair, names=names)
    shutil.rmtree(b.folder)
    MadeRun(tmp_path / "b", dataset, "run.seed=1")
    ledger = json.loads((tmp_path / "b" / "ledger.json").read_text())
    ledger["stages"]["shards"]["result"]["dataset_sha256"] = "0" * 64
    (tmp_path / "b" / "ledger.json").write_text(json.dumps(ledger))
    refused(ConfigError, *pair, names=("b (", "other data"))
    refused(ConfigError, f"a={runs}/good/1", "--metric", "R@5000", names=("R@5000 looks deeper", "1000 documents"))
    refused(DataError, f"a={runs}/good/1", "--split", "validation", names=("'validation'", "dev, test"))
    nowhere = ("--data", f"{tmp_path}/nowhere")
    refused(DataError, f"a={runs}/good/1", *nowhere, names=("no folder", "/nowhere", "good/1", "lie now by --data"))


def re_ranked(run: MadeRun, depth: int | None, *iterations: int) -> None:
    """Have rows of a run say another depth of re-ranking, as `evaluate` leaves them that measures them again."""
    path = run.folder / "results" / "summary.json"
    rows = json.loads(path.read_text())
    for row in rows:
        if row["over"] and (not iterations or row["iteration"] in iterations):
            row["rerank_depth"] = depth
    path.write_text(json.dumps(rows))


def test_depths_of_re_ranking_are_those_that_were_measured(
    runs: Path, dataset: Dataset, tmp_path: Path, compare: Compare, caplog: pytest.LogCaptureFixture
) -> None:
    """Symptom: what `evaluate --depth` had measured again counted with the depth in config.yaml, so that rankers over
    10 and over 5 documents were compared, and the remedy of the error led to the same error."""
    pair = (f"a={runs}/good/1", f"b={tmp_path}/b")
    b = MadeRun(tmp_path / "b", dataset, "run.seed=1", "evaluation.rerank_depth=5")
    re_ranked(b, None)
    command = f"sparring evaluate {b.folder} --split dev --set evaluation.rerank_depth=10"
    refused(ConfigError, *pair, names=("D on dev", "a has 10, b has 5", command))
    re_ranked(b, 10, 2)
    assert {(row["name"], row["role"]) for row in compare(*pair, "--metric", "MRR@10")} == {
        (name, role) for name in ("a", "b") for role in ("retriever", "ranker", "fused")
    }
    with (tmp_path / "out" / "curves-dev-MRR@10.csv").open(newline="") as lines:
        curve = [row["iteration"] for row in csv.DictReader(lines) if (row["name"], row["role"]) == ("b", "ranker")]
    assert curve == ["2"], "a curve is of one depth"
    assert "D of iteration 1 is left out of the curves: b has re-ranked 5 documents" in caplog.text
    re_ranked(b, 2)
    refused(ConfigError, *pair, names=("a has 10, b has 2",))
    run = MadeRun(tmp_path / "c", dataset, "run.seed=1", "evaluation.rerank_depth=2")
    for system in trained_systems(run.config, [2]):
        run.record(system, "dev", limit=4)
    re_ranked(run, 2)
    shutil.copytree(run.folder, tmp_path / "d")
    re_ranked(run, 5)
    words = (f"c={run.folder}", f"d={tmp_path}/d", "--queries", "4")
    refused(ConfigError, *words, names=("c has 5, d has 2", "--split dev --max-queries 4 --set"))


def test_other_queries_are_refused_and_the_same_samples_by_seed_are_pooled(
    dataset: Dataset, tmp_path: Path, compare: Compare, runs: Path
) -> None:
    """Samples are drawn by the seed: seed 1 of one setting and seed 2 of another were measured on different queries."""
    for name, n in (("a", 4), ("b", 1)):
        for seed in (1, 2):
            words = (f"run.seed={seed}", f"ar2.num_negatives={n}", "evaluation.max_dev_queries=5")
            MadeRun(tmp_path / name / f"{seed}", dataset, *words)
    names = ("measured on 5 queries", "the same queries for all")
    refused(ConfigError, f"a={tmp_path}/a/1", f"b={tmp_path}/b/2", names=names)
    refused(ConfigError, f"a={tmp_path}/a/1", f"c={runs}/poor/1", names=("a was measured on 5 queries",))
    rows = compare(f"a={tmp_path}/a", f"b={tmp_path}/b", "--metric", "MRR@10")
    assert {row["num_runs"] for row in rows} == {"2"}
    assert {5 < int(row["num_queries"]) <= 10 for row in rows} == {True}, "the queries of both samples"


def answered_by(folder: Path, *qids: str) -> Dataset:
    """Data some of whose queries alone have answers: those of the training split, and these."""
    kept = {*made_data(folder).qrels["train"], *qids}
    lines = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    for line in lines:
        line["answers"] = ["a name"] if line["_id"] in kept else []
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_dataset(folder)


def test_a_split_without_answers_is_refused_for_a_metric_by_answers(tmp_path: Path) -> None:
    """Symptom: a ZeroDivisionError, where training queries have answers and those of dev have none."""
    run = MadeRun(tmp_path / "run", answered_by(tmp_path / "data"), "run.seed=1")
    names = ("no query of the split 'dev'", str(tmp_path / "data"), "A@20", "MRR@10", "--split", "--metric")
    refused(DataError, f"{run.folder}", "--metric", "MRR@10,A@20", names=names)


def test_of_samples_those_with_answers_count_for_a_metric_by_answers(
    tmp_path: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: a ZeroDivisionError, where the split has answers and the sample of a run has none."""
    qids = list(made_data(tmp_path / "whole").qrels["dev"])
    samples = [
        {qids[row] for row in np.random.default_rng(seed).choice(len(qids), 4, replace=False)} for seed in (1, 2)
    ]
    (only_first, *_) = sorted(samples[0] - samples[1])
    dataset = answered_by(tmp_path / "data", only_first)
    for seed in (1, 2):
        MadeRun(tmp_path / "a" / f"{seed}", dataset, f"run.seed={seed}", "evaluation.max_dev_queries=4")
    monkeypatch.setattr("launcher.commands.compare._texts", lambda *_: lambda docid: "a name")
    rows = compare(f"{tmp_path}/a", "--metric", "MRR@10,A@20")
    found = {(row["metric"], row["num_runs"], row["num_queries"]) for row in rows if row["role"] == "retriever"}
    assert found == {("MRR@10", "2", str(len(samples[0] | samples[1]))), ("A@20", "1", "1")}
    for words in ((), ("--unfinished",)):
        names = ("none of the queries of dev that b was measured on", "A@20", "evaluate", "--metric")
        refused(DataError, f"b={tmp_path}/a/2", "--metric", "A@20", *words, names=names)


def test_a_sample_is_taken_by_its_size(runs: Path, dataset: Dataset, tmp_path: Path, compare: Compare) -> None:
    run = MadeRun(tmp_path / "a", dataset, "run.seed=1")
    _, retriever = trained_systems(run.config, [2])[::-1]
    run.record(retriever, "dev", limit=4)
    words = (f"a={tmp_path}/a", f"b={runs}/poor/1", "--queries", "4")
    refused(ConfigError, *words, names=("b (", "has no ranking of G on dev with 4 queries", "--max-queries 4"))
    assert {row["num_queries"] for row in compare(f"a={tmp_path}/a", "--queries", "4")} == {"4"}


def test_a_ranking_that_is_not_the_rows_is_refused(runs: Path, dataset: Dataset, tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "a", dataset, "run.seed=1")
    results = run.folder / "results"
    shutil.copy(results / "dev-G0-000.trec", results / "dev-G-002.trec")
    refused(ArtifactError, f"{run.folder}", names=("dev-G-002.trec has MRR@10", "evaluate"))
    shutil.copy(results / "test-G-002.trec", results / "dev-G-002.trec")
    refused(ArtifactError, f"{run.folder}", names=("is none of the", "queries of 'dev'"))
    (results / "dev-G-002.trec").unlink()
    refused(ArtifactError, f"{run.folder}", names=("the ranking of G on dev is not in", "dev-G-002.trec"))


def test_a_run_that_is_not_finished_has_curves_alone(dataset: Dataset, tmp_path: Path, compare: Compare) -> None:
    run = MadeRun(tmp_path / "a", dataset, "run.seed=1")
    run.finish(last="evaluate/3")
    refused(ConfigError, f"{run.folder}", names=("has not finished: its last stage was evaluate/3", "--unfinished"))
    rows = compare(f"{run.folder}", "--unfinished", "--metric", "MRR@10", file="curves-dev-MRR@10")
    assert {row["iteration"] for row in rows} == {"0", "1", "2"}


def test_curves_begin_with_the_first_iteration_and_are_told_where_there_are_none(
    dataset: Dataset, tmp_path: Path, compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: `--unfinished` printed nothing, with exit code 0, until the second iteration was measured."""
    run = MadeRun(tmp_path / "a", dataset, "run.seed=1")
    run.finish(last="evaluate/0")
    rows = json.loads((run.folder / "results" / "summary.json").read_text())
    for num_measured, path in ((1, tmp_path / "one"), (0, tmp_path / "none")):
        shutil.copytree(run.folder, path)
        kept = [row for row in rows if row["iteration"] == 0] * num_measured
        (path / "results" / "summary.json").write_text(json.dumps(kept))
    found = compare(f"{tmp_path}/one", "--unfinished", "--metric", "MRR@10", file="curves-dev-MRR@10")
    assert {row["iteration"] for row in found} == {"0"}
    assert "MRR@10 on dev by iteration" in capsys.readouterr().out
    refused(ConfigError, f"{tmp_path}/none", "--unfinished", names=("no curves of none", "on dev", "evaluate/0"))


def test_results_that_cannot_be_written_are_refused_first(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: everything was computed, and then the table was not written, with a traceback."""
    monkeypatch.setattr("launcher.commands.compare._recordings", lambda *_: pytest.fail("it is computed"))
    (tmp_path / "afile").write_text("")
    (tmp_path / "run").symlink_to(runs / "good" / "1")
    for words in (["--out", f"{tmp_path}/afile"], ["--out", f"{tmp_path}/afile/below"]):
        assert main(["compare", f"{tmp_path}/run", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {tmp_path}/afile is a file")
        assert "Remedy: name another place by --out" in told
    monkeypatch.setattr("shards.files.unusable.is_writable", lambda _: False)
    assert main(["compare", f"{tmp_path}/run"]) == 2
    assert "Remedy: name a place outside of the run by --out" in capsys.readouterr().err


def test_an_error_is_told_once_with_exit_code_2(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{runs}/nothing"]) == 2
    assert capsys.readouterr().err.count("error:") == 1

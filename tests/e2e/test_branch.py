"""A run that begins with what another has finished, and what such a beginning refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.config.file import dump_config, load_config
from engine.errors import ArtifactError, ConfigError
from engine.training.branching import branch_run
from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, summary_of, weights_of
from tests.e2e.starts import Zygote, refused


def points_of(folder: Path) -> set[tuple[str, int, str]]:
    """What was measured where: stage, step and tag."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["stage"], line["step"], tag) for line in lines for tag in line}


@pytest.fixture(scope="module")
def early(alone: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that still has the places of the first checkpoints, as a run that stopped there has."""
    folder = tmp_path_factory.mktemp("early") / "run"
    shutil.copytree(alone.folder, folder)
    for model in ("retriever", "ranker"):
        for number in range(1, 7):
            (folder / "checkpoints" / model / f"{number:06d}").mkdir(exist_ok=True)
    return folder


def test_goes_on_to_the_same_end(zygote: Zygote, alone: Finished, tmp_path: Path) -> None:
    """Without a change, the stages that are computed again give what the source has; it is left as it was."""
    before, folder = {path: path.stat().st_mtime_ns for path in alone.folder.rglob("*")}, tmp_path / "branch"
    made = zygote.launcher("branch", str(alone.folder), str(folder), "--before", "ranker/2", "run.stop_before=export")
    assert made.code == 0, made.err
    kept = list(ledger_of(folder))
    assert "retriever/2" in kept
    assert "ranker/2" not in kept
    assert "G" in {row["system"] for row in summary_of(folder)}
    assert not any(
        row["split"] == "test" or (row["system"] == "D" and row["iteration"] == 2) for row in summary_of(folder)
    )
    rankings = {path.name for path in (folder / "results").glob("*.trec")}
    assert {"dev-G-001.trec", "dev-D-001.trec"} <= rankings
    assert not {"dev-G-002.trec", "dev-D-002.trec"} & rankings, "rankings of rows that it does not have are not its own"
    assert {point[0] for point in points_of(folder)} <= set(kept), (
        "curves of stages that it has not run are not its own"
    )
    stopped = zygote.recipe(config=folder / "config.yaml").wait()
    assert stopped.code == 0, stopped.err
    assert "ended before export" in stopped.err
    assert "evaluate/test" in ledger_of(folder)
    assert "export" not in ledger_of(folder)
    ended = zygote.recipe("run.stop_before=null", config=folder / "config.yaml").wait()
    assert ended.code == 0, ended.err
    assert weights_of(folder) == weights_of(alone.folder)
    assert sorted(summary_of(folder), key=str) == sorted(summary_of(alone.folder), key=str)
    assert points_of(folder) == points_of(alone.folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_came_before_training_is_measured_again_as_it_was(zygote: Zygote, alone: Finished, tmp_path: Path) -> None:
    """The models are trained by then: their starts are the other run's, and not what they have become.

    Symptom: an index that the other run had dropped by then (`run.keep_indexes`) was missed by what measured with it.
    """
    folder = tmp_path / "branch"
    words = ["evaluation.rerank_depth=5", "run.stop_before=ranker/2"]
    made = zygote.launcher("branch", str(alone.folder), str(folder), "--before", "ranker/2", *words)
    assert made.code == 0, made.err
    assert "made again: evaluate/yardsticks" in made.err
    shutil.rmtree(folder / "index" / "001")
    done = zygote.recipe(config=folder / "config.yaml").wait()
    assert done.code == 0, done.err
    assert "evaluate/yardsticks" in ledger_of(folder)
    rows = [[row for row in summary_of(one) if row["system"] == "zero-shot"] for one in (folder, alone.folder)]
    assert [row for row in rows[1] if row["split"] == "dev"] == rows[0] != []
    assert [stage for stage in ledger_of(folder) if stage.endswith("/001")] == [
        "candidates/001",
        "encode/001",
        "index/001",
    ]
    first = [
        [row for row in summary_of(one) if (row["system"], row["iteration"]) == ("G", 1)]
        for one in (folder, alone.folder)
    ]
    assert first[0] == first[1] != [], "the index is what it was"
    shutil.rmtree(folder / "weights" / "retriever" / "zero-shot")
    ledger = json.loads((folder / "ledger.json").read_text())
    del ledger["stages"]["evaluate/yardsticks"]
    (folder / "ledger.json").write_text(json.dumps(ledger))
    refused(zygote.recipe(config=folder / "config.yaml").wait(), "retriever cannot be had there as it came")


def test_takes_what_the_change_does_not_reach(early: Path, tmp_path: Path) -> None:
    changes = ["ar2.adversarial_weight=0.9", "run.seed=7", "evaluation.rerank_depth=5", "ar2.iterations=1"]
    done = branch_run(early, tmp_path / "branch", changes, "retriever/1")
    assert {"warmup_retriever", "index/000", "warmup_ranker", "bm25"} <= set(done.kept)
    assert {"evaluate/0", "evaluate/yardsticks"} <= set(done.again)
    assert not any(stage.endswith(("/1", "/2", "/001")) for stage in (*done.kept, *done.again))
    assert not (tmp_path / "branch" / "weights" / "retriever" / "001").exists()
    assert json.loads((tmp_path / "branch" / "branch.json").read_text())["changed"] == list(done.changed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("retriever.max_length=30", "warmup_retriever"),
        ("warmup_ranker.steps=3", "warmup_ranker"),
        ("warmup_retriever.bm25_depth=11", "other candidates"),
        ("ar2.top_k=9", "warmup_ranker"),
        ("bm25.k1=0.5", "bm25.k1"),
        ("data.documents_per_shard=7", "cannot change"),
    ],
)
def test_what_it_takes_would_have_been_another(early: Path, tmp_path: Path, change: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        branch_run(early, tmp_path / "branch", [change], "retriever/1")
    assert not list(tmp_path.iterdir())


def test_where_its_source_ended_is_not_where_it_ends(early: Path, tmp_path: Path) -> None:
    """Symptom: a branch of a run that ended before a stage ended there as well, without a step."""
    source = tmp_path / "run"
    shutil.copytree(early, source)
    ended = load_config(source / "config.yaml", ["run.stop_before=retriever/2"])
    (source / "config.yaml").write_text(dump_config(ended), encoding="utf-8")
    for words, before in ([], None), (["run.stop_before=ranker/2"], "ranker/2"):
        branch_run(source, tmp_path / f"to-{before}", words, "retriever/2")
        assert load_config(tmp_path / f"to-{before}" / "config.yaml").run.stop_before == before


def test_an_index_that_the_next_would_have_begun_from_and_is_no_more_is_told(early: Path, tmp_path: Path) -> None:
    """Symptom: without a change of settings, a branch had another index than its source, and nothing said why."""
    assert branch_run(early, tmp_path / "there", [], "retriever/2").gone == ""
    source = tmp_path / "run"
    shutil.copytree(early, source)
    shutil.rmtree(source / "index" / "001")
    assert branch_run(source, tmp_path / "gone", [], "retriever/2").gone == "001"
    assert branch_run(source, tmp_path / "cold", ["index.warm_start=false"], "retriever/2").gone == ""


def test_settings_of_a_game_that_has_begun(early: Path, tmp_path: Path) -> None:
    """The retriever's first phase was trained with it; what only the ranker's later phases have may change."""
    with pytest.raises(ConfigError, match=r"retriever/1 .*adversarial_weight"):
        branch_run(early, tmp_path / "branch", ["ar2.adversarial_weight=0.9"], "ranker/1")
    assert "retriever/1" in branch_run(early, tmp_path / "b", ["ar2.ranker.optim.lr=1e-3"], "ranker/1").kept


def test_behind_a_stage_without_steps(early: Path, tmp_path: Path) -> None:
    """A retriever that is not warmed up is G0 as it came, and has no checkpoint to go on from."""
    source = tmp_path / "run"
    shutil.copytree(early, source)
    config = load_config(source / "config.yaml", ["warmup_retriever.steps=0"])
    (source / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    ledger = json.loads((source / "ledger.json").read_text())
    ledger["stages"]["warmup_retriever"]["result"] |= {"steps": 0, "checkpoint": 0}
    (source / "ledger.json").write_text(json.dumps(ledger))
    done = branch_run(source, tmp_path / "branch", [], "retriever/1")
    assert "warmup_retriever" in done.kept
    assert [path.name for path in (tmp_path / "branch" / "checkpoints").iterdir()] == ["ranker"]


def test_a_run_ends_in_order_before_its_shards(zygote: Zygote, small_data: Path, tmp_path: Path) -> None:
    """Symptom: before the first stages, of data and shards, it ended as one that had failed, with exit code 2."""
    ended = zygote.recipe(f"run.path={tmp_path / 'run'}", f"data.path={small_data}", "run.stop_before=shards").wait()
    assert ended.code == 0, ended.err
    assert "ended before shards" in ended.err
    assert not (tmp_path / "run" / "shards").exists()


@pytest.mark.parametrize("option", ["ar2.teacher=dev", "ar2.adversarial_from=lead"])
def test_what_was_decided_on_dev_would_have_been_another(early: Path, tmp_path: Path, option: str) -> None:
    """Symptom: a game went on behind a phase that its own settings would have decided otherwise, without a word."""
    source = tmp_path / "run"
    shutil.copytree(early, source)
    config = load_config(source / "config.yaml", [option])
    (source / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    for change in ("evaluation.rerank_depth=5", "run.keep_best=R@5"):
        with pytest.raises(ConfigError, match=rf"retriever/1 .* with {change.partition('=')[0]}"):
            branch_run(source, tmp_path / "branch", [change], "ranker/1")
        assert "evaluate/0" in branch_run(source, tmp_path / change, [change], "retriever/1").again
    assert "retriever/1" in branch_run(source, tmp_path / "b", ["evaluation.test_at_end=false"], "ranker/1").kept


@pytest.mark.parametrize("reader", [["ranker.bm25_prior=2"], ["data.fallback_positive=answer"]])
def test_what_bm25_says_beside_its_candidates(early: Path, tmp_path: Path, reader: list[str]) -> None:
    """Symptom: where no phase drew from BM25's hits, the prior and the positives of what was taken were of another."""
    source = tmp_path / "run"
    shutil.copytree(early, source)
    config = load_config(source / "config.yaml", ["warmup_retriever.hard_negatives=0", *reader])
    (source / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"would have been another with bm25\.k1"):
        branch_run(source, tmp_path / "branch", ["bm25.k1=0.5"], "retriever/1")


def test_other_games_from_the_same_warm_up(early: Path, tmp_path: Path) -> None:
    """ANCE has no ranker, so that D0 is left out and the warm-up measured again; IRGAN's D0 is another."""
    done = branch_run(early, tmp_path / "ance", ["ar2.objective=ance"], "retriever/1")
    assert done.left_out == ("warmup_ranker",)
    assert {"warmup_retriever", "candidates/000"} <= set(done.kept)
    assert "evaluate/0" in done.again
    assert not (tmp_path / "ance" / "weights" / "ranker" / "000").exists()
    assert "ar2.objective" in str(branch_run(early, tmp_path / "b", ["ar2.objective=ance"], "warmup_ranker").changed)
    with pytest.raises(ConfigError, match=r"warmup_ranker of .*objective"):
        branch_run(early, tmp_path / "irgan", ["ar2.objective=irgan"], "retriever/1")
    assert branch_run(early, tmp_path / "irgan", ["ar2.objective=irgan"], "warmup_ranker").left_out == ()


def test_a_stage_that_only_the_new_recipe_has(early: Path, tmp_path: Path) -> None:
    """A model that the other run did without begins after all that is taken over."""
    branch_run(early, tmp_path / "ance", ["ar2.objective=ance"], "retriever/1")
    done = branch_run(tmp_path / "ance", tmp_path / "ar2", ["ar2.objective=ar2"], "warmup_ranker")
    assert {"warmup_retriever", "candidates/000"} <= set(done.kept)
    with pytest.raises(ConfigError, match=r"has no stage 'student'.*warmup_ranker"):
        branch_run(tmp_path / "ance", tmp_path / "b", ["ar2.objective=ar2"], "student")


def test_bad_words(zygote: Zygote, alone: Finished, tmp_path: Path) -> None:
    refused(
        zygote.launcher("branch", str(alone.folder), str(tmp_path / "b"), "--before", "rankr/1"), "rankr/1", "ranker/1"
    )
    with pytest.raises(ConfigError, match="finished nothing before"):
        branch_run(alone.folder, tmp_path / "b", [], "generate")
    with pytest.raises(ConfigError, match="is not empty"):
        branch_run(alone.folder, alone.folder, [], "ranker/1")
    with pytest.raises(ConfigError, match="holds no run"):
        branch_run(tmp_path, tmp_path / "b", [], "ranker/1")
    with pytest.raises(ArtifactError, match="checkpoint of retriever behind warmup_retriever"):
        branch_run(alone.folder, tmp_path / "b", [], "retriever/1")

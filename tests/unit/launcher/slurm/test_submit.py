"""`submit`: what is checked before SLURM hears of a job, what is written, and what its refusals become."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.config.file import load_config
from engine.errors import ConfigError
from launcher.slurm import submit
from launcher.slurm.job import read_submitted
from launcher.slurm.settings import seconds_of_time
from launcher.terminal.next_steps import installed_program
from tests.distributed.processes import ROOT
from tests.unit.launcher.slurm.stand_ins import StandIns, leave_start

TINY = ROOT / "configs" / "tiny.yaml"
BASE = ("--nodes", "2", "--gpus-per-node", "4")
KEPT = ("ar2.overlap=split", "ar2.refresh_devices=2")
CPU = ("--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "2")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    stand_ins = StandIns(tmp_path / "programs")
    stand_ins.make("sbatch", "echo 41")
    stand_ins.make("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    stand_ins.make("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{stand_ins.bin}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return stand_ins


def run_submit(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    return submit.run_command(parser.parse_args(["--config", str(TINY), *map(str, words)]))


def refusal(*words: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        run_submit(*words)
    return str(caught.value)


def test_a_run_is_written_and_submitted(made: StandIns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_submit(*BASE, "--partition", "gpu", f"run.path={run}", "run.seed=7") == 0
    assert made.calls == [f"sbatch --parsable {run}/slurm/job.sbatch"]
    assert load_config(run / "slurm" / "recipe.yaml") == load_config(TINY, [f"run.path={run}", "run.seed=7"])
    script = (run / "slurm" / "job.sbatch").read_text()
    assert "seed" not in script, "values of the recipe stay out of the script"
    assert "#SBATCH --signal=B:USR1@150\n" in script, "run.preemption_seconds, and 30"
    submitted = read_submitted(run)
    assert submitted is not None
    assert (submitted.id, submitted.nodes, submitted.ranks) == ("41", 2, 8)
    told = capsys.readouterr().out
    assert f"job 41: {run}\n" in told
    assert f"{installed_program()} status {run}" in told


def test_a_dry_run_prints_the_script_and_leaves_no_trace(
    made: StandIns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_submit(*BASE, "--dry-run", *KEPT, f"run.path={tmp_path / 'run'}")
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "#SBATCH --ntasks-per-node=2\n" in script, "ranks have the GPUs that refreshes do not keep"
    assert "#SBATCH --gpus-per-node=4\n" in script
    assert not (tmp_path / "run").exists()
    assert made.calls == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nodes: expected 1 or more, got nothing (--nodes); gpus-per-node: expected a number"),
        (("--nodes", "1", "--gpus-per-node", "0"), "the number of processes on each node is needed"),
        ((*BASE, "--ranks-per-node", "8"), "8 ranks on a node would share 4 GPUs"),
        ((*BASE, *KEPT, "--ranks-per-node", "3"), "keeps 2 GPUs of a node, and the job asks for 4 and 3 ranks"),
        ((*BASE, *KEPT, "ar2.refresh_devices=4"), "keeps 4 GPUs of a node, and the job asks for 4"),
        ((*BASE, "--partition", "gpu\n#SBATCH --wrap=x"), "partition: 'gpu\\n#SBATCH --wrap=x' has characters"),
        ((*BASE, "--account", "a b"), "account: 'a b' has characters"),
        ((*BASE, "--module", "cuda; rm -r x"), "module: 'cuda; rm -r x' is no name of a module"),
        ((*BASE, "--sbatch", "mail-type=$(x)"), "'mail-type=$(x)' is no option"),
        ((*BASE, "--sbatch=--time=5"), "'time' is set by submit itself"),
        ((*BASE, "--time", "soon"), "time: expected SLURM's notation, such as 24:00:00 or 2-12, got 'soon'"),
        ((*BASE, "--time", "4"), "--time 4 is 240 s, of which the last 150"),
        ((*BASE, "--container", "docker:x"), "expected apptainer:IMAGE or pyxis:IMAGE"),
        ((*BASE, "--container", "pyxis:x", "--mpi", "mpirun"), "a container of pyxis is started by srun"),
        ((*BASE, "--mount", "/data"), "mounts are for a container"),
        ((*BASE, "--name", "a b"), "--name 'a b' is no name of a job"),
        ((*BASE, "--max-parallel", "2"), "--max-parallel is for a sweep"),
        ((*BASE, "run.sede=1"), "unknown key 'run.sede', did you mean 'run.seed'?"),
        ((*BASE, "run.path=a\nb"), "a path has a line break"),
    ],
)
def test_what_is_refused_before_slurm_hears_of_it(made: StandIns, words: tuple[str, ...], message: str) -> None:
    assert message in refusal(*words)
    assert made.calls == []


def test_a_run_with_a_job_gets_no_second_one(made: StandIns, tmp_path: Path) -> None:
    words = (*BASE, f"run.path={tmp_path / 'run'}")
    run_submit(*words)
    made.make("scontrol", "echo 'JobId=41 JobName=x JobState=PENDING Reason=Priority Restarts=0 NodeList='")
    assert "has a job already: 41 is pending (Priority)" in refusal(*words)
    made.make("scontrol", "echo 'JobId=41 JobName=x JobState=TIMEOUT Reason=TimeLimit Restarts=0 NodeList=n1'")
    made.make("sbatch", "echo '42;cluster'")
    run_submit(*words)
    submitted = read_submitted(tmp_path / "run")
    assert submitted is not None
    assert submitted.id == "42"


def test_a_finished_run_is_not_submitted(made: StandIns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_start(tmp_path / "run", stages=("shards", "export"))
    assert run_submit(*BASE, f"run.path={tmp_path / 'run'}") == 0
    assert "is finished: nothing is left to do" in capsys.readouterr().out
    assert made.calls == []


def test_a_folder_that_is_no_runs_is_refused(made: StandIns, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    assert "is not empty and holds no run" in refusal(*BASE, f"run.path={tmp_path}")


def test_a_submission_that_was_cut_short_leaves_a_folder_that_a_run_can_take(made: StandIns, tmp_path: Path) -> None:
    """The folder of the job alone would make it one that is not empty and holds no run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm").touch()  # in the way of the job's folder
    with pytest.raises(FileExistsError):
        run_submit(*BASE, f"run.path={tmp_path / 'run'}")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_recipe_that_the_run_would_refuse_is_refused_now(made: StandIns, tmp_path: Path) -> None:
    words = (*BASE, f"run.path={tmp_path / 'run'}")
    run_submit(*words)
    run_submit(*words, "run.seed=8")  # nothing is computed yet
    leave_start(tmp_path / "run", stages=("shards",))
    assert "was begun with another configuration: run.seed: 42 -> 8" in refusal(*words, "run.seed=8")
    run_submit(*words, "run.timeout_seconds=99")
    run_submit(*words, "run.seed=8", "run.force_resume=true")


def test_what_sbatch_says_is_told(made: StandIns, tmp_path: Path) -> None:
    said = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    made.make("sbatch", f"echo '{said}' >&2; exit 1")
    told = refusal(*BASE, f"run.path={tmp_path / 'run'}")
    assert "SLURM does not take the job: invalid partition specified: x; Batch job submission failed" in told
    assert "`sinfo` lists partitions" in told
    assert read_submitted(tmp_path / "run") is None


def test_a_host_without_sbatch_is_told(made: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = refusal(*BASE, f"run.path={tmp_path / 'run'}")
    assert "this host has no sbatch" in told
    assert "job.sbatch where SLURM is" in told


# --- the site's file -------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_sites_file(
    made: StandIns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text('{partition: gpu, account: lab, nodes: 4, gpus_per_node: "a100:8", modules: [a], time: "2-12"}')
    words = ("--site", site, "--partition", "big", "--nodes", "1", "--module", "b", "--dry-run")
    run_submit(*words, f"run.path={tmp_path / 'run'}")
    script = capsys.readouterr().out
    for line in ("partition=big", "account=lab", "nodes=1", "ntasks=8", "gpus-per-node=a100:8", "time=2-12"):
        assert f"#SBATCH --{line}\n" in script
    assert "module load a || exit 2\nmodule load b || exit 2\n" in script


def test_a_sites_file_takes_texts_as_they_are_written(
    made: StandIns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`time: 24:00:00` was refused as 86400 and `partition: on` as True, since YAML guesses what they are."""
    site = tmp_path / "site.yaml"
    site.write_text("{partition: on, account: 2024-01-01, time: 24:00:00, mem: 0, qos: null}")
    assert run_submit(*BASE, "--site", site, "--dry-run", f"run.path={tmp_path / 'run'}") == 0
    told = capsys.readouterr().out
    for option in ("partition=on", "account=2024-01-01", "time=24:00:00", "mem=0"):
        assert f"#SBATCH --{option}\n" in told
    assert "qos" not in told


def test_the_example_of_a_sites_file_is_good(made: StandIns, tmp_path: Path) -> None:
    example = ROOT / "configs" / "slurm" / "site.example.yaml"
    assert run_submit("--site", example, "--dry-run", f"run.path={tmp_path / 'run'}") == 0
    given = {line.removeprefix("# ").split(":")[0] for line in example.read_text().splitlines()}
    from launcher.slurm.settings import Settings

    shown = {name for name in vars(Settings()) if name in given}
    assert set(vars(Settings())) - shown <= {"ranks_per_node"}, "each key is shown"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key 'partitoin', did you mean 'partition'?"),
        ("time: [24]", "time: expected a text, got ['24']"),
        ("nodes: many", "nodes: expected a whole number, got 'many'"),
        ("nodes: 1.5", "nodes: expected a whole number, got '1.5'"),
        ("max_restarts: -1", "max-restarts: expected 0 or more"),
        ("nodes: 1\nnodes: 2", "line 2: the key 'nodes' stands there again, first in line 1"),
        ("modules: cuda", "modules: expected a list of texts, got 'cuda'"),
        ("- a", "holds no mapping"),
        ("{a", "is not valid YAML"),
    ],
)
def test_a_bad_sites_file_is_refused(made: StandIns, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    assert message in refusal(*BASE, "--site", tmp_path / "site.yaml", f"run.path={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("1:30", 90), ("2:00:00", 7200), ("2-12", 216000), ("1-1:1", 90060), ("1-0:0:1", 86401), ("x", None)],
)
def test_times_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    assert seconds_of_time(text) == seconds


# --- sweeps ----------------------------------------------------------------------------------------------------------


def recipe(run: Path) -> Any:
    return load_config(run / "slurm" / "recipe.yaml")


def test_a_sweep_makes_every_combination(made: StandIns, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = ("--sweep", "ar2.num_negatives=1,4", "--sweep", "run.seed=1,2,3", "--max-parallel", "2")
    run_submit(*CPU, *words, f"run.path={sweep}")
    names = sorted(path.name for path in sweep.iterdir() if path.name != "slurm")
    assert names[:2] == ["0_num-negatives-1_seed-1", "1_num-negatives-1_seed-2"]
    found = [(recipe(sweep / name).ar2.num_negatives, recipe(sweep / name).run.seed) for name in names]
    assert found == [(1, 1), (1, 2), (1, 3), (4, 1), (4, 2), (4, 3)]
    assert [recipe(sweep / name).run.path for name in names] == [sweep / name for name in names]
    script = (sweep / "slurm" / "job.sbatch").read_text()
    assert "#SBATCH --array=0,1,2,3,4,5%2\n" in script
    tasks = json.loads((sweep / "slurm" / "tasks.json").read_text())
    assert tasks[4] == {"run": str(sweep / names[4]), "words": ["ar2.num_negatives=4", "run.seed=2"]}
    task = read_submitted(sweep / names[4])
    assert task is not None
    assert (task.name, task.log(sweep / names[4])) == ("41_4", sweep / "slurm" / "41_4.out")


def test_finished_runs_of_a_sweep_are_left_out(made: StandIns, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = (*CPU, "--sweep", "run.seed=1,2,3", f"run.path={sweep}")
    run_submit(*words)
    leave_start(sweep / "1_seed-2", stages=("export",))
    run_submit(*words)
    assert "#SBATCH --array=0,2\n" in (sweep / "slurm" / "job.sbatch").read_text()


def test_a_sweep_over_losses_and_lists(made: StandIns, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = ("--sweep", "ar2.adversarial=paper,released", "--sweep", "ar2.retriever.optim.betas=[0.9, 0.99],[0.8, 0.9]")
    run_submit(*CPU, *words, f"run.path={sweep}")
    found = [recipe(path) for path in sorted(sweep.iterdir()) if path.name != "slurm"]
    assert [config.ar2.adversarial for config in found] == ["paper", "paper", "released", "released"]
    assert [config.ar2.retriever.optim.betas for config in found] == [(0.9, 0.99), (0.8, 0.9)] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sweep", "run.seed"), "is no choice of values"),
        (("--sweep", "run.seed=1,,2"), "is no choice of values"),
        (("--sweep", "run.seed=1,1"), "has a value twice"),
        (("--sweep", "run.path=a,b"), "run.path cannot be swept"),
        (("--sweep", "run.seed=1,2", "--sweep", "run.seed=3"), "or is there already"),
        (("--sweep", "ar2.num_negatives=4,2000"), "2000 negatives are drawn from the top 20 candidates"),
        (("--sweep", "run.seed=" + ",".join(map(str, range(1001)))), "the sweep has 1001 runs"),
    ],
)
def test_a_sweep_with_a_bad_run_is_refused_as_a_whole(
    made: StandIns, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in refusal(*CPU, *words, f"run.path={tmp_path / 'sweep'}")
    assert made.calls == []
    assert not (tmp_path / "sweep").exists()

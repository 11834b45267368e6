"""`sparring train`: which starter it takes where, and what it refuses before anything is started."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.config.shipped import SHIPPED
from engine.errors import ConfigError
from launcher.__main__ import main
from launcher.commands.supervise import _run_path as run_path_of
from launcher.world import starters
from launcher.world.starters import Asked, Place, Start, choose_start

TINY = SHIPPED / "tiny.yaml"
RUN = str(starters._RUN)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Two cores, no GPU, no root; every starter is in the environment, which is activated."""
    for name in ("deepspeed", "mpirun", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(starters, "JOB_HOSTFILE", tmp_path / "no-hostfile")
    monkeypatch.chdir(tmp_path)
    return Place(gpus=0, cores=2, programs=tmp_path, environ={"PATH": str(tmp_path)})


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n", encoding="utf-8")
    return tmp_path / "hosts"


QUIETLY = ("--log_level", "error")


def recipe(*words: str) -> Config:
    return load_config(TINY, ["run.path=r", *words])


def chosen(place: Place, asked: Asked = Asked(), *words: str) -> Start:  # noqa: B008
    return choose_start(recipe(*words), asked, place, ["--config", "c.yaml"])


def test_one_machine_without_gpus(place: Place) -> None:
    assert chosen(place).words == ["deepspeed", "--num_accelerators", "2", *QUIETLY, RUN, "--config", "c.yaml"]
    assert (chosen(place).environ, chosen(place).shown) == ({"DS_ACCELERATOR": "cpu"}, ()), "it need not be typed"
    assert chosen(replace(place, cores=64)).words[2] == str(starters.MOST_RANKS_ON_CPU)
    assert chosen(place, Asked(ranks=4, master_port=29951)).words[1:5] == [
        "--num_accelerators", "4", "--master_port", "29951",
    ]  # fmt: skip
    three = [f"{key}.batch_size=9" for key in ("warmup_retriever", "warmup_ranker", "ar2.retriever", "ar2.ranker")]
    three += [f"{key}.micro_batch_size=3" for key in ("warmup_retriever", "warmup_ranker", "ar2.retriever")]
    assert chosen(replace(place, cores=4), Asked(), *three).words[2] == "3", "which divides the batches"


def test_one_machine_with_gpus(place: Place) -> None:
    place = replace(place, gpus=4, cores=64)
    assert (chosen(place).words[2], chosen(place).environ) == ("4", {})
    assert chosen(place, Asked(ranks=1)).words[2] == "1"
    on_cpu = chosen(place, Asked(ranks=8))
    assert (
        on_cpu.told
        == f"DS_ACCELERATOR=cpu deepspeed --num_accelerators 8 --log_level error {RUN} --config c.yaml run.device=cpu"
    )
    assert chosen(place, Asked(), "run.device=cpu").environ == {"DS_ACCELERATOR": "cpu"}
    with pytest.raises(ConfigError, match=r"8 ranks are to run, run.device is cuda, .* 4 GPUs"):
        chosen(place, Asked(ranks=8), "run.device=cuda")


def test_gpus_that_were_chosen_are_those_that_train(place: Place) -> None:
    """Symptom: CUDA_VISIBLE_DEVICES=2,3 trained on another's GPUs 0 and 1: told a number, deepspeed passes it over."""
    environ = {**place.environ, "CUDA_VISIBLE_DEVICES": "2, 3,5,7"}
    gpus = replace(place, gpus=4, cores=64, environ=environ)
    start = chosen(gpus)
    assert start.told == f"CUDA_VISIBLE_DEVICES=2,3,5,7 deepspeed --log_level error {RUN} --config c.yaml"
    assert chosen(gpus, Asked(ranks=2)).environ == {"CUDA_VISIBLE_DEVICES": "2,3"}
    kept = chosen(gpus, Asked(), "ar2.overlap=split", "ar2.refresh_devices=2")
    assert kept.environ == {"CUDA_VISIBLE_DEVICES": "2,3", "SPARRING_REFRESH_GPUS": "5,7"}
    assert chosen(gpus, Asked(), "run.device=cpu").words[:2] == ["deepspeed", "--num_accelerators"]
    by_id = replace(gpus, gpus=1, environ={**environ, "CUDA_VISIBLE_DEVICES": "GPU-1f"})
    with pytest.raises(ConfigError, match=r"names 'GPU-1f', and deepspeed takes numbers alone.*--mpi"):
        chosen(by_id)
    assert chosen(by_id, Asked(mpi=True)).words[0] == "mpirun"


def test_devices_that_refreshes_keep_get_no_ranks(place: Place) -> None:
    """Symptom: all GPUs would have a rank, and the run end at its start for want of those of the refresh."""
    keeping = ("ar2.overlap=split", "ar2.refresh_devices=2")
    gpus = replace(place, gpus=4, cores=64)
    assert chosen(gpus, Asked(), *keeping).words[2] == "2"
    assert chosen(gpus, Asked(ranks=1), *keeping).words[2] == "1"
    assert chosen(replace(place, cores=4), Asked(), *keeping).words[2] == "2", "of the cores, two are the companions'"
    assert chosen(place, Asked(), *keeping).words[2] == "1"
    assert chosen(gpus, Asked(ranks=4), *keeping, "run.device=cpu").words[2] == "4"
    with pytest.raises(ConfigError, match=r"3 ranks and ar2.refresh_devices=2 take more than the 4 GPUs.*--ranks 2"):
        chosen(gpus, Asked(ranks=3), *keeping)
    with pytest.raises(ConfigError, match=r"1 rank and ar2.refresh_devices=2 .* the 2 GPUs.*ar2.overlap=ranker"):
        chosen(replace(place, gpus=2), Asked(), *keeping)
    environ = {name: value for name, value in {**place.environ, **SLURM}.items() if name != "SLURM_NTASKS"}
    assert chosen(replace(gpus, environ=environ), Asked(), *keeping).words[:5] == [
        "mpirun", "-n", "4", "--map-by", "ppr:2:node",
    ]  # fmt: skip


def test_mpirun_on_one_machine(place: Place) -> None:
    start = chosen(replace(place, is_root=True), Asked(mpi=True))
    assert start.words == [
        "mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, RUN, "--config", "c.yaml",
    ]  # fmt: skip
    assert start.told.startswith("OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun")


def test_hosts(place: Place, hostfile: Path) -> None:
    assert chosen(place, Asked(hostfile=hostfile, master_addr="10.0.0.1")).words == [
        "deepspeed", "--hostfile", str(hostfile), "--master_addr", "10.0.0.1", *QUIETLY, RUN, "--config",
        "c.yaml",
    ]  # fmt: skip
    assert chosen(place, Asked(hostfile=hostfile, mpi=True)).words[:5] == [
        "mpirun", "-n", "2", "--hostfile", str(hostfile),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--ranks is 4, but .* has 2 slots"):
        chosen(place, Asked(hostfile=hostfile, ranks=4))


def test_the_hosts_that_deepspeed_finds_by_itself(
    place: Place, hostfile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starters, "JOB_HOSTFILE", hostfile)
    assert chosen(place).words[:3] == ["deepspeed", "--hostfile", str(hostfile)]


def test_a_slurm_allocation(place: Place) -> None:
    place = replace(place, environ={**place.environ, **SLURM})
    start = chosen(place)
    assert start.words[:7] == ["mpirun", "-n", "8", "--map-by", "ppr:4:node", "--bind-to", "none"]
    assert start.words[7:] == ["-x", "SLURM_NTASKS", "-x", "SLURM_NNODES", sys.executable, RUN, "--config", "c.yaml"]
    assert chosen(place, Asked(pmix=True)).words[:3] == ["srun", "--kill-on-bad-exit=1", "--mpi=pmix"]
    with pytest.raises(ConfigError, match="--ranks is 4, but the allocation has 8 tasks"):
        chosen(place, Asked(ranks=4))
    with pytest.raises(ConfigError, match="names the hosts"):
        chosen(place, Asked(hostfile=Path("hosts")))
    alone = replace(
        place, environ={**place.environ, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": ""}
    )
    assert chosen(alone).words[0] == "deepspeed", "a machine like any other"


def test_nodes_without_tasks(place: Place) -> None:
    """`salloc --nodes 2 --gpus-per-node 4` says nothing of tasks."""
    environ = {name: value for name, value in {**place.environ, **SLURM}.items() if name != "SLURM_NTASKS"}
    place = replace(place, environ=environ, gpus=4)
    assert chosen(place).words[:5] == ["mpirun", "-n", "8", "--map-by", "ppr:4:node"]
    assert chosen(place, Asked(pmix=True)).words[3:5] == ["--ntasks", "8"]
    with pytest.raises(ConfigError, match="3 ranks cannot be shared equally by 2 nodes"):
        chosen(place, Asked(ranks=3))


def test_what_does_not_fit_is_refused(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks cannot share warmup_retriever.batch_size=16"):
        chosen(place, Asked(ranks=3))
    with pytest.raises(ConfigError, match="one of several that a starter has put in place"):
        chosen(replace(place, environ={"WORLD_SIZE": "2"}))
    with pytest.raises(ConfigError, match="no SLURM allocation"):
        chosen(place, Asked(pmix=True))
    with pytest.raises(ConfigError, match="are for deepspeed"):
        chosen(place, Asked(mpi=True, master_port=1))
    (place.programs / "deepspeed").unlink()
    with pytest.raises(ConfigError, match="there is no deepspeed here"):
        chosen(place)


def test_an_environment_that_is_not_activated(place: Place, tmp_path: Path) -> None:
    start = chosen(replace(place, environ={"PATH": "/usr/bin"}))
    assert start.words[0] == str(tmp_path / "deepspeed")
    assert start.environ["PATH"] == f"{tmp_path}:/usr/bin", "the starters find each other by name"


def test_the_command_is_printed_and_becomes_the_process(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    became: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(starters, "look_around", lambda _: place)
    monkeypatch.setattr(os, "execvpe", lambda *told: became.append(told))
    words = ["train", "--config", "tiny", "run.path=a b", "--ranks", "2"]
    assert main([*words, "--print"]) == 0
    printed = capfd.readouterr().out
    assert printed == f"deepspeed --num_accelerators 2 --log_level error {RUN} --config {TINY} 'run.path=a b'\n"
    assert became == []
    main(words)
    assert capfd.readouterr().out == printed
    assert became[0][:2] == (
        "deepspeed", ["deepspeed", "--num_accelerators", "2", *QUIETLY, RUN, "--config", str(TINY), "run.path=a b"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "tiny", "run.path=r", "ar2.iterationz=2"], "did you mean 'ar2.iterations'?"),
        (["--config", "nothing.yaml"], "come along: ar2_msmarco, "),
        (["--config", "tiny", "run.path=r", "data.path=/no such data"], "there is no folder /no such data"),
    ],
)
def test_a_wrong_recipe_starts_nothing(
    words: list[str], told: str, place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starters, "look_around", lambda _: place)
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("started"))
    assert main(["train", *words]) == 2
    assert told in capfd.readouterr().err


def test_a_file_here_comes_before_one_that_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.terminal.arguments import recipe_file

    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml", "configs/tiny.yaml"):
        assert recipe_file(name) == TINY
    assert recipe_file("configs/nothing.yaml") == tmp_path / "configs" / "nothing.yaml"
    assert recipe_file("../configs/tiny.yaml") == tmp_path / ".." / "configs" / "tiny.yaml"
    (tmp_path / "tiny.yaml").write_text("run: {path: r}\n", encoding="utf-8")
    assert recipe_file("tiny.yaml") == tmp_path / "tiny.yaml"


def test_a_supervised_start_may_be_of_this_command(tmp_path: Path) -> None:
    for program in (["sparring"], ["python", "-m", "launcher"]):
        words = [*program, "train", "--config", "tiny", "--ranks", "2", f"run.path={tmp_path / 'run'}"]
        assert run_path_of(words) == tmp_path / "run"
    with pytest.raises(ConfigError, match="starts no run: train"):
        run_path_of(["train", "--config", "tiny"])

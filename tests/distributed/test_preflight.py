"""The preflight between real ranks: silent where all is well, one refusal on all ranks where something is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.log import set_up_logging
from launcher.preflight import facts, folder, ranks
from launcher.preflight.ranks import require_preflight
from launcher.world.opening import World, open_world
from tests.distributed.processes import ROOT, clean_environment, report, run_ranks

HERE = "tests.distributed.test_preflight"
TINY = ROOT / "configs" / "tiny.yaml"
FOLDER = "TEST_FOLDER"


# --- what runs on each rank ------------------------------------------------------------------------------------------


def config_of(path: Path, *words: str) -> Config:
    return load_config(TINY, [f"run.path={path}", *words])


def refusal(config: Config, world: World) -> str:
    try:
        require_preflight(config, world)
    except ConfigError as error:
        return str(error)
    return "nothing"


def all_on_every_rank() -> None:
    world = open_world(device="cpu", timeout_seconds=60)
    set_up_logging(world.rank, world.world_size)
    world.coordinator.hosts[:] = ["one", "two"]  # of the ranks of a host, the first alone would examine it
    folder._PATIENCE_SECONDS = 0.2
    base = Path(os.environ[FOLDER])
    told: dict[str, str] = {}
    for check in (
        check_healthy,
        check_other_version,
        check_other_configuration,
        check_unwritable_folder,
        check_folder_of_its_own,
        check_all_at_once,
        check_machines_of_one_name,
        check_one_local_folder,
        check_broken_collective,  # the last: it leaves the process group broken
    ):
        told[check.__name__] = check(base / check.__name__, world)
        world.coordinator.barrier(f"after {check.__name__}")
    print(json.dumps(told), flush=True)
    world.coordinator.close()
    if mpi := sys.modules.get("mpi4py.MPI"):
        mpi.Finalize()
    os._exit(0)  # the process group is broken, and would wait


def check_healthy(base: Path, world: World) -> str:
    told = refusal(config_of(base / "run"), world)
    world.coordinator.barrier("rank 0 has taken its mark away")
    assert list((base / "run").iterdir()) == []
    return told


def other_version(world: World) -> Callable[[], None]:
    """Let rank 1 have another torch; return what takes that back."""
    real = facts.software
    if world.rank == 1:
        facts.software = lambda: real() | {"torch": "1.0.0"}

    def undo() -> None:
        facts.software = real

    return undo


def check_other_version(base: Path, world: World) -> str:
    undo = other_version(world)
    try:
        return refusal(config_of(base / "run"), world)
    finally:
        undo()
        world.coordinator.barrier("rank 0 has taken its mark away")
        assert not base.exists(), "a refused start must leave nothing"


def check_other_configuration(base: Path, world: World) -> str:
    return refusal(config_of(base / "run", f"ranker.name=expanded-{world.rank}"), world)


def check_unwritable_folder(base: Path, world: World) -> str:
    if world.rank == 0:
        base.write_text("a file in the way")
    world.coordinator.barrier("written")
    return refusal(config_of(base / "run"), world)


def own_folder(world: World) -> Callable[[], None]:
    """Let rank 1 look into another folder, as a host does where the file system is not mounted."""
    real = facts.look_for_mark
    if world.rank == 1:
        facts.look_for_mark = lambda path, mark: replace(real(path.with_name("elsewhere"), mark), path=str(path))

    def undo() -> None:
        facts.look_for_mark = real

    return undo


def check_folder_of_its_own(base: Path, world: World) -> str:
    undo = own_folder(world)
    try:
        return refusal(config_of(base / "run"), world)
    finally:
        undo()


def check_all_at_once(base: Path, world: World) -> str:
    undo = [other_version(world), own_folder(world)]
    words = [f"data.path={base}/none", f"run.seed={world.rank}"]
    try:
        return refusal(config_of(base / "run", *words), world)
    finally:
        for one in undo:
            one()


def check_machines_of_one_name(base: Path, world: World) -> str:
    world.coordinator.hosts[:] = ["one", "one"]
    real = ranks.boot_id
    ranks.boot_id = lambda: f"boot {world.rank}"
    try:
        return refusal(config_of(base / "run"), world)
    finally:
        ranks.boot_id = real
        world.coordinator.hosts[:] = ["one", "two"]


def check_one_local_folder(base: Path, world: World) -> str:
    """A folder that both hosts have, and then one that each has for itself."""
    words = ["evaluation.fuse=false", "index.embeddings=local", "index.local_folder=$TEST_DISK"]
    os.environ["TEST_DISK"] = str(base / "one" / "for" / "both")
    told = refusal(config_of(base / "run", *words), world)
    os.environ["TEST_DISK"] = str(base / world.coordinator.host)
    own = refusal(config_of(base / "run", *words), world)
    world.coordinator.barrier("all have taken their marks away")
    assert not list(base.rglob(".preflight-*"))
    return f"{told} THEN {own}"


def check_broken_collective(base: Path, world: World) -> str:
    ranks._COLLECTIVE_SECONDS = 1.5
    real = dist.all_gather

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer [10.0.0.2]:1234\nand pages of frames")

    if world.rank == 1:
        dist.all_gather = fail
    try:
        return refusal(config_of(base / "run"), world)
    finally:
        dist.all_gather = real


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["store", "mpirun"])
def test_ranks_find_the_same_and_refuse_together(launcher: str, tmp_path: Path) -> None:
    results = run_ranks(f"{HERE}:all_on_every_rank", 2, launcher, timeout=120, env={FOLDER: str(tmp_path)})  # type: ignore[arg-type]
    assert [result.returncode for result in results] == [0, 0], report(results)
    told, same = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    assert same == told, "each rank tells an error that no other has told: they must raise the same one"
    assert told["check_healthy"] == "nothing"
    line, with_own_folders = [line for line in results[0].stderr.splitlines() if " checks passed" in line]
    assert "all 16 checks passed" in with_own_folders
    assert "preflight: 2 hosts, 2 ranks, all 15 checks passed in " in line
    assert ("barrier over MPI" in line) == (launcher == "mpirun")
    assert "preflight" not in results[1].stderr
    assert "torch is unlike: " in told["check_other_version"]
    assert "1.0.0 on two" in told["check_other_version"]
    assert "ranker.name: 'expanded-0' -> 'expanded-1'" in told["check_other_configuration"]
    assert (
        "the preflight found 1 problem; nothing was computed\n1. one: run folder: " in told["check_unwritable_folder"]
    )
    assert "cannot be written: Not a directory" in " ".join(told["check_unwritable_folder"].split())
    own = " ".join(told["check_folder_of_its_own"].split())
    assert "1. two: run folder: " in own
    assert "is not the folder of one: a file written there does not appear here" in own
    for text in ("software", "configuration", "run folder", "data"):
        assert f": {text}: " in told["check_all_at_once"]
    assert "\n4. one, two: data: " in told["check_all_at_once"]
    assert "2 machines call themselves so" in told["check_machines_of_one_name"]
    one_folder = " ".join(told["check_one_local_folder"].split())
    for host, other in (("one", "two"), ("two", "one")):
        assert f"{host}: local folder: {tmp_path}/check_one_local_folder/one/for/both" in one_folder
        assert f"is the same folder as on {other}" in one_folder
    assert one_folder.endswith("THEN nothing")
    broken = " ".join(told["check_broken_collective"].split())
    assert "two: collective: rank 1: gloo failed: Connection closed by peer [10.0.0.2]:1234" in broken
    assert "one: collective: rank 0: gloo failed: " in broken
    assert "check_all_at_once" in results[0].stderr  # the table


def test_refused_start_ends_with_code_2_and_one_message(tmp_path: Path) -> None:
    """Symptom: each of 64 ranks told that the data could not be read."""
    words = [sys.executable, "launcher/run.py", "--preflight-only", "--config", str(TINY), f"run.path={tmp_path}/run"]
    ended = subprocess.run(
        ["mpirun", "--oversubscribe", "-n", "2", *words, f"data.path={tmp_path}/none", "run.device=cpu"],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("the preflight found 1 problem") == 1, ended.stderr
    assert ended.stderr.count("remedy: check data.path") == 1
    assert "PROBLEM" in ended.stderr
    assert list(tmp_path.iterdir()) == []

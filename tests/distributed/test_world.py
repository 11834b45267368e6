"""How a world opens under each starter, refuses contradictory signs, and ends together when one rank fails."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest

from engine.coordinator import Coordinator, LocalTransport, MpiTransport, StoreTransport
from engine.errors import ArtifactError, ConfigError, DataError
from launcher import world as world_module
from launcher.world import World, guarded
from tests.distributed.processes import RankResult, report, run_ranks

HERE = "tests.distributed.test_world"
HOST = socket.gethostname()
STARTERS = pytest.mark.parametrize("launcher", ["store", "mpirun"])


# --- on the ranks ----------------------------------------------------------------------------------------------------


def open_and_sum_on_every_rank() -> int:
    """Open the real world, add up the ranks through torch.distributed, and say what was found."""
    import torch
    import torch.distributed as dist

    from launcher.world import open_world

    torch.set_num_threads(1)
    opened: list[World] = []
    device = os.environ.get("TEST_DEVICE", "cpu")
    asked = os.environ.get("TEST_COORDINATOR", "auto")
    code = guarded(None, lambda: opened.append(open_world(coordinator=asked, device=device, timeout_seconds=50)))
    if code:
        return code
    world = opened[0]

    def work() -> None:
        total = torch.tensor([world.rank + 1], device=world.device)
        dist.all_reduce(total)
        found = {
            "rank": world.rank,
            "size": world.world_size,
            "local_rank": world.local_rank,
            "device": world.device.type,
            "kind": world.coordinator.kind,
            "sum": int(total),
            "backend": dist.get_backend(),
            "variables": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")],
            "threads": torch.get_num_threads(),
            "omp": os.environ["OMP_NUM_THREADS"],
            "description": world.description,
        }
        print(json.dumps(found), flush=True)
        assert world.coordinator.gather("ranks", world.rank) == list(range(world.world_size))

    return guarded(world, work)


def light_world() -> World:
    """A world without torch.distributed, for what concerns the coordinator alone."""
    import torch

    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        coordinator = Coordinator(MpiTransport(), 60)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port = int(os.environ["MASTER_PORT"])
        coordinator = Coordinator(StoreTransport(rank, world_size, "127.0.0.1", port, 60), 60)
    c = coordinator
    return World(c.rank, c.world_size, c.rank, torch.device("cpu"), c, "a world for tests")


def one_rank_refuses_on_every_rank() -> int:
    """Rank 1 fails outside every agreement, while rank 0 waits for it at a barrier."""
    world = light_world()

    def work() -> None:
        if world.rank == 1:
            raise ArtifactError("shard 000007.tar is short", remedy="write it again")
        world.coordinator.barrier("all shards written")

    return guarded(world, work)


def one_rank_crashes_on_every_rank() -> int:
    world = light_world()

    def work() -> None:
        if world.rank == 1:
            raise ZeroDivisionError("an error of the program")
        world.coordinator.barrier("never met")

    return guarded(world, work)


def all_ranks_refuse_on_every_rank() -> int:
    """All ranks find the same fault in the same file."""
    world = light_world()

    def work() -> None:
        if world.rank == 1:
            time.sleep(0.2)
        raise DataError("corpus.jsonl is empty")

    return guarded(world, work)


def last_step_fails_on_every_rank() -> int:
    """Rank 0 has finished its work when rank 1 fails: it must not report success."""
    world = light_world()

    def work() -> None:
        if world.rank == 1:
            time.sleep(0.3)
            raise ArtifactError("the export is damaged")

    return guarded(world, work)


# --- a world opens ---------------------------------------------------------------------------------------------------


def findings(results: list[RankResult]) -> list[dict]:
    assert [result.returncode for result in results] == [0] * len(results), report(results)
    return [json.loads(result.stdout.splitlines()[-1]) for result in results]


@pytest.mark.parametrize(("launcher", "kind"), [("store", "store"), ("mpirun", "mpi"), ("deepspeed", "store")])
def test_two_ranks(launcher: str, kind: str) -> None:
    results = run_ranks(f"{HERE}:open_and_sum_on_every_rank", 2, launcher, timeout=100)
    cores = len(os.sched_getaffinity(0))
    for rank, found in enumerate(findings(results)):
        assert (found["rank"], found["size"], found["local_rank"], found["kind"]) == (rank, 2, rank, kind)
        assert (found["sum"], found["device"], found["backend"]) == (3, "cpu", "gloo")
        assert found["variables"] == [str(rank), "2", str(rank), "127.0.0.1"]
        if launcher != "deepspeed":  # it may set a number of its own
            assert (found["threads"], found["omp"]) == (max(1, cores // 2), str(max(1, cores // 2)))
        assert found["description"].startswith("2 ranks on 1 host, cpu with")
        assert "DeepSpeed" not in results[rank].stdout + results[rank].stderr, "its log is noise to the user"


def test_a_process_alone_is_a_world_of_one() -> None:
    (found,) = findings(run_ranks(f"{HERE}:open_and_sum_on_every_rank", 1, "plain", timeout=100))
    assert (found["rank"], found["size"], found["kind"], found["sum"]) == (0, 1, "local", 1)
    assert found["variables"] == ["0", "1", "0", "127.0.0.1"]
    assert found["threads"] == len(os.sched_getaffinity(0))


# --- a world is refused ----------------------------------------------------------------------------------------------


def test_tasks_that_have_not_found_each_other_are_refused() -> None:
    """Symptom: `srun` without PMIx started two complete runs in one folder."""
    (result,) = run_ranks(f"{HERE}:open_and_sum_on_every_rank", 1, "plain", timeout=60, env={"SLURM_NTASKS": "2"})
    assert result.returncode == 2
    assert "SLURM_NTASKS is 2, but this process has found no other rank" in result.stderr
    assert "mpirun" in result.stderr
    assert "Traceback" not in result.stderr


def test_sizes_that_differ_are_refused() -> None:
    """Symptom: WORLD_SIZE was left in the shell by an earlier job."""
    results = run_ranks(f"{HERE}:open_and_sum_on_every_rank", 2, "mpirun", timeout=60, env={"WORLD_SIZE": "3"})
    assert results[0].returncode == 2
    assert any("MPI has 2 rank(s), but WORLD_SIZE=3" in result.stderr for result in results)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "contradict each other"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "whole numbers"),
    ],
)
def test_variables_that_make_no_world_are_refused(environ: dict[str, str], message: str) -> None:
    if "are not" not in message:
        environ = {"LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1", **environ}
    with pytest.raises(ConfigError, match=message):
        world_module._find_place(environ, None)


def test_variables_of_a_rendezvous_alone_make_no_world() -> None:
    assert world_module._find_place({"MASTER_ADDR": "h", "MASTER_PORT": "1"}, None) == (0, 1)


def test_an_mpi_coordinator_needs_an_mpi_world() -> None:
    with pytest.raises(ConfigError, match="mpirun -n N"):
        world_module._join_mpi({}, "mpi", 1.0)
    assert world_module._join_mpi({}, "auto", 1.0) is None


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"ocal rank 1 .* finds 1 CUDA device"):
        world_module._choose_device("cuda", 1)


def test_the_address_of_rank_zero() -> None:
    assert world_module._own_address(["a", "a"], {"MASTER_ADDR": "10.0.0.9"}) == "127.0.0.1"
    assert world_module._own_address(["a", "b"], {"MASTER_ADDR": "10.0.0.9"}) == "10.0.0.9"
    assert world_module._own_address(["a", "b"], {"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        world_module._own_address(["a", "host.invalid"], {})


# --- a world ends ----------------------------------------------------------------------------------------------------


@STARTERS
def test_one_rank_that_refuses_ends_all_with_one_message(launcher: str) -> None:
    start = time.monotonic()
    results = run_ranks(f"{HERE}:one_rank_refuses_on_every_rank", 2, launcher, timeout=50)
    assert [result.returncode for result in results] == [2, 2]
    assert f"[rank 1 on {HOST}] error: " in results[1].stderr
    assert "000007.tar is short" in results[1].stderr
    assert "Traceback" not in results[1].stderr
    assert results[0].stderr == ""
    assert time.monotonic() - start < 45, "rank 0 must not wait for its timeout of 60 s"


@STARTERS
def test_an_exception_on_one_rank_does_not_hang(launcher: str) -> None:
    """Symptom: under mpirun, MPI waited at the exit of the failed rank for the others, for ever."""
    results = run_ranks(f"{HERE}:one_rank_crashes_on_every_rank", 2, launcher, timeout=40)
    assert [result.returncode for result in results] == [1, 1]
    assert results[0].stderr == ""
    assert f"[rank 1 on {HOST}] ZeroDivisionError: an error of the program" in results[1].stderr
    assert f"[rank 1 on {HOST}] Traceback" in results[1].stderr


@STARTERS
def test_what_all_ranks_find_is_told_once(launcher: str) -> None:
    results = run_ranks(f"{HERE}:all_ranks_refuse_on_every_rank", 2, launcher, timeout=50)
    assert [result.returncode for result in results] == [2, 2]
    assert "corpus.jsonl is empty" in results[0].stderr
    assert results[1].stderr == ""


def test_no_rank_reports_success_when_another_fails_last() -> None:
    results = run_ranks(f"{HERE}:last_step_fails_on_every_rank", 2, "store", timeout=50)
    assert [result.returncode for result in results] == [2, 2]
    assert "the export is damaged" in results[1].stderr.lower()
    assert results[0].stderr == ""


def alone() -> World:
    return World(0, 1, 0, world_module.torch.device("cpu"), Coordinator(LocalTransport()), "alone")


def test_exit_codes_of_a_world_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    def raise_(error: BaseException) -> None:
        raise error

    assert guarded(alone(), lambda: None) == 0
    assert guarded(alone(), lambda: 85) == 85
    assert guarded(alone(), lambda: raise_(SystemExit(3))) == 3
    assert guarded(None, lambda: raise_(SystemExit())) == 0
    assert guarded(alone(), lambda: raise_(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""
    assert guarded(None, lambda: raise_(SystemExit("usage"))) == 1
    assert capsys.readouterr().err == "usage\n"
    assert guarded(alone(), lambda: raise_(ConfigError("n is 200", expected="at most 100", remedy="lower n"))) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert guarded(alone(), lambda: raise_(ValueError("a bug"))) == 1
    assert "Traceback" in (told := capsys.readouterr().err)
    assert told.endswith("ValueError: a bug\n")

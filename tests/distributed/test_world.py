"""How a world opens under each starter, refuses contradictory signs, and ends together when one rank fails."""

from __future__ import annotations

import json
import os
import socket
import sys
import time

import pytest

from engine.coordination.coordinator import Coordinator, LocalTransport, MpiTransport, StoreTransport
from engine.errors import ArtifactError, ConfigError, DataError
from launcher.ending import guarded
from launcher.world import opening as world_module
from launcher.world.opening import World
from tests.distributed.processes import RankResult, report, run_ranks

HERE = "tests.distributed.test_world"
HOST = socket.gethostname()
PATIENCE = 300.0  # of a test; ranks are more patient, so that one that waits in vain fails the test
SEPARATOR = "--- next\n"
UNSAID = {"OMP_NUM_THREADS": ""}
"""Nobody says how many threads a rank has."""


# --- on the ranks ----------------------------------------------------------------------------------------------------


def open_and_sum_on_every_rank() -> int:
    """Open the real world, add up the ranks through torch.distributed, and say what was found."""
    import torch
    import torch.distributed as dist

    from launcher.world.opening import open_world

    torch.set_num_threads(1)
    opened: list[World] = []
    device = os.environ.get("TEST_DEVICE", "cpu")
    asked = os.environ.get("TEST_COORDINATOR", "auto")
    code = guarded(None, lambda: opened.append(open_world(coordinator=asked, device=device, timeout_seconds=120)))
    if code:
        return code
    world = opened[0]

    def work() -> None:
        from deepspeed.utils import groups

        total = torch.tensor([world.rank + 1], device=world.device)
        dist.all_reduce(total)
        own = (dist.group.WORLD, groups._get_data_parallel_group())
        found = {
            "rank": world.rank,
            "size": world.world_size,
            "local_rank": world.local_rank,
            "device": world.device.type,
            "kind": world.coordinator.kind,
            "sum": int(total),
            "backend": dist.get_backend(),
            "timeouts": [group._get_backend(world.device).options._timeout.total_seconds() for group in own],
            "variables": [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")],
            "threads": torch.get_num_threads(),
            "omp": os.environ["OMP_NUM_THREADS"],
            "description": world.description,
        }
        print(json.dumps(found), flush=True)
        assert world.coordinator.gather("ranks", world.rank) == list(range(world.world_size))

    return guarded(world, work)


def light_world(first: Coordinator | None = None) -> World:
    """A world without torch.distributed, for what concerns the coordinator alone."""
    import torch

    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        coordinator = Coordinator(MpiTransport(), 2 * PATIENCE)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        hosted = (
            StoreTransport(0, world_size, "127.0.0.1", 0 if first else int(os.environ["MASTER_PORT"]), PATIENCE)
            if rank == 0
            else None
        )
        port = first.broadcast("port", hosted.port if hosted else None) if first else int(os.environ["MASTER_PORT"])
        transport = hosted or StoreTransport(rank, world_size, "127.0.0.1", port, PATIENCE)
        coordinator = Coordinator(transport, 2 * PATIENCE)
    c = coordinator
    return World(c.rank, c.world_size, c.rank, torch.device("cpu"), c, "a world for tests")


def refuse(world: World) -> None:
    """Rank 1 fails outside every agreement, while rank 0 waits for it at a barrier."""
    if world.rank == 1:
        raise ArtifactError("shard 000007.tar is short", remedy="write it again")
    world.coordinator.barrier("all shards written")


def crash(world: World) -> None:
    if world.rank == 1:
        raise ZeroDivisionError("an error of the program")
    world.coordinator.barrier("never met")


def refuse_alike(world: World) -> None:
    """All ranks find the same fault in the same file, rank 1 a little later."""
    if world.rank == 1:
        time.sleep(0.2)
    raise DataError("corpus.jsonl is empty")


def fail_last(world: World) -> None:
    """Rank 0 has finished its work when rank 1 fails: it must not report success."""
    if world.rank == 1:
        time.sleep(0.3)
        raise ArtifactError("the export is damaged")


def refuse_on_every_rank() -> int:
    world = light_world()
    return guarded(world, lambda: refuse(world))


def crash_on_every_rank() -> int:
    world = light_world()
    return guarded(world, lambda: crash(world))


def end_in_every_way_on_every_rank() -> None:
    """Where the end of a world is not the end of its processes, one start is enough for all endings."""
    first = light_world().coordinator
    codes = {}
    for work in (refuse, crash, refuse_alike, fail_last):
        world = light_world(first)
        codes[work.__name__] = guarded(world, lambda world=world, work=work: work(world))
        sys.stderr.write(SEPARATOR)
        sys.stderr.flush()
    print(json.dumps(codes))
    first.barrier("all endings seen")
    first.close()


# --- a world opens ---------------------------------------------------------------------------------------------------


def findings(results: list[RankResult]) -> list[dict]:
    assert [result.returncode for result in results] == [0] * len(results), report(results)
    return [json.loads(result.stdout.splitlines()[-1]) for result in results]


@pytest.mark.parametrize(("launcher", "kind"), [("store", "store"), ("mpirun", "mpi"), ("deepspeed", "store")])
def test_two_ranks(launcher: str, kind: str) -> None:
    results = run_ranks(f"{HERE}:open_and_sum_on_every_rank", 2, launcher, PATIENCE, UNSAID, fresh=True)
    cores = len(os.sched_getaffinity(0))
    for rank, found in enumerate(findings(results)):
        assert (found["rank"], found["size"], found["local_rank"], found["kind"]) == (rank, 2, rank, kind)
        assert (found["sum"], found["device"], found["backend"]) == (3, "cpu", "gloo")
        assert found["timeouts"] == [120.0, 120.0], "DeepSpeed reduces gradients in a group of its own"
        assert found["variables"] == [str(rank), "2", str(rank), "127.0.0.1"]
        if launcher != "deepspeed":  # it may set a number of its own
            assert (found["threads"], found["omp"]) == (max(1, cores // 2), str(max(1, cores // 2)))
        assert found["description"].startswith("2 ranks on 1 host, cpu with")
        assert "DeepSpeed" not in results[rank].stdout + results[rank].stderr, "its log is noise to the user"


def test_a_process_alone_is_a_world_of_one() -> None:
    (found,) = findings(run_ranks(f"{HERE}:open_and_sum_on_every_rank", 1, "plain", PATIENCE, UNSAID, fresh=True))
    assert (found["rank"], found["size"], found["kind"], found["sum"]) == (0, 1, "local", 1)
    assert found["variables"] == ["0", "1", "0", "127.0.0.1"]
    assert found["threads"] == len(os.sched_getaffinity(0))


# --- a world is refused ----------------------------------------------------------------------------------------------


def test_tasks_that_have_not_found_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: `srun` without PMIx started two complete runs in one folder."""
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert guarded(None, lambda: world_module.open_world() and None) == 2
    told = capsys.readouterr().err
    assert "SLURM_NTASKS is 2, but this process has found no other rank" in told
    assert "mpirun" in told
    assert "Traceback" not in told


def test_sizes_that_differ_are_refused() -> None:
    """Symptom: WORLD_SIZE was left in the shell by an earlier job."""
    results = run_ranks(f"{HERE}:open_and_sum_on_every_rank", 2, "mpirun", timeout=PATIENCE, env={"WORLD_SIZE": "3"})
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


# --- a world ends ----------------------------------------------------------------------------------------------------


def refused(stderr: str) -> bool:
    return f"[rank 1 on {HOST}] error: " in stderr and "000007.tar is short" in stderr and "Traceback" not in stderr


def crashed(stderr: str) -> bool:
    return (
        f"[rank 1 on {HOST}] Traceback" in stderr
        and f"[rank 1 on {HOST}] ZeroDivisionError: an error of the program" in stderr
    )


def test_endings_without_mpi() -> None:
    """One rank's error ends all, is told once, and gives all the same code; rank 0 waits for none of its timeouts."""
    results = run_ranks(f"{HERE}:end_in_every_way_on_every_rank", 2, "store", timeout=PATIENCE)
    codes = [json.loads(result.stdout) for result in results]
    assert codes == [{"refuse": 2, "crash": 1, "refuse_alike": 2, "fail_last": 2}] * 2, report(results)
    told = [result.stderr.split(SEPARATOR) for result in results]
    assert told[0][:2] == ["", ""]
    assert refused(told[1][0])
    assert crashed(told[1][1])
    assert "corpus.jsonl is empty" in told[0][2]
    assert told[1][2] == "", "what all ranks find is told once"
    assert told[0][3] == ""
    assert "the export is damaged" in told[1][3].lower()


def test_a_rank_that_refuses_under_mpirun_ends_all_with_one_message() -> None:
    results = run_ranks(f"{HERE}:refuse_on_every_rank", 2, "mpirun", timeout=PATIENCE)
    assert results[0].returncode == 2, report(results)
    assert refused(results[1].stderr)
    assert results[0].stderr == ""


def test_an_exception_under_mpirun_does_not_hang() -> None:
    """Symptom: MPI waited at the exit of the failed rank for the others, for ever."""
    results = run_ranks(f"{HERE}:crash_on_every_rank", 2, "mpirun", timeout=PATIENCE)
    assert results[0].returncode == 1, report(results)
    assert crashed(results[1].stderr)
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
    assert capsys.readouterr().err == ""
    assert guarded(alone(), lambda: raise_(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert guarded(None, lambda: raise_(SystemExit("usage"))) == 1
    assert capsys.readouterr().err == "usage\n"
    assert guarded(alone(), lambda: raise_(ConfigError("n is 200", expected="at most 100", remedy="lower n"))) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert guarded(alone(), lambda: raise_(ValueError("a bug"))) == 1
    assert "Traceback" in (told := capsys.readouterr().err)
    assert told.endswith("ValueError: a bug\n")

"""Nothing of a run on one host can be reached from another one."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from launcher.ending import guarded
from tests.distributed.processes import ROOT, report, run_ranks

HERE = "tests.distributed.test_listening"


def say_what_listens() -> int:
    """Open the world, use everything of it that talks, and print the addresses at which this process listens."""
    import torch
    import torch.distributed as dist

    from launcher.world.opening import open_world

    def work() -> None:
        world = open_world(device="cpu", timeout_seconds=120)
        dist.all_reduce(torch.ones(1))
        with world.coordinator.agreement("units"):
            list(world.coordinator.hand_out("units", range(4)))
        listening = {
            connection.laddr.ip
            for connection in psutil.Process().net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        print(json.dumps(sorted(listening)), flush=True)
        world.coordinator.barrier("printed")
        world.close()

    return guarded(None, work)


@pytest.mark.parametrize("starter", ["mpirun", "deepspeed", "store"])
def test_ranks_of_one_host_listen_on_the_loopback_alone(starter: str) -> None:
    """Symptom: whoever is on the same network as a laptop can write into the stores of a run on it."""
    results = run_ranks(f"{HERE}:say_what_listens", 2, starter, timeout=120)  # type: ignore[arg-type]
    assert [result.returncode for result in results] == [0, 0], report(results)
    for result in results:
        addresses = json.loads(result.stdout.splitlines()[-1])
        assert set(addresses) <= {"127.0.0.1", "::1"}, report(results)
    assert any("127.0.0.1" in result.stdout for result in results)  # the question was asked rightly


def test_a_store_listens_where_it_is_told() -> None:
    """Symptom: torch's stores listen on every interface, whatever address they are given."""
    script = """
import psutil
from engine.coordination.listening import open_listening_store
here, everywhere = open_listening_store("127.0.0.1", 0, 1), open_listening_store("127.0.0.1", 0, 1, everywhere=True)
found = {one.laddr.port: one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"}
print(found[here.port], found[everywhere.port])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["127.0.0.1", "0.0.0.0"]

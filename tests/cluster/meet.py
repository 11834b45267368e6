"""A world without a recipe: opens on every rank, does one collective operation and one barrier, and ends.

A script, started as a user starts `launcher/run.py`: `deepspeed --hostfile F tests/cluster/meet.py [key=value ...]`.
Each rank leaves a file `rank-N.json` in `folder`, or tells why there is no world; other words are left alone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

sys.path[:] = [str(Path(__file__).resolve().parents[2]), *sys.path[1:]]  # as `launcher/run.py` does
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from launcher.ending import end_of_process, guarded  # noqa: E402
from launcher.world.opening import World, open_world  # noqa: E402


def main() -> int:
    """Open the world, meet, and write down what this rank has seen; return the exit code."""
    words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    before = dict(os.environ)
    opened: list[World] = []

    def start() -> None:
        rendezvous_seconds = float(words.get("rendezvous_seconds", "30"))
        network = words.get("network")
        opened.append(open_world(timeout_seconds=30, rendezvous_seconds=rendezvous_seconds, network=network))

    def meet() -> None:
        (world,) = opened
        total = torch.tensor([world.rank + 1.0])
        dist.all_reduce(total)
        world.coordinator.barrier("seen")
        seen = {
            "rank": world.rank,
            "local_rank": world.local_rank,
            "world_size": world.world_size,
            "host": socket.gethostname(),
            "sum": total.item(),
            "coordinator": world.coordinator.kind,
            "argv": sys.argv[1:],
            "given": before,
            "environ": dict(os.environ),
            "description": world.description,
        }
        (Path(words["folder"]) / f"rank-{world.rank}.json").write_text(json.dumps(seen))

    return guarded(None, start) or guarded(opened[0], meet)


if __name__ == "__main__":
    end_of_process(main())

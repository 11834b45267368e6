"""A run without models, for what concerns the processes alone: started for real, on every rank, in a second.

It opens a run folder as `launcher/run.py` does (lock, heartbeats, watchdog, signals) and does one stage of steps with a
collective operation each and one that waits at a barrier. Environment variables say which rank does what to itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config.file import load_config
from engine.coordination.coordinator import Coordinator, MpiTransport, StoreTransport
from engine.coordination.watched import WatchedTransport
from engine.log import set_up_logging
from engine.reliability.preemption import PREEMPTION
from engine.reliability.progress import progress_bar
from engine.run import Run, Stage
from launcher.ending import end_of_process, guarded
from launcher.world.opening import World
from tests.distributed.processes import ROOT

STEPS, STEP_SECONDS, FAULT_STEP = 60, 0.05, 4
UNITS = 20
BEAT_SECONDS = 0.2
STOPPED_SECONDS = 12.0
OPENING_SECONDS = 120.0
"""The ranks of a busy machine may begin far apart; what is measured are the waits after that."""


def main() -> int:
    """Run on this rank; the fault is `TEST_FAULT`, on the rank `TEST_FAULT_RANK`."""
    words = [f"run.{key}={value}" for key, value in settings().items()]
    config = load_config(ROOT / "configs" / "tiny.yaml", words)
    PREEMPTION.listen(config.run.preemption_seconds)
    world = open_small_world(float(os.environ.get("TEST_COLLECTIVE_SECONDS", "120")))
    set_up_logging(world.rank, world.world_size)

    def work() -> None:
        world.coordinator.timeout_seconds = OPENING_SECONDS
        run = Run.open(config, world.coordinator, world.device, watched=True)
        world.coordinator.barrier("all are here")
        world.coordinator.timeout_seconds = config.run.timeout_seconds
        run.once("shards", nothing)
        run.once("units", units)
        run.once("steps", steps)
        run.once("meeting", meet)
        print("finished", flush=True)

    end_of_process(guarded(world, work))
    return 0


def settings() -> dict[str, str]:
    return {
        "path": os.environ["TEST_FOLDER"],
        "timeout_seconds": os.environ.get("TEST_TIMEOUT", "120"),
        "heartbeat_seconds": str(BEAT_SECONDS),
        "preemption_seconds": os.environ.get("TEST_PREEMPTION_SECONDS", "60"),
    }


def open_small_world(collective_seconds: float) -> World:
    """Join the ranks through the coordinator and through gloo, without DeepSpeed, whose import takes seconds."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        coordinator = Coordinator(WatchedTransport(MpiTransport()), OPENING_SECONDS)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        transport = StoreTransport(rank, world_size, "127.0.0.1", int(os.environ["MASTER_PORT"]), OPENING_SECONDS)
        coordinator = Coordinator(WatchedTransport(transport), OPENING_SECONDS)
    rank, world_size = coordinator.rank, coordinator.world_size
    host = dist.TCPStore("127.0.0.1", 0, world_size, True, wait_for_workers=False) if rank == 0 else None
    port = coordinator.broadcast("port", host.port if host else None)
    store = host or dist.TCPStore("127.0.0.1", port, world_size, False)
    limit = timedelta(seconds=collective_seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    return World(rank, world_size, rank, torch.device("cpu"), coordinator, "a small world")


def nothing(stage: Stage) -> dict[str, int]:
    return {"documents": 0}


def steps(stage: Stage) -> dict[str, int]:
    """Steps as the training loop makes them; the place of a checkpoint is taken by a file that counts them."""
    done_path = Path(os.environ["TEST_FOLDER"]) / "done"
    done = int(done_path.read_text()) if done_path.exists() else 0
    with progress_bar(stage.name, STEPS, "step", shown=False, initial=done) as bar:
        for step in range(done, STEPS):
            if step == FAULT_STEP:
                hurt(stage, "collective")
            time.sleep(STEP_SECONDS)
            dist.all_reduce(torch.ones(1))
            bar.update()
            if PREEMPTION.agreed(torch.device("cpu")):
                if stage.run.is_main:
                    done_path.write_text(str(step + 1))
                raise PREEMPTION.stop_here(f"{stage.name}, step {step + 1}")
    return {"from": done}


def units(stage: Stage) -> dict[str, int]:
    """A pass over units of work, each a file once it is finished."""
    missing = [unit for unit in range(UNITS) if not (stage.run.folder.path / f"unit-{unit}").exists()]
    missing = stage.run.coordinator.broadcast("missing", missing)
    with stage.run.coordinator.agreement("units"):
        for done, unit in enumerate(stage.run.coordinator.hand_out("units", missing)):
            if done == 2:
                hurt(stage, "units")
            time.sleep(STEP_SECONDS)
            (stage.run.folder.path / f"unit-{unit}").touch()
    return {"missing": len(missing)}


def meet(stage: Stage) -> None:
    """One rank may not come."""
    hurt(stage, "meeting")
    stage.run.coordinator.barrier("the meeting")


def hurt(stage: Stage, place: str) -> None:
    """Do to this rank what the test asks for, once in the life of the folder."""
    mine = os.environ.get("TEST_FAULT_RANK", "1") in {"all", str(stage.run.coordinator.rank)}
    if not mine or os.environ.get("TEST_FAULT_AT", "collective") != place:
        return
    fault = os.environ.get("TEST_FAULT", "")
    mark = stage.run.folder.path / "hurt"
    if mark.exists() and "TEST_FAULT_EACH_TIME" not in os.environ:
        return
    mark.touch()
    time.sleep(2 * BEAT_SECONDS)  # so that the last heartbeat tells of this step
    if fault == "raise":
        raise ZeroDivisionError("an error of the program")
    if fault == "SIGUSR1, then hang":
        os.kill(os.getpid(), signal.SIGUSR1)
    if fault == "stopped for a time":
        subprocess.Popen(["sh", "-c", f"sleep {STOPPED_SECONDS}; kill -CONT {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault.startswith("tell the starter"):
        os.kill(os.getppid(), getattr(signal, os.environ["TEST_SIGNAL"]))
    if fault == "tell the supervisor":
        os.kill(os.getppid(), signal.SIGTERM)  # `env` has become this process
    if fault in {"SIGSTOP", "SIGKILL", "SIGUSR1"}:
        os.kill(os.getpid(), getattr(signal, fault))
    if fault.endswith("hang"):
        time.sleep(1000)


if __name__ == "__main__":
    sys.exit(main())

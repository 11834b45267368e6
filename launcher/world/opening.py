"""The world of a run: which ranks there are, what each computes on, and how they reach each other.

`open_world` finds out how the process was started and makes everything below it look the same:

* `deepspeed`, `torchrun` and their like set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
* `mpirun`, `deepspeed --launcher openmpi` and `srun --mpi=pmix` form an MPI world, from which these five are made;
* anything else is a world of one.

Starters can fail in silence: an `srun` without PMIx, or an allocation where somebody typed `python`, gives N processes
that each believe to be alone, and that would all write into one run folder. Where the signs contradict each other, the
world does not open. The other end of a world is `launcher.ending`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from engine.coordination.coordinator import Coordinator, LocalTransport, MpiTransport, StoreTransport
from engine.coordination.watched import WatchedTransport
from engine.errors import ConfigError, CoordinationError
from launcher.world.interfaces import set_mpi_interfaces
from launcher.world.leaving import leave_mpi
from launcher.world.rank_table import table_of_ranks
from launcher.world.rendezvous import meet_at_given_address, meet_over_mpi, open_store
from shards.errors import counted

_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI_SIGNS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK")


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them."""

    rank: int
    """This process, 0 to world_size - 1."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """This process among those of its host, from 0."""
    device: torch.device
    """What this rank computes on."""
    coordinator: Coordinator
    """Where the ranks meet."""
    description: str
    """For the person who started it: one line, and a table of the ranks where there are several."""
    _held: Any = field(default=None, repr=False)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Wait for all ranks, then take down the process group and the coordinator.

        Args:
            timeout_seconds: How long to wait; the coordinator's own timeout by default.

        Raises:
            CoordinationError: Another rank has failed, or does not come.
        """
        self.coordinator.barrier("end of the run", timeout_seconds)
        if dist.is_initialized():
            dist.destroy_process_group()
        self.coordinator.barrier("process group closed", timeout_seconds)  # until here, rank 0's stores are needed
        self.coordinator.close()


def open_world(
    *,
    coordinator: Literal["auto", "mpi", "store"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    timeout_seconds: float = 600.0,
    rendezvous_seconds: float = 300.0,
    network: str | None = None,
    companions: int = 0,
) -> World:
    """Join the ranks that were started with this process, and start torch.distributed through DeepSpeed.

    Sets the five variables of torch's `env://` rendezvous where the starter did not, and OMP_NUM_THREADS where nobody
    did: the cores of the host, divided among its ranks and those that compute beside them.

    Args:
        coordinator: How control messages travel. "auto" takes MPI where the processes form an MPI world of their
            size, and a store of torch's where they do not.
        device: What to compute on; "auto" takes CUDA where there is a device. One device a local rank.
        timeout_seconds: How long a rank waits for the others at later points and in collectives, above 0.
        rendezvous_seconds: How long the ranks wait for each other here.
        network: Interfaces or subnets over which hosts talk; None leaves out those of containers.
        companions: Processes of each host that compute on its cores beside the ranks, where these do.

    Returns:
        The world. Close it after the work; `guarded` does.

    Raises:
        ConfigError: The environment is contradictory, or does not have what was asked for.
        CoordinationError: Not all ranks came.
    """
    set_mpi_interfaces(os.environ, network)
    mpi = _join_mpi(os.environ, coordinator, timeout_seconds)
    rank, world_size = _find_place(os.environ, mpi)
    _require_all_tasks(os.environ, world_size)
    store_holder = _meet(mpi, rank, world_size, rendezvous_seconds, network)
    local_rank = int(os.environ["LOCAL_RANK"])
    with mpi.agreement("device") if mpi else contextlib.nullcontext():
        chosen = _choose_device(device, local_rank)
    with mpi.agreement("torch.distributed") if mpi else contextlib.nullcontext():
        _start_process_group(chosen, rank, world_size, timeout_seconds)
    meeting = _choose_coordinator(coordinator, mpi, rank, world_size, chosen, timeout_seconds)
    num_threads = _share_cores(meeting, companions if chosen.type == "cpu" else 0)
    num_hosts = len(set(meeting.hosts))
    road = {"mpi": "MPI", "store": "a store of torch.distributed", "local": "none needed"}[meeting.kind]
    description = (
        f"{counted(world_size, 'rank')} on {counted(num_hosts, 'host')}, "
        f"{chosen.type} with {counted(num_threads, 'thread')} a rank, coordinator: {road}"
    )
    if world_size > 1:
        description += "\n" + table_of_ranks(meeting, chosen)
    return World(rank, world_size, local_rank, chosen, meeting, description, store_holder)


def _join_mpi(environ: Mapping[str, str], asked: str, timeout_seconds: float) -> Coordinator | None:
    """Return a coordinator over MPI where a starter of MPI processes has left its signs."""
    if not any(sign in environ for sign in _MPI_SIGNS):  # without them, some sites' MPI aborts the process at import
        if asked == "mpi":
            raise ConfigError(
                f"an MPI coordinator is asked for, but none of {', '.join(_MPI_SIGNS)} is set",
                expected="processes started by mpirun, or by srun --mpi=pmix",
                remedy="start with `mpirun -n N ...` or `deepspeed --launcher openmpi ...`, or let it be chosen",
            )
        return None
    transport = MpiTransport()
    sys.excepthook = _abort_after(sys.excepthook)
    claimed = {name: int(environ[name]) for name in ("OMPI_COMM_WORLD_SIZE", "WORLD_SIZE") if environ.get(name)}
    if wrong := {name: size for name, size in claimed.items() if size != transport.world_size}:
        raise ConfigError(
            f"MPI has {transport.world_size} rank(s), but {', '.join(f'{k}={v}' for k, v in wrong.items())}",
            expected="one world of one size",
            remedy="start the processes with the mpirun that comes with the environment's MPI, in a shell where "
            "WORLD_SIZE is not set",
        )
    if int(environ.get("RANK") or transport.rank) != transport.rank:
        raise ConfigError(
            f"MPI calls this process rank {transport.rank}, but RANK={environ['RANK']}",
            expected="the same rank from both",
            remedy="unset RANK, WORLD_SIZE and LOCAL_RANK, and let MPI decide",
        )
    return Coordinator(WatchedTransport(transport), timeout_seconds)


def _find_place(environ: Mapping[str, str], mpi: Coordinator | None) -> tuple[int, int]:
    """Return (rank, world_size)."""
    if mpi is not None:
        return mpi.rank, mpi.world_size
    found = [name for name in _TORCH_VARIABLES if environ.get(name)]
    if not {"RANK", "WORLD_SIZE"} & set(found):
        return 0, 1  # an address alone says nothing about ranks
    if absent := [name for name in _TORCH_VARIABLES if name not in found]:
        raise ConfigError(
            f"{', '.join(found)} are set, but {', '.join(absent)} are not",
            expected=f"all of {', '.join(_TORCH_VARIABLES)}, or no RANK and WORLD_SIZE",
            remedy="start with deepspeed, torchrun or mpirun, which set what they need; unset them for a single rank",
        )
    try:
        rank, world_size, local_rank = (int(environ[name]) for name in _TORCH_VARIABLES[:3])
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    if not (0 <= rank < world_size and 0 <= local_rank < world_size):
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} contradict each other",
            expected="ranks from 0 to WORLD_SIZE - 1",
        )
    return rank, world_size


def _require_all_tasks(environ: Mapping[str, str], world_size: int) -> None:
    """Stop a SLURM task that knows of fewer ranks than there are tasks, such as one that believes to be alone.

    Each of its siblings would do the whole run in the same folder. More ranks than tasks are possible: `deepspeed` and
    `torchrun` start several for one task.
    """
    num_tasks = int(environ.get("SLURM_NTASKS") or 1)
    if world_size < num_tasks:
        found = "has found no other rank" if world_size == 1 else f"is one of {world_size} ranks"
        raise ConfigError(
            f"SLURM_NTASKS is {num_tasks}, but this process {found}",
            expected=f"{num_tasks} ranks in one world, not several runs in one folder",
            remedy="start with `mpirun -n $SLURM_NTASKS` inside the batch script, or with `srun --mpi=pmix` where the "
            "site has PMIx; for fewer ranks on purpose, unset SLURM_NTASKS",
        )


def _meet(mpi: Coordinator | None, rank: int, world_size: int, seconds: float, network: str | None) -> Any:
    """Set the five variables where the starter did not; return what keeps the chosen port in our hands."""
    environ, store, local_rank = os.environ, None, 0
    if mpi is not None:
        store = meet_over_mpi(mpi, environ, network)
        local_rank = mpi.hosts[:rank].count(mpi.hosts[rank])
        environ["LOCAL_RANK"] = environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or str(local_rank)
    elif world_size == 1 and not environ.get("RANK"):
        store = open_store("127.0.0.1", 0, 1)
        environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), LOCAL_RANK="0")
    elif environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun's agent listens there
        store = meet_at_given_address(rank, world_size, environ, seconds)
    environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    return store


def _choose_device(asked: str, local_rank: int) -> torch.device:
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses anew, and warns when it guesses this
        return torch.device("cpu")
    if (num_devices := torch.cuda.device_count()) <= local_rank:
        raise ConfigError(
            f"local rank {local_rank} on {socket.gethostname()} finds {num_devices} CUDA device(s)",
            expected="one device a rank",
            remedy="start fewer ranks on this host, or choose device=cpu; under SLURM let each task see all GPUs of "
            "its node: --gpus-per-node, not --gpus-per-task",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _start_process_group(device: torch.device, rank: int, world_size: int, timeout_seconds: float) -> None:
    import deepspeed  # type: ignore[import-untyped]
    from deepspeed.utils import groups, logger  # type: ignore[import-untyped]

    logger.setLevel("WARNING")
    # On CPU, DeepSpeed would compile a shared-memory all-reduce that only its inference engine uses: minutes at the
    # first start, a compiler on every host, and a lock that a killed process leaves behind for ever.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, OSError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise CoordinationError(
            f"torch.distributed ({backend}) did not start on rank {rank} of {world_size} with {place}: "
            f"{str(error).splitlines()[0]}",
            expected=f"rank 0 listening there and {world_size} ranks reaching it within {timeout_seconds:g} s",
            remedy="where another job has the port, choose one with --master_port; else look at the other ranks",
        ) from error
    # DeepSpeed reduces gradients in a clone of the world, which else waits half an hour for a rank that is gone.
    assert "_WORLD_GROUP" in vars(groups), "another DeepSpeed than the one that is pinned"
    clone = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=timeout_seconds))
    vars(groups)["_WORLD_GROUP"] = clone
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise CoordinationError(
            f"torch.distributed calls this process rank {dist.get_rank()} of {dist.get_world_size()}",
            expected=f"rank {rank} of {world_size}",
        )


def _choose_coordinator(
    asked: str, mpi: Coordinator | None, rank: int, world_size: int, device: torch.device, timeout_seconds: float
) -> Coordinator:
    if mpi is not None and (asked == "mpi" or (asked == "auto" and world_size > 1)):
        mpi.address = os.environ["MASTER_ADDR"]
        return mpi
    if world_size == 1 and asked != "store":
        return Coordinator(WatchedTransport(LocalTransport()), timeout_seconds)
    address = os.environ["MASTER_ADDR"]
    transport = StoreTransport(0, world_size, address, timeout_seconds=timeout_seconds) if rank == 0 else None
    port = torch.tensor([transport.port if transport else 0], device=device)
    dist.broadcast(port, 0)
    if transport is None:
        transport = StoreTransport(rank, world_size, address, int(port.item()), timeout_seconds)
    return Coordinator(WatchedTransport(transport), timeout_seconds, address)


def _share_cores(meeting: Coordinator, companions: int) -> int:
    """Set the number of threads of this rank so that the processes of a host use each core once; return it.

    Some starters bind each rank to cores of its own and some do not. What all ranks of the host may use together,
    divided by their number, is right for both.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    own = sorted(os.sched_getaffinity(0))
    cores = meeting.gather("processor cores", own)
    here = [cores[rank] for rank, host in enumerate(meeting.hosts) if host == meeting.hosts[meeting.rank]]
    num_threads = max(1, min(len(own), len(set().union(*here)) // (len(here) + companions)))
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # for libraries that are loaded later
    torch.set_num_threads(num_threads)
    return num_threads


def _abort_after(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return an exception hook that also ends the MPI world: for errors that nothing catches."""

    def report_and_abort(*args: Any) -> None:
        hook(*args)
        leave_mpi(1)

    return report_and_abort

"""The devices of a host that are kept for refreshes beside training (`ar2.refresh_devices`): which, and are they there?

On GPUs they are those that the ranks of the host do not train on: what is visible behind the ranks' own; and where the
launcher of deepspeed has started the ranks, which shows them no more GPUs than slots, those that `sparring train`
names, else the next ones of the host. On CPUs a companion is a process, which needs no device.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

import torch

from engine.errors import ConfigError
from engine.run import Refresher
from launcher.world.opening import World
from launcher.world.starters import KEPT_GPUS, VISIBLE, named_gpus
from shards.errors import counted

_OF_DEEPSPEED = "CROSS_SIZE"
"""A variable that the launcher of deepspeed sets in its ranks, and nobody else does."""
_QUERY = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
_QUERY_SECONDS = 60.0


def refreshers_of(world: World, wanted: int, cores: Sequence[Sequence[int]] = ()) -> tuple[Refresher, ...]:
    """Choose the devices on which this rank starts companions: those of its host, where it is the first of it.

    Args:
        world: The ranks.
        wanted: Devices of each host.
        cores: Of the processor, that each rank may use: a starter may have bound it to its own.

    Raises:
        ConfigError: This host has fewer that no rank trains on.
    """
    if not wanted or not world.coordinator.is_first_of_host:
        return ()
    here = world.coordinator.ranks_of_host
    together = tuple(sorted({core for rank in here for core in cores[rank]})) if cores else ()
    if world.device.type == "cpu":
        return (Refresher("cpu", {}, together),) * wanted
    num_ranks = len(here)
    visible = visible_gpus(os.environ, torch.cuda.device_count())
    hidden = _hidden_gpus(len(visible)) if _OF_DEEPSPEED in os.environ else []
    kept = kept_gpus(visible, hidden, num_ranks=num_ranks, wanted=wanted)
    # All of them together have as many threads as the ranks of the host.
    threads = {"OMP_NUM_THREADS": str(max(1, num_ranks * torch.get_num_threads() // wanted))}
    return tuple(Refresher("cuda:0", {VISIBLE: gpu, **threads}, together) for gpu in kept)


def told_of(found: Sequence[Refresher]) -> str:
    """Say which devices of a host are kept, such as `GPU 6, GPU 7`.

    Args:
        found: They.
    """
    gpus = [one.environ[VISIBLE].removeprefix("GPU-") for one in found if VISIBLE in one.environ]
    return ", ".join(f"GPU {gpu}" for gpu in gpus) or f"{counted(len(found), 'companion')} of each host"


def visible_gpus(environ: Mapping[str, str], count: int) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls each GPU that this process sees, in torch's order.

    Args:
        environ: Environment variables.
        count: How many torch sees.
    """
    return (named_gpus(environ) or [str(number) for number in range(count)])[:count]


def kept_gpus(visible: Sequence[str], hidden: Sequence[str], *, num_ranks: int, wanted: int) -> list[str]:
    """Choose GPUs on which no rank trains; the ranks have the first that are visible.

    Args:
        visible: Of this host, as CUDA_VISIBLE_DEVICES calls them.
        hidden: Further ones that may be taken, likewise.
        num_ranks: On this host.
        wanted: How many are needed.

    Raises:
        ConfigError: There are fewer.
    """
    free = [*visible[num_ranks:], *hidden]
    if len(free) >= wanted:
        return free[:wanted]
    total = len(visible) + len(hidden)
    fewer = (
        f"start {counted(total - wanted, 'rank')} on each host (slots=, --num_accelerators, mpirun -n)"
        if total > wanted
        else f"set ar2.refresh_devices to {total - 1} at most"
        if total > 1
        else "set ar2.overlap=ranker and leave ar2.refresh_devices out"
    )
    raise ConfigError(
        f"ar2.refresh_devices keeps {counted(wanted, 'GPU')} of each host for the refresh, but of the {total} here "
        f"{counted(num_ranks, 'rank')} leave {len(free)}",
        expected=f"{counted(num_ranks + wanted, 'GPU')}, one for each rank and {wanted} more",
        remedy=f"{fewer}; where the host has more GPUs, let the processes see them ({VISIBLE})",
    )


def _hidden_gpus(num_visible: int) -> list[str]:
    """Return the GPUs of this host that this process does not see and may use; none where nobody can tell."""
    if KEPT_GPUS in os.environ:
        return [word for word in os.environ[KEPT_GPUS].split(",") if word]
    seen = {str(torch.cuda.get_device_properties(number).uuid) for number in range(num_visible)}
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=_QUERY_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [uuid for uuid in told.split() if uuid.removeprefix("GPU-") not in seen]

"""The table of the ranks that a run prints when its world has opened."""

from __future__ import annotations

import os
import socket

import psutil
import torch
from tabulate import tabulate

from engine.coordination.coordinator import Coordinator
from shards.errors import counted

_MOST_ROWS = 64
_GIB = 2**30


def table_of_ranks(coordinator: Coordinator, device: torch.device) -> str:
    """Gather what each rank computes on and return one table: rank, host, device, memory, transport.

    A point where ranks meet. Above 64 ranks, those of a host that are alike share a row.

    Args:
        coordinator: Of all ranks.
        device: This rank's.
    """
    told = coordinator.gather("table of the ranks", [*_device_and_memory(device), _transport(coordinator, device)])
    rows = [(str(rank), host, *row) for rank, (host, row) in enumerate(zip(coordinator.hosts, told, strict=True))]
    if len(rows) > _MOST_ROWS:
        rows = _by_host(rows)
    return tabulate(rows, headers=("rank", "host", "device", "memory", "transport"), tablefmt="simple")


def _device_and_memory(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{device} {torch.cuda.get_device_name(device)}", f"{free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
    memory = psutil.virtual_memory()
    threads = torch.get_num_threads()
    used_by = f"{device.type}, {counted(threads, 'thread')}"
    return used_by, f"{memory.available / _GIB:.0f} of {memory.total / _GIB:.0f} GiB free"


def _transport(coordinator: Coordinator, device: torch.device) -> str:
    tensors = "nccl" if device.type == "cuda" else "gloo"
    several = len(set(coordinator.hosts)) > 1
    words = {"mpi": "MPI", "store": "store", "local": "none"}[coordinator.kind]
    if not several:
        return f"{words} + {tensors}, one host"
    variable = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
    name = os.environ.get(variable, "").removeprefix("=")
    addresses = [entry.address for entry in psutil.net_if_addrs().get(name, []) if entry.family == socket.AF_INET]
    return f"{words} + {tensors} over {name or 'any interface'}" + (f" ({addresses[0]})" if addresses else "")


def _by_host(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Join neighbouring rows of one host: ranks from-to, and the first one's words."""
    joined: list[tuple[str, ...]] = []
    for rank, host, *words in rows:
        if joined and joined[-1][1] == host:
            first = joined[-1][0].split("-")[0]
            joined[-1] = (f"{first}-{rank}", *joined[-1][1:])
        else:
            joined.append((rank, host, *words))
    return joined

"""Rank 0's stores, which listen where the other ranks are and nowhere else.

A store of torch's asks nobody who they are. By itself it listens on every interface of its host; here it gets a socket
that listens at one address: the loopback where all ranks are on one host.
"""

from __future__ import annotations

import errno
import socket
from datetime import timedelta
from typing import Any

_BACKLOG = 4096


def open_listening_store(
    address: str, port: int, world_size: int, *, timeout_seconds: float = 300.0, everywhere: bool = False
) -> Any:
    """Open a `torch.distributed.TCPStore` on rank 0.

    Args:
        address: Where it listens, and how rank 0 itself reaches it. A name or an address that is not this host's own,
            as behind a gateway, makes it listen on every interface.
        port: 0 lets the system choose; the store's `port` then tells which it is.
        world_size: Number of ranks.
        timeout_seconds: How long its calls wait.
        everywhere: Listen on every interface, for where the others' way here is not known yet.

    Raises:
        OSError: The port is taken.
        RuntimeError: The store cannot be opened.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, its stub says otherwise

    listener = _listen("" if everywhere else address, port)
    port = listener.getsockname()[1]
    own = "127.0.0.1" if everywhere else address
    # With multi_tenant, torch's own rendezvous in this process finds the store open and shares it.
    return TCPStore(
        own,
        port,
        world_size,
        True,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def meet_at_store(rank: int, world_size: int, address: str, port: int, timeout_seconds: float) -> Any:
    """Open a store on rank 0; on another rank, connect to it.

    Args:
        rank: This process, 0 to world_size - 1.
        world_size: Number of ranks.
        address: Rank 0's, as the other ranks reach it.
        port: Where rank 0 listens; 0 on rank 0 lets the system choose.
        timeout_seconds: How long to try to connect, and how long the store's calls wait.

    Raises:
        OSError: The port is taken, or rank 0 is not reached.
        RuntimeError: The same, as torch tells it.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, its stub says otherwise

    if rank == 0:
        return open_listening_store(address, port, world_size, timeout_seconds=timeout_seconds)
    limit = timedelta(seconds=timeout_seconds)
    return TCPStore(address, port, world_size, False, timeout=limit, wait_for_workers=False)


def _listen(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), backlog=_BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL and not isinstance(error, socket.gaierror):
            raise
    return socket.create_server(("", port), backlog=_BACKLOG)

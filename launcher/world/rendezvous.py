"""Where the ranks first meet: the address and port of rank 0, found so that every host reaches it.

The starters differ in what they tell. `mpirun` tells no address: rank 0 offers those it has, every host tries them, and
the first that all of them reach is taken. `deepspeed` over pdsh tells the first word of `hostname -I`, which may be the
bridge of some container: a rank that finds nobody there tries the name by which the hostfile calls the first host.

A rank that does not come within `run.rendezvous_seconds` is named, with its host: nobody waits for a host on which
nothing was started.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil

from engine.coordination.coordinator import Coordinator, PeerError
from engine.coordination.listening import open_listening_store
from engine.errors import ConfigError, CoordinationError
from engine.reliability.preemption import PREEMPTION
from launcher.world.greeting import greet, why_unreached
from launcher.world.hostfile import HOST_NAME
from launcher.world.interfaces import interface_towards, interfaces, interfaces_for_ranks, set_collective_interface
from shards.errors import listed

_TRY_SECONDS = 3.0
"""How long one attempt to reach an address may take."""
_PAUSE_SECONDS = 0.2


def meet_over_mpi(mpi: Coordinator, environ: MutableMapping[str, str], network: str | None) -> Any:
    """Agree on rank 0's address over MPI and open its store; set MASTER_ADDR and MASTER_PORT on every rank.

    Args:
        mpi: Coordinator of the MPI world.
        environ: Of this process; changed.
        network: Interface or subnet to use; None tries all that are no container's.

    Returns:
        On rank 0 the open store, which holds the port as long as it is kept; None elsewhere.

    Raises:
        ConfigError: No address of rank 0 is reached by all hosts.
    """
    address = _address_for_all(mpi, environ, network) if len(set(mpi.hosts)) > 1 else "127.0.0.1"
    store = open_store(address, 0, mpi.world_size) if mpi.rank == 0 else None
    port = mpi.broadcast("port of the rendezvous", store.port if store else None)
    environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _tell_interface(environ, mpi.hosts, address)
    return store


def meet_at_given_address(rank: int, world_size: int, environ: MutableMapping[str, str], timeout_seconds: float) -> Any:
    """Meet at the MASTER_ADDR and MASTER_PORT that the starter has set, or where rank 0's host is reached in truth.

    Args:
        rank: This process.
        world_size: Number of ranks.
        environ: Of this process; MASTER_ADDR may be changed.
        timeout_seconds: How long to wait for all ranks.

    Returns:
        The store, open as long as it is kept.

    Raises:
        CoordinationError: The port is taken, rank 0 is not reached, or ranks have not come; a `PeerError` where it is
            rank 0 that says so.
    """
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    starters = hosts_of_starter(world_size)
    _require_host_of_starter(starters)
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        # The others may come by another address than the one they were told.
        local = address == "localhost" or address.startswith("127.")
        store = open_store("127.0.0.1" if local else address, port, world_size, everywhere=not local)
        hosts, reached = _wait_for_all(store, world_size, starters, deadline, timeout_seconds)
        address = reached or address
    else:
        address, store = _join(rank, [address, *starters[:1]], port, world_size, deadline, timeout_seconds)
        hosts = _register(store, rank, address, world_size, timeout_seconds)
    environ["MASTER_ADDR"] = address
    _tell_interface(environ, hosts, address)
    return store


def open_store(address: str, port: int, world_size: int, *, everywhere: bool = False) -> Any:
    """Open rank 0's store; torch's own rendezvous in this process finds it open and shares it.

    Args:
        address: Where it listens, and how rank 0 itself reaches it.
        port: Where to listen; 0 lets the system choose, and the store's `port` then tells which it is.
        world_size: Number of ranks.
        everywhere: Listen on every interface.

    Raises:
        CoordinationError: Another process has the port.
    """
    try:
        return open_listening_store(address, port, world_size, everywhere=everywhere)
    except (RuntimeError, OSError) as error:
        raise CoordinationError(
            f"rank 0 on {socket.gethostname()} cannot listen at port {port}: {str(error).splitlines()[0]}",
            expected="a port that no other process has",
            remedy="choose another with --master_port; or end the run that was left behind there",
        ) from error


def hosts_of_starter(world_size: int) -> list[str]:
    """Return the hostfile's name of each rank's host, as DeepSpeed's per-host process was told; empty where unknown."""
    with contextlib.suppress(ValueError, AttributeError, StopIteration):
        told = next(word for word in _words_of_starter() if word.startswith("--world_info="))
        slots = json.loads(base64.urlsafe_b64decode(told.removeprefix("--world_info=")))
        names = [name for name, places in slots.items() for _ in places]
        return names if len(names) == world_size and all(map(HOST_NAME.fullmatch, names)) else []
    return []


def _tell_interface(environ: MutableMapping[str, str], hosts: Sequence[str], address: str) -> None:
    """Tell gloo and NCCL the interface that leads to rank 0; on one host, let gloo listen on the loopback alone."""
    if len(set(hosts)) == 1:
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # NCCL goes through memory, and chooses itself
    elif interface := interface_towards(address):
        set_collective_interface(environ, interface)


def _words_of_starter() -> list[str]:
    """Return the command line of DeepSpeed's per-host process, which started this one; empty where there is none."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
        return words if "deepspeed.launcher.launch" in words else []
    return []


def _require_host_of_starter(starters: Sequence[str]) -> None:
    """Stop a process that `deepspeed` has started on another host than the only one of its list."""
    if len(set(starters)) != 1 or starters[0] == "localhost":
        return
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(starters[0])
        if not address.startswith("127.") and address not in {interface.address for interface in interfaces()}:
            raise ConfigError(
                f"deepspeed was to start on {starters[0]}, but has started on {socket.gethostname()}: with one host "
                "left of its hostfile it starts the processes where it is typed",
                expected=f"processes on {starters[0]}",
                remedy=f"add --force_multi, or type the command on {starters[0]} without --hostfile",
            )


def _name_of_start(world_size: int) -> str:
    """Return what the ranks of one start have in common, and those of another that has the same port have not."""
    shared = [word for word in _words_of_starter() if word.startswith(("--world_info=", "--master_"))]
    return hashlib.sha256("\0".join([str(world_size), *shared]).encode()).hexdigest()[:16]


def _pause() -> None:
    """Wait a moment; a rank that is asked to stop while the ranks come together has nothing to finish."""
    if PREEMPTION.requested:
        raise PREEMPTION.stop_here("the beginning, before all ranks had come")
    time.sleep(_PAUSE_SECONDS)


def _address_for_all(mpi: Coordinator, environ: MutableMapping[str, str], network: str | None) -> str:
    """Return the first address of rank 0's host that every other host reaches."""
    given = environ.get("MASTER_ADDR")
    with mpi.agreement("interfaces"):
        own = [given] if given else [interface.address for interface in interfaces_for_ranks(network)]
    with _greeter() if mpi.rank == 0 else contextlib.nullcontext((0, "")) as (port, word):
        own, port, word = mpi.broadcast("addresses of rank 0", [own, port, word])
        reached = [a for a in own if not mpi.is_first_of_host or why_unreached(a, port, word) is None]
        answers = mpi.gather("addresses reached", reached)
    if common := [address for address in own if all(address in answer for answer in answers)]:
        return str(common[0])
    table = "; ".join(
        f"{host} reaches {', '.join(answer) or 'none'}"
        for host, answer in dict(zip(mpi.hosts, answers, strict=True)).items()
        if host != mpi.hosts[0]
    )
    raise ConfigError(
        f"rank 0 (host {mpi.hosts[0]}) has the addresses {', '.join(own) or 'none'}, "
        f"and none is reached by all: {table}",
        expected="an address of rank 0's host that every host reaches, at ports above 1024",
        remedy="name the network that joins them with run.network (an interface or a subnet), or set MASTER_ADDR on "
        "rank 0's host; let no firewall stand between the nodes",
    )


@contextmanager
def _greeter() -> Iterator[tuple[int, str]]:
    """Greet everyone who connects while the body runs; yields (port, word)."""
    word = secrets.token_hex(8)
    with greet(word) as server:
        yield server.getsockname()[1], word
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread


def _join(
    rank: int, addresses: Sequence[str], port: int, world_size: int, deadline: float, timeout_seconds: float
) -> tuple[str, Any]:
    """Return (address, store) of rank 0, at the first address where it answers."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    while True:
        for address in dict.fromkeys(addresses):
            with contextlib.suppress(OSError, RuntimeError):
                socket.create_connection((address, port), _TRY_SECONDS).close()
                limit = timedelta(seconds=timeout_seconds + _TRY_SECONDS)
                store = TCPStore(address, port, world_size, False, timeout=limit, wait_for_workers=False)
                return socket.gethostbyname(address), store
        if time.monotonic() > deadline:
            raise CoordinationError(
                f"rank {rank} on {socket.gethostname()} did not reach rank 0 within {timeout_seconds:g} s: "
                f"nobody answers at {' or '.join(dict.fromkeys(addresses))}, port {port}",
                expected="rank 0 listening at an address that this host reaches",
                remedy="start with --master_addr ADDRESS, an address of the first host on the network that joins the "
                "nodes; `sparring preflight --hostfile FILE` tells which are reached",
            )
        _pause()


def _register(store: Any, rank: int, address: str, world_size: int, timeout_seconds: float) -> list[str]:
    """Tell rank 0 that this rank is here, wait until all are, and return every rank's host."""
    start = _name_of_start(world_size)
    deadline = time.monotonic() + timeout_seconds + _TRY_SECONDS  # rank 0 gives up first, and says who is absent
    try:
        if store.add(f"{start}/claims of {rank}", 1) > 1:
            raise CoordinationError(
                f"another process has come to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} as rank {rank}",
                expected="one run at this port",
                remedy="choose another port for the second run with --master_port",
            )
        store.set(f"{start}/here/{rank}", json.dumps([socket.gethostname(), address]))
        while not store.check([f"{start}/everybody"]):
            if time.monotonic() > deadline:
                raise CoordinationError(
                    f"rank {rank} on {socket.gethostname()} is not awaited at {address}, port "
                    f"{os.environ['MASTER_PORT']}: the rank 0 that listens there is another run's",
                    expected="one run at this port",
                    remedy="choose another port for this run with --master_port",
                )
            _pause()
        verdict = json.loads(store.get(f"{start}/everybody"))
    except RuntimeError as error:
        raise CoordinationError(
            f"rank {rank} on {socket.gethostname()} lost rank 0 while the ranks were coming together",
            expected=f"all ranks within {timeout_seconds:g} s",
            remedy="look at what rank 0 says",
        ) from error
    if "missing" in verdict:
        refusal = PeerError(verdict["missing"])
        refusal.lost = True
        raise refusal
    return list(verdict["hosts"])


def _wait_for_all(
    store: Any, world_size: int, starters: Sequence[str], deadline: float, timeout_seconds: float
) -> tuple[list[str], str]:
    """Wait, on rank 0, until all ranks are here; return their hosts and the address at which rank 0 was reached."""
    absent, start = list(range(1, world_size)), _name_of_start(world_size)
    while absent := [rank for rank in absent if not store.check([f"{start}/here/{rank}"])]:
        if time.monotonic() > deadline:
            names = listed((f"{rank}{f' ({starters[rank]})' if starters else ''}" for rank in absent), 16)
            error = CoordinationError(
                f"{len(absent)} of {world_size} ranks have not come within {timeout_seconds:g} s: {names}",
                expected="every host of the hostfile to start its ranks and to reach "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} on {socket.gethostname()}",
                remedy="look above for what ssh or these hosts said; `sparring preflight --hostfile FILE` "
                "checks every host; slow hosts want a longer run.rendezvous_seconds",
            )
            store.set(f"{start}/everybody", json.dumps({"missing": str(error)}))
            time.sleep(3 * _PAUSE_SECONDS)  # until those who wait have heard it
            raise error
        _pause()
    others = [json.loads(store.get(f"{start}/here/{rank}")) for rank in range(1, world_size)]
    hosts = [socket.gethostname(), *(host for host, _ in others)]
    store.set(f"{start}/everybody", json.dumps({"hosts": hosts}))
    return hosts, next((address for host, address in others if host != hosts[0]), "")

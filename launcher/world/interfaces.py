"""Over which interfaces the ranks of several hosts reach each other.

Hosts have more interfaces than one: a network for management, one for data, bridges of containers that carry the same
address on every host. What libraries take by default is often the first, or whatever the host's own name resolves to,
which on Debian and Ubuntu is 127.0.1.1. So each rank chooses here and tells MPI, gloo and NCCL, unless they were told
by the person who started the run.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import psutil

from engine.errors import ConfigError

_OF_CONTAINERS = re.compile(r"(lo|docker|br-|virbr|veth|cni|cali|flannel|lxc|lxd|podman|vmnet|tap|tailscale)")
_MPI_INCLUDE, _MPI_EXCLUDE = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that is up, with one of its IPv4 addresses."""

    name: str
    address: str
    network: ipaddress.IPv4Network


def interfaces() -> list[Interface]:
    """Return the interfaces of this host that are up and have an IPv4 address, the loopback too."""
    states = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family == socket.AF_INET and entry.netmask and (name not in states or states[name].isup):
                network = ipaddress.IPv4Network(f"{entry.address}/{entry.netmask}", strict=False)
                found.append(Interface(name, entry.address, network))
    return found


def interfaces_for_ranks(asked: str | None) -> list[Interface]:
    """Return the interfaces over which ranks of other hosts may be reached.

    Args:
        asked: Names or subnets, divided by commas, such as `ib0` or `10.0.0.0/16`. None leaves out the loopback and
            what containers and virtual machines use, whose addresses repeat on every host.

    Raises:
        ConfigError: This host has no interface that was asked for, or something asked for is neither.
    """
    present = interfaces()
    if asked is None:
        return [interface for interface in present if not _OF_CONTAINERS.match(interface.name)]
    chosen = [interface for interface in present if any(_is_meant(interface, word) for word in _words(asked))]
    if not chosen:
        have = ", ".join(f"{interface.name} ({interface.network})" for interface in present)
        raise ConfigError(
            f"{socket.gethostname()} has no interface for run.network={asked}",
            expected=f"one of {have}",
            remedy="name a subnet (10.0.0.0/16) where the interfaces have other names on other hosts",
        )
    return chosen


def interface_towards(address: str) -> Interface | None:
    """Return the interface by which this host reaches an address; nothing is sent to find it."""
    present = interfaces()
    if own := next((interface for interface in present if interface.address == address), None):
        return own
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # chooses the route
            source = str(probe.getsockname()[0])
    except OSError:
        return None
    return next((interface for interface in present if interface.address == source), None)


def set_mpi_interfaces(environ: MutableMapping[str, str], asked: str | None) -> None:
    """Tell Open MPI which interfaces to use, before it starts; what it was told is kept where this host has it.

    `deepspeed --launcher openmpi` tells it `eth0` on every cluster. Without any word it would also use the bridges of
    containers, and wait for ever where two hosts have the same address there.

    Args:
        environ: Of this process; changed.
        asked: As for `interfaces_for_ranks`.

    Raises:
        ConfigError: As `interfaces_for_ranks`.
    """
    if _all_on_one_host(environ):
        environ.setdefault("OMPI_MCA_btl", "self,sm")  # through memory: nothing listens
        return
    if asked is None and (told := environ.get(_MPI_INCLUDE)):
        if any(_is_meant(interface, word) for interface in interfaces() for word in _words(told)):
            return
        del environ[_MPI_INCLUDE]  # Open MPI would have no way to other hosts at all
    elif asked is None and environ.get(_MPI_EXCLUDE):
        return
    if chosen := interfaces_for_ranks(asked):
        environ.pop(_MPI_EXCLUDE, None)  # Open MPI takes one of the two
        environ[_MPI_INCLUDE] = ",".join(dict.fromkeys(interface.name for interface in chosen))


def set_collective_interface(environ: MutableMapping[str, str], interface: Interface) -> None:
    """Tell gloo and NCCL which interface leads to the other ranks, unless they were told.

    Args:
        environ: Of this process; changed.
        interface: This host's, towards rank 0.
    """
    environ.setdefault("GLOO_SOCKET_IFNAME", interface.name)
    environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface.name}")  # '=' is NCCL's mark of a whole name


def _all_on_one_host(environ: Mapping[str, str]) -> bool:
    size = environ.get("OMPI_COMM_WORLD_SIZE")
    return size is not None and size == environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _is_meant(interface: Interface, word: str) -> bool:
    if "/" in word:
        try:
            return ipaddress.IPv4Address(interface.address) in ipaddress.IPv4Network(word, strict=False)
        except ValueError as error:
            raise ConfigError(
                f"{word!r} is no subnet: {error}", expected="an interface such as ib0, or a subnet such as 10.0.0.0/16"
            ) from error
    return interface.name == word

"""Which interfaces are taken, told apart from containers', and what is told to MPI, gloo and NCCL."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from engine.errors import ConfigError
from launcher.world import interfaces as network
from launcher.world.interfaces import Interface

LO = Interface("lo", "127.0.0.1", IPv4Network("127.0.0.0/8"))
DOCKER = Interface("docker0", "172.17.0.1", IPv4Network("172.17.0.0/16"))
MANAGEMENT = Interface("eno1", "192.168.4.7", IPv4Network("192.168.4.0/24"))
DATA = Interface("ib0", "10.1.0.7", IPv4Network("10.1.0.0/16"))
INCLUDE, EXCLUDE = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: [LO, DOCKER, MANAGEMENT, DATA])


def test_bridges_of_containers_and_the_loopback_are_left_out() -> None:
    assert network.interfaces_for_ranks(None) == [MANAGEMENT, DATA]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [("ib0", [DATA]), ("10.1.0.0/16", [DATA]), ("ib0, eno1", [MANAGEMENT, DATA]), ("docker0", [DOCKER])],
)
def test_what_is_asked_for_is_taken(asked: str, chosen: list[Interface]) -> None:
    assert network.interfaces_for_ranks(asked) == chosen


@pytest.mark.parametrize("asked", ["ib1", "10.2.0.0/16"])
def test_what_is_not_there_is_refused_with_what_is(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"ib0 \(10\.1\.0\.0/16\)"):
        network.interfaces_for_ranks(asked)


def test_a_word_that_is_neither_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'ib0/x' is no subnet"):
        network.interfaces_for_ranks("ib0/x")


def test_mpi_is_kept_from_the_bridges() -> None:
    """Symptom: mpirun over two hosts hangs in its first message, since both have a docker0 with the same address."""
    environ: dict[str, str] = {}
    network.set_mpi_interfaces(environ, None)
    assert environ == {INCLUDE: "eno1,ib0"}


def test_an_interface_that_the_host_does_not_have_is_replaced() -> None:
    """Symptom: `deepspeed --launcher openmpi` finds no way between hosts whose interface is not called eth0."""
    environ = {INCLUDE: "eth0"}
    network.set_mpi_interfaces(environ, None)
    assert environ == {INCLUDE: "eno1,ib0"}


@pytest.mark.parametrize("told", [{INCLUDE: "ib0"}, {INCLUDE: "10.1.0.0/16"}, {EXCLUDE: "lo,eno1"}])
def test_what_mpi_was_told_is_kept(told: dict[str, str]) -> None:
    environ = dict(told)
    network.set_mpi_interfaces(environ, None)
    assert environ == told


def test_run_network_goes_before_what_the_starter_told() -> None:
    environ = {INCLUDE: "eno1", EXCLUDE: "lo"}
    network.set_mpi_interfaces(environ, "ib0")
    assert environ == {INCLUDE: "ib0"}


def test_gloo_and_nccl_are_told_unless_they_were() -> None:
    environ = {"NCCL_SOCKET_IFNAME": "eno1"}
    network.set_collective_interface(environ, DATA)
    assert environ == {"NCCL_SOCKET_IFNAME": "eno1", "GLOO_SOCKET_IFNAME": "ib0"}


def test_the_interface_that_has_an_address_leads_to_it() -> None:
    assert network.interface_towards("10.1.0.7") == DATA
    assert network.interface_towards("host.invalid") is None


def test_ranks_of_one_host_talk_through_memory() -> None:
    """Symptom: on a laptop MPI opens ports to which anybody on the network can connect."""
    environ = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    network.set_mpi_interfaces(environ, None)
    assert environ["OMPI_MCA_btl"] == "self,sm"
    assert INCLUDE not in environ

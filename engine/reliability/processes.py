"""Processes as files name them, and whether they still run."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Signed:
    """A record that names the process which wrote it."""

    host: str
    place: str
    """Host, boot and process namespace: where two records agree in it, one can look for the other's process."""
    pid: int

    @property
    def is_from_here(self) -> bool:
        """Whether its process can be looked for from here."""
        return self.place == own_place()

    @property
    def process_is_gone(self) -> bool:
        """Whether its process has ended, as far as that can be seen from here."""
        return self.is_from_here and not process_is_alive(self.pid)


@cache
def own_place() -> str:
    """Return what two processes share that can see each other's process ids: host, boot and process namespace."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot_id()}/{os.readlink(namespace) if namespace.exists() else ''}"


def boot_id() -> str:
    """Return the kernel's id of its last start, which no other machine has; empty where it tells none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def process_is_alive(pid: int) -> bool:
    """Whether a process of this host runs; one that has ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    return True

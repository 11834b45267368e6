"""Hosts on one machine: network namespaces with names, addresses, mounts and an sshd of their own.

A `Lab` has a login host and some nodes, all on one switch. What runs on a node sees only the node's processes,
interfaces, host name and mounts, and reaches the others over TCP; the file system below is shared, as a cluster's is.
A node can be cut off, slowed down, or lost with all its processes. Every node is as awkward as real ones are:

* the first address that `hostname -I` prints is that of a `docker0`, the same on every node, where nobody answers;
* the node's own name resolves to 127.0.1.1 on it, as Debian sets it up;
* /tmp, /run and /dev/shm are its own.

Nothing of the machine changes: the namespaces live as long as their first process, which dies with this one. Wants
root with the rights to make namespaces, sshd, ip and mount; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_PROGRAMS = ("ip", "nsenter", "unshare", "setpriv", "mount", "sshd", "ssh", "ssh-keygen")
_WORLD_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "PRTE_", "PYTEST_")
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

# The first process of a node: reaps what its dead processes leave, as an init does.
_INIT = "import os, time\nwhile True:\n try: os.wait()\n except ChildProcessError: time.sleep(0.1)\n"


def why_not(*programs: str) -> str | None:
    """Return why no lab can be made here, or None where it can.

    Args:
        programs: What a test needs besides, such as `pdsh`.
    """
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := [name for name in (*_PROGRAMS, *programs) if shutil.which(name, path=path) is None]:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "x", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces are not allowed: {trial.stderr.strip()}" if trial.returncode else None


class Host:
    """A machine of the lab.

    Attributes:
        name: Its host name.
        address: Its IPv4 address on the lab's network, at interface `interface`.
        interface: `eth0`, unless renamed.
    """

    def __init__(self, lab: Lab, name: str, address: str, *, is_node: bool) -> None:
        self.lab, self.name, self.address, self.is_node = lab, name, address, is_node
        self.interface = "eth0"
        spaces = ["--net", "--uts", "--mount", *(["--pid", "--fork", "--mount-proc"] if is_node else [])]
        unshare = ["unshare", *spaces, *(["--kill-child"] if is_node else [])]
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *unshare, sys.executable, "-S", "-c", _INIT], stdin=subprocess.DEVNULL
        )
        self.pid = self._pid_of_init()
        self._set_up()

    def command(self, words: Sequence[str | Path], folder: Path | None = None) -> list[str]:
        """Return the words that run a command on this host, in the project's folder or another."""
        spaces = ["--net", "--uts", "--mount", *(["--pid"] if self.is_node else [])]
        return ["nsenter", "-t", str(self.pid), *spaces, f"--wd={folder or ROOT}", "--", *map(str, words)]

    def start(
        self,
        words: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int | None = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host, in a session of its own; on the login host the process is the command's."""
        return subprocess.Popen(
            self.command(words),
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(
        self, words: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end and return what it printed, both streams in one.

        Raises:
            TimeoutError: It still ran; the message holds what it had printed.
        """
        process = self.start(words, env)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            output, _ = process.communicate()
            text = output.decode(errors="replace")
            raise TimeoutError(f"{words} on {self.name} still ran after {timeout:g} s\n{text}") from None
        return subprocess.CompletedProcess([*map(str, words)], process.returncode, output.decode(errors="replace"))

    def check(self, *words: str | Path) -> str:
        """Run a command of the lab's own; it must succeed."""
        done = self.run(words)
        if done.returncode:
            raise RuntimeError(f"{words} on {self.name}: {done.stdout}")
        return done.stdout

    def cut_off(self) -> None:
        """Take the host off the network: its link is down, its processes go on."""
        self.lab.switch("ip", "link", "set", self._port, "down")

    def connect(self) -> None:
        """Bring the host back onto the network."""
        self.lab.switch("ip", "link", "set", self._port, "up")

    def rename_interface(self, name: str) -> None:
        """Call the host's interface otherwise, such as `ib0`."""
        self.check("ip", "link", "set", self.interface, "down")
        self.check("ip", "link", "set", self.interface, "name", name)
        self.check("ip", "link", "set", name, "up")
        self.interface = name

    def start_sshd(self) -> None:
        """Let others log in; as a host does when it starts."""
        self.check("/usr/sbin/sshd", "-f", self.lab.folder / "sshd_config")

    def stop_sshd(self) -> None:
        """Refuse new logins; sessions that are open stay."""
        self.run(["pkill", "-x", "-o", "sshd"])

    def mount_small(self, path: Path, size: str) -> None:
        """Put a file system of its own over a folder, on this host alone.

        Args:
            path: An existing folder.
            size: As mount's, such as `8m`.
        """
        self.check("mount", "-t", "tmpfs", "-o", f"size={size}", "small", path)

    def unmount(self, path: Path) -> None:
        """Take it away again."""
        self.check("umount", "--lazy", path)

    def kill_processes(self, pattern: str) -> None:
        """Kill all processes of the host whose command line matches."""
        self.run(["pkill", "-9", "-f", pattern])

    def lose(self) -> None:
        """End the host with all its processes, without a word to anybody: the link goes first."""
        with contextlib.suppress(subprocess.CalledProcessError):  # lost before
            self.lab.switch("ip", "link", "del", self._port)
        self._holder.kill()
        self._holder.wait()

    def _pid_of_init(self) -> int:
        """Return the process id, seen from here, of the host's first process."""
        deadline = time.monotonic() + 10
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        while time.monotonic() < deadline:
            words = Path(f"/proc/{self._holder.pid}/cmdline").read_bytes()
            if not self.is_node and words.startswith(os.fsencode(sys.executable)):
                return self._holder.pid
            for child in children.read_text().split() if self.is_node else []:
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/cmdline").read_bytes().startswith(os.fsencode(sys.executable)):
                        return int(child)
            time.sleep(0.01)
        raise RuntimeError(f"the namespaces of {self.name} did not come up")

    @property
    def _port(self) -> str:
        return f"p-{self.name}"

    def _set_up(self) -> None:
        lab, inner = self.lab, self.check
        if self.is_node:
            inner("ip", "link", "add", "docker0", "type", "bridge")
            inner("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
            inner("ip", "link", "set", "docker0", "up")
        # A node that comes back has the same hardware address: others remember it.
        hardware = "02:00:0a:4d:00:{:02x}".format(int(self.address.rpartition(".")[2]))
        inside = ["name", "eth0", "address", hardware, "netns", str(self.pid)]
        lab.switch("ip", "link", "add", self._port, "type", "veth", "peer", *inside)
        lab.switch("ip", "link", "set", self._port, "master", "br0", "up")
        inner("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        inner("ip", "link", "set", "eth0", "up")
        inner("ip", "link", "set", "lo", "up")
        inner("hostname", self.name)
        inner("mount", "--make-rprivate", "/")
        hosts = lab.folder / f"hosts-{self.name}"
        others = [(host.address, host.name) for host in lab.addresses() if host.name != self.name]
        own = "127.0.1.1" if self.is_node else self.address
        lines = [("127.0.0.1", "localhost"), (own, self.name), *others]
        hosts.write_text("".join(f"{address}\t{name}\n" for address, name in lines), encoding="ascii")
        inner("mount", "--bind", hosts, "/etc/hosts")
        inner("mount", "--bind", lab.folder / "ssh_config", "/etc/ssh/ssh_config")
        if self.is_node:
            self._mount_own_tmp()
            inner("mount", "-t", "tmpfs", "-o", "size=2g", "shm", "/dev/shm")
            inner("mount", "-t", "tmpfs", "-o", "size=16m", "run", "/run")
            inner("mkdir", "-p", "/run/sshd")
            self.start_sshd()

    def _mount_own_tmp(self) -> None:
        """Give the host a /tmp of its own, with what all share still in it where it lay there."""
        kept = [self.lab.folder, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        shared = [str(path) for path in dict.fromkeys(kept) if path.is_relative_to("/tmp")]
        self.check("mount", "-t", "tmpfs", "-o", "size=1g", "aside", "/mnt")
        for number, path in enumerate(shared):
            self.check("mkdir", f"/mnt/{number}")
            self.check("mount", "--bind", path, f"/mnt/{number}")
        self.check("mount", "-t", "tmpfs", "-o", "size=1g,mode=1777", "tmp", "/tmp")
        for number, path in enumerate(shared):
            self.check("mkdir", "-p", path)
            self.check("mount", "--bind", f"/mnt/{number}", path)


class _Place:
    """Name and address of a host, before it exists."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address


class Lab:
    """A login host and nodes `node1`, `node2`... on one switch.

    Args:
        folder: For keys and settings; must exist, and be readable by all hosts.
        num_nodes: Number of nodes.
    """

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder, self._num_nodes = folder, num_nodes
        self.nodes: list[Host] = []

    def __enter__(self) -> Lab:
        self._write_settings()
        self._switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", sys.executable, "-S", "-c", _INIT],
            stdin=subprocess.DEVNULL,
        )
        self.switch_pid = self._switch.pid
        while not Path(f"/proc/{self.switch_pid}/cmdline").read_bytes().startswith(os.fsencode(sys.executable)):
            time.sleep(0.01)
        try:
            self.switch("ip", "link", "add", "br0", "type", "bridge")
            self.switch("ip", "link", "set", "br0", "up")
            first, *rest = self.addresses()
            self.login = Host(self, first.name, first.address, is_node=False)
            self.nodes = [Host(self, place.name, place.address, is_node=True) for place in rest]
            self._wait_for_sshd()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def addresses(self) -> list[_Place]:
        """Return name and address of every host, the login host first."""
        nodes = [_Place(f"node{i}", f"10.77.0.{10 + i}") for i in range(1, self._num_nodes + 1)]
        return [_Place("login", "10.77.0.1"), *nodes]

    def switch(self, *words: str) -> None:
        """Run `ip` on the switch."""
        subprocess.run(["nsenter", "-t", str(self.switch_pid), "--net", "--", *words], check=True, capture_output=True)

    def restart_node(self, number: int) -> Host:
        """Start a lost node again, with the same name and address."""
        place = self.addresses()[number]
        self.nodes[number - 1] = Host(self, place.name, place.address, is_node=True)
        self._wait_for_sshd()
        return self.nodes[number - 1]

    def hostfile(self, path: Path, slots: int = 1, *, by_name: bool = True) -> Path:
        """Write a hostfile of all nodes."""
        hosts = [host.name if by_name else host.address for host in self.nodes]
        path.write_text("".join(f"{host} slots={slots}\n" for host in hosts), encoding="ascii")
        return path

    def close(self) -> None:
        """Take everything down."""
        hosts = [*self.nodes, *([self.login] if hasattr(self, "login") else [])]
        for host in hosts:
            host.lose()
        self._switch.kill()
        self._switch.wait()

    def _write_settings(self) -> None:
        for name in ("key", "hostkey"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)],
                check=True,
                stdin=subprocess.DEVNULL,
            )
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        hostkey = " ".join((self.folder / "hostkey.pub").read_text().split()[:2])
        names = ",".join(word for place in self.addresses() for word in (place.name, place.address))
        (self.folder / "known_hosts").write_text(f"{names} {hostkey}\n")
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/key\n  UserKnownHostsFile {self.folder}/known_hosts\n"
            "  StrictHostKeyChecking yes\n"
        )
        (self.folder / "sshd_config").write_text(
            f"Port 22\nHostKey {self.folder}/hostkey\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            "StrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nPidFile none\n"
            "MaxStartups 100\nUseDNS no\nX11Forwarding no\n"
            f"SetEnv PATH={BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        )

    def _wait_for_sshd(self) -> None:
        for host in self.nodes:
            deadline = time.monotonic() + 10
            while (done := self.login.run(["ssh", "-o", "BatchMode=yes", host.name, "true"])).returncode:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no ssh to {host.name}: {done.stdout}")
                time.sleep(0.1)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without any sign of a world, with the programs of the environment first."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _WORLD and not name.startswith(_WORLD_PREFIXES) and name != "PYTHONPATH"
    }
    env["PATH"] = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", DS_ACCELERATOR="cpu")
    return {**env, **(extra or {})}

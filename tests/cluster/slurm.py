"""A SLURM in the lab: slurmctld on the login host, a slurmd on every node, munge, no accounting database.

All state lies in one folder, SLURM_CONF says where, and every daemon dies with the lab; what slurmd makes below
/sys/fs/cgroup is removed. Processes are tracked by control groups, as sites do: at a preemption only the first process
of a step is signalled. What a site sets to minutes is set to seconds here:

* `cred_expire` in AuthInfo: a requeued job waits so long (120 s by default) before it may start again;
* `sched_interval`, `sched_min_interval`, `batch_sched_delay`: how often jobs are started;
* `KillWait`: from SIGTERM to SIGKILL at the end of a job (30 s);
* `SlurmdTimeout`: how long a node may be silent before it counts as down (300 s);
* `GraceTime` of a partition: from the word of preemption to the end (a site's own choice, 0 by default).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster.lab import BIN, Host, Lab

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
GRACE_SECONDS = 30
_CGROUPS = Path("/sys/fs/cgroup")
_CONF = """\
ClusterName=lab
SlurmctldHost={login}({login_address})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldTimeout=30
SlurmdTimeout=10
TmpFS={folder}/tmp.%n
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,preempt_youngest_first
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime={grace} PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_no_slurm() -> str | None:
    """Return why no SLURM can be started here, or None where it can."""
    own = _CGROUPS / "freezer" if (_CGROUPS / "freezer").is_dir() else _CGROUPS
    return None if os.access(own, os.W_OK) else f"slurmd needs control groups, and {own} cannot be written"


class Slurm:
    """The daemons, from their start to their end.

    Args:
        lab: The hosts; slurmctld runs on the login host.
        folder: Takes settings, state, sockets and logs; exists, and all hosts see it.
    """

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        """What SLURM's commands need in their environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}

    def __enter__(self) -> Slurm:
        for name in ("state", *(f"{kind}.{node.name}" for node in self.lab.nodes for kind in ("spool", "tmp"))):
            (self.folder / name).mkdir()
        nodes = [
            f"NodeName={node.name} NodeAddr={node.address} CPUs=4 RealMemory=2000 State=UNKNOWN"
            for node in self.lab.nodes
        ]
        text = _CONF.format(
            login=self.lab.login.name,
            login_address=self.lab.login.address,
            folder=self.folder,
            grace=GRACE_SECONDS,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        version = 2 if (_CGROUPS / "cgroup.controllers").exists() else 1
        (self.folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v{version}\nCgroupMountpoint=/sys/fs/cgroup\n"
            + "IgnoreSystemd=yes\n" * (version == 2)
        )
        try:
            self._start_munge()
            self._start(self.lab.login, "slurmctld", "-D")
            for node in self.lab.nodes:
                self.start_slurmd(node)
            self.wait_for(self._is_up, "both nodes idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, words: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host, as a user does."""
        return self.lab.login.run(words, {**self.env, **(env or {})}, timeout)

    def check(self, *words: str | Path) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.run(words)
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stdout}")
        return done.stdout

    def ask(self, *words: str) -> str:
        """Run a command that only asks; again where SLURM was too busy to answer."""
        for _ in range(5):
            done = self.run(words)
            if done.returncode == 0:
                return done.stdout
            time.sleep(1.0)
        raise RuntimeError(f"{words}: {done.stdout}")

    def start_slurmd(self, node: Host) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node.name)

    def kill_slurmd(self, node: Host) -> None:
        """Let a node's slurmd and all that it started die."""
        node.run(["pkill", "-9", "slurm"])

    def job(self, job_id: str) -> dict[str, str]:
        """Return what SLURM knows of a job, as `scontrol show job` prints it."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job_id)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Wait until something is so.

        Raises:
            TimeoutError: It did not come; the message holds the ends of the daemons' logs.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s for: {what}\n{self.report()}")
            time.sleep(0.2)

    def wait_for_state(self, job_id: str, *states: str, timeout: float = 60.0) -> dict[str, str]:
        """Wait until a job is in one of some states, such as RUNNING; return what is known of it then."""
        self.wait_for(lambda: self.job(job_id)["JobState"] in states, f"job {job_id} {states}", timeout)
        return self.job(job_id)

    def report(self) -> str:
        """Return the queue and the ends of all logs, for the message of a test that fails."""
        texts = [self.run([name]).stdout for name in ("squeue", "sinfo")]
        logs = [*self.folder.glob("*.log"), *self.lab.folder.glob("**/slurm/*.out")]
        texts += [f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs]
        return "\n".join(texts)

    def close(self) -> None:
        """End the daemons; what the nodes still run dies with the lab."""
        for node in self.lab.nodes:
            self.kill_slurmd(node)
        for process in reversed(self._daemons):
            process.kill()
            process.wait()
        for path in sorted(_CGROUPS.glob("**/slurm_node*/**/"), reverse=True):  # the deepest first
            with contextlib.suppress(OSError):  # an attribute's folder, or one that still has a process to reap
                path.rmdir()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start(self.lab.login, "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self.wait_for((self.folder / "munge.socket").exists, "munged")

    def _start(self, host: Host, program: str, *words: str) -> None:
        path = shutil.which(program, path="/usr/sbin:/usr/bin")
        with (self.folder / f"{program}-{host.name}.out").open("ab") as output:
            command = ["setpriv", "--pdeathsig", "KILL", str(path), *words]
            self._daemons.append(host.start(command, self.env, output.fileno()))

    def _is_up(self) -> bool:
        done = self.run(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"])
        return done.stdout.split() == ["idle"] * len(self.lab.nodes)

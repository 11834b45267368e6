"""Run a function on several ranks, each a process of its own, and get back what each of them printed.

The same function can be started in every way that a user's run can: as processes with torch's variables, by `mpirun`,
by `deepspeed`, or alone. This file is also what those start: see `_run_one_rank`. Processes that no other program
starts are copies of one that has imported everything (`tests.e2e.zygote`), unless a test is about their beginning.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_WORLD_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "PRTE_")


class Process(Protocol):
    """What is common to a process that was started and to one that was forked."""

    pid: int
    returncode: Any

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int | None: ...

    def terminate(self) -> None: ...


class RankResult(NamedTuple):
    """How one rank ended. Under `mpirun` and `deepspeed` the return code is the launcher's, the same for all.

    `log` is what the launcher itself printed, or the rank before it had files of its own to print to.
    """

    rank: int
    returncode: int
    stdout: str
    stderr: str
    log: str


def free_port() -> int:
    """Return a TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this processor: it asks oneDNN, as this does."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without any sign of a world, for processes of tests.

    They have one thread: the tests share their cores, and threads that wait for each other there burn them.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _WORLD_VARIABLES and not name.startswith(_WORLD_PREFIXES)
    }
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(_BIN), env.get("PATH", "")])
    env.update(
        TORCH_CPP_LOG_LEVEL="ERROR", OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1"
    )
    return {**env, **(extra or {})}


def run_ranks(
    target: str,
    world_size: int,
    launcher: Literal["store", "mpirun", "deepspeed", "plain"] = "store",
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    *,
    fresh: bool = False,
) -> list[RankResult]:
    """Run a target on every rank and wait for all of them.

    Args:
        target: `module:function`, called without arguments (its integer result is the exit code), or the text of a
            script, recognised by its line breaks.
        world_size: Number of ranks.
        launcher: "store": processes with torch's five variables; "plain": processes without any.
        timeout: Seconds, after which everything is killed.
        env: Further variables.
        fresh: Whether the processes import everything themselves; those of `mpirun` and `deepspeed` always do.

    Returns:
        One entry a rank, in rank order.

    Raises:
        TimeoutError: Something still ran at the deadline; the message holds what the ranks had printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "\n" in target:
            (folder / "script.py").write_text(target, encoding="utf-8")
            target = str(folder / "script.py")
        commands = _commands(launcher, world_size, [__file__, name, target], clean_environment(env))
        forked = not fresh and launcher in {"store", "plain"}
        processes = [
            _start(command, variables, folder / f"launcher-{number}.log", forked=forked)
            for number, (command, variables) in enumerate(commands)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            report = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in _logs(folder))
            raise TimeoutError(f"{launcher} with {world_size} ranks still ran after {timeout:g} s\n{report}") from None
        finally:
            _kill_all(folder, processes)
        starter = [min(rank, len(processes) - 1) for rank in range(world_size)]  # one for all, or one each
        return [
            _result(folder, rank, processes[number].returncode, folder / f"launcher-{number}.log")
            for rank, number in enumerate(starter)
        ]


def report(results: Sequence[RankResult]) -> str:
    """Return all that ranks printed, for the message of a test that fails."""
    return "\n".join(
        f"--- rank {r.rank} ended with {r.returncode}\n{r.stdout}{r.stderr}--- its launcher\n{r.log}" for r in results
    )


def _commands(
    launcher: str, world_size: int, arguments: Sequence[str], env: dict[str, str]
) -> list[tuple[list[str], dict[str, str]]]:
    """Return (command, environment) of each process to start."""
    own = [sys.executable, *arguments]
    if launcher == "mpirun":
        return [([str(_BIN / "mpirun"), "--oversubscribe", "-n", str(world_size), *own], env)]
    if launcher == "deepspeed":
        # A folder without `.deepspeed_env` and without a job-wide hostfile is not certain; a name that is absent is.
        options = ["--hostfile", "/nonexistent", "--num_gpus", str(world_size), "--master_port", str(free_port())]
        return [([str(_BIN / "deepspeed"), *options, *arguments], {**env, "DS_ACCELERATOR": "cpu"})]
    if launcher == "plain":
        return [(own, {**env, "TEST_RANK": str(rank)}) for rank in range(world_size)]
    port = str(free_port())
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [(own, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), **env}) for rank in range(world_size)]


def _start(command: list[str], env: dict[str, str], log: Path, *, forked: bool) -> Process:
    if forked:
        from tests.e2e.starts import the_zygote

        return the_zygote().rank(command[1:], env, log)
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _logs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in {".out", ".err", ".log"})


def _kill_all(folder: Path, processes: Sequence[Process]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()  # mpirun ends its ranks on this one, which a killed mpirun cannot
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for path in folder.glob("*.pid"):  # a rank that its launcher left behind
        pid = int(path.read_text())
        with contextlib.suppress(OSError):
            if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def _result(folder: Path, rank: int, returncode: int, log: Path) -> RankResult:
    paths = [folder / f"rank-{rank}.out", folder / f"rank-{rank}.err", log]
    texts = [path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in paths]
    return RankResult(rank, returncode, *texts)


def _run_one_rank(folder: Path, target: str) -> int:
    """Become one rank: print into files of its own, then run the target."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "TEST_RANK")
    rank = next(os.environ[name] for name in names if os.environ.get(name))
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    for suffix, descriptor in (("out", 1), ("err", 2)):
        with open(folder / f"rank-{rank}.{suffix}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    if (here := str(Path(__file__).parent)) in sys.path:
        sys.path.remove(here)  # else this folder's modules would be found without their package
    if target.endswith(".py"):
        exec(compile(Path(target).read_text(encoding="utf-8"), target, "exec"), {"__name__": "__main__"})
        return 0
    from launcher.world.imports import begin_imports, end_imports

    module, function = target.split(":")
    begin_imports()  # as the real programs do
    try:
        found = getattr(importlib.import_module(module), function)
        end_imports()
        return found() or 0
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # a plain exit under mpirun waits in MPI for the other ranks; a test that failed should not


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # deepspeed adds one
    sys.exit(_run_one_rank(Path(words[0]), words[1]))

"""A small real world over the hosts, opened by the launcher that will open the run's: `run.py --preflight-only`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.preflight.facts import ROOT
from launcher.preflight.records import Judgement

_SECONDS = 240.0
_MEETING_SECONDS = 90.0
"""How long ranks wait for each other in the trial."""
_KEPT_LINES = 25
_PLAIN = re.compile(r"[A-Za-z0-9/._=,:@%+-]+")
_READ_BETWEEN_QUOTES = re.compile(r"[$`\\]")
_READ_BARE = re.compile(r"[$`\\\"';&|<>()*?\s]|=~|\{[^{}]*,[^{}]*\}")
_PUT_IN_BY_PDSH = re.compile(r"%[hnu%]")
_OF_RANK = re.compile(r"(\S+: )?\[rank \d+ on ")
"""How `launcher.ending` begins a line; pdsh puts the host in front."""
_ROUTINE = re.compile(r"\] \[(INFO|WARNING|ERROR)\] \[(launch|runner|multinode_runner|real_accelerator)\.py:")


def trial_words(config: Path, *, launcher: str, hostfile: Path | None, ranks: int, master: str | None) -> list[str]:
    """Return the words that start the trial.

    Args:
        config: The recipe, whole: DeepSpeed hands words of the command line to a shell of the hosts.
        launcher: `pdsh` or `openmpi` with a hostfile, `srun` in an allocation (mpirun finds its nodes), or `none`.
        hostfile: The hosts.
        ranks: Processes in all, where there is no hostfile.
        master: Master address to ask for.
    """
    run = [str(ROOT / "launcher" / "run.py"), "--preflight-only", "--config", str(config)]
    run += [f"run.timeout_seconds={_MEETING_SECONDS:g}", f"run.rendezvous_seconds={_MEETING_SECONDS:g}"]
    beside = Path(sys.executable).parent
    if hostfile is not None:
        address = ["--master_addr", master] if master else []
        return [_program("deepspeed", beside), "--hostfile", str(hostfile), "--launcher", launcher, *address, *run]
    if ranks == 1:
        return [sys.executable, *run]
    placed = ["--map-by", "ppr:1:node"] if launcher == "srun" else ["--oversubscribe"]
    return [_program("mpirun", beside), "-n", str(ranks), *placed, sys.executable, *run]


def try_world(words: Sequence[str], timeout_seconds: float = _SECONDS) -> Judgement:
    """Start the trial and wait for its end.

    Args:
        words: From `trial_words`.
        timeout_seconds: After which it is ended.

    Returns:
        What the ranks said of their world, or the problem.
    """
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except OSError as error:
        return _failed(f"{words[0]} cannot be started: {error.strerror}", [])
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        output, _ = process.communicate()
        return _failed(f"a small world did not end within {timeout_seconds:g} s", output.splitlines())
    except BaseException:
        _end(process)
        raise
    lines = output.splitlines()
    if process.returncode:
        return _failed(f"a small world ended with code {process.returncode}", lines)
    told = next((line.partition("preflight: ")[2] for line in reversed(lines) if "preflight: " in line), "")
    return Judgement(told or "opened and closed")


def worth_telling(lines: Sequence[str]) -> list[str]:
    """Return what ranks said of a failure, or, where they said nothing, what is no routine message of a launcher."""
    printed = [line.rstrip() for line in lines if line.strip()]
    of_ranks = [line for line in printed if _OF_RANK.match(line)]
    others = [line for line in printed if not _ROUTINE.search(line)]
    return of_ranks or others or printed


def _failed(fact: str, lines: list[str]) -> Judgement:
    kept = worth_telling(lines)[-_KEPT_LINES:]
    fact += "; it printed last:\n" + "\n".join(f"   | {line}" for line in kept) if kept else ""
    remedy = "what it printed says why"
    if any("allow-run-as-root" in line for line in lines):
        fact = "mpirun starts nothing for root"
        remedy = "start as another user; or export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    return Judgement("failed", [(fact, remedy, "error")])


def changed_by_a_shell(words: Sequence[str], overrides: Sequence[str], launcher: str) -> Judgement | None:
    """Return the problem of words that a shell would change, where the launcher hands them to one; None for none.

    Args:
        words: What is started.
        overrides: The user's own, which are to stand behind the run's command; the trial has them in a file.
        launcher: `pdsh` lets a shell of every host read the command line, unquoted.
    """
    changed = [word for word in words if not _PLAIN.fullmatch(word)]
    remedy = "use paths of letters, digits and /._=,:@%+- only, or start with --launcher openmpi"
    if not changed:
        changed = words_read_by_shells(overrides)
        remedy = "write this value into the file that --config names, or start with --launcher openmpi"
    if not changed or launcher != "pdsh":
        return None
    fact = (
        f"{changed[0]!r} would be read by a shell of every host: DeepSpeed gives it the command line over pdsh as it is"
    )
    return Judgement("not tried", [(fact, remedy, "error")])


def words_read_by_shells(words: Sequence[str]) -> list[str]:
    """Return the words that do not arrive as they are behind `deepspeed` with pdsh.

    DeepSpeed puts a word with blanks between double quotes, and gives all others to a shell of every host as they are;
    where each host gets the same other word, no rank can see it.

    Args:
        words: As they are typed behind `launcher/run.py`.
    """
    return [
        word
        for word in words
        if _PUT_IN_BY_PDSH.search(word) or (_READ_BETWEEN_QUOTES if " " in word else _READ_BARE).search(word)
    ]


def _end(process: subprocess.Popen[str]) -> None:
    """End a launcher and what it started here; by its own means first, since only it knows the other hosts."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _program(name: str, beside: Path) -> str:
    return str(beside / name) if (beside / name).exists() else name

"""`python -m launcher supervise -- COMMAND`: start a run's command again after a failure, a limited number of times.

Ranks that a starter has put in place cannot start their world anew, so this stands above the starter: COMMAND is what
would be typed without it, such as `deepspeed launcher/run.py --config FILE run.path=DIR`, or with `mpirun`. Why a start
ended is read from the run folder, since starters lose it: `deepspeed` exits with 0 when the process between it and the
ranks is killed. Ranks that a dead starter leaves behind are ended before the next start.

A request to stop (SIGTERM or SIGUSR1 to this process) reaches the ranks through a file in the run folder, on whichever
host they are and whatever started them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from engine.config.file import load_config
from engine.errors import ConfigError
from engine.log import get_logger
from engine.reliability.exit_codes import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_REFUSED
from engine.reliability.heartbeat import ENDED
from engine.reliability.starts import newest_nonce
from engine.reliability.traces import read_traces
from engine.run import RunFolder
from launcher.commands import train
from launcher.terminal.arguments import whole_number

log = get_logger(__name__)

_SCRIPT = "run.py"
_BECOME_PARENT_OF_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
_LOOK_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_NOTICE_LOST_HOSTS = {
    "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=15 -o ServerAliveCountMax=4",
    "PRTE_MCA_oob_tcp_keepalive_time": "15",
    "PRTE_MCA_oob_tcp_keepalive_intvl": "15",
    "PRTE_MCA_oob_tcp_keepalive_probes": "3",
}
"""For starters, where the user has set nothing: ssh waits for ever for a host that has vanished, mpirun for minutes."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a start ended.

    Attributes:
        code: Exit code of the start: what its first failure recorded, else what the starter returned.
        place: Stage and number of steps done at the failure; None where no rank got as far.
        reason: In words.
    """

    code: int
    place: tuple[str, int] | None
    reason: str


EXAMPLES = (
    "--max-restarts 5 -- deepspeed launcher/run.py --config configs/tiny.yaml run.path=runs/tiny",
    "-- sparring train --config configs/tiny.yaml run.path=runs/tiny",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("--max-restarts", type=whole_number, default=3, metavar="N", help="restarts at most (3)")
    parser.add_argument(
        "--retry-refused",
        action="store_true",
        help="start again after exit code 2 too, which says that something is to be mended first",
    )
    parser.add_argument(
        "--retry-preempted", action="store_true", help="start again after exit code 85 too, a stop that was asked for"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what starts the run")


def run_command(arguments: argparse.Namespace) -> int:
    """Start the run's command, again where it fails; return the last start's exit code."""
    retry = {EXIT_REFUSED} if arguments.retry_refused else set()
    retry |= {EXIT_PREEMPTED} if arguments.retry_preempted else set()
    command = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    return supervise(command, max_restarts=arguments.max_restarts, retry=frozenset(retry))


def supervise(command: Sequence[str], *, max_restarts: int, retry: frozenset[int] = frozenset()) -> int:
    """Run a command that starts a run, and start it again after failures.

    Args:
        command: The words of the command, with `launcher/run.py` and what follows it among them.
        max_restarts: How often it is started again at most, 0 or more.
        retry: Exit codes that are otherwise final and are to be retried all the same: 2 and 85.

    Returns:
        The last start's exit code.

    Raises:
        ConfigError: The command does not start a run, or its configuration is not usable.
    """
    folder = RunFolder(_run_path(command).absolute())
    _adopt_orphans()
    asked = _listen()
    final = {0, EXIT_REFUSED, EXIT_PREEMPTED, EXIT_INTERRUPTED} - (retry - {0})
    before: Ended | None = None
    for count in range(max_restarts + 1):
        ended = _start(command, folder, asked)
        if ended.code in final or asked:
            return ended.code
        where = f"in {ended.place[0] or 'no stage'}, after step {ended.place[1]}" if ended.place else "early"
        log.warning("the start failed %s (exit code %d): %s", where, ended.code, ended.reason)
        if before is not None and before.place == ended.place:
            log.error("it has failed twice at the same place, %s; starting again would not help", where)
            return ended.code
        if count < max_restarts:
            log.warning("restart %d of %d", count + 1, max_restarts)
        before = ended
    log.error("it has failed after %d restart(s), which is all that --max-restarts allows", max_restarts)
    return ended.code


def _run_path(command: Sequence[str]) -> Path:
    """Find the run folder by reading the command as `launcher/run.py` will."""
    if "train" in command[1:4]:  # sparring train, python -m launcher train
        arguments = train.parse_words(list(command[command.index("train") + 1 :]))
        return load_config(arguments.config, arguments.overrides).run.path
    places = [place for place, word in enumerate(command) if Path(word).name == _SCRIPT]
    if not places:
        raise ConfigError(
            f"the command starts no run: {' '.join(command) or 'it is empty'}",
            expected="the words of a start, with launcher/run.py or `train` among them",
            remedy="such as `sparring supervise -- sparring train --config configs/tiny.yaml run.path=runs/tiny`",
        )
    from launcher.run import parse_words  # it is about to open a world, with torch

    arguments = parse_words(list(command[places[0] + 1 :]))
    return load_config(arguments.config, arguments.overrides).run.path


def _start(command: Sequence[str], folder: RunFolder, asked: list[str]) -> Ended:
    """Start the command, wait for its end and for that of everything it leaves behind, and find out how it ended."""
    earlier = newest_nonce(folder.path)
    process = subprocess.Popen(command, start_new_session=True, env=_NOTICE_LOST_HOSTS | os.environ)
    stop = folder.path / "stop"
    try:
        while process.poll() is None:
            if asked and folder.path.exists():  # again and again: a start that is still on its way clears the file
                stop.touch()
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait()
        return Ended(EXIT_INTERRUPTED, None, "interrupted")
    finally:
        _end_leftovers()
        stop.unlink(missing_ok=True)
    return _how_it_ended(process.returncode, folder, earlier)


def _how_it_ended(returned: int, folder: RunFolder, earlier: str | None) -> Ended:
    code = 128 - returned if returned < 0 else returned  # ended by a signal: as a shell says it
    traces = read_traces(folder.path, earlier)
    if traces is None:
        return Ended(code or EXIT_CRASH, None, "no rank came as far as opening the run folder")
    if (failure := traces.failure) is not None:
        reason = f"{failure.kind} on rank {failure.rank} (host {failure.host}): {failure.message}"
        return Ended(failure.code, traces.place, reason)
    unended = [beat for beat in traces.beats if beat.state != ENDED]
    if code == 0 and not unended:
        return Ended(0, traces.place, "finished")
    who = ", ".join(beat.who for beat in unended[:8]) or "no rank"
    return Ended(code or EXIT_CRASH, traces.place, f"{who} ended without a word, the starter with {returned}")


def _listen() -> list[str]:
    """Collect requests to stop; the list is empty until one comes."""
    asked: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return asked


def _adopt_orphans() -> None:
    """Become the parent of ranks whose starter dies, so that they can be found and ended (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_BECOME_PARENT_OF_ORPHANS, 1, 0, 0, 0)


def _end_leftovers() -> None:
    left = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=_GRACE_SECONDS)
    for process in alive:
        log.warning("ending process %d, which its starter left behind", process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # not SIGTERM, which asks a rank to go on to a checkpoint
    psutil.wait_procs(alive, timeout=_GRACE_SECONDS)

"""`python -m launcher status RUN`: what a run does right now, or why it stopped, from any terminal.

Everything is read from small files: the ledger, the heartbeats, the lock, the commit records of checkpoints and the
last error. Nothing is changed, and the run notices nothing. What was submitted to SLURM is asked of SLURM as well; a
sweep's folder shows its tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.config.remaining import Now, left_of
from engine.config.timetable import Sizes
from engine.errors import ConfigError
from engine.evaluation.summary import verdicts
from engine.reliability.exit_codes import EXIT_PREEMPTED, EXIT_REFUSED
from engine.reliability.failure import Failure
from engine.reliability.heartbeat import ENDED, STOPPING, Beat, beat_path, read_beats
from engine.reliability.progress import format_seconds, plural
from engine.reliability.run_lock import Holder, read_holder
from engine.reliability.traces import read_traces
from engine.results import LAST_STAGE, kept_shares, read_ledger
from engine.run import SIZES, RunFolder
from launcher.slurm.job import Asked, ask_about, is_finished, job_lines, sweep_rows
from launcher.terminal.arguments import typed_path
from launcher.terminal.next_steps import next_steps
from shards.errors import ArtifactError, counted
from shards.files import parse_record

RUNNING, FINISHED, STOPPED, SILENT = 0, 3, 4, 5
"""Exit codes: it runs; it has finished; it stopped before its end; it runs, but a rank gives no sign."""

_MISSED_BEATS = 6
_COLUMNS = 110


@dataclass(frozen=True)
class State:
    """All that is known of a run from its folder."""

    folder: RunFolder
    config: Config
    ledger: Mapping[str, Any]
    beats: Sequence[Beat]
    holder: Holder | None
    failure: Failure | None
    """Of the newest start; None where it has none."""
    beside: Sequence[Beat] = ()
    """Of the ranks' companions that are at work, rank by rank."""
    job: Asked | None = None
    """What SLURM says of the run's job; None where none was submitted."""

    @property
    def knows_its_size(self) -> bool:
        """Whether steps are known: phases that are counted in epochs have none before the data was."""
        return not self.config.counts_epochs or SIZES in self.ledger

    @property
    def silence_seconds(self) -> float:
        """How old a heartbeat may be."""
        return _MISSED_BEATS * self.config.run.heartbeat_seconds

    @property
    def is_held(self) -> bool:
        """Whether a start works in the folder."""
        if self.holder is None:
            return False
        if self.holder.is_from_here:
            return not self.holder.process_is_gone
        if self.job is not None and self.job.has_ended(self.holder.argv):
            return False
        with contextlib.suppress(OSError):
            return time.time() - self.folder.lock.stat().st_mtime < self.silence_seconds
        return False

    def age(self, beat: Beat) -> float:
        """Return the seconds since a heartbeat was written, by the clock of the file system."""
        with contextlib.suppress(OSError):
            return max(0.0, time.time() - beat_path(self.folder.path / "heartbeats", beat.rank).stat().st_mtime)
        return 0.0

    @property
    def code(self) -> int:
        """One of the exit codes above."""
        if not self.is_held:
            return FINISHED if LAST_STAGE in self.ledger else STOPPED
        lost = [beat for beat in self.beats if beat.state != ENDED and self.age(beat) > self.silence_seconds]
        return SILENT if lost else RUNNING


EXAMPLES = (
    "runs/nq",
    "runs/sweep",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")


def run_command(arguments: argparse.Namespace) -> int:
    """Print what the run does; return one of the exit codes above."""
    return show_status(arguments.run)


def show_status(path: Path) -> int:
    """Print what a run does and return the exit code: 0 running, 3 finished, 4 stopped, 5 a rank gives no sign.

    Args:
        path: The run folder.

    Raises:
        ConfigError: The folder holds no run.
        ArtifactError: The ledger is damaged.
    """
    asked = ask_about(path.absolute())
    if asked is not None and asked.submitted.tasks is not None:
        return _show_sweep(path.absolute(), asked, asked.submitted.tasks)
    state = read_state(path, asked)
    rows = [(name, text) for name, text in _lines(state) if text]
    print(tabulate(rows, tablefmt="plain"))
    if state.code == FINISHED:
        print(_what_came_of_it(state))
    elif state.beats:
        print()
        print(tabulate([_rank_row(state, beat) for beat in state.beats], headers="keys", tablefmt="simple"))
    return state.code


def _show_sweep(folder: Path, asked: Asked, tasks: Mapping[str, str]) -> int:
    print(f"sweep {folder}, job {asked.submitted.id}\n")
    print(tabulate(sweep_rows(asked), headers="keys", tablefmt="simple", disable_numparse=True))
    if all(is_finished(Path(run)) for run in tasks.values()):
        return FINISHED
    return RUNNING if any(known.state == "RUNNING" for known in asked.found or ()) else STOPPED


def read_state(path: Path, asked: Asked | None = None) -> State:
    """Read everything that `show_status` prints.

    Args:
        path: The run folder.
        asked: What SLURM says of the run's job; without it, the files alone tell.

    Raises:
        ConfigError: The folder holds no run.
        ArtifactError: The ledger is damaged.
    """
    folder = RunFolder(path.absolute())
    if not folder.config.exists():
        raise ConfigError(f"{path} holds no run", expected="a folder with a config.yaml that a run wrote")
    config = load_config(folder.config)
    ledger = read_ledger(folder.ledger)
    if SIZES in ledger:
        config = config.sized(parse_record(ledger[SIZES]["result"], Sizes, f"the result of {SIZES} in {folder.ledger}"))
    config = config.with_measured(kept_shares(ledger))
    traces = read_traces(folder.path, before=None)
    ranks = {beat.attempt for beat in traces.beats} if traces else set()
    beside = [beat for beat in read_beats(folder.path / "heartbeats" / "beside") if beat.state != ENDED]
    return State(
        folder,
        config,
        ledger,
        traces.beats if traces else [],
        read_holder(folder.lock),
        traces.failure if traces else None,
        [beat for beat in beside if beat.attempt in ranks and not beat.process_is_gone],
        asked,
    )


def now_of(beat: Beat) -> Now:
    """Return what a rank counts at the moment."""
    return Now(beat.stage, beat.done, beat.total, beat.speed)


def _lines(state: State) -> list[tuple[str, str]]:
    first = state.beats[0] if state.beats else None
    code = state.code
    run = state.folder.path
    lines = [("run", str(run)), ("state", _in_words(state, code)), *job_lines(run, state.job)]
    if code in {RUNNING, SILENT} and first is not None:
        speed = f", {first.speed:.3g} {plural(first.unit)} a second" if first.speed else ""
        left = now_of(first).seconds_left
        lines.append(("stage", first.where + speed + (f", {format_seconds(left)} left" if left is not None else "")))
        lines += [("beside", text) for text in _beside(state)]
        if state.knows_its_size and (recipe := left_of(state.config, state.ledger, now_of(first))) is not None:
            lines.append(("recipe", recipe.told(format_seconds)))
    elif code == STOPPED and first is not None:
        lines.append(("stopped", first.where))
    if code != FINISHED and first is not None and first.last_point:
        lines.append(("last barrier", first.last_point))
    finished = list(state.ledger.items())
    if finished:
        name, entry = finished[-1]
        lines.append(("finished", f"{len(finished)} stages, the last {name} in {format_seconds(entry['seconds'])}"))
    lines += [("checkpoint", text) for text in _checkpoints(state.folder)]
    if state.failure is not None and state.failure.code != EXIT_PREEMPTED:
        lines.append(("last error", _error(state.failure)))
    return lines


def _what_came_of_it(state: State) -> str:
    """Say of a finished run whether it paid, and what can be done with it."""
    question = "a question" if state.config.learns_from_queries else None
    parts = [textwrap.fill(text, _COLUMNS) for text in verdicts(state.folder)]
    return "\n" + "\n\n".join([*parts, f"to go on with:\n{next_steps(state.folder.path, question)}"])


def _beside(state: State) -> list[str]:
    """Say what the ranks' companions do, and what they have finished that the run's ledger does not have yet."""
    done: list[str] = []
    for path in state.folder.beside.glob("*/ledger.json"):
        with contextlib.suppress(OSError, ArtifactError):  # taken over this moment
            done += [name for name in read_ledger(path) if name not in state.ledger]
    where = [beat.where for beat in state.beside[:1]]
    return ["; ".join([*where, *(f"{name} finished" for name in done)])] if where or done else []


def _in_words(state: State, code: int) -> str:
    holder, failure = state.holder, state.failure
    if code in {RUNNING, SILENT} and holder is not None:
        ranks = f"{counted(holder.num_ranks, 'rank')}"
        words = [f"running: {ranks}, pid {holder.pid} on {holder.host} since {holder.started}"]
        words += ["a rank gives no sign"] * (code == SILENT)
        words += ["asked to stop"] * any(beat.state == STOPPING for beat in state.beats)
        return "; ".join(words)
    if code == FINISHED:
        return "finished"
    go_on = "its job goes on" if state.job is not None and state.job.waits else "the same command goes on"
    if failure is not None and failure.code == EXIT_PREEMPTED:
        return f"stopped because it was asked to; {go_on}"
    if failure is not None:
        once = "once that is mended, " if failure.code == EXIT_REFUSED else ""
        return f"failed with exit code {failure.code}; {once}{go_on}"
    if not state.beats and state.job is not None:
        return "submitted; no rank has opened the run folder yet"
    if not state.beats:
        return f"not running; {go_on}"
    codes = {beat.code for beat in state.beats if beat.state == ENDED}
    if codes == {0}:
        return "ended where run.stop_before says; the same command without it goes on"
    how = f"ended with exit code {max(code or 0 for code in codes)}" if codes else "killed without a word"
    return f"not running: {how}; {go_on}"


def _error(failure: Failure) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failure.time))
    where = f"rank {failure.rank} on {failure.host}, {failure.stage or 'between stages'}, {failure.step} done"
    return f"{when}, {where}\n{failure.kind}: {failure.message}"


def _checkpoints(folder: RunFolder) -> list[str]:
    found = []
    for model in sorted(folder.checkpoints.glob("*/")):
        for commit in sorted(model.glob("[0-9]*/COMMIT.json"), reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError):  # an older one, deleted this moment
                position = json.loads(commit.read_text(encoding="utf-8"))["position"]
                age = format_seconds(max(0.0, time.time() - commit.stat().st_mtime))
                found.append(f"{model.name}: {position['stage']}, step {position['step']}, {age} ago")
                break
    return found


def _rank_row(state: State, beat: Beat) -> dict[str, str]:
    gone = beat.state != ENDED and beat.process_is_gone
    ended = f"ended with {beat.code}" if beat.state == ENDED else beat.state
    return {
        "rank": str(beat.rank),
        "host": beat.host,
        "pid": str(beat.pid),
        "heartbeat": f"{format_seconds(state.age(beat))} ago",
        "state": "process is gone" if gone else ended,
        "where": beat.where + (f" for {beat.waiting_seconds:g} s" if beat.waiting_for else ""),
        "function": beat.at,
    }

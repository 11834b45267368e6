"""`python -m launcher sweep FILE [key=value ...]`: the runs of a file of settings, and their comparison.

    python -m launcher sweep configs/sweeps/ar2_regularization.yaml data.path=DIR
    python -m launcher sweep FILE --starter "deepspeed --num_accelerators 2" data.path=DIR
    python -m launcher sweep FILE --jobs 8 --starter "deepspeed --include localhost:{slot} --master_port {port}"
    python -m launcher sweep FILE --print data.path=DIR                     # the commands, one a line
    python -m launcher sweep FILE --slurm "--nodes 1 --gpus-per-node 8" data.path=DIR    # a job for each run

Every run is started as a user would start it. What is finished is not run again, so the same command goes on after a
stop; a run that fails is told, and the others go on. Where settings share what comes before a stage (`share:`), that is
computed once a seed, and every setting begins with it (`python -m launcher branch`).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from engine.config.file import differences, load_config
from engine.errors import ConfigError
from engine.evaluation.figures import require_matplotlib
from engine.log import get_logger
from engine.reliability.exit_codes import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED
from engine.reliability.failure import Failure
from engine.reliability.progress import format_seconds
from engine.reliability.run_folder import RunFolder
from engine.reliability.starts import newest_nonce
from engine.reliability.traces import read_traces
from launcher.commands.sweep_board import write_board
from launcher.commands.sweep_file import Sweep, SweepRun, read_sweep, require_shared_alike
from launcher.commands.sweep_slots import Slots
from launcher.slurm.job import finished_stages, is_finished
from launcher.terminal.arguments import positive_whole_number, recipe_file, typed_path
from shards.errors import listed
from shards.files import read_record, write_json

log = get_logger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
_RECORD, _LOGS, _TABLES = "sweep.json", "logs", "comparison"
_STOPS = (EXIT_PREEMPTED, EXIT_INTERRUPTED)
"""Exit codes of a run that was asked to stop: so is the sweep."""
Runner = Callable[[Sequence[str], Path], int]
"""Runs a command whose output goes into a file, and returns its exit code."""


EXAMPLES = (
    "configs/sweeps/ar2_regularization.yaml data.path=data/wiki",
    'configs/sweeps/tiny.yaml --starter "deepspeed --num_accelerators 2" --out runs/sweep',
    'FILE --jobs 8 --starter "deepspeed --include localhost:{slot} --master_port {port}"',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("file", type=recipe_file, metavar="FILE", help="the sweep, such as configs/sweeps/*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, such as data.path=DIR")
    parser.add_argument("--out", type=typed_path, metavar="DIR", help="folder of all runs, in place of the file's")
    parser.add_argument(
        "--starter",
        default="deepspeed",
        metavar="WORDS",
        help='what starts the ranks, such as "deepspeed --num_accelerators 2" or "mpirun -n 2 python" (deepspeed)',
    )
    parser.add_argument(
        "--jobs",
        type=positive_whole_number,
        default=1,
        metavar="N",
        help="so many runs at once; in --starter {slot} is then a run's place, 0 to N-1, and {port} a free port (1)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--print", action="store_true", dest="prints", help="print the commands that are left, one a line")
    how.add_argument("--slurm", metavar="OPTIONS", help="hand each run to SLURM, by these options of `submit`")
    how.add_argument("--shared-only", action="store_true", help="compute what settings share, and end")
    parser.add_argument("--no-figure", action="store_true", help="no figures of the comparison")


def run_command(arguments: argparse.Namespace) -> int:
    """Run what is left of a sweep and compare what is finished; return 0, or the first failed run's exit code."""
    sweep = read_sweep(arguments.file, arguments.overrides, arguments.out)
    require_own(sweep)
    require_shared_alike(sweep)
    starter = shlex.split(arguments.starter)
    slots = Slots(arguments.jobs, starter)
    if arguments.prints:
        for command in _commands_left(sweep, starter):
            print(shlex.join(command))
        return 0
    if arguments.slurm is not None:
        if arguments.jobs > 1:
            raise ConfigError(
                "--jobs and --slurm are both given", remedy="leave --jobs out: SLURM says what runs at once"
            )
        return submit_all(sweep, shlex.split(arguments.slurm), run_logged)
    if not (arguments.shared_only or arguments.no_figure or "--no-figure" in sweep.compare):
        require_matplotlib()
    outcome = play_sweep(sweep, slots, run_logged, shared_only=arguments.shared_only)
    if arguments.shared_only or outcome.stopped:
        return outcome.code
    print(outcome.text(sweep), flush=True)
    if words := finished_groups(sweep):
        print()
        compare_words = [*words, "--out", str(sweep.out / _TABLES), *["--no-figure"] * arguments.no_figure]
        _compare([*compare_words, *sweep.compare])
    if (board := write_board(sweep)) is not None:
        print(f"\ntensorboard --logdir {shlex.quote(str(board))}    # in HParams: settings and results of each run")
    return outcome.code


def require_own(sweep: Sweep) -> None:
    """Refuse finished runs of other settings in the folders of the sweep's own, before anything is started.

    A run that is not finished is held against its settings when it is started again.

    Args:
        sweep: The runs.

    Raises:
        ConfigError: A finished run has other settings than those that are asked for.
    """
    for run in sweep.runs:
        recorded = RunFolder(run.folder).config
        if not (is_finished(run.folder) and recorded.exists()):
            continue
        if changed := differences(run.config, load_config(recorded)):
            raise ConfigError(
                f"{run.label}: the finished run in {run.folder} is of other settings ({listed(changed, 5)})",
                expected="a run whose config.yaml has the settings that the sweep asks for",
                remedy="undo the change, give the setting another name or the sweep another --out; or move the folder "
                "away, and the run is made anew",
            )


@dataclass
class Outcome:
    """What became of a sweep's runs in this start.

    Attributes:
        failed: Label of a run -> why it is not finished.
        code: Exit code: 0, or that of the first run that failed.
        stopped: Whether the sweep was asked to stop.
        lock: Held by whoever writes here or into the sweep's record.
    """

    failed: dict[str, str] = field(default_factory=dict)
    code: int = 0
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, label: str, code: int, reason: str, failure: Failure | None = None) -> None:
        """Record a run that failed; what its ranks recorded counts, as starters make other exit codes of theirs."""
        code = failure.code if failure else code
        with self.lock:
            self.failed[label] = reason
            self.code = self.code or code or EXIT_LOST
            self.stopped = self.stopped or code in _STOPS
        log.error("%s: %s", label, reason)

    def text(self, sweep: Sweep) -> str:
        """Say which runs are finished, and why others are not."""
        done = [run for run in sweep.runs if is_finished(run.folder)]
        lines = [f"{len(done)} of {len(sweep.runs)} runs are finished ({sweep.out})"]
        lines += [f"  {label}: {reason}" for label, reason in self.failed.items()]
        return "\n".join(lines)


def play_sweep(sweep: Sweep, slots: Slots, run: Runner, *, shared_only: bool = False) -> Outcome:
    """Run what is not finished, as many seeds at once as runs; a failure ends no other run than those that build on it.

    Args:
        sweep: The runs.
        slots: In which they go.
        run: Runs a command.
        shared_only: End when what settings share is there.
    """
    outcome = Outcome()

    def begin(seed: int, starter: list[str]) -> list[SweepRun]:
        return [] if outcome.stopped else _begin_seed(sweep, seed, starter, run, outcome)

    def play(one: SweepRun, starter: list[str]) -> None:
        if not outcome.stopped and not is_finished(one.folder):
            _play_one(sweep, one, starter, run, outcome)

    for first in range(0, len(sweep.seeds), slots.number):
        ready = slots.each(begin, sweep.seeds[first : first + slots.number])
        slots.each(play, [] if shared_only else list(chain.from_iterable(ready)))
    return outcome


def _begin_seed(sweep: Sweep, seed: int, starter: Sequence[str], run: Runner, outcome: Outcome) -> list[SweepRun]:
    """Compute what the settings of a seed share; return the runs that can begin."""
    own = [one for one in sweep.runs if one.seed == seed]
    if sweep.share and any(not _is_begun(one.folder) for one in own):
        log.info("seed %d: what all settings share, before %s", seed, sweep.share)
        if reason := _share(sweep, seed, starter, run, outcome):
            waiting = ", ".join(one.variant for one in own if not _is_begun(one.folder))
            log.error("seed %d: %s wait for it (%s)", seed, waiting, reason)
            return [one for one in own if _is_begun(one.folder)]
    return own


def finished_groups(sweep: Sweep) -> list[str]:
    """Return the finished runs as `compare` names them, by seeds that all of the settings have; `NAME=RUN,RUN`."""
    finished: dict[str, dict[int, Path]] = {run.variant: {} for run in sweep.runs}
    for run in sweep.runs:
        if is_finished(run.folder):
            finished[run.variant][run.seed] = run.folder
    finished = {name: own for name, own in finished.items() if own}
    common = [seed for seed in sweep.seeds if all(seed in own for own in finished.values())]
    if finished and not common:
        log.warning("no seed is finished by all of %s: nothing is compared yet", ", ".join(finished))
        return []
    if left := [f"{name} {seed}" for name, own in finished.items() for seed in own if seed not in common]:
        log.warning("left out of the table, as other settings lack the seed: %s", listed(left, 20))
    return [f"{name}=" + ",".join(str(own[seed]) for seed in common) for name, own in finished.items()]


def run_logged(command: Sequence[str], file: Path) -> int:
    """Run a command from this working directory; what it says goes to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
        except OSError as error:
            raise ConfigError(
                f"{command[0]} cannot be started: {error.strerror}", remedy="name what starts the ranks by --starter"
            ) from error
    return done.returncode


def _share(sweep: Sweep, seed: int, starter: Sequence[str], run: Runner, outcome: Outcome) -> str:
    """Compute what the settings of a seed share, unless it is there; return why it is not, or nothing."""
    folder, label = sweep.shared_folder(seed), f"shared seed {seed}"
    if _is_shared(sweep, seed):
        return ""
    before = newest_nonce(folder)
    code = run(_shared_command(sweep, seed, starter), sweep.out / _LOGS / f"shared-seed-{seed}.log")
    traces = read_traces(folder, before)
    if code or traces is None or traces.failure is not None:
        failure = traces.failure if traces else None
        reason = _why(code, failure.message if failure else "", sweep, f"shared-seed-{seed}")
        outcome.add(label, code, reason, failure)
        return reason
    with outcome.lock:
        write_json(sweep.out / _RECORD, {**_read_shared(sweep), f"{seed}": sweep.share})
    return ""


def _play_one(sweep: Sweep, one: SweepRun, starter: Sequence[str], run: Runner, outcome: Outcome) -> None:
    """Begin a run, or go on with it."""
    name = f"{one.variant}-seed-{one.seed}"
    file, began = sweep.out / _LOGS / f"{name}.log", time.monotonic()
    if sweep.share and not _is_begun(one.folder) and (code := run(_branch_command(sweep, one), file)):
        outcome.add(one.label, code, _why(code, _last_error(file), sweep, name))
        return
    log.info("%s: runs, log %s", one.label, file)
    before = newest_nonce(one.folder)
    code = run(_start_command(sweep, one, starter), file)
    if is_finished(one.folder):
        log.info("%s: finished in %s", one.label, format_seconds(time.monotonic() - began))
        return
    traces = read_traces(one.folder, before)
    failure = traces.failure if traces else None
    told = failure.message if failure else _last_error(file)
    outcome.add(one.label, code, _why(code, told, sweep, name), failure)


def _commands_left(sweep: Sweep, starter: Sequence[str]) -> list[list[str]]:
    """Return the commands of what is not finished, in their order."""
    commands: list[list[str]] = []
    for seed in sweep.seeds:
        own = [run for run in sweep.runs if run.seed == seed]
        if sweep.share and any(not _is_begun(run.folder) for run in own) and not _is_shared(sweep, seed):
            commands.append(_shared_command(sweep, seed, starter))
        for run in own:
            if sweep.share and not _is_begun(run.folder):
                commands.append(_branch_command(sweep, run))
            if not is_finished(run.folder):
                commands.append(_start_command(sweep, run, starter))
    groups: dict[str, list[str]] = {}
    for run in sweep.runs:
        groups.setdefault(run.variant, []).append(str(run.folder))
    words = [f"{name}={','.join(folders)}" for name, folders in groups.items()]
    tables = ["--out", str(sweep.out / _TABLES), *sweep.compare]
    return [*commands, [sys.executable, "-m", "launcher", "compare", *words, *tables]]


def submit_all(sweep: Sweep, options: Sequence[str], run: Runner) -> int:
    """Hand every run that is left to SLURM as a job of its own; those that share begin with what is there.

    Args:
        sweep: The runs.
        options: Of `submit`.
        run: Runs a command.

    Returns:
        0, or the exit code of the first run that was not taken.

    Raises:
        ConfigError: What settings share is not there yet.
    """
    waiting = {one.seed for one in sweep.runs if sweep.share and not _is_begun(one.folder)}
    if missing := [seed for seed in sweep.seeds if seed in waiting and not _is_shared(sweep, seed)]:
        raise ConfigError(
            f"what comes before {sweep.share} is not there for the seeds {', '.join(map(str, missing))}",
            expected="what settings share, before their jobs are handed to SLURM",
            remedy="compute it first by the same command with --shared-only in the place of --slurm, such as inside of "
            "`salloc`; or leave `share` out of the file",
        )
    outcome = Outcome()
    for one in sweep.runs:
        if is_finished(one.folder):
            continue
        file = sweep.out / _LOGS / f"{one.variant}-seed-{one.seed}.log"
        code = 0
        if sweep.share and not _is_begun(one.folder):
            code = run(_branch_command(sweep, one), file)
        name = ["--name", file.stem.replace("+", "-")]  # folders of all settings have the same last parts
        submit = [sys.executable, "-m", "launcher", "submit", "--config", str(sweep.recipe), *name, *options]
        code = code or run([*submit, *one.words, f"run.path={one.folder}"], file)
        if code:
            outcome.add(one.label, code, _why(code, _last_error(file), sweep, file.stem))
        else:
            print(f"{one.label}: submitted, {one.folder}", flush=True)
    print("the same command without --slurm compares them when they are finished")
    return outcome.code


def _start_command(sweep: Sweep, run: SweepRun, starter: Sequence[str]) -> list[str]:
    return [*starter, _script(), "--config", str(sweep.recipe), *run.words, f"run.path={run.folder}"]


def _shared_command(sweep: Sweep, seed: int, starter: Sequence[str]) -> list[str]:
    words = [*sweep.words, f"run.seed={seed}", f"run.stop_before={sweep.share}"]
    return [*starter, _script(), "--config", str(sweep.recipe), *words, f"run.path={sweep.shared_folder(seed)}"]


def _branch_command(sweep: Sweep, run: SweepRun) -> list[str]:
    source, words = sweep.shared_folder(run.seed), [*run.words, "run.stop_before=null"]
    branch = [sys.executable, "-m", "launcher", "branch", str(source), str(run.folder)]
    return [*branch, *words, "--before", str(sweep.share)]


def _script() -> str:
    script = _ROOT / "launcher" / "run.py"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def _is_begun(folder: Path) -> bool:
    return (folder / "ledger.json").exists()


def _read_shared(sweep: Sweep) -> dict[str, str]:
    path = sweep.out / _RECORD
    return read_record(path, dict[str, str], "the record of the sweep") if path.exists() else {}


def _is_shared(sweep: Sweep, seed: int) -> bool:
    """Tell whether what the settings of a seed share is there: it was computed up to that stage, or beyond it."""
    folder = sweep.shared_folder(seed)
    if not _is_begun(folder):
        return False
    return _read_shared(sweep).get(f"{seed}") == sweep.share or sweep.share in finished_stages(folder)


def _why(code: int, told: str, sweep: Sweep, name: str) -> str:
    words = told or f"it ended with {code}"
    return f"{words} (log {sweep.out / _LOGS / name}.log)"


def _last_error(file: Path) -> str:
    """Return the last error that a command told, in its log."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return next((line.partition("error: ")[2] for line in reversed(lines) if "error: " in line), "")


def _compare(words: Sequence[str]) -> None:
    from launcher.commands import compare
    from launcher.commands.words.compare import add_arguments as describe

    parser = argparse.ArgumentParser(prog="python -m launcher compare")
    describe(parser)
    compare.run_command(parser.parse_args(words))

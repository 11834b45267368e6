"""`sparring submit --config FILE --nodes N --gpus-per-node G [key=value ...]`: a run as a SLURM job.

Everything is checked before anything is submitted: the recipe (each of a sweep), the options, whether the run has a job
already or is finished. Then the resolved recipe and a readable script are written into `RUN/slurm/`, and sbatch gets
the script. `--dry-run` writes and submits nothing and prints the script.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.reliability.starts import newest_nonce
from launcher.slurm.job import Submitted, alive, in_words, is_finished, read_submitted, run_slurm, write_submitted
from launcher.slurm.script import DAEMON, DAEMON_NAME, REQUEUE_SECONDS, Job, recipe_path, render, slurm_folder
from launcher.slurm.settings import add_arguments as add_settings
from launcher.slurm.settings import seconds_of_time, settings_of
from launcher.terminal.arguments import positive_whole_number, recipe_file
from launcher.terminal.next_steps import installed_program
from shards.files import write_atomically, write_json

if TYPE_CHECKING:  # pydantic takes a moment; the other commands need not wait for it
    from engine.config.recipe import Config

_ROOT = Path(__file__).resolve().parents[2]
_SIGNAL_SECONDS = 60
"""How far from the asked moment SLURM may send a signal."""


EXAMPLES = (
    "--config configs/ar2_nq.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 data.path=data/nq run.path=runs/nq",
    "--config configs/ar2_nq.yaml --site site.yaml --sweep ar2.num_negatives=7,15 --dry-run run.path=runs/n",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `submit`."""
    parser.add_argument(
        "--config", type=recipe_file, required=True, metavar="FILE", help="recipe, such as configs/ar2_nq.yaml"
    )
    add_settings(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="name of the job; left out, sparring- and that of the run folder"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="one run for each value, as an array; given repeatedly, all combinations",
    )
    parser.add_argument(
        "--max-parallel", type=positive_whole_number, metavar="N", help="how many runs of a sweep at once"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR run.path=DIR")


def run_command(arguments: argparse.Namespace) -> int:
    """Check, write and submit; return 0.

    Raises:
        ConfigError: The recipe, an option or the site's file is not usable, the run has a job or runs already, or SLURM
            does not take the job.
    """
    from engine.config.file import load_config
    from launcher.slurm.sweep import tasks_of

    asked = settings_of(arguments)
    base = load_config(arguments.config, arguments.overrides)
    tasks = tasks_of(arguments.config, arguments.overrides, arguments.sweep) if arguments.sweep else []
    configs = [task.config for task in tasks] or [base]
    settings = asked.keeping(max(config.refresh_devices for config in configs))
    folder = base.run.path.absolute()
    runs = tuple(config.run.path.absolute() for config in configs)
    if "\n" in str(folder) + str(Path.cwd()) + str(_ROOT):
        raise ConfigError(f"a path has a line break: {str(folder)!r}", expected="paths of one line")
    if arguments.max_parallel is not None and (arguments.max_parallel < 1 or not tasks):
        raise ConfigError("--max-parallel is for a sweep, and 1 or more", remedy="name what to sweep with --sweep")
    left = [number for number, run in enumerate(runs) if not is_finished(run)]
    if not left:
        print(f"{folder} is finished: nothing is left to do")
        return 0
    stop_seconds = round(max(config.run.preemption_seconds for config in configs)) + REQUEUE_SECONDS
    _refuse_short_time(settings.time, stop_seconds)
    job = Job(
        settings=settings,
        name=_job_name(arguments.name, folder),
        folder=folder,
        cwd=Path.cwd(),
        root=_ROOT,
        python=Path(sys.executable),
        stop_seconds=stop_seconds,
        runs=runs if tasks else (),
        tasks=tuple(left) if tasks else (),
        max_parallel=arguments.max_parallel,
        reads=_reads(configs),
        as_root=os.geteuid() == 0,
    )
    if arguments.dry_run:
        print(render(job), end="")
        return 0
    _refuse_foreign_folder(runs)
    _refuse_changed_recipe(runs, configs)
    _refuse_second_job([folder, *(runs if tasks else ())])
    _write(job, configs, [task.words for task in tasks])
    number = _sbatch(slurm_folder(folder) / "job.sbatch")
    _record(job, number, settings.nodes * settings.ranks)
    what = f"{len(left)} tasks, {folder}" if tasks else str(folder)
    print(f"job {number}: {what}")
    print(f"  script   {slurm_folder(folder) / 'job.sbatch'}")
    print(f"  log      {slurm_folder(folder)}/{number}{'_*' if tasks else ''}.out")
    print(f"  look     {installed_program()} status {_as_typed(base.run.path)}")
    print(f"  stop     {installed_program()} cancel {_as_typed(base.run.path)}")
    return 0


def _as_typed(path: Path) -> str:
    return shlex.quote(str(path))


def _refuse_short_time(limit: str | None, stop_seconds: int) -> None:
    seconds = seconds_of_time(limit) if limit else None
    needed = stop_seconds + 2 * _SIGNAL_SECONDS
    if seconds is not None and seconds < needed:
        raise ConfigError(
            f"--time {limit} is {seconds} s, of which the last {stop_seconds} (run.preemption_seconds and "
            f"{REQUEUE_SECONDS}) are for stopping, and SLURM's signal may come {_SIGNAL_SECONDS} s early",
            expected=f"{needed} s or more",
            remedy="ask for more time, or set run.preemption_seconds to what a step and a checkpoint take",
        )


def _job_name(asked: str | None, folder: Path) -> str:
    if asked is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", asked):
        raise ConfigError(f"--name {asked!r} is no name of a job", expected="letters, digits, dots and dashes")
    return asked or "sparring-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-")[:80] or "run")


def _reads(configs: Sequence[Config]) -> tuple[Path, ...]:
    """Return the folders outside of the run that a recipe reads, for a container."""
    named = [config.data.path for config in configs]
    sections = [section for config in configs for section in config.models.values()]
    named += [Path(section.name) for section in sections]
    named += [section.deepspeed.parent for section in sections if section.deepspeed]
    return tuple(dict.fromkeys(path.absolute() for path in named if path is not None and path.is_dir()))


def _refuse_foreign_folder(runs: Sequence[Path]) -> None:
    """Refuse now what the run would refuse when it starts."""
    for run in runs:
        names = {path.name for path in run.iterdir()} if run.is_dir() else set()
        if "config.yaml" not in names and names - {"data", "slurm", "run.lock"}:
            raise ConfigError(
                f"the folder {run} is not empty and holds no run",
                expected="a new or empty folder, or one that a run made",
                remedy="choose another run.path",
            )


def _refuse_changed_recipe(runs: Sequence[Path], configs: Sequence[Config]) -> None:
    """Refuse now, and not after days in the queue, a recipe with which the run would not go on."""
    from engine.config.file import differences, load_config

    for run, config in zip(runs, configs, strict=True):
        if not (run / "ledger.json").exists() or not (run / "config.yaml").exists() or config.run.force_resume:
            continue
        if changed := differences(config, load_config(run / "config.yaml")):
            raise ConfigError(
                f"{run} was begun with another configuration: {'; '.join(changed)}",
                expected="the configuration that began it",
                remedy="submit with that, choose another run.path, or go on all the same with run.force_resume=true",
            )


def _refuse_second_job(folders: Sequence[Path]) -> None:
    for folder in folders:
        submitted = read_submitted(folder)
        found = alive(submitted) if submitted is not None else []
        if submitted is not None and found:
            raise ConfigError(
                f"{folder} has a job already: {submitted.name} is {in_words(found[0])}",
                expected="one job a run",
                remedy="look at it with `sparring status`, end it with `sparring cancel`; a run "
                "goes on by itself after the end of a job's time",
            )
        _refuse_running(folder)


def _refuse_running(run: Path) -> None:
    from engine.reliability.run_lock import read_holder

    holder = read_holder(run / "run.lock")
    if holder is not None and holder.is_from_here and not holder.process_is_gone:
        raise ConfigError(
            f"{run} is in use: a start on {holder.host} (pid {holder.pid}) works in it",
            expected="one start at a time in a run folder",
            remedy=f"stop it with `touch {_as_typed(run / 'stop')}`, then submit",
        )


def _write(job: Job, configs: Sequence[Config], words: Sequence[Sequence[str]]) -> None:
    from engine.config.file import dump_config

    for run, config in zip(job.runs or (job.folder,), configs, strict=True):
        if not (run / "config.yaml").exists():  # first: it makes the folder a run's; written anew when the run starts
            _write_text(run / "config.yaml", dump_config(config))
        folder = slurm_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cancelled").unlink(missing_ok=True)
        _write_text(recipe_path(run), dump_config(config))
    folder = slurm_folder(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if job.runs:
        tasks = [{"run": str(run), "words": list(change)} for run, change in zip(job.runs, words, strict=True)]
        write_json(folder / "tasks.json", tasks)
    _write_text(folder / DAEMON_NAME, DAEMON, mode=0o755)
    _write_text(folder / "job.sbatch", render(job), mode=0o755)


def _write_text(path: Path, text: str, mode: int = 0o644) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(mode)


def _sbatch(script: Path) -> str:
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "this host has no sbatch",
            expected="a login node of a SLURM cluster, with SLURM's programs in PATH",
            remedy=f"submit {script} where SLURM is, or start the run by hand with deepspeed or mpirun",
        )
    done = run_slurm("sbatch", "--parsable", str(script))
    if done is None:
        raise ConfigError(
            "sbatch does not answer", expected="an answer within seconds", remedy="try `sinfo`, and later"
        )
    number = done.stdout.strip().split(";")[0]  # ID, or ID;CLUSTER
    if done.returncode or not number.isdigit():
        said = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        raise ConfigError(
            f"SLURM does not take the job: {said or 'sbatch ended with ' + str(done.returncode)}",
            remedy="`sinfo` lists partitions and nodes, `sacctmgr show associations` accounts; correct the options of "
            "submit or the site's file",
        )
    return number


def _record(job: Job, number: str, ranks: int) -> None:
    now, nodes = time.strftime("%Y-%m-%dT%H:%M:%S%z"), job.settings.nodes
    if not job.runs:
        write_submitted(job.folder, Submitted(number, now, nodes, ranks, nonce=newest_nonce(job.folder)))
        return
    for task in job.tasks:
        run = job.runs[task]
        write_submitted(run, Submitted(number, now, nodes, ranks, task, str(job.folder), nonce=newest_nonce(run)))
    tasks = {str(task): str(run) for task, run in enumerate(job.runs)}
    write_submitted(job.folder, Submitted(number, now, nodes, ranks, tasks=tasks))

"""What a job asks of SLURM: the options of `submit`, and the same keys in a site's file.

A site writes once what all its jobs have in common (`--site FILE`); the command line wins over it. Every value that
goes into an `#SBATCH` line has to match a pattern without blanks, quotes and line breaks. Only `setup` is shell text,
and it comes from the person who submits.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from engine.config.text import number_of
from engine.config.tree import Null, read_tree_file
from engine.errors import ConfigError
from launcher.terminal.arguments import positive_whole_number, typed_path, whole_number
from shards.errors import counted

_VALUE = re.compile(r"[A-Za-z0-9_.,:+@%/*&|()\[\]!~^=-]+")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@-]*")
_GPUS = re.compile(r"(?:[A-Za-z0-9_.-]+:)?(?P<count>[0-9]+)")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_OPTION = re.compile(r"(?:--)?(?P<option>[a-z][a-z0-9-]*(?:=[A-Za-z0-9_.,:+@%/*&|()\[\]!~^=-]+)?)")
_OURS = {"nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue", "no-requeue", "open-mode"}
_OURS |= {"output", "error", "job-name", "array", "wrap", "export", "chdir"}


@dataclass(frozen=True)
class Settings:
    """What a job asks for. Lists are tuples; None is not asked for, so that the site's default holds."""

    nodes: int = 0
    """Number of nodes, 1 or more."""
    gpus_per_node: str = ""
    """GPUs of each node, as `8` or `a100:8`; `0` computes on the processors."""
    ranks_per_node: int | None = None
    """Processes on each node; left out, one a GPU."""
    time: str | None = None
    """Time limit of one start, as SLURM writes it (`24:00:00`, `2-12`, minutes); a run may take many starts."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    cpus_per_task: int | None = None
    """Processor cores of each rank."""
    mem: str | None = None
    """Memory of each node, such as `500G`; `0` is all of it."""
    modules: tuple[str, ...] = ()
    """Loaded with `module load` before anything else."""
    setup: tuple[str, ...] = ()
    """Lines of shell, put into the script as they are, after the modules."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, such as `exclusive` or `mail-type=END`."""
    mpi: str = ""
    """`mpirun` (brings all it needs), or `pmix`: `srun --mpi=pmix`, where the site's SLURM has PMIx."""
    container: str | None = None
    """`apptainer:IMAGE`, or `pyxis:IMAGE`, which goes with `mpi: pmix`."""
    mounts: tuple[str, ...] = ()
    """Folders that the container sees too, as `DIR` or `DIR:INSIDE`; the run, the code and the data always are."""
    container_python: str = "python3"
    """The interpreter inside the container."""
    max_restarts: int = 3
    """How often a run starts again after it has lost a rank; ends of time and preemptions do not count."""

    @property
    def num_gpus(self) -> int:
        """GPUs of each node."""
        match = _GPUS.fullmatch(self.gpus_per_node)
        return int(match["count"]) if match else 0

    @property
    def ranks(self) -> int:
        """Processes on each node."""
        return self.ranks_per_node or self.num_gpus

    def keeping(self, devices: int) -> Settings:
        """Return the same with ranks on those GPUs of a node alone that are not kept for refreshes.

        Args:
            devices: GPUs of each node that are kept.

        Raises:
            ConfigError: There are fewer than these and a rank's, or than these and those of the ranks asked for.
        """
        if not devices or not self.num_gpus:
            return self
        ranks = self.ranks_per_node or self.num_gpus - devices
        if ranks < 1 or ranks + devices > self.num_gpus:
            raise ConfigError(
                f"ar2.refresh_devices keeps {counted(devices, 'GPU')} of a node, and the job asks for {self.num_gpus}"
                + (f" and {counted(self.ranks_per_node, 'rank')}" if self.ranks_per_node else ""),
                expected="a GPU for each rank, and those that are kept",
                remedy=f"ask for --gpus-per-node {max(ranks, 1) + devices}, or keep fewer",
            )
        return replace(self, ranks_per_node=ranks)

    @property
    def starter(self) -> str:
        """`mpirun` or `pmix`: what was asked for, or what the container wants."""
        return self.mpi or ("pmix" if (self.container or "").startswith("pyxis:") else "mpirun")


_LISTS = ("modules", "setup", "sbatch", "mounts")
_NAMES = tuple(field.name for field in fields(Settings))
_NUMBERS = ("nodes", "ranks_per_node", "cpus_per_task", "max_restarts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that make `Settings`."""
    add = parser.add_argument
    add("--nodes", type=positive_whole_number, metavar="N", help="number of nodes (needed here or in --site)")
    add("--gpus-per-node", metavar="G", help="GPUs of each node, as 8 or a100:8; 0 computes on the processors")
    add("--ranks-per-node", type=positive_whole_number, metavar="R", help="processes on each node; left out, one a GPU")
    add(
        "--time",
        metavar="TIME",
        help="limit of one start, [DAYS-]HOURS:MINUTES:SECONDS or minutes; the run goes on in as many as it needs",
    )
    for name in ("partition", "account", "qos", "constraint", "reservation", "exclude"):
        add(f"--{name}", metavar="WORD", help=f"as sbatch --{name}")
    add("--mem", metavar="SIZE", help="memory of each node, such as 500G (MiB without a letter); 0 is all of it")
    add("--cpus-per-task", type=positive_whole_number, metavar="C", help="processor cores of each rank")
    add("--module", action="append", dest="modules", metavar="NAME", help="module to load; may be given repeatedly")
    add("--setup", action="append", metavar="LINE", help="line of shell to run on the first node; repeatable")
    add("--setup-file", type=typed_path, metavar="FILE", help="such lines from a file")
    add("--sbatch", action="append", metavar="OPTION", help="further option of sbatch, such as exclusive; repeatable")
    add("--mpi", choices=("mpirun", "pmix"), help="what starts the ranks (mpirun); pmix is srun --mpi=pmix")
    add("--container", metavar="KIND:IMAGE", help="apptainer:IMAGE or pyxis:IMAGE")
    add("--mount", action="append", dest="mounts", metavar="DIR[:INSIDE]", help="folder for the container; repeatable")
    add("--container-python", metavar="PATH", help="interpreter inside the container (python3)")
    add(
        "--max-restarts",
        type=whole_number,
        metavar="N",
        help="restarts after a lost rank (3); ends of time do not count",
    )
    add("--site", type=typed_path, metavar="FILE", help="YAML file with these options, for all jobs of a site")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Merge the site's file and the command line, and check every value.

    Raises:
        ConfigError: A key is unknown, a value is not usable, or values contradict each other; all at once.
    """
    chosen: dict[str, Any] = read_site(arguments.site) if arguments.site else {}
    if arguments.setup_file is not None:
        if not arguments.setup_file.is_file():
            raise ConfigError(f"there is no file {arguments.setup_file}", expected="lines of shell (--setup-file)")
        lines = arguments.setup_file.read_text(encoding="utf-8").splitlines()
        chosen["setup"] = (*chosen.get("setup", ()), *lines)
    for name in _NAMES:
        value = getattr(arguments, name, None)
        if value is not None:
            chosen[name] = (*chosen.get(name, ()), *value) if name in _LISTS else value
    settings = Settings(**chosen)
    if problems := _problems(settings):
        raise ConfigError(
            f"the job has {counted(len(problems), 'problem')}: " + "; ".join(problems),
            remedy="correct the options of submit, or the site's file (configs/slurm/site.example.yaml)",
        )
    return settings


def read_site(path: Path) -> dict[str, Any]:
    """Read a site's file: a mapping with the keys of `Settings`.

    Raises:
        ConfigError: The file is missing, no YAML mapping, has an unknown key or a value of the wrong type.
    """
    if not path.is_file():
        raise ConfigError(f"there is no site file {path}", remedy="begin with configs/slurm/site.example.yaml")
    tree = read_tree_file(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no mapping", expected="keys such as partition and account")
    problems = [*_unknown(tree)]
    site: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in _NAMES or value is None or isinstance(value, Null):
            continue
        if name in _LISTS:
            value = value.splitlines() if name == "setup" and isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
                problems.append(f"{name}: expected a list of texts, got {value!r}")
            else:
                site[name] = tuple(value)
        elif name in _NUMBERS:
            number = number_of(value) if isinstance(value, str) else None
            if not isinstance(number, int):
                problems.append(f"{name}: expected a whole number, got {value!r}")
            site[name] = number
        elif isinstance(value, str):  # as it is written: YAML would read 24:00:00 as a number in base 60
            site[name] = value
        else:
            problems.append(f"{name}: expected a text, got {value!r}")
    if problems:
        count = counted(len(problems), "problem")
        raise ConfigError(f"{path} has {count}: " + "; ".join(problems), remedy="correct the site's file")
    return site


def seconds_of_time(text: str) -> int | None:
    """Return the seconds of a time limit in SLURM's notation; None where it has none of the notations."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None:  # D-H, D-H:M, D-H:M:S
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)  # M, M:S


def _unknown(tree: Mapping[Any, Any]) -> list[str]:
    found = []
    for name in tree:
        if name not in _NAMES:
            near = difflib.get_close_matches(str(name), _NAMES, n=1, cutoff=0.5)
            found.append(f"unknown key {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    return found


def _problems(settings: Settings) -> list[str]:
    found = []
    if settings.nodes < 1:
        found.append(f"nodes: expected 1 or more, got {settings.nodes or 'nothing'} (--nodes)")
    if not _GPUS.fullmatch(settings.gpus_per_node):
        found.append(f"gpus-per-node: expected a number or type:number, got {settings.gpus_per_node or 'nothing'!r}")
    elif settings.ranks < 1:
        found.append("without GPUs, the number of processes on each node is needed (--ranks-per-node)")
    elif 0 < settings.num_gpus < settings.ranks:
        found.append(f"{settings.ranks} ranks on a node would share {settings.num_gpus} GPUs: one a rank at most")
    for name in ("cpus_per_task", "ranks_per_node"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            found.append(f"{name}: expected 1 or more, got {value}")
    if settings.max_restarts < 0:
        found.append(f"max-restarts: expected 0 or more, got {settings.max_restarts}")
    if settings.time is not None and seconds_of_time(settings.time) is None:
        found.append(f"time: expected SLURM's notation, such as 24:00:00 or 2-12, got {settings.time!r}")
    for name in ("partition", "account", "qos", "constraint", "reservation", "exclude", "mem"):
        value = getattr(settings, name)
        if value is not None and not _VALUE.fullmatch(value):
            found.append(f"{name}: {value!r} has characters that no option of sbatch takes here")
    found += [f"module: {name!r} is no name of a module" for name in settings.modules if not _MODULE.fullmatch(name)]
    for option in settings.sbatch:
        match = _OPTION.fullmatch(option)
        if match is None:
            found.append(f"sbatch: {option!r} is no option such as exclusive or mail-type=END")
        elif (name := match["option"].split("=")[0]) in _OURS:
            found.append(f"sbatch: {name!r} is set by submit itself")
    return found + _problems_of_container(settings)


def _problems_of_container(settings: Settings) -> list[str]:
    found = []
    if settings.mpi not in {"", "mpirun", "pmix"}:
        found.append(f"mpi: expected mpirun or pmix, got {settings.mpi!r}")
    if settings.container is None:
        return found + (["mounts are for a container, and none is given"] if settings.mounts else [])
    kind, _, image = settings.container.partition(":")
    if kind not in {"apptainer", "pyxis"} or not image or "\n" in image:
        found.append(f"container: expected apptainer:IMAGE or pyxis:IMAGE, got {settings.container!r}")
    if kind == "pyxis" and settings.mpi == "mpirun":
        found.append("a container of pyxis is started by srun: choose mpi=pmix")
    bad = [mount for mount in settings.mounts if not mount or re.search(r"[,\n]", mount)]
    return found + [f"mount: {mount!r} has a comma or a line break, or is empty" for mount in bad]

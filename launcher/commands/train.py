"""`sparring train --config FILE [key=value ...]`: start a run by the starter that fits the place where it is typed.

The command is printed first, so that it can be learnt and typed: `deepspeed` or `mpirun` with `launcher/run.py`. This
process becomes that command, and so ends with its exit code.

    a SLURM allocation of several tasks or nodes   mpirun over its nodes, as `submit` starts a run (--pmix: srun)
    --hostfile FILE, or /job/hostfile              deepspeed --hostfile, over ssh (--mpi: mpirun)
    one machine                                    deepspeed with a rank a GPU, or on the processors (--mpi: mpirun)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.terminal.arguments import complete, positive_whole_number, recipe_file, typed_path

EXAMPLES = (
    "--config configs/tiny.yaml --ranks 2 run.path=runs/tiny",
    "--config configs/ar2_nq.yaml --hostfile hostfile --print data.path=data/nq run.path=runs/nq",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    add = parser.add_argument
    add(
        "--config",
        type=recipe_file,
        required=True,
        metavar="FILE",
        help="the recipe, or the name of one that comes along",
    )
    add("--print", action="store_true", dest="only_print", help="print the command, and start nothing")
    add("--ranks", type=positive_whole_number, metavar="N", help="processes (one a GPU, else by cores, four at most)")
    add("--hostfile", type=typed_path, metavar="FILE", help="hosts, a line such as `node1 slots=8` each")
    add("--mpi", action="store_true", help="start by mpirun in place of deepspeed, over a hostfile or here")
    add("--pmix", action="store_true", help="inside a SLURM allocation: start by srun --mpi=pmix")
    add("--master-addr", metavar="ADDRESS", help="deepspeed: where the first host is reached, as preflight may advise")
    add("--master-port", type=positive_whole_number, metavar="PORT", help="deepspeed: TCP port of rank 0 (29500)")
    add("--preflight-only", action="store_true", help="compare the hosts, try the connections, and end")
    add("overrides", nargs="*", metavar="key=value", help="over the recipe, such as data.path=DIR run.path=DIR")


def parse_words(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words behind `train`; end with exit code 2 where they are wrong."""
    parser = argparse.ArgumentParser(prog="sparring train", allow_abbrev=False)
    add_arguments(parser)
    return complete(parser, *parser.parse_known_args(words))


def run_command(arguments: argparse.Namespace) -> int:
    """Print the command and become it; with `--print`, return 0.

    Raises:
        ConfigError: The recipe is not usable, its batches cannot be shared by the ranks, or a word does not fit the
            place.
        DataError: The hostfile is not valid, or this machine alone is to train and has no such data folder.
    """
    from engine.config.file import load_config
    from engine.metrics.trackers import require_trackers
    from launcher.world.starters import Asked, choose_start, look_around

    config = load_config(arguments.config, arguments.overrides)
    require_trackers(config.run.trackers)
    asked = Asked(
        ranks=arguments.ranks,
        hostfile=arguments.hostfile,
        mpi=arguments.mpi,
        pmix=arguments.pmix,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
    )
    words = ["--config", _as_short(arguments.config), *arguments.overrides]
    words += ["--preflight-only"] * arguments.preflight_only
    start = choose_start(config, asked, look_around(os.environ), words)
    print(start.told, flush=True)
    if arguments.only_print:
        return 0
    if start.is_here:
        _require_data(config.data.path)
    sys.stderr.flush()
    os.execvpe(start.words[0], start.words, os.environ | start.environ)


def _require_data(path: Path | None) -> None:
    """Refuse a data folder that is not here, before processes are started, of which each would say so."""
    from shards.errors import DataError

    if path is not None and not path.is_dir():
        raise DataError(
            f"there is no folder {path}",
            expected="a data folder",
            remedy="correct data.path; a relative one begins where the command is typed",
        )


def _as_short(path: Path) -> str:
    """Return a path as somebody in this folder would type it."""
    return os.fspath(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

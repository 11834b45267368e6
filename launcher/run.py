"""Run a recipe: what `deepspeed launcher/run.py --config FILE [key=value ...]` starts on every rank.

The same file works under `deepspeed` (one node, or a hostfile with pdsh or Open MPI), under `mpirun`, and alone as a
world of one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
# A script's own folder comes first in sys.path; here it would shadow packages that are named like one of our files.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT / "launcher"]
if str(_ROOT) not in sys.path:
    sys.path.insert(0, str(_ROOT))

# Before torch is imported: a store that ends with rank 0 is reported by us, not by pages of C++ frames.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from launcher.terminal.streams import begin_in_utf8, open_streams, run_at_terminal  # noqa: E402
from launcher.world.imports import begin_imports, end_imports  # noqa: E402

if __name__ == "__main__":
    begin_in_utf8()
    open_streams()  # first, as an interrupt may come while the following is imported
    begin_imports()

import argparse  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from engine.config.file import load_config  # noqa: E402
from engine.config.recipe import Config  # noqa: E402
from engine.errors import ConfigError  # noqa: E402
from engine.log import get_logger, set_up_logging  # noqa: E402
from engine.metrics.trackers import require_trackers  # noqa: E402
from engine.reliability.preemption import PREEMPTION  # noqa: E402
from launcher.ending import end_of_process, guarded  # noqa: E402
from launcher.terminal.arguments import complete, recipe_file  # noqa: E402
from launcher.terminal.aside import libraries_aside, streams_aside  # noqa: E402
from launcher.world.opening import World, open_world  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, open the world and run the recipe; return the exit code."""
    arguments = parse_words(argv)
    config, failure = _read(arguments.config, arguments.overrides)
    opened: list[World] = []

    def start() -> None:
        settings = config.run if config else None
        if settings:
            PREEMPTION.listen(settings.preemption_seconds)
        opened.append(
            open_world(
                coordinator=settings.coordinator if settings else "auto",
                device=settings.device if settings else "auto",
                timeout_seconds=settings.timeout_seconds if settings else 60.0,
                rendezvous_seconds=settings.rendezvous_seconds if settings else 60.0,
                network=settings.network if settings else None,
                companions=config.refresh_devices if config else 0,
            )
        )

    only = arguments.preflight_only
    with libraries_aside():
        code = guarded(None, start)
        return code or guarded(opened[0], lambda: run_recipe(config, failure, opened[0], preflight_only=only))


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the words behind `launcher/run.py`."""
    parser = argparse.ArgumentParser(
        prog="launcher/run.py", description="Run a whole recipe on all ranks.", allow_abbrev=False
    )
    parser.add_argument(
        "--config", type=recipe_file, required=True, metavar="FILE", help="the recipe, such as configs/tiny.yaml"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("--preflight-only", action="store_true", help="compare the hosts, try the connections, and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR run.path=DIR")
    return parser


def parse_words(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words behind `launcher/run.py`; end with exit code 2 where they are wrong.

    Args:
        words: None takes those of this process.
    """
    parser = command_line()
    return complete(parser, *parser.parse_known_args(words))


def _read(file: Path, overrides: list[str]) -> tuple[Config | None, ConfigError | None]:
    """Read the configuration; an error waits until the world is open, so that it is told once and not by each rank."""
    try:
        return load_config(file, overrides), None
    except ConfigError as error:
        return None, error


def run_recipe(
    config: Config | None, failure: ConfigError | None, world: World, *, preflight_only: bool = False
) -> None:
    """Run a recipe in an open world; a run folder that an earlier start left is gone on with.

    Args:
        config: The recipe; None where it could not be read.
        failure: Why not.
        world: The ranks.
        preflight_only: End after the hosts were compared.

    Raises:
        ConfigError: What reading the configuration found, or the preflight.
    """
    set_up_logging(world.rank, world.world_size, aside=streams_aside())
    if config is None:
        raise failure or ConfigError("there is no configuration")
    if world.rank == 0:  # it tells them
        require_trackers(config.run.trackers)
    get_logger(__name__).info("%s", world.description)
    if config.run.preflight or preflight_only:
        from launcher.preflight.ranks import require_preflight

        require_preflight(config, world)
    if not preflight_only:
        from launcher.recipe import play

        end_imports()
        play(config, world)


if __name__ == "__main__":
    end_of_process(run_at_terminal(main))

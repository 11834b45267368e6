"""Training in this process: a world of one rank, from a script or a notebook.

It is the run that `sparring train --ranks 1` starts: the same folder, stages, checkpoints and numbers, so that either
goes on with what the other began. What belongs to a process of its own is left out: SIGTERM means what it means to the
caller, and nothing ends this process where a run would.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.evaluation.summary import Row, read_rows, summary_table
from engine.log import is_set_up, set_up_logging
from engine.reliability.run_lock import kept_alive
from engine.run import RunFolder
from sparring.recipe import Recipe

if TYPE_CHECKING:  # torch takes a moment, and is needed where something is trained
    from launcher.world.opening import World

Callback = Callable[[str, int, Mapping[str, float]], None]
"""Told of each point that is measured: the stage (`retriever/1`), the step or iteration, and name -> value."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS")
"""Of the environment, which opening a world sets."""
_opened: list[tuple[World, dict[str, str]]] = []
"""The world of this process with its environment, once it has trained."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that has come to its end.

    Attributes:
        path: Its folder, which `Searcher.open` takes.
    """

    path: Path

    @property
    def rows(self) -> list[Row]:
        """What was measured: a row for each system and split, with its `metrics` by name."""
        return read_rows(RunFolder(self.path).summary)

    @property
    def table(self) -> str:
        """The same as a table in text; empty where nothing was measured."""
        return summary_table(RunFolder(self.path)) if self.rows else ""


def train(recipe: Recipe, callbacks: Sequence[Callback] = (), *, quiet: bool = False) -> Trained:
    """Run a recipe from end to end in this process, on one rank; start it again to go on where it stopped.

    Args:
        recipe: With `run.path`, the folder that holds all that is made.
        callbacks: Called one after the other with each point that goes to metrics.jsonl, in this thread. What one
            raises stops the run, which can be gone on with.
        quiet: Whether only warnings are logged.

    Returns:
        The run.

    Raises:
        ConfigError: The recipe does not fit the data or this machine, its folder holds another run or is in use, or
            this process is one of several ranks.
        DataError: The data are not usable.
        SparringError: Whatever else a run refuses; the message has the remedy.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{recipe!r} is no recipe", expected="what Recipe.load returns")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ConfigError(f"callbacks are {callbacks!r}", expected="a list of functions of stage, step and values")
    _require_alone()
    config = recipe.config
    if not is_set_up():
        set_up_logging(rank=0, world_size=1)
    with _as_it_was(), _quietened(quiet), kept_alive(config.run.path / "run.lock", config.run.heartbeat_seconds):
        _play_alone(config, callbacks)
    return Trained(Path(config.run.path))


def _play_alone(config: Config, callbacks: Sequence[Callback]) -> None:
    """Play the recipe in this process's world of one."""
    from engine.coordination.coordinator import Coordinator, LocalTransport

    world = _world_of_process(
        config
    )  # before DeepSpeed is imported, which else looks for devices by itself, and says so

    from launcher.preflight.ranks import require_preflight
    from launcher.recipe import play

    # A coordinator of its own: what a run that failed has left in one must not end the next.
    coordinator = Coordinator(LocalTransport(), config.run.timeout_seconds)
    world = replace(world, coordinator=coordinator)
    try:
        if config.run.preflight:
            require_preflight(config, world)
        play(config, world, watched=False, listeners=callbacks)
    finally:
        coordinator.close()


def _world_of_process(config: Config) -> World:
    """Open the world of one that this process has from its first training to its end.

    DeepSpeed remembers groups of the first world, so a second one cannot be trained in.
    """
    import torch
    import torch.distributed as dist

    from launcher.world.opening import open_world

    if _opened:
        world, variables = _opened[0]
        has_gpu = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
        if has_gpu != (world.device.type == "cuda"):
            raise ConfigError(
                f"this process has trained on {world.device.type} before, and run.device is {config.run.device} now",
                expected="one kind of device in a process",
                remedy=f"set run.device={world.device.type}, or train in another process",
            )
        os.environ.update(variables)
        return world
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is in use in this process already",
            expected="a process in which nothing else trains with it",
            remedy="end the other work first (torch.distributed.destroy_process_group), or train in another process",
        )
    world = open_world(
        coordinator="auto",
        device=config.run.device,
        timeout_seconds=config.run.timeout_seconds,
        rendezvous_seconds=config.run.rendezvous_seconds,
        network=config.run.network,
        companions=config.refresh_devices,
    )
    _opened.append((world, {name: os.environ[name] for name in _VARIABLES if name in os.environ}))
    atexit.register(dist.destroy_process_group)
    return world


def _require_alone() -> None:
    """Refuse a process that a starter has started as one of several."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if (size := os.environ.get(name, "1")) != "1":
            raise ConfigError(
                f"{name} is {size}: this process is one of several ranks, and each would train by itself",
                expected="one process",
                remedy="start the script without deepspeed, torchrun or mpirun; several ranks: sparring train",
            )


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Leave the environment as it was: a second run must not take this world for one that a starter made."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quietened(quiet: bool) -> Iterator[None]:
    """Log warnings alone while the body runs, if that is asked for."""
    logger = logging.getLogger("sparring")
    before = logger.level
    if quiet:
        logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(before)

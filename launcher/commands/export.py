"""`python -m launcher export RUN`: write an iteration's models for other libraries, and publish them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.config.models import ModelConfig, RankerConfig
from engine.errors import ConfigError
from engine.evaluation.exported import export_indexes, export_iteration, require_indexes
from engine.log import get_logger
from engine.models.export_hub import push, repositories, require_hub
from engine.models.export_onnx import require_onnx
from engine.models.yes_no import YES_NO
from engine.run import Run
from launcher.commands.finished import corpus_of, last_iteration, open_run, place_for, states_of, taken_of

log = get_logger(__name__)


def run_command(arguments: argparse.Namespace) -> None:
    """Write the models, and what else is asked for."""
    if arguments.public and arguments.push is None:
        raise ConfigError(
            "--public says who sees what is published, and nothing is",
            expected="--push OWNER/NAME beside it",
            remedy="name where to, or leave --public out",
        )
    run = open_run(arguments.run)
    target = place_for(arguments.out, run.folder.path / "export")
    iteration = _finished(run, arguments.iteration)
    models = _chosen(run, arguments.models)
    places = {} if arguments.push is None else repositories(arguments.push, models)
    if arguments.onnx:
        require_onnx({model: _form(run.config.models[model]) for model in models})
    if arguments.index:
        require_indexes(run, iteration, models)
        data = corpus_of(run, iteration, arguments.shards)
    if places:
        require_hub(list(places.values()), private=not arguments.public)
    folders = export_iteration(run, iteration, target, models=models, onnx=arguments.onnx, places=places)
    log.info("iteration %d exported to %s", iteration, target)
    if arguments.index:
        export_indexes(run, data, iteration, target, models)
    for model, place in places.items():
        print(push(folders[model], place, private=not arguments.public))


def _finished(run: Run, iteration: int | None) -> int:
    """Return the iteration whose weights are all there.

    Raises:
        ConfigError: The iteration is not finished.
    """
    newest = last_iteration(run)
    iteration = taken_of(run) if iteration is None else iteration
    states = states_of(run, iteration)
    if not all(run.folder.weights(model, one.state).exists() for model, one in states.items()):
        raise ConfigError(
            f"iteration {iteration} of {run.folder.path} is not finished",
            expected=f"an iteration from 0 to {newest}",
        )
    return iteration


def _form(section: ModelConfig) -> str:
    return YES_NO if isinstance(section, RankerConfig) and section.head == YES_NO else section.kind


def _chosen(run: Run, names: Sequence[str] | None) -> list[str]:
    """Return the models to write.

    Raises:
        ConfigError: One of the names is no model of the run.
    """
    models = list(run.config.models)
    if unknown := [name for name in names or () if name not in models]:
        raise ConfigError(f"the run has no model {unknown[0]!r}", expected=f"one of {', '.join(models)}")
    return [model for model in models if not names or model in names]

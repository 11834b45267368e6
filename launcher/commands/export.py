"""`python -m launcher export RUN [--iteration T]`: write an iteration's models for other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.errors import ConfigError
from engine.evaluation.fusion import export_fusion
from engine.evaluation.systems import fused_system
from engine.log import get_logger
from engine.models.export import export_model
from launcher.commands.finished import last_iteration, open_run, states_of, taken_of

log = get_logger(__name__)


def run_command(arguments: argparse.Namespace) -> None:
    """Write the models."""
    export_run(arguments.run, iteration=arguments.iteration, out=arguments.out)


def export_run(path: Path, *, iteration: int | None, out: Path | None) -> None:
    """Write retriever and ranker of a finished iteration.

    Args:
        path: The run folder.
        iteration: 0 is the warm-up; None takes that of `evaluation.iteration`.
        out: Folder that gets `retriever` and `ranker`; None for the run's own `export`.

    Raises:
        ConfigError: The folder holds no run, or the iteration is not finished.
    """
    run = open_run(path)
    newest = last_iteration(run)
    iteration = taken_of(run) if iteration is None else iteration
    states = states_of(run, iteration)
    sources = {model: run.folder.weights(model, one.state) for model, one in states.items()}
    if not all(source.exists() for source in sources.values()):
        raise ConfigError(
            f"iteration {iteration} of {path} is not finished", expected=f"an iteration from 0 to {newest}"
        )
    target = out or run.folder.path / "export"
    for model, source in sources.items():
        export_model(source, target / model)
    if run.config.learns_from_queries:
        export_fusion(run, fused_system(run.config, taken=iteration), target / "fusion")
    log.info("iteration %d exported to %s", iteration, target)

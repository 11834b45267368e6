"""What a recipe's board shows first."""

from __future__ import annotations

from engine.config.file import dump_config, flatten
from engine.config.metric_names import compared_by
from engine.config.recipe import Config
from engine.config.timetable import Sizes
from engine.metrics.board import BoardPlan


def plan_of(config: Config) -> BoardPlan:
    """Return the plan of a recipe's board: its metrics, that by which iterations are compared first, and its phases.

    Args:
        config: The recipe.
    """
    phases = config.timetable_for(Sizes(1, 1)).phases
    metrics = config.evaluation.metrics if config.learns_from_queries else ()
    first = compared_by(metrics, config.run.keep_best)
    return BoardPlan(
        metrics=() if first is None else tuple(dict.fromkeys((first, *metrics))),
        games=tuple(phase.name for phase in phases if not phase.is_warmup),
        warmups=tuple(phase.name for phase in phases if phase.is_warmup),
        settings=dump_config(config),
        trackers=config.run.trackers,
        values=flatten(config.model_dump(mode="json")),
    )

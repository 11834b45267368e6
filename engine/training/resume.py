"""Where training goes on: a model's checkpoints in a run, and which finished stages a lost one takes back.

The ledger says which stages are finished, a checkpoint what the model has learnt. Where the newest checkpoint is
damaged, the one before may lie before the end of a stage that the ledger has as finished; then that stage is opened
again, goes on from there, and ends in the same weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.log import get_logger
from engine.reliability.starts import read_starts
from engine.results import Measured
from engine.run import Run
from engine.training.checkpoint import Checkpoints, Retention
from shards.files import canonical_json

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Ended:
    """What is read of a training stage's result."""

    checkpoint: int


def checkpoints_of(run: Run, models: Iterable[str]) -> dict[str, Checkpoints]:
    """Return the checkpoints of models in a run; one object each, since it counts them."""
    settings = run.config.run
    fence = run.lock.require if run.lock is not None else lambda: None

    def open_one(model: str) -> Checkpoints:
        retention = Retention(settings.keep_checkpoints, settings.keep_every_steps, lambda: _best_stage(run, model))
        return Checkpoints(run.folder.checkpoints / model, run.coordinator, retention, _origin(run), fence)

    return {model: open_one(model) for model in models}


def reopen_lost_stages(run: Run, model: str, checkpoint: int) -> None:
    """Open those finished stages again that a model's newest whole checkpoint does not hold.

    Args:
        run: Whose ledger has them as finished.
        model: Whom they trained.
        checkpoint: Number of that checkpoint; 0 without one.
    """
    stages = [visit.stage for phase in run.timetable.phases_of(model) for visit in phase.visits]
    ended = {stage: run.result_of(stage, _Ended) for stage in stages}
    lost = [stage for stage, result in ended.items() if result is not None and result.checkpoint > checkpoint]
    if lost:
        log.warning("%s has lost what it learnt in %s: trained again from here", model, ", ".join(lost))
        run.forget(lost)


def _best_stage(run: Run, model: str) -> str | None:
    """Return the stage that ended in the model's best iteration on dev so far; None where nothing is measured."""
    metric = run.config.run.keep_best
    trained_in = {visit.iteration: visit.stage for phase in run.timetable.phases_of(model) for visit in phase.visits}
    measured: dict[str, float] = {}
    for iteration in range(run.timetable.iterations + 1):
        result = run.result_of(f"evaluate/{iteration}", Measured)
        if metric is None or result is None:
            continue
        if not result.scores:
            continue
        value = result.value_of(model, metric)
        if value is None:
            raise ConfigError(
                f"run.keep_best is {metric}, but evaluate/{iteration} measured {', '.join(result.shown())}",
                expected="a metric that the dev split allows",
                remedy="name one of these, or leave run.keep_best out",
            )
        measured[trained_in[iteration]] = value
    return max(measured, key=lambda stage: measured[stage]) if measured else None


def _origin(run: Run) -> dict[str, Any]:
    """Return which code and configuration writes checkpoints now."""
    config = run.config.model_dump(mode="json", exclude={"run"})
    starts = read_starts(run.folder.path)
    return {
        "code": {"git": starts[-1].git, **starts[-1].versions} if starts else {"git": None},
        "config_sha256": hashlib.sha256(canonical_json(config).encode()).hexdigest(),
    }

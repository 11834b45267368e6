"""Where training goes on: a model's checkpoints in a run, and which finished stages a lost one takes back.

The ledger says which stages are finished, a checkpoint what the model has learnt. Where the newest checkpoint is
damaged, the one before may lie before the end of a stage that the ledger has as finished; then that stage is opened
again, goes on from there, and ends in the same weights.
"""

from __future__ import annotations

import hashlib
from typing import Any

from engine.errors import ConfigError
from engine.log import get_logger
from engine.measured import Measured
from engine.run import Run
from engine.training.backend import TrainedModel
from engine.training.checkpoint import Checkpoints, Position, Retention
from shards.files import canonical_json, parse_record, read_json

log = get_logger(__name__)


def checkpoints_of(run: Run, model: TrainedModel) -> Checkpoints:
    """Return a model's checkpoints; one object a run, since it counts them."""
    if model.name not in run.checkpoints:
        settings = run.config.run
        retention = Retention(
            settings.keep_checkpoints, settings.keep_every_steps, lambda: _best_stage(run, model.name)
        )
        folder = run.folder.checkpoints / model.name
        fence = run.lock.require if run.lock is not None else lambda: None
        run.checkpoints[model.name] = Checkpoints(folder, run.coordinator, retention, _origin(run), fence)
    found: Checkpoints = run.checkpoints[model.name]
    return found


def restore_training(run: Run, model: TrainedModel) -> Position | None:
    """Bring a model to its newest whole checkpoint, and open those finished stages again that it does not hold.

    Raises:
        ArtifactError: There are checkpoints, but none is whole; or the newest is of another model.
    """
    position = checkpoints_of(run, model).restore(model)
    number = position.number if position else 0
    lost = [
        name
        for name, result in run.results().items()
        if isinstance(result, dict)
        and result.get("_checkpoint", [None])[0] == model.name
        and result["_checkpoint"][1] > number
    ]
    if lost:
        log.warning("%s has lost what it learnt in %s: trained again from here", model.name, ", ".join(lost))
        run.forget(lost)
    return position


def _best_stage(run: Run, model: str) -> str | None:
    """Return the stage that ended in the model's best iteration on dev so far; None where nothing is measured."""
    metric = run.config.run.keep_best
    measured: dict[str, float] = {}
    for iteration in range(run.config.ar2.iterations + 1):
        result = run.results().get(f"evaluate/{iteration}")
        if metric is None or result is None:
            continue
        found = parse_record(result, Measured, f"the result of evaluate/{iteration} in the ledger")
        if not found.scores:
            continue
        value = found.value_of(model, metric)
        if value is None:
            raise ConfigError(
                f"run.keep_best is {metric}, but evaluate/{iteration} measured {', '.join(found.shown())}",
                expected="a metric that the dev split allows",
                remedy="name one of these, or leave run.keep_best out",
            )
        measured[f"{model}/{iteration}" if iteration else f"warmup_{model}"] = value
    return max(measured, key=lambda stage: measured[stage]) if measured else None


def _origin(run: Run) -> dict[str, Any]:
    """Return which code and configuration writes checkpoints now."""
    config = run.config.model_dump(mode="json", exclude={"run"})
    starts = run.folder.path / "starts.json"
    start = read_json(starts, "the record of starts")[-1] if starts.exists() else {}
    return {
        "code": {"git": start.get("git"), **start.get("versions", {})},
        "config_sha256": hashlib.sha256(canonical_json(config).encode()).hexdigest(),
    }

"""The only training loop.

It counts steps, sets the learning rate, seeds the random numbers of a step, logs, saves and resumes. What a step
computes is an objective's matter (`engine.phases`): a function from (model, step) that runs its backward passes and
returns metrics.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.config.recipe import OptimConfig
from engine.metrics import Metric, MetricWindow
from engine.reliability.preemption import PREEMPTION
from engine.reliability.progress import progress_bar
from engine.run import Stage
from engine.training.backend import TrainedModel
from engine.training.checkpoint import Checkpoints
from engine.training.guards import BatchIds, Guards

Objective = Callable[[TrainedModel, int], Mapping[str, Metric]]
"""Runs the forward and backward passes of one step (its number in the schedule) and returns metrics with a `loss`."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates over the whole life of an optimizer, which may span several stages.

    Attributes:
        optim: Peak rate, shape and share of warm-up.
        total_steps: Steps after which a linear schedule reaches 0.
    """

    optim: OptimConfig
    total_steps: int

    def lr(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0 over all stages that share the optimizer."""
        warmup = round(self.optim.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.optim.lr * (step + 1) / (warmup + 1)
        if self.optim.schedule == "constant":
            return self.optim.lr
        return self.optim.lr * max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))


def train(
    stage: Stage,
    model: TrainedModel,
    checkpoints: Checkpoints,
    objective: Objective,
    schedule: Schedule,
    *,
    batch_ids: BatchIds,
    first_step: int,
    steps: int,
    tag: str,
) -> dict[str, Any]:
    """Train a model for a stage's steps, from where an earlier start left off.

    Args:
        stage: Where this runs; its name marks the checkpoints.
        model: The engine to step.
        checkpoints: Of this model; saved every `run.checkpoint_every_steps` and at the end.
        objective: Forward and backward of one step.
        schedule: Learning rates.
        batch_ids: Names what a step is made of, for the post-mortem of one that must not be taken.
        first_step: Steps of the schedule that earlier stages took.
        steps: Steps of this stage.
        tag: Prefix of the metrics' names, such as `retriever`.

    Returns:
        Number of steps and the mean loss over the last logged window; under `_checkpoint` the model's name and the
        number of the checkpoint at the stage's end.

    Raises:
        TrainingError: A step must not be taken; the weights are those before it. See `engine.training.guards`.
    """
    if steps == 0:
        return {"steps": 0}
    model.begin_stage(schedule.optim)
    model.train()
    done = checkpoints.position.step if checkpoints.position and checkpoints.position.stage == stage.name else 0
    if done == 0 and first_step == 0:
        model.reset_optimizer()
    window, settings, last = MetricWindow(), stage.run.config.run, {}
    guards = Guards(stage, batch_ids, first_step)
    if done > 0:
        guards.restore(checkpoints.notes["guards"])
        window.restore(checkpoints.notes["window"])
        last = dict(checkpoints.notes["last"])
    with progress_bar(stage.name, steps, "step", shown=stage.run.is_main, initial=done) as bar:
        window_start = time.monotonic()
        for step in range(done, steps):
            with _random_numbers_of(stage, step):
                metrics = objective(model, first_step + step)
            lr = schedule.lr(first_step + step)
            report = guards.step(model, step, lr, metrics)
            window.add(metrics)
            window.add(_of_optimizer(lr, report.grad_norm, guards.num_skipped))
            bar.update()
            if (step + 1) % settings.log_every_steps == 0 or step + 1 == steps:
                last = window.reduce(model.device)
                last["tokens_per_second"] = last.pop("tokens") / max(1e-9, time.monotonic() - window_start)
                window_start = time.monotonic()
                bar.set_postfix(loss=f"{last['loss']:.4f}", refresh=False)
                values = {f"{tag}/{name}": value for name, value in last.items()}
                stage.run.metrics.write(stage.name, first_step + step + 1, values)
            stop = PREEMPTION.agreed(model.device)
            if (step + 1) % settings.checkpoint_every_steps == 0 or step + 1 == steps or stop:
                window.settle(model.device)
                shown = {"loss": last["loss"]} if last else {}
                notes = {"window": window.state(), "last": shown, "guards": guards.state()}
                checkpoints.save(model, stage.name, step + 1, notes)
            if stop:
                raise PREEMPTION.stop_here(f"{stage.name}, step {step + 1}")
    stage.run.metrics.flush()
    newest = checkpoints.position
    result = {"steps": steps, "_checkpoint": [model.name, newest.number if newest else 0]}
    return result | {"loss": last["loss"]} if last else result


def _of_optimizer(lr: float, grad_norm: float | None, num_skipped: int) -> dict[str, Metric]:
    metrics = {"lr": Metric(lr, "max"), "skipped_steps": Metric(float(num_skipped), "max")}
    return metrics if grad_norm is None else metrics | {"grad_norm": Metric(grad_norm)}


@contextmanager
def _random_numbers_of(stage: Stage, step: int) -> Iterator[None]:
    """Give a step random numbers of its own, so that a resumed one draws what an undisturbed one draws."""
    with torch.random.fork_rng(devices=[stage.run.device] if stage.run.device.type == "cuda" else []):
        torch.manual_seed(step_seed(stage, step, 0))
        yield


def step_seed(stage: Stage, step: int, place: int) -> int:
    """Return the seed of a micro-batch's dropout.

    Args:
        stage: Where this runs.
        step: Number of the step.
        place: Of the micro-batch's first query in the batch of all ranks: whichever rank has it draws the same.
    """
    return zlib.crc32(f"{stage.seed}/{stage.name}/{step}/{place}".encode())

"""The only training loop.

It counts steps, sets the learning rate, seeds the random numbers of a step, logs, saves and resumes. What a step
computes is an objective's matter (`engine.phases`): a function from (model, step) that runs its backward passes and
returns metrics.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine.backend import TrainedModel
from engine.checkpoint import Checkpoints
from engine.config import OptimConfig
from engine.errors import TrainingError
from engine.log import progress_bar
from engine.metrics import Metric, MetricWindow
from engine.run import Stage

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
        first_step: Steps of the schedule that earlier stages took.
        steps: Steps of this stage.
        tag: Prefix of the metrics' names, such as `retriever`.

    Returns:
        Number of steps and the mean loss over the last logged window.

    Raises:
        TrainingError: The loss or the gradient is not finite on some rank; the weights are those before the step.
    """
    if steps == 0:
        return {"steps": 0}
    model.begin_stage(schedule.optim)
    model.train()
    done = checkpoints.position.step if checkpoints.position and checkpoints.position.stage == stage.name else 0
    if done == 0 and first_step == 0:
        model.reset_optimizer()
    window, settings, last = MetricWindow(), stage.run.config.run, {}
    with progress_bar(stage.name, steps, "step", shown=stage.run.is_main, initial=done) as bar:
        window_start = time.monotonic()
        for step in range(done, steps):
            with _random_numbers_of(stage, step):
                metrics = objective(model, first_step + step)
            _require_finite(stage, step, metrics["loss"], model.device)
            lr = schedule.lr(first_step + step)
            report = model.step(lr)
            window.add(metrics)
            window.add(_of_optimizer(lr, report.grad_norm, report.applied))
            bar.update()
            if (step + 1) % settings.log_every_steps == 0 or step + 1 == steps:
                last = window.reduce(model.device)
                last["tokens_per_second"] = last.pop("tokens") / max(1e-9, time.monotonic() - window_start)
                window_start = time.monotonic()
                bar.set_postfix(loss=f"{last['loss']:.4f}", refresh=False)
                values = {f"{tag}/{name}": value for name, value in last.items()}
                stage.run.metrics.write(stage.name, first_step + step + 1, values)
            if (step + 1) % settings.checkpoint_every_steps == 0 or step + 1 == steps:
                checkpoints.save(model, stage.name, step + 1)
    stage.run.metrics.flush()
    return {"steps": steps, "loss": last["loss"]} if last else {"steps": steps}


def _of_optimizer(lr: float, grad_norm: float | None, applied: bool) -> dict[str, Metric]:
    metrics = {"lr": Metric(lr, "max"), "skipped_steps": Metric(0.0 if applied else 1.0, "max")}
    return metrics if grad_norm is None else metrics | {"grad_norm": Metric(grad_norm)}


@contextmanager
def _random_numbers_of(stage: Stage, step: int) -> Iterator[None]:
    """Seed dropout from (seed, stage, step, rank), so that a resumed step draws what an undisturbed one draws."""
    with torch.random.fork_rng(devices=[stage.run.device] if stage.run.device.type == "cuda" else []):
        torch.manual_seed(step_seed(stage, step, stage.run.coordinator.rank))
        yield


def step_seed(stage: Stage, step: int, rank: int) -> int:
    """Return the seed of a step's dropout on one rank."""
    return zlib.crc32(f"{stage.seed}/{stage.name}/{step}/{rank}".encode())


def _require_finite(stage: Stage, step: int, loss: Metric, device: torch.device) -> None:
    value = torch.as_tensor(loss.value, dtype=torch.float32, device=device).detach().clone()
    worst = torch.isfinite(value).logical_not().float()
    if dist.is_initialized():
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if worst.item() > 0:
        own = float(value)
        raise TrainingError(
            f"the loss of {stage.name} is not finite at step {step}"
            + (f" (this rank has {own})" if math.isfinite(own) else f": {own}"),
            expected="a finite loss on all ranks; the weights are still those before this step",
            remedy="lower the learning rate, or train in bf16 or fp32",
        )

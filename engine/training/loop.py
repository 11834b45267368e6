"""The only training loop.

It counts steps, sets the learning rate, seeds the random numbers of a step, takes the optimizer's step, logs, saves and
resumes. What a step computes is an objective's matter (`engine.objectives`); which steps there are stands in the
timetable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.config.timetable import Visit
from engine.data.batches import GroupTokens, dropout_seed
from engine.data.prefetch import prefetched
from engine.metrics import Metric, MetricWindow
from engine.metrics.memory import PeakMemory
from engine.reliability.preemption import PREEMPTION
from engine.reliability.progress import progress_bar
from engine.run import Stage
from engine.training.backend import TrainedModel
from engine.training.checkpoint import Checkpoints
from engine.training.guards import Guards


@dataclass(frozen=True, slots=True)
class Progress:
    """What the loop has done in a stage.

    Attributes:
        steps: Steps of the stage.
        loss: Mean over the last logged window; None where there is none.
        checkpoint: Number of the model's checkpoint at the end; 0 without one.
    """

    steps: int
    loss: float | None = None
    checkpoint: int = 0


class Objective(Protocol):
    """What one step of a phase computes; `engine.objectives` has them."""

    samples: Any
    """What its steps are made of: a class of `engine.data.batches.StepSamples`, whose type a protocol cannot say, since
    `engine.training.micro_batches` replaces it."""

    @property
    def token_counts(self) -> Sequence[GroupTokens]:
        """What a sample of a step takes of each model, in tokens: a query with its documents, or a document."""
        ...

    def prepare(self, step: int) -> Any:
        """Make the batch of a step on the CPU; steps are counted over all visits of the phase."""
        ...

    def backward(self, model: TrainedModel, batch: Any) -> dict[str, Metric]:
        """Run the forward and backward passes of a prepared batch, on the device, and return metrics with a `loss`."""
        ...


def train(stage: Stage, visit: Visit, model: TrainedModel, checkpoints: Checkpoints, objective: Objective) -> Progress:
    """Train a model for one visit of a phase, from where an earlier start left off.

    Args:
        stage: Where this runs; its name marks the checkpoints.
        visit: Which steps, and their learning rates.
        model: The engine to step.
        checkpoints: Of this model; saved every `run.checkpoint_every_steps` and at the end.
        objective: Batches, forward and backward of a step.

    Raises:
        TrainingError: A step must not be taken; the weights are those before it. See `engine.training.guards`.
        Preempted: The run was asked to stop; the step that was at work is saved.
    """
    phase, schedule, first_step = visit.phase, visit.phase.schedule, visit.first_step
    if phase.steps == 0:
        return Progress(0)
    model.begin_stage(phase.optim)
    model.train()
    done = checkpoints.position.step if checkpoints.position and checkpoints.position.stage == stage.name else 0
    if done == 0 and first_step == 0:
        model.reset_optimizer()
    window, settings, last_loss, seconds_before = MetricWindow(), stage.run.config.run, None, 0.0
    guards = Guards(stage, objective.samples.names, first_step)
    if done > 0:
        guards.restore(checkpoints.notes["guards"])
        window.restore(checkpoints.notes["window"])
        last_loss = checkpoints.notes["last"].get("loss")
        seconds_before = checkpoints.notes["last"].get("seconds", 0.0)
    memory, window_start = PeakMemory(model.device), time.monotonic() - seconds_before
    with (
        progress_bar(stage.name, phase.steps, "step", shown=stage.run.is_main, initial=done) as bar,
        prefetched(objective.prepare, range(first_step + done, first_step + phase.steps), model.device) as batches,
    ):
        for step, batch in enumerate(batches, start=done):
            with _random_numbers_of(stage, step):
                metrics = objective.backward(model, batch)
            guards.require_health(step, metrics, model.device)
            lr = schedule.lr(visit.first_of_schedule + step)
            with guards.post_mortem(step, metrics):
                report = model.step(lr)
            guards.count(step, report, metrics)
            window.add(metrics)
            window.add(_of_optimizer(lr, report.grad_norm, guards.num_skipped))
            bar.update()
            at_end = step + 1 == phase.steps
            if (step + 1) % settings.log_every_steps == 0 or at_end:
                window.add(memory.metrics())
                reduced = window.reduce(model.device)
                reduced["tokens_per_second"] = reduced.pop("tokens") / max(1e-9, time.monotonic() - window_start)
                window_start, last_loss = time.monotonic(), reduced["loss"]
                bar.set_postfix(loss=f"{last_loss:.4f}")
                values = {f"{phase.name}/{name}": value for name, value in reduced.items()}
                stage.run.metrics.write(stage.name, first_step + step + 1, values)
            stop = PREEMPTION.agreed(model.device)
            if (step + 1) % settings.checkpoint_every_steps == 0 or at_end or stop:
                window.settle(model.device)
                last = {} if last_loss is None else {"loss": last_loss}
                last["seconds"] = time.monotonic() - window_start  # of the window that is open
                notes = {"window": window.state(), "last": last, "guards": guards.state()}
                checkpoints.save(model, stage.name, step + 1, notes)
            if stop:
                raise PREEMPTION.stop_here(f"{stage.name}, step {step + 1}")
    stage.run.metrics.flush()
    return Progress(phase.steps, last_loss, checkpoints.position.number if checkpoints.position else 0)


def _of_optimizer(lr: float, grad_norm: float | None, num_skipped: int) -> dict[str, Metric]:
    metrics = {"lr": Metric(lr, "max"), "skipped_steps": Metric(float(num_skipped), "max")}
    return metrics if grad_norm is None else metrics | {"grad_norm": Metric(grad_norm)}


@contextmanager
def _random_numbers_of(stage: Stage, step: int) -> Iterator[None]:
    """Give a step random numbers of its own, so that a resumed one draws what an undisturbed one draws."""
    with torch.random.fork_rng(devices=[stage.run.device] if stage.run.device.type == "cuda" else []):
        torch.manual_seed(dropout_seed(stage.seed, stage.name, step, 0))
        yield

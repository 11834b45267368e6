"""How many steps a phase takes, and at which learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.config.training import OptimConfig
from engine.errors import ConfigError


def steps_of(steps: int | None, epochs: float | None, batch_size: int, num_samples: int | None, section: str) -> int:
    """Return the steps of a phase that may be counted in epochs.

    Args:
        steps: Given steps, which count where they are given.
        epochs: Passes over the samples.
        batch_size: Samples of a step.
        num_samples: Of an epoch; None where they have not been counted yet.
        section: Of the phase in the configuration, for the message.

    Returns:
        Steps; the last one of the last epoch goes on into the next where the batch does not divide the samples.

    Raises:
        ConfigError: Epochs are asked for, and the data has not been counted.
    """
    if steps is not None:
        return steps
    if num_samples is None:
        raise ConfigError(
            f"{section}.epochs cannot be turned into steps before the data is opened",
            expected="a run that has read its data, or steps",
            remedy=f"name the steps by {section}.steps",
        )
    return math.ceil((epochs or 0) * num_samples / batch_size)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates over the whole life of an optimizer, which may span several visits.

    Attributes:
        optim: Peak rate, shape and share of warm-up.
        total_steps: Steps after which a linear schedule reaches 0.
    """

    optim: OptimConfig
    total_steps: int

    def lr(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0 over all visits."""
        warmup = round(self.optim.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.optim.lr * (step + 1) / (warmup + 1)
        if self.optim.schedule == "constant":
            return self.optim.lr
        return self.optim.lr * max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))

"""The sections of training that any algorithm has: an optimizer, and phases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.config.sections import Section

Tokens = Annotated[int, Field(ge=1)] | Literal["auto"]
"""A number of tokens, or `auto` for one that is found where the recipe runs."""
DecayRate = Annotated[float, Field(ge=0, lt=1)]
"""How much of a moment stays at each step."""


class OptimConfig(Section):
    """AdamW with a linear schedule (AR2 Table 9)."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    head_lr_scale: float = Field(1.0, gt=0)
    """What the learning rate is multiplied by for a ranker's head: all above its layers, a pooler among it. Ours; the
    papers and their released code have one rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; biases and LayerNorm weights take none."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the schedule's steps in which the rate rises linearly from 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the rise: linear decay to 0 at the last step of the schedule, or constant."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm is clipped to this; 0 switches it off. AR2's released code clips at 2.0."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""


class BatchConfig(Section):
    """What any phase has: batches and an optimizer."""

    batch_size: int = Field(64, ge=1)
    """Queries of a step over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Queries of one forward on one rank; DeepSpeed accumulates the rest."""
    micro_batch_tokens: Tokens | None = None
    """Tokens of one forward on one rank, in place of `micro_batch_size`: as many queries as fit, at least one. `auto`:
    the most that a GPU's memory allows, found by trial before the phase's first step and recorded in the run folder."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer; its moments and its schedule go on from iteration to iteration."""


class PhaseConfig(BatchConfig):
    """One side of the adversarial game in every iteration."""

    steps: int = Field(1500, ge=0)
    """Optimizer steps in one iteration."""


class CountedPhaseConfig(BatchConfig):
    """A phase that is counted in steps or in epochs."""

    steps: int | None = Field(None, ge=0)
    """Optimizer steps; left out, `epochs` says how many. 0 leaves the model as it came."""
    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the training queries, where `steps` is left out."""

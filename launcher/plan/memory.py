"""Memory of a training step under each ZeRO stage, in bytes, by part and by the moment in which it is needed.

What DeepSpeed holds of P parameters on each of W ranks, e bytes a number (4 in fp32, 2 in bf16 and fp16), as found in
its source and by `benchmarks/plan.py`:

    stage           weights   float32 masters   moments   gradients          between steps
    0, fp32         4 P       -                 8 P       4 P
    0, bf16/fp16    e P       4 P               8 P       e P
    1               e P       4 P / W           8 P / W   e P
    2               e P       4 P / W           8 P / W   e (partition)
    3               e P / W   4 P / W           8 P / W   e P / W            the gradients' buffer and one bucket

Gradients accumulate in the type of the weights. A partition's gradients are kept as whole parameters, so the parameter
on its border counts fully on both sides. Under ZeRO-3, DeepSpeed's default of 1e9 live parameters keeps a smaller model
gathered from its forward pass to the end of the backward pass. P are the parameters that are trained; those that are
frozen beside adapters take e bytes each, partitioned under ZeRO-3, and nothing else.

Three moments can be the peak: the start of the backward pass (activations), its end (gradients and buckets), and the
optimizer's step (float32 gradients, and under ZeRO in bf16 and fp16 the flattened ones that they are cast from; the
fused AdamW needs nothing besides).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from engine.config.models import ModelConfig
from engine.config.shipped import SHIPPED
from engine.errors import ConfigError
from launcher.plan.activations import Inputs, Numerics, kept_bytes, passing_bytes
from launcher.plan.models import ModelShape

STAGES = (0, 1, 2, 3)
_MASTER, _MOMENTS = 4, 8
_ALL_REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed's bucket without ZeRO."""
_DEFAULT_BUCKET = 500_000_000


@dataclass(frozen=True, slots=True)
class Buckets:
    """What of a DeepSpeed file takes memory."""

    elements: int
    """Of a reduction's bucket."""
    copies: int
    """Two where communication overlaps with the backward pass."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on one rank that trains one model; the rank that holds most."""

    weights: int
    masters: int
    moments: int
    gradients: int
    """Most that is held of them at a time, in the type of the weights."""
    kept_gradients: int
    """ZeRO-3's buffer, which stays between steps."""
    gathered: int
    """Whole weights under ZeRO-3."""
    activations: int
    """Kept for the backward pass, and passing through it."""
    bucket: int
    """Of the reduction."""
    kept_bucket: int
    """Of it, what stays between steps."""
    extra: int
    """What the objective holds during the passes: representations in a pool."""
    opponent: int
    """Frozen weights beside the model in training."""
    backward_start: int
    backward_end: int
    step: int

    @property
    def resident(self) -> int:
        """Between steps."""
        own = self.weights + self.masters + self.moments + self.kept_gradients + self.kept_bucket
        return own + self.opponent

    @property
    def peak(self) -> int:
        """At the worst moment of a step."""
        return self.resident + max(self.backward_start, self.backward_end, self.step)

    @property
    def worst_moment(self) -> str:
        """Which of the three that is."""
        moments = {
            "start of backward": self.backward_start,
            "end of backward": self.backward_end,
            "optimizer step": self.step,
        }
        return max(moments, key=lambda name: moments[name])


def step_memory(
    shape: ModelShape,
    batches: Sequence[Inputs],
    numerics: Numerics,
    *,
    stage: int,
    world_size: int,
    num_micro_batches: int,
    buckets: Buckets,
    extra: int = 0,
    opponent: int = 0,
) -> StepMemory:
    """Estimate the memory of a training step.

    Args:
        shape: The model.
        batches: What one forward of a micro-batch holds: pairs, or queries and documents.
        numerics: Types and kernels.
        stage: ZeRO stage, 0 to 3.
        world_size: W, at least 1.
        num_micro_batches: Of a rank in a step; from the second on, gradients are there while activations are.
        buckets: Of the DeepSpeed file.
        extra: Bytes that the objective holds during the passes.
        opponent: Bytes of the frozen weights that score the same documents.
    """
    e, total = numerics.element, shape.parameters
    share = sum(-(-size // world_size) for size in shape.sizes) if stage == 3 else -(-total // world_size)
    own = total if stage == 0 else share
    master = stage > 0 or numerics.precision != "fp32"
    whole, frozen = total * e, shape.frozen * e
    bucket_elements = buckets.elements if stage else _ALL_REDUCE_ELEMENTS
    filled = min(bucket_elements, total) * e
    # On a CPU only the pages that are written count; a GPU's allocation counts whole.
    bucket = 0 if stage == 0 else buckets.copies * (filled if numerics.on_cpu else bucket_elements * e)
    partition = partition_elements(shape, world_size) * e
    accumulated = {0: whole, 1: whole, 2: partition, 3: 0}[stage] if num_micro_batches > 1 else 0
    activations = kept_bytes(shape, batches, numerics)
    activations += max(passing_bytes(shape, inputs, numerics) for inputs in batches)
    gathered = whole + frozen if stage == 3 and world_size > 1 else 0
    early_bucket = bucket if stage in (1, 2) and not numerics.on_cpu else 0
    backward_start = accumulated + activations + gathered + early_bucket + extra
    repeated = shape.embedding * e if num_micro_batches > 1 else 0
    backward_end = (
        extra
        + {
            0: whole + filled,
            1: max(whole + repeated + early_bucket, bucket + filled + max(0, whole - filled), bucket + partition),
            2: accumulated + bucket + max(filled, shape.embedding * e, partition),
            3: gathered + max(filled, shape.embedding * e),
        }[stage]
    )
    return StepMemory(
        weights=(share if stage == 3 else total) * e + (-(-frozen // world_size) if stage == 3 else frozen),
        masters=_MASTER * own if master else 0,
        moments=_MOMENTS * own,
        gradients={0: whole, 1: whole, 2: partition, 3: share * e}[stage],
        kept_gradients=share * e if stage == 3 else 0,
        gathered=gathered,
        activations=activations,
        bucket=bucket,
        kept_bucket=bucket if stage == 3 else 0,
        extra=extra,
        opponent=opponent,
        backward_start=backward_start,
        backward_end=backward_end,
        step=_step_bytes(shape, numerics, stage, world_size, partition),
    )


def partition_elements(shape: ModelShape, world_size: int) -> int:
    """Return the elements of the parameters that lie in one rank's partition, wholly or partly, of the fullest rank.

    Args:
        shape: Its parameters, in the optimizer's two groups.
        world_size: Equal parts that each group's flattened parameters are cut into.
    """
    held = [0] * world_size
    for sizes in shape.groups:
        part = -(-sum(sizes) // world_size)
        for size, stop in zip(sizes, accumulate(sizes), strict=True):
            for rank in range((stop - size) // part, (stop - 1) // part + 1):
                held[rank] += size
    return max(held)


def buckets_of(section: ModelConfig, stage: int) -> Buckets:
    """Read the size of the reduction's bucket from the DeepSpeed file that a stage would use.

    Args:
        section: Names the file for its own stage; the other stages take configs/deepspeed.
        stage: ZeRO stage.

    Raises:
        ConfigError: The file cannot be read.
    """
    own = section.deepspeed if stage == section.zero_stage else None
    path = own or SHIPPED / "deepspeed" / f"zero{stage}.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(f"the DeepSpeed file {path} cannot be read: {error}", remedy="name a JSON file") from error
    overlapped = bool(settings.get("overlap_comm", stage == 3))
    return Buckets(int(settings.get("reduce_bucket_size", _DEFAULT_BUCKET)), 2 if overlapped and stage < 3 else 1)


def idle_bytes(shape: ModelShape, precision: str, stage: int) -> int:
    """Return what an engine that was moved to the host leaves on the GPU.

    Nothing, but without ZeRO in bf16 and fp16: there DeepSpeed's wrapper keeps its float32 masters where they are.
    """
    return _MASTER * shape.parameters if stage == 0 and precision != "fp32" else 0


def _step_bytes(shape: ModelShape, numerics: Numerics, stage: int, world_size: int, partition: int) -> int:
    """Return what is held during the optimizer's step besides what is resident."""
    e, total = numerics.element, shape.parameters
    if stage == 0:
        return total * e + (_MASTER * total if numerics.precision != "fp32" else 0)
    part = -(-max(sum(sizes) for sizes in shape.groups) // world_size)
    flattened = e * part if numerics.precision != "fp32" else 0  # before they are cast
    return _MASTER * part + flattened + (partition if stage < 3 else 0)

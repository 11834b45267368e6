"""What a forward pass leaves for the backward pass, and what both need on the way, in bytes.

The counts are those of a BERT layer (dense, dropout, LayerNorm after each half): T tokens of width h and feed-forward
width f, numbers of e bytes. A layer keeps 8 T h (its input, query, key, value, attention's result, both LayerNorms'
inputs, the first one's result) and 2 T f (before and after GELU), the statistics of both LayerNorms, and the masks of
two dropouts. Attention that materialises its scores keeps these as well. `tests/unit/launcher/plan/test_memory.py`
compares the counts with what autograd keeps.

Source: counted by torch's saved-tensor hooks; the same count as Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", Eq. 1, whose 34 bytes a token and channel are these 16 numbers of two bytes
and two masks of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.plan.models import ModelShape

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """A padded batch: rows of one length."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Numerics:
    """What decides about the size of one number, and which kernels compute."""

    precision: str
    """`fp32`, `bf16` or `fp16`."""
    attention: str
    """`sdpa`, `eager` or `flash_attention_2`."""
    checkpointing: bool
    """Recompute each layer's activations in the backward pass."""
    on_cpu: bool
    """torch's kernels for the CPU keep dropout's masks as numbers, and have no fused attention with dropout."""

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return ELEMENT_BYTES[self.precision]


def kept_bytes(shape: ModelShape, batches: Sequence[Inputs], numerics: Numerics) -> int:
    """Return what is kept between forward and backward of batches that share one graph.

    Args:
        shape: The model.
        batches: Such as queries and documents of a micro-batch.
        numerics: Types and kernels.

    Returns:
        Bytes at the moment when the backward pass begins; with checkpointing, when it has recomputed the largest
        batch's last layer.
    """
    total = sum(_around_layers(shape, inputs, numerics) for inputs in batches)
    if not numerics.checkpointing:
        return total + sum(shape.layers * layer_bytes(shape, inputs, numerics) for inputs in batches)
    inputs_of_layers = sum(shape.layers * inputs.tokens * shape.hidden * numerics.element for inputs in batches)
    return total + inputs_of_layers + max(layer_bytes(shape, inputs, numerics) for inputs in batches)


def layer_bytes(shape: ModelShape, inputs: Inputs, numerics: Numerics) -> int:
    """Return what one layer keeps of one batch."""
    e, tokens = numerics.element, inputs.tokens
    total = tokens * (8 * shape.hidden + 2 * shape.intermediate) * e
    total += tokens * 4 * (e if numerics.on_cpu else _FLOAT)
    if shape.dropout:
        total += 2 * tokens * shape.hidden * (e if numerics.on_cpu else 1)
    scores = inputs.rows * shape.heads * inputs.length**2
    if not _materialises(shape, numerics):
        mask = inputs.rows * inputs.length**2 * e if numerics.attention == "sdpa" else 0
        return total + inputs.rows * shape.heads * inputs.length * _FLOAT + mask
    number = _score_bytes(numerics)
    total += 3 * tokens * shape.hidden * (number - e)
    copies = 2 * number + (number if numerics.on_cpu else 1) if shape.attention_dropout else number
    return total + scores * copies


def passing_bytes(shape: ModelShape, inputs: Inputs, numerics: Numerics) -> int:
    """Return what the backward pass needs at a time besides what was kept: gradients of activations on their way."""
    passing = inputs.tokens * (shape.intermediate + shape.hidden) * numerics.element
    if _materialises(shape, numerics):
        passing += 2 * inputs.rows * shape.heads * inputs.length**2 * _score_bytes(numerics)
    return passing


def inference_bytes(shape: ModelShape, inputs: Inputs, numerics: Numerics) -> int:
    """Return what a forward pass without gradients needs at a time: input, and both sides of GELU."""
    needed = inputs.tokens * (2 * shape.hidden + 2 * shape.intermediate) * numerics.element
    if numerics.attention == "eager":
        needed += 2 * inputs.rows * shape.heads * inputs.length**2 * numerics.element
    return needed


def _around_layers(shape: ModelShape, inputs: Inputs, numerics: Numerics) -> int:
    """Return what lies before and after the layers: the embeddings' LayerNorm and dropout, the last states, ids."""
    e = numerics.element
    total = inputs.tokens * (2 * shape.hidden * e + 2 * e + 3 * 8)
    return total + (inputs.tokens * shape.hidden * (e if numerics.on_cpu else 1) if shape.dropout else 0)


def _materialises(shape: ModelShape, numerics: Numerics) -> bool:
    unfused = numerics.on_cpu and numerics.attention == "sdpa" and shape.attention_dropout > 0
    return numerics.attention == "eager" or unfused


def _score_bytes(numerics: Numerics) -> int:
    """Of one attention score; where torch composes attention itself, it does so in float32."""
    return numerics.element if numerics.attention == "eager" else _FLOAT

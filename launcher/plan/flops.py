"""Floating-point operations of the models' passes: a multiplication and an addition count as two.

Source: of a token and layer, two for each weight of the matrices, and for attention 4 L h with L tokens in the row (two
products of L with the width). LayerNorm, GELU and softmax are left out, below 1 %. A unit test compares with torch's
counter.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.plan.activations import Inputs
from launcher.plan.models import ModelShape


def forward_flops(shape: ModelShape, batches: Sequence[Inputs]) -> float:
    """Return the operations of a forward pass, padding included."""
    return float(
        sum(
            shape.layers * inputs.tokens * (2 * shape.layer_parameters + 4 * inputs.length * shape.hidden)
            + 2 * inputs.tokens * shape.head_parameters
            for inputs in batches
        )
    )


def training_flops(shape: ModelShape, batches: Sequence[Inputs], *, checkpointing: bool, cached: bool = False) -> float:
    """Return the operations of forward and backward.

    Args:
        shape: The model.
        batches: What goes through it.
        checkpointing: The backward pass computes each layer's forward again.
        cached: Gradient caching computes the forward once more, before the loss.
    """
    return forward_flops(shape, batches) * (3 + checkpointing + cached)

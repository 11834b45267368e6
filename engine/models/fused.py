"""Linear layers for inference on a CPU: weights laid out once as the kernel wants them, bias and GELU in the kernel.

A plain linear layer writes its bias, adds the product to it and leaves the activation to a third pass over memory.
oneDNN does all three in one; torch reaches it through the operators that its compiler emits, here without a compiler.
Results differ by rounding alone.

Shapes: T tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

_TOKENS_EXPECTED = 1024
"""T that the layout of the weights is chosen for; any T works."""


class FusedLinear(nn.Module):
    """A frozen linear layer, with exact GELU behind it if wanted.

    Args:
        linear: Its weights, float32 on the CPU, of which a second copy is made.
        gelu: Apply GELU to the result.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        # Kept because a model may ask a layer for its weight's type.
        self.weight, self.bias = linear.weight, linear.bias
        self._weight_OI = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TOKENS_EXPECTED)
        self._activation = ("gelu", "none") if gelu else ("none", "none")

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Map float32 [..., I] to [..., O]."""
        name, variant = self._activation
        outputs_TO: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs_TI, self._weight_OI, self.bias, name, [], variant
        )
        return outputs_TO


def fuse_linear_layers(model: nn.Module) -> int:
    """Replace a model's linear layers, and the GELU behind them where it is known to follow.

    Args:
        model: For inference only; changed in place. On another device than the CPU, in another type than float32, or
            without oneDNN it stays as it is.

    Returns:
        How many layers were replaced.
    """
    if not _is_supported(model):
        return 0
    replaced = 0
    for parent in list(model.modules()):
        gelu = _applies_gelu_to_dense(parent)
        for name, child in list(parent.named_children()):
            # Not a subclass, which may compute something else.
            if type(child) is nn.Linear:
                setattr(parent, name, FusedLinear(child, gelu=gelu and name == "dense"))
                replaced += 1
        if gelu:
            parent.intermediate_act_fn = nn.Identity()
    return replaced


def _is_supported(model: nn.Module) -> bool:
    on_cpu = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in model.parameters())
    has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return on_cpu and has_onednn and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def _applies_gelu_to_dense(module: Any) -> bool:
    """Tell whether a module is BERT's `Intermediate`, in whatever model: `intermediate_act_fn(dense(states))`."""
    children = dict(module.named_children())
    return (
        type(module).__name__.endswith("Intermediate")
        and set(children) == {"dense", "intermediate_act_fn"}
        and type(children["dense"]) is nn.Linear
        and type(children["intermediate_act_fn"])
        is GELUActivation  # the exact one, whose approximations differ in name
    )

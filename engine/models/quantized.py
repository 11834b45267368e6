"""Linear layers with int8 weights and int8 inputs, for encoding a corpus on CPUs.

Each output's weights have a scale of their own, found once, and each token's inputs, found as they are computed
(dynamic quantization). With one scale for all tokens of a product, as torch's own dynamic quantization has it, a token
with a large number among its states would cost all others their precision, and an embedding would depend on the
documents that it shares a batch with. Products are sums of integers, and so exact. Processors with int8 dot products
(VNNI) compute them four times as fast as in float32; attention, normalisation and what lies between stay in float32.
What it costs in recall and saves in time is measured by benchmarks/encode_int8.py (docs/scale.md).

Shapes: T tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.models.fused import FusedLinear

_LARGEST = 127
"""Of an int8, on both sides of zero."""
_LEAST = 1e-30
"""Of a largest number, so that a row of zeros has a scale."""


def has_int8_products() -> bool:
    """Tell whether this processor has int8 dot products; on others int8 is no faster."""
    asked: Any = getattr(torch.cpu, "_is_vnni_supported", None)
    return asked is not None and bool(asked())


class QuantizedLinear(nn.Module):
    """A frozen linear layer in int8, with exact GELU behind it if wanted.

    Args:
        linear: Its weights, float32 on the CPU, of which a second copy is made in int8.
        gelu: Apply GELU to the result.
    """

    def __init__(self, linear: nn.Linear | FusedLinear, *, gelu: bool = False) -> None:
        super().__init__()
        # Kept because a model may ask a layer for its weight's type.
        self.weight, self.bias, self._gelu = linear.weight, linear.bias, gelu
        weight_OI = linear.weight.detach()
        self._scales_O = weight_OI.abs().amax(dim=1).clamp(min=_LEAST) / _LARGEST
        self._weight_IO = (weight_OI / self._scales_O[:, None]).round().to(torch.int8).T.contiguous()

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Map float32 [..., I] to [..., O]."""
        rows_TI = inputs_TI.flatten(0, -2)
        scales_T1 = rows_TI.abs().amax(dim=-1, keepdim=True).clamp_(min=_LEAST).div_(_LARGEST)
        products_TO = torch._int_mm((rows_TI / scales_T1).round_().to(torch.int8), self._weight_IO)
        outputs_TO = products_TO.float().mul_(self._scales_O).mul_(scales_T1)
        if self.bias is not None:
            outputs_TO += self.bias
        outputs_TO = outputs_TO.view(*inputs_TI.shape[:-1], -1)
        return nn.functional.gelu(outputs_TO) if self._gelu else outputs_TO


def quantize_linear_layers(model: nn.Module) -> int:
    """Replace a model's linear layers by int8 ones.

    Args:
        model: For inference only, in float32 on a CPU, its layers torch's or laid out anew; changed in place.

    Returns:
        How many layers were replaced.

    Raises:
        ModelError: It is of another type or elsewhere, or has no linear layer.
    """
    strange = {f"{one.dtype} on {one.device}" for one in model.parameters()} - {"torch.float32 on cpu"}
    if strange:
        raise ModelError(
            f"{type(model).__name__} has parameters of {', '.join(sorted(strange))}",
            expected="float32 on a CPU, of which int8 layers can be made",
            remedy="set index.encode_int8=false",
        )
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Not a subclass, which may compute something else.
            if type(child) is nn.Linear or type(child) is FusedLinear:
                setattr(parent, name, QuantizedLinear(child, gelu=isinstance(child, FusedLinear) and child.gelu))
                replaced += 1
    if not replaced:
        raise ModelError(
            f"{type(model).__name__} has no linear layers of torch, which int8 would compute",
            remedy="set index.encode_int8=false",
        )
    return replaced

"""Linear layers for inference, laid out anew so that fewer passes go over memory; the weights are those of the model.

A plain linear layer leaves the activation to a pass of its own, and on a CPU the bias too. On a CPU oneDNN does all
three in one, with weights laid out once as its kernel wants them; torch reaches it through the operators that its
compiler emits, here without a compiler. On a GPU in half precision cuBLAS has GELU in the product's epilogue, in the
form with tanh, which differs from the exact one by less than bfloat16 rounds; and queries, keys and values are one
product. Results differ by rounding alone.

Shapes: T tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

_OF_ATTENTION = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
"""How the layers before an attention are called in a module, by BERT's kin and by DistilBERT."""
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
        self.gelu = gelu
        """Whether GELU is applied."""

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Map float32 [..., I] to [..., O]."""
        name, variant = self._activation
        outputs_TO: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs_TI, self._weight_OI, self.bias, name, [], variant
        )
        return outputs_TO


class EpilogueGelu(nn.Module):
    """A frozen linear layer with GELU behind it, in one product of a GPU.

    Args:
        linear: Its weights, in half precision, which are shared; with a bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        rows_TI = inputs_TI.flatten(0, -2)
        outputs_TO: Tensor = torch._addmm_activation(self.bias, rows_TI, self.weight.T, use_gelu=True)
        return outputs_TO.view(*inputs_TI.shape[:-1], -1)


class JoinedLinear:
    """Several frozen linear layers of the same inputs as one product, which the first of them to be called computes.

    Each of `parts` takes the place of one of the layers. One thread at a time.

    Args:
        linears: Of equal sizes, all with a bias or all without; a second copy is made of their weights.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._weight = torch.cat([one.weight.detach() for one in linears])
        self._bias = None if linears[0].bias is None else torch.cat([one.bias.detach() for one in linears])
        self._inputs: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}
        self._num_parts = len(linears)
        self.parts = [JoinedPart(self, number, one.weight) for number, one in enumerate(linears)]

    def take(self, number: int, inputs_TI: Tensor) -> Tensor:
        """Return one layer's outputs [..., O]."""
        if self._inputs is not inputs_TI or number not in self._waiting:
            outputs = nn.functional.linear(inputs_TI, self._weight, self._bias).chunk(self._num_parts, -1)
            self._inputs, self._waiting = inputs_TI, dict(enumerate(outputs))
        taken = self._waiting.pop(number)
        if not self._waiting:
            self._inputs = None
        return taken


class JoinedPart(nn.Module):
    """One layer's place in a `JoinedLinear`."""

    def __init__(self, joined: JoinedLinear, number: int, weight: Tensor) -> None:
        super().__init__()
        # Kept because a model may ask a layer for its weight's type.
        self.weight, self._number, self._joined = weight, number, joined

    def forward(self, inputs_TI: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return self._joined.take(self._number, inputs_TI)


def fuse_linear_layers(model: nn.Module) -> int:
    """Replace a model's linear layers, and the GELU behind them where it is known to follow.

    Args:
        model: For inference only; changed in place. In float32 on a CPU with oneDNN, all linear layers are replaced; in
            half precision on a GPU those that can be joined or have GELU behind them; else it stays as it is.

    Returns:
        How many layers were replaced.
    """
    if _suits_onednn(model):
        return sum(_replace_all(parent) for parent in list(model.modules()))
    if _suits_cublas(model):
        return sum(_replace_some(parent) for parent in list(model.modules()))
    return 0


def _replace_all(parent: Any) -> int:
    gelu, replaced = _applies_gelu_to_dense(parent), 0
    for name, child in list(parent.named_children()):
        # Not a subclass, which may compute something else.
        if type(child) is nn.Linear:
            setattr(parent, name, FusedLinear(child, gelu=gelu and name == "dense"))
            replaced += 1
    if gelu:
        parent.intermediate_act_fn = nn.Identity()
    return replaced


def _replace_some(parent: Any) -> int:
    replaced, children = 0, dict(parent.named_children())
    if _applies_gelu_to_dense(parent) and parent.dense.bias is not None:
        parent.dense, parent.intermediate_act_fn = EpilogueGelu(parent.dense), nn.Identity()
        replaced += 1
    for names in _OF_ATTENTION:
        linears = [children[name] for name in names if type(children.get(name)) is nn.Linear]
        if len(linears) == len(names) and len({(one.weight.shape, one.bias is None) for one in linears}) == 1:
            for name, part in zip(names, JoinedLinear(linears).parts, strict=True):
                setattr(parent, name, part)
            replaced += len(names)
    return replaced


def _suits_onednn(model: nn.Module) -> bool:
    on_cpu = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in model.parameters())
    has_onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return on_cpu and has_onednn and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def _suits_cublas(model: nn.Module) -> bool:
    half = (torch.float16, torch.bfloat16)
    return all(one.device.type == "cuda" and one.dtype in half for one in model.parameters()) and hasattr(
        torch, "_addmm_activation"
    )


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

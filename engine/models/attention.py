"""Attention within each input of a packed batch, beside the attention that transformers has for padded ones.

What a backbone calls in every layer is looked up by name in transformers' attention interface. The functions of that
interface are registered anew here, so that they look at what the backbone was given: a `Layout` means a packed batch,
and attention stays within its inputs; without one the function that was there before is called, unchanged. The layout
travels as an argument of the forward, not as a state around it: layers that are computed again in the backward pass
find it too, and threads do not mix theirs.

Decoders attend causally: a token sees itself and what lies before it in its own input. transformers would make a mask
of T x T numbers for that, so `causal_mask` gives it one of a single number, which it hands on as it is.

Shapes: N inputs, T tokens of all of them, G inputs of one length L, A heads, E size of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.errors import ModelError
from engine.log import get_logger
from engine.models.batch import PackedBatch

logger = get_logger(__name__)

KEYWORD = "packed_layout"
"""The argument of a backbone's forward that carries the layout to its attention."""
PACKED_ATTENTIONS = ("sdpa", "flash_attention_2")
"""Attention kernels beside which packed batches can be computed; eager attention is never looked up by name."""
_MASK_SHAPE = (1, 1, 1, 1)
_NOT_KNOWN_HERE = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


@dataclass(slots=True)
class Layout:
    """Where inputs lie in the row that a forward computes.

    Attributes:
        batch: The packed batch.
        calls: How many layers have attended; 0 after a forward tells that the backbone attends in its own way.
    """

    batch: PackedBatch
    calls: int = 0


def is_causal(model: nn.Module) -> bool:
    """Tell whether a model's tokens see what lies before them alone, as its attention modules say of themselves."""
    return any(getattr(module, "is_causal", False) for module in model.modules())


def causal_mask(device: torch.device) -> Tensor:
    """Make what stands for the causal mask of a packed batch; the attention here needs none."""
    return torch.ones(_MASK_SHAPE, dtype=torch.bool, device=device)


@functools.cache
def register_packed_attention() -> None:
    """Let transformers' attention functions take packed batches; padded ones are computed as before."""
    for name in PACKED_ATTENTIONS:
        AttentionInterface.register(name, _either(ALL_ATTENTION_FUNCTIONS[name]))


def _either(padded: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(padded)
    def attend(module: nn.Module, *states: Any, packed_layout: Layout | None = None, **settings: Any) -> Any:
        if packed_layout is None:
            return padded(module, *states, **settings)
        return _packed(module, *states, layout=packed_layout, **settings)

    return attend


@torch.compiler.disable  # type: ignore[untyped-decorator]  # or layers were compiled anew for each number of inputs
def _packed(
    module: nn.Module,
    query_1ATE: Tensor,
    key_1ATE: Tensor,
    value_1ATE: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend within each input of a row: what transformers calls in every layer."""
    unknown = [name for name in _NOT_KNOWN_HERE if settings.get(name) is not None]
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if attention_mask is not None and not (causal and tuple(attention_mask.shape) == _MASK_SHAPE):
        unknown.append("attention_mask")
    if unknown:
        raise ModelError(
            f"{type(module).__name__} attends with {', '.join(unknown)}",
            expected="full or causal attention within each input",
        )
    layout.calls += 1
    # Squeezed, not indexed: the gradient of an index is copied into a tensor of zeros.
    query_TAE, key_TAE, value_TAE = (one.squeeze(0).transpose(0, 1) for one in (query_1ATE, key_1ATE, value_1ATE))
    kernel = _kernel(query_TAE.device.type, query_TAE.dtype, query_TAE.shape[-1])
    return kernel(query_TAE, key_TAE, value_TAE, layout.batch, scaling, dropout, causal).unsqueeze(0), None


def _attend_by_runs(
    query_TAE: Tensor,
    key_TAE: Tensor,
    value_TAE: Tensor,
    batch: PackedBatch,
    scaling: float | None,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Attend on any device: inputs of equal length in one call.

    Runs of nearly equal length could share a call, padded to their longest: measured on a CPU at 16 and 64 inputs,
    that is no faster at lengths around 60 tokens and slower at lengths of 100 to 160, in both passes.
    """
    # Split and joined in one operation each: slices would each fill a gradient of the whole row in the backward pass.
    sizes = [count * length for count, length in batch.runs]
    grouped = key_TAE.shape[1] != query_TAE.shape[1]
    attended = []
    parts = (torch.split(one, sizes) for one in (query_TAE, key_TAE, value_TAE))
    for (count, length), *states in zip(batch.runs, *parts, strict=True):
        query_GALE, key_GALE, value_GALE = (one.unflatten(0, (count, length)).transpose(1, 2) for one in states)
        attended_GALE = nn.functional.scaled_dot_product_attention(
            query_GALE, key_GALE, value_GALE, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        attended.append(attended_GALE.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)


def _attend_by_varlen(
    query_TAE: Tensor,
    key_TAE: Tensor,
    value_TAE: Tensor,
    batch: PackedBatch,
    scaling: float | None,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Attend on a GPU in half precision: one call of FlashAttention's kernel for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    own_scaling = query_TAE.shape[-1] ** -0.5
    if scaling is not None and not math.isclose(scaling, own_scaling):
        # Older versions of the function know no scale but their own.
        query_TAE = query_TAE * (scaling / own_scaling)
    groups = query_TAE.shape[1] // key_TAE.shape[1]
    if groups > 1:
        key_TAE, value_TAE = (one.repeat_interleave(groups, dim=1) for one in (key_TAE, value_TAE))
    # The kernel takes any strides but those within a head.
    query_TAE, key_TAE, value_TAE = map(_with_whole_heads, (query_TAE, key_TAE, value_TAE))
    states = query_TAE, key_TAE, value_TAE
    bounds = batch.bounds_N, batch.bounds_N
    lengths = batch.longest, batch.longest
    if dropout:
        # The function above has no dropout, the operator below it has; torch's nested tensors call it in this way.
        attended_TAE, *_ = torch.ops.aten._flash_attention_forward(*states, *bounds, *lengths, dropout, causal, False)
    else:
        attend = _causal(varlen_attn) if causal else varlen_attn
        attended_TAE = attend(*states, *bounds, *lengths)
    assert isinstance(attended_TAE, Tensor)  # a pair only where more is asked for
    return attended_TAE


@functools.cache
def _causal(varlen_attn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it attends causally, which newer versions of torch are told by a window."""
    by_window = "window_size" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, **({"window_size": (-1, 0)} if by_window else {"is_causal": True}))


def _with_whole_heads(states_TAE: Tensor) -> Tensor:
    return states_TAE if states_TAE.stride(-1) == 1 else states_TAE.contiguous()


_Kernel = Callable[[Tensor, Tensor, Tensor, PackedBatch, float | None, float, bool], Tensor]


@functools.cache
def _kernel(device: str, dtype: torch.dtype, head_size: int) -> _Kernel:
    """Choose how to attend; the choices differ in speed and in rounding."""
    flash = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    if not flash or torch.cuda.get_device_capability() < (8, 0):
        return _attend_by_runs
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        logger.info("this torch has no attention for packed inputs: inputs attend in groups of equal length")
        return _attend_by_runs
    return _attend_by_varlen

"""Encodes documents laid end to end in one row, so that no padding is computed.

A padded batch computes every document at the length of its longest neighbour. Here a batch is one row of all tokens,
`[1, T]`, whose positions start anew at each document: linear layers, normalisations and activations see real tokens
only, and attention, the one operation in which tokens meet, runs document by document. That takes nothing from a
backbone but transformers' attention interface and `position_ids`. Whether a backbone really honours both is found by
trying: what comes out packed is compared with what it gives unpacked, and one that differs is not packed.

Inference only: the encoder works on a copy of the backbone's modules that shares its weights, some of them laid out
anew (`engine.models.fused`), so weights that change later are not seen.

Shapes: N documents, T tokens of all of them, G documents of one length L, A heads, E size of a head, H hidden size
(equal to the embedding's dimension D).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from engine.errors import ModelError
from engine.log import get_logger
from engine.models.fused import fuse_linear_layers
from engine.models.loading import first_position, quiet_transformers
from engine.models.template import Input

logger = get_logger(__name__)

_NAME = "sparring_packed"
_PROBE_LENGTHS = (7, 5, 5, 2, 1)
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_NOT_KNOWN_HERE = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


class PackedEncoder:
    """Embeds inputs of any lengths without padding; what `Retriever.document_encoder` returns where it can.

    Threads may call one encoder at the same time.

    Args:
        backbone: Frozen and in evaluation mode; it is not changed.
        pooling: What of the last layer is the embedding: the first token, or the mean over the tokens.
        normalize: Make embeddings unit vectors.

    Raises:
        ModelError: The backbone cannot be packed: it has no attention interface, takes no positions, or gives other
            results when packed.
    """

    def __init__(self, backbone: Any, *, pooling: Literal["cls", "mean"], normalize: bool) -> None:
        parameters = inspect.signature(backbone.forward).parameters
        if "position_ids" not in parameters:
            raise ModelError(f"{type(backbone).__name__} takes no position_ids", expected="a backbone that does")
        self._takes_type_ids = "token_type_ids" in parameters
        self._first_position = first_position(backbone.config)
        self._device: torch.device = backbone.device
        self._pooling, self._normalize = pooling, normalize
        self._backbone = _packed_copy(backbone)
        self._compare(backbone)

    def __call__(self, inputs: Sequence[Input]) -> Tensor:
        """Embed inputs.

        Args:
            inputs: At least one; neighbours of equal length share one call of the attention kernel.

        Returns:
            float32 [N, D] on the backbone's device, in the order of the inputs.
        """
        states_TH, layout = self._states(inputs)
        if self._pooling == "cls":
            embeddings_NH = states_TH[layout.bounds_N[:-1]].float()
        else:
            # `unsafe` leaves out a check that the lengths add up to T, for which the host would wait for the device.
            embeddings_NH = torch.segment_reduce(
                states_TH.float(), "mean", lengths=layout.bounds_N.diff().long(), axis=0, unsafe=True
            )
        return nn.functional.normalize(embeddings_NH, dim=-1) if self._normalize else embeddings_NH

    def _states(self, inputs: Sequence[Input]) -> tuple[Tensor, _Layout]:
        """Return the last layer [T, H], and where the inputs lie in it."""
        lengths = [len(one.ids) for one in inputs]
        lengths_N = torch.tensor(lengths)
        ends_N = lengths_N.cumsum(0)
        starts_T = (ends_N - lengths_N).repeat_interleave(lengths_N)
        row = {
            "input_ids": torch.tensor([token for one in inputs for token in one.ids]),
            "position_ids": torch.arange(len(starts_T)) - starts_T + self._first_position,
        }
        if self._takes_type_ids:
            row["token_type_ids"] = torch.tensor([segment for one in inputs for segment in one.type_ids])
        runs = [(len(list(same)), length) for length, same in groupby(lengths)]
        bounds_N = self._upload(nn.functional.pad(ends_N, (1, 0)).to(torch.int32))
        with _laid_out(_Layout(runs, bounds_N, max(lengths))) as layout:
            states_1TH = self._backbone(**{name: self._upload(ids_T)[None] for name, ids_T in row.items()})[0]
        if not layout.calls:
            raise ModelError(
                f"{type(self._backbone).__name__} does not use transformers' attention interface",
                expected="a backbone whose attention function can be chosen",
            )
        return states_1TH[0], layout

    def _upload(self, ids_T: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return ids_T.to(self._device)
        # From pinned memory the copy does not wait for the kernels that are queued.
        return ids_T.pin_memory().to(self._device, non_blocking=True)

    @torch.inference_mode()
    def _compare(self, backbone: Any) -> None:
        """Refuse a backbone that gives other states when its inputs are packed."""
        vocabulary = backbone.config.vocab_size
        rows = [[(31 * place + length) % vocabulary for place in range(length)] for length in _PROBE_LENGTHS]
        # The padding token inside a text would change what some backbones count as a position.
        pad = backbone.config.pad_token_id
        rows = [[token if token != pad else (token + 1) % vocabulary for token in row] for row in rows]
        inputs = [Input(row, [0] * len(row)) for row in rows]
        packed_TH = self._states(inputs)[0].float()
        alone_TH = torch.cat(
            [
                backbone(
                    input_ids=torch.tensor([row], device=self._device),
                    attention_mask=torch.ones(1, len(row), dtype=torch.long, device=self._device),
                )[0][0].float()
                for row in rows
            ]
        )
        difference, scale = float((packed_TH - alone_TH).abs().max()), float(alone_TH.abs().max())
        tolerance = _TOLERANCES[backbone.dtype]
        # Said so that a difference that is not a number is refused too.
        if not difference <= tolerance * max(scale, 1.0):
            raise ModelError(
                f"packed, {type(backbone).__name__} gives states that differ by {difference:.2g} of {scale:.2g}",
                expected=f"at most {tolerance:g} of it, which rounding explains",
            )


def packed_encoder(backbone: Any, *, pooling: Literal["cls", "mean"], normalize: bool) -> PackedEncoder | None:
    """Build a packed encoder if the backbone allows it.

    Args:
        backbone: As in `PackedEncoder`.
        pooling: As in `PackedEncoder`.
        normalize: As in `PackedEncoder`.

    Returns:
        The encoder; None, and a line in the log, for a backbone that must be given padded batches.
    """
    try:
        return PackedEncoder(backbone, pooling=pooling, normalize=normalize)
    except ModelError as error:
        _say_once(f"encoding pads its batches: {error}")
        return None


@dataclass
class _Layout:
    """Where documents lie in the row that is being computed."""

    runs: list[tuple[int, int]]
    """(documents, tokens of each) of neighbours of equal length."""
    bounds_N: Tensor
    """int32 [N + 1] on the device: where each document starts, and T."""
    longest: int
    calls: int = field(default=0)
    """How many layers have attended."""


_LAYOUT: ContextVar[_Layout] = ContextVar("layout")


@contextmanager
def _laid_out(layout: _Layout) -> Iterator[_Layout]:
    token = _LAYOUT.set(layout)
    try:
        yield layout
    finally:
        _LAYOUT.reset(token)


def _packed_attention(
    module: nn.Module,
    query_1ATE: Tensor,
    key_1ATE: Tensor,
    value_1ATE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend within each document of a row: the function that transformers calls in every layer."""
    unknown = [name for name in _NOT_KNOWN_HERE if settings.get(name) is not None]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if is_causal or getattr(module, "is_causal", False):
        unknown.append("is_causal")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise ModelError(
            f"{type(module).__name__} attends with {', '.join(unknown)}",
            expected="full attention within each document, as an encoder has in evaluation mode",
        )
    layout = _LAYOUT.get()
    layout.calls += 1
    query_TAE, key_TAE, value_TAE = (one[0].transpose(0, 1) for one in (query_1ATE, key_1ATE, value_1ATE))
    kernel = _kernel(query_TAE.device.type, query_TAE.dtype, query_TAE.shape[-1])
    return kernel(query_TAE, key_TAE, value_TAE, layout, scaling)[None], None


def _attend_by_runs(
    query_TAE: Tensor, key_TAE: Tensor, value_TAE: Tensor, layout: _Layout, scaling: float | None
) -> Tensor:
    """Attend on any device: documents of equal length in one call."""
    attended_TAE = torch.empty_like(query_TAE, memory_format=torch.contiguous_format)
    grouped = key_TAE.shape[1] != query_TAE.shape[1]
    first = 0
    for count, length in layout.runs:
        here = slice(first, first + count * length)
        query_GALE, key_GALE, value_GALE = (
            one[here].reshape(count, length, *one.shape[1:]).transpose(1, 2) for one in (query_TAE, key_TAE, value_TAE)
        )
        attended_GALE = nn.functional.scaled_dot_product_attention(
            query_GALE, key_GALE, value_GALE, scale=scaling, enable_gqa=grouped
        )
        attended_TAE[here].view(count, length, *attended_TAE.shape[1:]).copy_(attended_GALE.transpose(1, 2))
        first += count * length
    return attended_TAE


def _attend_by_varlen(
    query_TAE: Tensor, key_TAE: Tensor, value_TAE: Tensor, layout: _Layout, scaling: float | None
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
    attended_TAE = varlen_attn(
        query_TAE.contiguous(),
        key_TAE.contiguous(),
        value_TAE.contiguous(),
        layout.bounds_N,
        layout.bounds_N,
        layout.longest,
        layout.longest,
    )
    assert isinstance(attended_TAE, Tensor)  # a pair only where more is asked for
    return attended_TAE


_Kernel = Callable[[Tensor, Tensor, Tensor, _Layout, float | None], Tensor]


@functools.cache
def _kernel(device: str, dtype: torch.dtype, head_size: int) -> _Kernel:
    """Choose how to attend; the choices differ in speed and in rounding."""
    flash = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    if not flash or torch.cuda.get_device_capability() < (8, 0):
        return _attend_by_runs
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        _say_once("this torch has no attention for packed inputs: documents attend in groups of equal length")
        return _attend_by_runs
    return _attend_by_varlen


def _packed_copy(backbone: Any) -> Any:
    """Copy the modules and the configuration, share the weights, and choose the attention above."""
    AttentionInterface.register(_NAME, _packed_attention)
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    packed = copy.deepcopy(backbone, shared)
    with quiet_transformers():
        packed.set_attn_implementation(_NAME)
    fuse_linear_layers(packed)
    return packed


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)

"""Computes packed batches, after a trial that the model gives for them what it gives for padded ones.

That takes nothing from a backbone but transformers' attention interface and `position_ids`. Whether a backbone really
honours both is found by trying: what comes out packed is compared with what it gives unpacked, and one that differs is
not packed. A model that is loaded is tried once, in float32 on the CPU, before it is trained or cast.

`PackedEncoder` and `Scorer` are for inference only: they work on a copy of the model's modules that shares its weights,
some of them laid out anew (`engine.models.fused`), so weights that change later are not seen.

Shapes: N inputs, T tokens of all of them, H hidden size, D embedding dimension.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import ModelError
from engine.log import get_logger
from engine.models.architecture import forward_parameters, input_form
from engine.models.attention import (
    KEYWORD,
    PACKED_ATTENTIONS,
    Layout,
    causal_mask,
    is_causal,
    register_packed_attention,
)
from engine.models.batch import PackedBatch, pack
from engine.models.compiled import compile_layers
from engine.models.failures import FORWARD_ERRORS, quiet_transformers
from engine.models.fused import fuse_linear_layers
from engine.models.quantized import quantize_linear_layers
from engine.models.template import Batch, Input

logger = get_logger(__name__)

Pooling = Literal["cls", "mean", "last"]
PackedPooling = Callable[[Tensor, PackedBatch], Tensor]
"""Maps what a backbone gives for a row [T, ...] to one vector of each input [N, D], in the order they were given in."""
_PROBE_LENGTHS = (1, 2, 5, 5, 7)
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_STATES, _SCORES = 1.0, 0.05
"""What differences are measured by at least: the size of normalised states, and a tenth of a fresh head's scores."""


def packed_forward(model: Any, batch: PackedBatch) -> Any:
    """Run the forward of a transformers model on a packed batch.

    Args:
        model: A backbone, whose states [1, T, H] are the row's; or a classifier that `show_first_tokens` was told of,
            whose logits [N, 1] are in the order in which the inputs were given.
        batch: On the model's device.

    Raises:
        ModelError: The model does not attend through transformers' attention interface.
    """
    register_packed_attention()
    layout = Layout(batch)
    row = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, KEYWORD: layout}
    if batch.token_type_ids is not None:
        row["token_type_ids"] = batch.token_type_ids
    if is_causal(model):
        row["attention_mask"] = causal_mask(batch.input_ids.device)
    output = model(**row)
    if not layout.calls:
        raise _no_interface(model)
    return output


def pool_packed(states_TH: Tensor, batch: PackedBatch, pooling: Pooling) -> Tensor:
    """Make one embedding of each input's token states, in float32 or a wider type.

    Args:
        states_TH: Last layer of the row [T, H], in any floating type.
        batch: Where the inputs lie in it.
        pooling: First token, last token, or mean over the tokens.

    Returns:
        Embeddings [N, H], in the order in which the inputs were given.
    """
    dtype = torch.promote_types(torch.float32, states_TH.dtype)
    if pooling != "mean":
        places_N = batch.first_N if pooling == "cls" else batch.last_N
        return states_TH.index_select(0, places_N).to(dtype)
    # `unsafe` leaves out a check that the lengths add up to T, for which the host would wait for the device.
    means_NH = torch.segment_reduce(
        states_TH.to(dtype), "mean", lengths=batch.bounds_N.diff().long(), axis=0, unsafe=True
    )
    return means_NH.index_select(0, batch.places_N)


class PackedEncoder:
    """Embeds inputs of any lengths without padding; what `Retriever.document_encoder` returns where it can.

    Threads may call one encoder at the same time on a CPU.

    Args:
        backbone: Frozen and in evaluation mode; it is not changed.
        pooling: What of the last layer is the embedding: the first or the last token, the mean over the tokens, or what
            a function makes of the backbone's first output.
        normalize: Make embeddings unit vectors.
        projection: Layers above the pooling; None for none.
        compiles: Compile the layers.
        tokens_at_once: Of a forward at most, where a row of more tokens would not fit into memory; a longer input has
            one of its own. None for no limit.

    Raises:
        ModelError: The backbone cannot be packed: it has no attention interface, takes no positions, or gives other
            results when packed.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        pooling: Pooling | PackedPooling,
        normalize: bool,
        projection: nn.Module | None = None,
        compiles: bool = False,
        tokens_at_once: int | None = None,
    ) -> None:
        if backbone.training:
            raise ModelError(f"{type(backbone).__name__} is in training mode", expected="evaluation mode")
        self._form = input_form(backbone)
        self._device: torch.device = backbone.device
        self._pooling, self._normalize, self._projection = pooling, normalize, projection
        self._tokens_at_once = tokens_at_once
        self._backbone = _frozen_copy(backbone)
        _compare(self._backbone, backbone, _states, least_scale=_STATES)
        if compiles:
            compile_layers(self._backbone)

    def __call__(self, inputs: Sequence[Input]) -> Tensor:
        """Embed inputs.

        Args:
            inputs: At least one.

        Returns:
            float32 [N, D] on the backbone's device, in the order of the inputs.
        """
        parts = [inputs] if self._tokens_at_once is None else _cut(inputs, self._tokens_at_once)
        rows = [self._embed(part) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def quantize(self) -> None:
        """Compute linear layers in int8 from now on, those above the pooling excepted; see `engine.models.quantized`.

        Raises:
            ModelError: The backbone is not in float32 on a CPU, or has no linear layer.
        """
        quantize_linear_layers(self._backbone)

    def _embed(self, inputs: Sequence[Input]) -> Tensor:
        types = [one.type_ids for one in inputs] if self._form.takes_types else None
        batch = pack([one.ids for one in inputs], types, self._form.first_position)
        if self._device.type == "cuda":
            batch = batch.pin_memory()  # from which the copy does not wait for the kernels that are queued
        batch = batch.to(self._device, non_blocking=True)
        states_1TH = packed_forward(self._backbone, batch)[0]
        states_TH, pooling = states_1TH[0], self._pooling
        embeddings_ND = pooling(states_TH, batch) if callable(pooling) else pool_packed(states_TH, batch, pooling)
        if self._projection is not None:
            embeddings_ND = self._projection(embeddings_ND)
        return nn.functional.normalize(embeddings_ND, dim=-1) if self._normalize else embeddings_ND


def packed_encoder(backbone: Any, **settings: Any) -> PackedEncoder | None:
    """Build a packed encoder if the backbone allows it.

    Args:
        backbone: As in `PackedEncoder`.
        settings: Those of `PackedEncoder`.

    Returns:
        The encoder; None, and a line in the log, for a backbone that must be given padded batches.
    """
    try:
        return PackedEncoder(backbone, **settings)
    except (ModelError, *FORWARD_ERRORS) as error:
        _say_padded(backbone, error)
        return None


class Scorer:
    """Scores pairs with the weights of this moment, for inference only; what `Ranker.scorer` returns.

    Threads may call one scorer at the same time on a CPU.

    Args:
        classifier: A ranker's, frozen and in evaluation mode; it is not changed.
        packs: Whether its batches are packed.
        compiles: Compile the layers.
    """

    def __init__(self, classifier: Any, *, packs: bool, compiles: bool = False) -> None:
        if classifier.training:
            raise ModelError(f"{type(classifier).__name__} is in training mode", expected="evaluation mode")
        self.packs = packs
        """Whether batches may be `PackedBatch`; `Ranker.collator` makes the right ones."""
        self._form = input_form(classifier)
        self._classifier = _shared_copy(classifier)
        fuse_linear_layers(self._classifier)
        if compiles:
            compile_layers(self._classifier)

    @torch.inference_mode()
    def __call__(self, pairs: Batch) -> Tensor:
        """Score pairs: raw logits [N] in float32, in the order of the pairs; the batch is on the ranker's device."""
        return score_batch(self._classifier, self._form.accepted(pairs), packs=self.packs)


def score_batch(classifier: Any, pairs: Batch, *, packs: bool) -> Tensor:
    """Run a classifier with one logit.

    Args:
        classifier: A Hugging Face model for sequence classification.
        pairs: Padded or packed inputs of N pairs.
        packs: Whether it may be given packed ones.

    Returns:
        Raw logits [N], float32 or float64, in the order of the pairs.

    Raises:
        ModelError: It is given packed ones, and may not be.
    """
    if isinstance(pairs, PackedBatch):
        require_packing(packs, classifier)
        logits_N1 = packed_forward(classifier, pairs).logits
    else:
        logits_N1 = classifier(**pairs).logits
    scores_N: Tensor = logits_N1.squeeze(-1)
    return scores_N.to(torch.promote_types(torch.float32, scores_N.dtype))


def require_packing(packs: bool, model: Any) -> None:
    """Refuse a packed batch for a model that cannot compute it.

    Raises:
        ModelError: It cannot.
    """
    if not packs:
        raise ModelError(
            f"{type(model).__name__} was given a packed batch",
            expected="padded batches, as its trial at load said",
            remedy="make its batches with the model's own `collator`",
        )


def tower_can_be_packed(backbone: Any) -> bool:
    """Try whether a retriever's backbone gives for packed inputs what it gives for padded ones; say so once if not.

    The backbone is not changed: the trial runs on a copy of its modules, in float32 and in evaluation mode.
    """
    return _can_be_packed(backbone, _states, least_scale=_STATES)


def classifier_can_be_packed(classifier: Any) -> bool:
    """Try a ranker's classifier with its head, as `tower_can_be_packed` tries a backbone."""
    return _can_be_packed(classifier, _logits, least_scale=_SCORES)


def _cut(inputs: Sequence[Input], num_tokens: int) -> list[Sequence[Input]]:
    """Cut inputs into neighbours of so many tokens together, or one longer input."""
    parts, start, tokens = [], 0, 0
    for place, one in enumerate(inputs):
        if place > start and tokens + len(one.ids) > num_tokens:
            parts.append(inputs[start:place])
            start, tokens = place, 0
        tokens += len(one.ids)
    return [*parts, inputs[start:]]


def _states(output: Any) -> Tensor:
    states_TH: Tensor = output[0].flatten(0, 1)
    return states_TH


def _logits(output: Any) -> Tensor:
    logits_N1: Tensor = output.logits
    return logits_N1


def _can_be_packed(model: Any, outcome: Callable[[Any], Tensor], *, least_scale: float) -> bool:
    if any(parameter.is_meta for parameter in model.parameters()):
        return False  # only shapes, of which memory is planned: there is nothing to compute
    try:
        if not isinstance(getattr(model, "base_model", model), PreTrainedModel):
            raise ModelError(f"{type(model).__name__} is no model of transformers")
        trial = _copy_for_trial(model)
        _compare(trial, trial, outcome, least_scale=least_scale)
        _require_kernel(model)
    except (ModelError, *FORWARD_ERRORS) as error:
        _say_padded(model, error)
        return False
    return True


def _require_kernel(model: Any) -> None:
    kernel = model.config._attn_implementation
    if kernel not in PACKED_ATTENTIONS:
        raise ModelError(
            f"{type(model).__name__} attends by {kernel} attention, which is not looked up by name",
            expected=" or ".join(PACKED_ATTENTIONS),
        )


@torch.no_grad()
def _compare(model: Any, plain: Any, outcome: Callable[[Any], Tensor], *, least_scale: float) -> None:
    """Refuse a model that gives other results than the plain one when its inputs are packed."""
    parameters = forward_parameters(model)
    if "position_ids" not in parameters:
        raise ModelError(f"{type(model).__name__} takes no position_ids", expected="a backbone that does")
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise _no_interface(model)
    rows = _probe(model.config)
    batch = pack(rows, None, input_form(model).first_position).to(model.device)
    packed = outcome(packed_forward(model, batch)).double()
    alone = torch.cat(
        [
            outcome(plain(input_ids=ids, attention_mask=torch.ones_like(ids))).double()
            for ids in (torch.tensor([row], device=model.device) for row in rows)
        ]
    )
    difference, scale = float((packed - alone).abs().max()), float(alone.abs().max())
    tolerance = _TOLERANCES[model.dtype]
    # Said so that a difference that is not a number is refused too.
    if not difference <= tolerance * max(scale, least_scale):
        raise ModelError(
            f"packed, {type(model).__name__} gives results that differ by {difference:.2g} of {scale:.2g}",
            expected=f"at most {tolerance:g} of it, which rounding explains",
        )


def _probe(config: Any) -> list[list[int]]:
    """Make short inputs, in the order in which they will lie in the row."""
    vocabulary, pad = config.vocab_size, config.pad_token_id
    rows = [[(31 * place + length) % vocabulary for place in range(length)] for length in _PROBE_LENGTHS]
    # The padding token inside a text would change what some backbones count as a position.
    return [[token if token != pad else (token + 1) % vocabulary for token in row] for row in rows]


def _copy_for_trial(model: Any) -> Any:
    """Copy a model so that rounding hides no difference, and in a kernel that the CPU has too."""
    whole = model.dtype in (torch.float32, torch.float64)
    trial = _shared_copy(model) if whole else copy.deepcopy(model).float()
    _set_attention(trial)
    return trial.eval()


def _frozen_copy(backbone: Any) -> Any:
    packed = _shared_copy(backbone)
    _set_attention(packed)
    fuse_linear_layers(packed)
    return packed


def _shared_copy(model: Any) -> Any:
    """Copy the modules and the configuration, and share the weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _set_attention(model: Any) -> None:
    with quiet_transformers():
        try:
            model.set_attn_implementation("sdpa")
        except ValueError as error:
            raise _no_interface(model) from error


def _no_interface(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not use transformers' attention interface",
        expected="a backbone whose attention function can be chosen",
    )


def _say_padded(model: Any, reason: Exception) -> None:
    _log_once(f"batches of {type(model).__name__} are padded: {reason}")


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)

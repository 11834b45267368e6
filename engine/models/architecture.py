"""What kind of model a checkpoint is: which classes take it, what they can do, and which inputs they accept.

All of it is read off the configuration and the modules, not off the architecture's name. What is no text encoder, or
needs code of its own, is refused here before any weight is read. A DPR encoder is the one exception by name: it is a
BERT under another name, and is read as one.

Shapes: N inputs, L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import AutoConfig, BertConfig, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_kernels_available

from engine.errors import ModelError
from engine.models.batch import PackedBatch
from engine.models.failures import loading
from engine.models.source import saved_metadata
from engine.models.template import Batch

Attention = Literal["sdpa", "eager", "flash_attention_2"]

ENCODERS = "a text encoder such as a BERT, RoBERTa, MPNet, ELECTRA, DeBERTa or ModernBERT"
_DPR_BERT = {r"^(?:question_encoder|ctx_encoder)\.bert_model\.": ""}
"""Where the weights of a DPR encoder's BERT are, and what a BERT calls them."""
_DPR_ENCODERS = frozenset({"DPRQuestionEncoder", "DPRContextEncoder"})
_NOT_BERTS = ("model_type", "architectures", "projection_dim", "transformers_version")
_KERNELS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint before its weights are read.

    Attributes:
        config: A transformers configuration, for one model; whoever loads may change it.
        key_mapping: Regular expressions of weights' names, and what stands for them in the model.
    """

    config: Any
    key_mapping: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class InputForm:
    """Which inputs a model takes.

    Attributes:
        first_position: Position of an input's first token, from which the others count on.
        longest: Tokens that its positions allow; None where nothing says so.
        takes_types: Whether it tells segments apart. A model that has one segment alone takes no segment ids: what its
            tokenizer says of a second one is left out.
    """

    first_position: int
    longest: int | None
    takes_types: bool

    def accepted(self, batch: Batch) -> Batch:
        """Leave out of a batch what the model does not take: segment ids, and padding beyond its last position.

        Args:
            batch: Its inputs have `longest` tokens at most; what padding adds to them may be more.
        """
        if isinstance(batch, PackedBatch):
            return batch if self.takes_types or batch.token_type_ids is None else replace(batch, token_type_ids=None)
        return {
            name: tensor[:, : self.longest]
            for name, tensor in batch.items()
            if self.takes_types or name != "token_type_ids"
        }


def read_checkpoint(source: str | Path, name: str, *, section: str) -> Checkpoint:
    """Read a checkpoint's configuration, and refuse what is no text encoder.

    Args:
        source: What `resolve_model` found.
        name: As the recipe names it.
        section: The recipe's section, for remedies.

    Raises:
        ModelError: There is none, it wants code of its own to be run, or the model is an encoder-decoder.
    """
    with loading(name, "configuration", source, section):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type == "dpr":
        return _dpr_as_bert(config, name)
    # The class tells it also for an encoder that was saved alone, whose configuration says no.
    if getattr(config, "is_encoder_decoder", False) or getattr(type(config), "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is of an encoder-decoder architecture (model_type {config.model_type}), of which transformers' "
            "AutoModel loads both halves and wants a text for each",
            expected=ENCODERS,
            remedy=f"name such a model by {section}.name",
        )
    return Checkpoint(config)


def require_class(config: Any, auto_class: Any, name: str, *, section: str, attention: Attention | None) -> None:
    """Refuse an architecture that transformers has no class for, or whose class lacks the attention asked for.

    Args:
        config: Of the checkpoint.
        auto_class: Such as `transformers.AutoModelForSequenceClassification`.
        name: As the recipe names it.
        section: The recipe's section, for remedies.
        attention: Kernel; None for whichever the model has.

    Raises:
        ModelError: It is so.
    """
    mapping = auto_class._model_mapping
    if type(config) not in mapping:
        heads = {"Classification": "sequence classifier", "MaskedLM": "masked language model"}
        kind = next((words for head, words in heads.items() if head in auto_class.__name__), "model")
        raise ModelError(
            f"transformers has no {kind} of the architecture of {name} (model_type {config.model_type})",
            expected=ENCODERS,
            remedy=f"name such a model by {section}.name",
        )
    known = mapping[type(config)]
    classes = known if isinstance(known, tuple) else (known,)
    if classes[0].main_input_name != "input_ids":
        raise ModelError(
            f"{classes[0].__name__}, the class of {name}, reads {classes[0].main_input_name}, not text",
            expected=ENCODERS,
            remedy=f"name such a model by {section}.name",
        )
    flag = _KERNELS.get(attention or "")
    if flag and not any(getattr(one, flag, False) for one in classes):
        others = [kernel for kernel, flag in _KERNELS.items() if any(getattr(one, flag, False) for one in classes)]
        raise ModelError(
            f"{classes[0].__name__}, the class of {name}, has no {attention} attention",
            expected=" or ".join((*others, "eager")),
            remedy=f"set {section}.attention={(*others, 'eager')[0]}",
        )


def require_kernel(attention: Attention | None, *, section: str) -> None:
    """Refuse FlashAttention where its package is not installed, or sees no device.

    Raises:
        ModelError: It is so.
    """
    if attention == "flash_attention_2" and not (is_flash_attn_2_available() or is_kernels_available()):
        raise ModelError(
            f"{section}.attention is flash_attention_2, which is not available here",
            expected="the package flash-attn and a GPU that it computes on",
            remedy=f"install it, or set {section}.attention=sdpa",
        )


def set_dropout(config: Any, dropout: float | None, name: str) -> None:
    """Set every dropout of a configuration: of embeddings, states and attention, and of every head.

    Args:
        config: Changed in place: each number in [0, 1] that it calls a dropout.
        dropout: In [0, 1); None leaves the model's own.
        name: As the recipe names it.

    Raises:
        ModelError: It has none.
    """
    if dropout is None:
        return
    present = [key for key, value in config.to_dict().items() if _is_dropout(key, value)]
    if not present:
        raise ModelError(f"{name} has no dropout in its configuration", remedy="leave dropout out")
    for key in present:
        setattr(config, key, dropout)


def set_module_dropout(model: nn.Module, dropout: float | None) -> None:
    """Set what no configuration reaches: layers whose dropout is a number in the model's code."""
    if dropout is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout


def input_form(model: Any) -> InputForm:
    """Find which inputs a transformers model takes.

    Args:
        model: A backbone or a classifier; its weights may be partitioned, or on the meta device.
    """
    config, tables = model.config, _tables(model)
    positions = _of_kind(tables, "position")
    padding = None if positions is None else positions.padding_idx
    # A table of positions with a row for padding counts from behind it, as RoBERTa's and its kin's do.
    first = 0 if padding is None else int(padding) + 1
    stated = getattr(config, "max_position_embeddings", None)
    rows = [
        number
        for number in (stated, None if positions is None else positions.num_embeddings)
        if isinstance(number, int) and number > 0
    ]
    types = _of_kind(tables, "token_type") or _of_kind(tables, "segment")
    segments = getattr(config, "type_vocab_size", None) if types is None else types.num_embeddings
    takes = "token_type_ids" in forward_parameters(model)
    return InputForm(
        first_position=first,
        longest=min(rows) - first if rows else None,
        takes_types=takes and (segments is None or segments > 1),
    )


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Return what the forward of a transformers model takes, by name; a head of ours passes all on to its backbone."""
    reader = model if isinstance(model, PreTrainedModel) else getattr(model, "base_model", model)
    return inspect.signature(reader.forward).parameters


def recorded_attention(source: str | Path) -> Attention | None:
    """Return the attention kernel that a model was trained with, as it was recorded beside its weights.

    Returns:
        None for the model's own choice: where nothing is recorded, and for FlashAttention, which needs a GPU and half
        precision and differs from the others by rounding alone.
    """
    recorded: Attention | None = saved_metadata(source).get("attention")
    return None if recorded == "flash_attention_2" else recorded


def _dpr_as_bert(config: Any, name: str) -> Checkpoint:
    strange = [one for one in config.architectures or () if one not in _DPR_ENCODERS]
    if strange:
        raise ModelError(
            f"{name} is a {strange[0]}",
            expected=f"{' or '.join(sorted(_DPR_ENCODERS))}, of a DPR",
            remedy="name the question or the context encoder",
        )
    if config.projection_dim:
        raise ModelError(
            f"{name} projects its embeddings to {config.projection_dim} dimensions by a layer above its BERT",
            expected="a DPR encoder with projection_dim 0, whose embedding is BERT's first state",
            remedy="name one without a projection, as those that its authors published are",
        )
    settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_BERTS}
    return Checkpoint(BertConfig.from_dict(settings), dict(_DPR_BERT))


def _is_dropout(key: str, value: Any) -> bool:
    named = "dropout" in key or key.endswith("pdrop")
    return named and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _tables(model: nn.Module) -> Mapping[str, nn.Embedding]:
    """Return the tables of embeddings by the last part of their names, the first of each."""
    found: dict[str, nn.Embedding] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found.setdefault(name.rpartition(".")[2], module)
    return found


def _of_kind(tables: Mapping[str, nn.Embedding], kind: str) -> nn.Embedding | None:
    """Return the table of a kind of id; one of relative positions is none of positions."""
    return next((table for name, table in tables.items() if kind in name and "rel" not in name), None)

"""Load pre-trained models and tokenizers, and write models as others load them.

Code that comes with a model is never run, weights are always loaded in float32 (the engine casts them), and a
checkpoint that lacks a part of the model is refused: transformers would fill it with random numbers and a warning. Only
a head that a checkpoint lacks whole is made anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import ModelError
from engine.models.adapters import merged_weights, plain_names, save_adapters
from engine.models.architecture import (
    Attention,
    forward_parameters,
    input_form,
    read_checkpoint,
    require_class,
    require_kernel,
    set_dropout,
    set_module_dropout,
)
from engine.models.attention import is_causal
from engine.models.ending import with_end
from engine.models.failures import loading
from engine.models.head import head_parameters
from engine.models.layers import choose_layers, keep_layers
from engine.models.sentence_transformers import Tower
from engine.models.sides import on_the_right
from engine.models.source import local_source, require_tokenizer_files
from engine.models.start import transformers_of
from shards.errors import listed

_LISTED = 3
_CAPITALS = "AÉЖ"


def load_tokenizer(name: str, *, section: str = "retriever", ends_texts: bool = False) -> Any:
    """Load a model's tokenizer, which cuts and fills on the right (`engine.models.sides`).

    Args:
        name: As in `resolve_model`; a retriever with two towers has the same tokenizer in both.
        section: The recipe's section, for remedies.
        ends_texts: Let it end every text with a special token (`engine.models.ending`).

    Raises:
        ModelError: It cannot be found or loaded, knows no word, or has no token to end a text with.
    """
    source = local_source(name)
    first, *others = (
        _tokenizer_of(source / tower.transformer if isinstance(source, Path) else source, name, tower, section)
        for tower in transformers_of(source)
    )
    if any(tokenizer_fingerprint(other) != tokenizer_fingerprint(first) for other in others):
        raise ModelError(
            f"the query tower and the document tower of {name} have different tokenizers",
            expected="one for both, since documents and queries are tokenised alike",
            remedy=f"name another model by {section}.name",
        )
    return with_end(first, name, section) if ends_texts else first


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash all that decides which ids a tokenizer gives a text.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        SHA-256, equal for a tokenizer and its saved and reloaded copy.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for set_by_the_last_call in ("truncation", "padding"):
            state.pop(set_by_the_last_call, None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state["special_tokens"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def load_backbone(
    auto_class: Any,
    name: str,
    *,
    folder: str = "",
    num_layers: int | Sequence[int] | None = None,
    dropout: float | None = None,
    attention: Attention | None = "sdpa",
    gradient_checkpointing: bool = False,
    settings: Mapping[str, Any] | None = None,
    may_be_fresh: Callable[[Any], Collection[str]] = lambda _model: (),
    judge_unused: Callable[[Any, Collection[str]], None] = lambda _model, _names: None,
    note_fresh: Callable[[Collection[str]], None] = lambda _names: None,
    needs_head: bool = False,
    section: str = "retriever",
) -> Any:
    """Load a model in float32.

    Args:
        auto_class: Such as `transformers.AutoModel`.
        name: As in `resolve_model`.
        folder: Sub-folder of a local folder that holds the model.
        num_layers: How many of the first layers to keep, or which, counted from 0 and ascending; None keeps all.
        dropout: Every dropout, in [0, 1); None keeps the model's own.
        attention: Attention kernel; None for the model's own choice.
        gradient_checkpointing: Recompute activations in the backward pass.
        settings: Other values to set on the model's configuration.
        may_be_fresh: Names of the model's parameters that a checkpoint may lack, all of a module's or none.
        judge_unused: Is given the model and the names of the checkpoint's weights that it has no place for; may raise.
        note_fresh: Is given the names of the parameters that the checkpoint lacks and that were made anew.
        needs_head: Say by its name if a checkpoint lacks the head for language modelling.
        section: The recipe's section, for remedies.

    Raises:
        ModelError: The model cannot be found or loaded, is no text encoder, lacks weights, has fewer layers than asked
            for, or has none of the dropouts or kernels asked for.
    """
    source = local_source(name)
    if folder:
        source = Path(source) / folder
    checkpoint = read_checkpoint(source, name, section=section)
    config = checkpoint.config
    require_class(config, auto_class, name, section=section, attention=attention)
    require_kernel(attention, section=section)
    keep_layers(config if isinstance(num_layers, int) else copy.deepcopy(config), num_layers, name)
    set_dropout(config, dropout, name)
    for key, value in (settings or {}).items():
        setattr(config, key, value)
    with loading(name, "model", source, section):
        model, info = auto_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and told by us, with the sizes
            key_mapping=checkpoint.key_mapping,
        )
    judge_unused(model, info["unexpected_keys"])
    fresh = frozenset(may_be_fresh(model))
    _require_sizes(info["mismatched_keys"], model, name, fresh, section)
    if needs_head:
        _require_head(info["missing_keys"], model, name, section)
    _require_whole(info["missing_keys"], model, name, fresh)
    note_fresh(_lacking(info["missing_keys"], model))
    if num_layers is not None and not isinstance(num_layers, int):
        model = choose_layers(model, num_layers, name)
    set_module_dropout(model, dropout)
    _leave_out_cache(model)
    if gradient_checkpointing:
        _checkpoint_activations(model, name, section)
    return model


def save_backbone(model: Any, folder: Path, tokenizer: Any, weights: Mapping[str, Tensor]) -> None:
    """Write a model as a Hugging Face folder, in float32.

    The weights come from outside because the model's own may be partitioned (ZeRO-3) or cast; transformers loads a
    checkpoint in the type it was written in, so that anything but float32 would score differently there. The tokenizer
    is written so that it gives the model no segment ids where the model has one segment. Adapters are merged, and
    written beside it, too.

    Args:
        model: Gives the configuration and the names of the weights.
        folder: An existing or new folder.
        tokenizer: Saved with it.
        weights: Full weights by the model's own names, one name for each that several share; others are ignored.

    Raises:
        ModelError: A weight is missing, or one has another shape than its configuration implies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = plain_names(model)
    whole = merged_weights(model, {**_shared_weights(model, weights), **weights})
    missing = [name for name in names if name not in whole]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weights of {type(model).__name__} are not given, such as {missing[0]}",
            expected="the full weights by the model's own names",
        )
    kept = {name: whole[name].detach().to(device="cpu", copy=True).contiguous() for name in names}
    kept = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures, config.dtype = [type(model).__name__], "float32"
    config.save_pretrained(folder)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    save_adapters(model, folder, weights)
    _fitting(tokenizer, model).save_pretrained(folder)


def _tokenizer_of(source: str | Path, name: str, tower: Tower, section: str) -> Any:
    if isinstance(source, Path):
        require_tokenizer_files(source)
    with loading(name, "tokenizer", source, section):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer)} entries, special tokens all of them",
            expected="a vocabulary: where transformers finds no tokenizer's files, it makes one without words",
            remedy=f"name a model with its tokenizer by {section}.name, or save the tokenizer beside the model",
        )
    return on_the_right(_in_lower_case(tokenizer, name) if tower.lower_case else tokenizer)


def _in_lower_case(tokenizer: Any, name: str) -> Any:
    """Let a tokenizer begin with what sentence-transformers' do_lower_case says; saved copies do so too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{name} makes texts lower case (do_lower_case), which {type(tokenizer).__name__} cannot",
            expected="a tokenizer with a tokenizer.json",
            remedy="name a model with one",
        )
    own = backend.normalizer
    if own is not None and own.normalize_str(_CAPITALS).islower():
        return tokenizer
    backend.normalizer = (
        normalizers.Lowercase() if own is None else normalizers.Sequence([normalizers.Lowercase(), own])
    )
    # Classes of one architecture make their normaliser anew from words of their own when they are loaded.
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )


def under_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the weights of one sub-module, named as in that sub-module."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's weights by name."""
    return dict(module.state_dict())


def _shared_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the given weights under the other names of the parameters that are tied to them."""
    given = ((alike, next((name for name in alike if name in weights), None)) for alike in _tied_names(model))
    return {other: weights[name] for alike, name in given if name is not None for other in alike}


def _fitting(tokenizer: Any, model: Any) -> Any:
    """Return a tokenizer that gives others who load it what the model takes."""
    if input_form(model).takes_types or "token_type_ids" not in tokenizer.model_input_names:
        return tokenizer
    fitting = copy.deepcopy(tokenizer)
    fitting.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    # What is saved are the words that it was made with.
    fitting.init_kwargs = {**tokenizer.init_kwargs, "model_input_names": fitting.model_input_names}
    return fitting


def _require_sizes(
    mismatched: Collection[tuple[str, Any, Any]], model: Any, name: str, head: Collection[str], section: str
) -> None:
    """Refuse weights of other sizes than the configuration implies; first of all, a head with several logits."""
    if not mismatched:
        return
    key, found, expected = min(mismatched, key=lambda one: (one[0] not in head, not one[0].endswith("weight"), one[0]))
    if key in head and len(found) and found[0] != expected[0] == 1:
        raise ModelError(
            f"the head of {name} gives {found[0]} logits ({key} is {list(found)})",
            expected=f"1 logit, the score of a pair, as {type(model).__name__} has with num_labels 1",
            remedy="name a ranker with one logit, or the model without its head: transformers' "
            f'AutoModel.from_pretrained("{name}").save_pretrained(FOLDER), its tokenizer saved there too, and '
            f"{section}.name=FOLDER; the head is then made anew",
        )
    raise ModelError(
        f"{len(mismatched)} weights of {name} have other sizes than its config.json says: {key} is {list(found)}",
        expected=f"{list(expected)}, as in {type(model).__name__} by that configuration",
        remedy="put the config.json and the weights of one model together, or name another model",
    )


def _require_head(missing: Collection[str], model: Any, name: str, section: str) -> None:
    """Refuse a checkpoint without a trained head for language modelling."""
    lacking = sorted(_lacking(missing, model) & head_parameters(model))
    if lacking:
        kind, others = ("LM", "") if is_causal(model) else ("masked-LM", ", or a SPLADE")
        raise ModelError(
            f"{name} has no {kind} head: its weights lack {listed(lacking, _LISTED)}",
            expected=f"a whole {type(model).__name__}, whose trained head weighs the words of the vocabulary: a new "
            "one would weigh them at random",
            remedy=f"name a checkpoint of a {kind.replace('-LM', '').replace('LM', '')} language model by "
            f"{section}.name, such as the one that {name} was made from{others}",
        )


def _require_whole(missing: Collection[str], model: Any, name: str, head: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights; a head may be lacking, but no part of one."""
    lacking = sorted(_lacking(missing, model))
    lost = [key for key in lacking if key not in head]
    by_module: dict[str, set[str]] = {}
    for key in head:
        by_module.setdefault(key.rpartition(".")[0], set()).add(key)
    lost += [key for key in lacking if key in head and by_module[key.rpartition(".")[0]] - set(lacking)]
    if lost:
        raise ModelError(
            f"the weights of {name} lack {len(lost)} parameters of {type(model).__name__}: {listed(lost, _LISTED)}",
            expected="a checkpoint of this architecture; what is missing would stay random",
            remedy="name another model, or complete the folder",
        )


def _lacking(missing: Collection[str], model: nn.Module) -> set[str]:
    """Return the missing names of the parameters of which a checkpoint has no other name either."""
    present = {name for alike in _tied_names(model) if set(alike) - set(missing) for name in alike}
    return set(missing) - present


def _tied_names(model: nn.Module) -> Collection[list[str]]:
    """Return the names of each parameter: several where weights are tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names.values()


def _leave_out_cache(model: Any) -> None:
    """Keep a decoder from holding keys and values for tokens that never come; its configuration stays as it is."""
    backbone = model.base_model
    if is_causal(backbone) and "use_cache" in forward_parameters(backbone):
        backbone.register_forward_pre_hook(_without_cache, with_kwargs=True)


def _without_cache(_module: nn.Module, words: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return words, {**settings, "use_cache": False}


def _checkpoint_activations(model: Any, name: str, section: str) -> None:
    try:
        # Reentrant checkpointing fails under ZeRO-2 and 3 when one encoder runs twice before a backward.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{name} cannot recompute activations: {error}",
            remedy=f"set {section}.gradient_checkpointing to false",
        ) from error

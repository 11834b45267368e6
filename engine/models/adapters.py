"""Adapters of low rank: a backbone is frozen, and two narrow matrices beside each of its linear layers are trained.

The layers are peft's (the extra `lora`), put into the backbone in place, so that it stays the class that it was. What
lies above the backbone is trained whole, as it is new or small; the last layer of a language model is not, which is no
head of its own. Published and exported weights are merged, an ordinary model for everybody who reads them, and the
adapters lie beside them in peft's form.

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685).

Shapes: I inputs and O outputs of a layer, R the adapter's rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config.models import LoraConfig
from engine.errors import ConfigError, ModelError
from engine.models.head import head_parameters
from shards.errors import listed

FOLDER = "adapter"
"""Below a saved model: its adapters in peft's form."""
_PEFT_PREFIX, _NAME = "base_model.model.", "default"
_PARTS = ("lora_A", "lora_B")
_OF_ADAPTER = re.compile(r"\.lora_[AB]\.")
_LISTED = 12


class Adapted(NamedTuple):
    """A model of transformers inside one of ours.

    Attributes:
        prefix: Of its parameters' names.
        model: It, with its head where that is transformers' own.
        folder: Where it is saved, below the model's folder.
        has_own_head: Whether it has a head that is new, and so trained whole.
    """

    prefix: str
    model: Any
    folder: str
    has_own_head: bool = False


def add_adapters(parts: list[Adapted], lora: LoraConfig, *, name: str, seed: int, section: str) -> None:
    """Freeze backbones and put adapters beside their linear layers; at first these change nothing.

    Args:
        parts: Of one model of ours; changed in place.
        lora: Rank, scale, dropout, and which layers.
        name: The model, as the recipe names it.
        seed: Initialises them, equally on every rank; the global random state is left as it was.
        section: The recipe's section, for remedies.

    Raises:
        ConfigError: peft is not installed.
        ModelError: A name in `target_modules` is no linear layer's.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"{section}.lora asks for adapters, which peft makes: {error}",
            expected="the extra lora",
            remedy="pip install 'sparring[lora]', or in the repository: pip install '.[lora]'; or leave "
            f"{section}.lora out",
        ) from error
    for part in parts:
        above = head_parameters(part.model) if part.has_own_head else set()
        backbone = part.model.base_model
        targets = _targets(backbone, lora, name, section)
        part.model.requires_grad_(False)
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            base_model_name_or_path=name,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, backbone, adapter_name=_NAME)
        for own, parameter in part.model.named_parameters():
            if own in above:
                parameter.requires_grad_(True)


def frozen_parameters(part: Adapted) -> set[str]:
    """Return the names of a model's parameters that adapters stand in for, as they are without adapters."""
    above = head_parameters(part.model) if part.has_own_head else set()
    return {f"{part.prefix}{own}" for own, _ in part.model.named_parameters() if own not in above}


def adapter_sizes(part: Adapted, lora: LoraConfig, *, name: str, section: str) -> list[int]:
    """Count the elements of each matrix that adapters would add.

    Args:
        part: A model without adapters, which may have no storage.
        lora: Their rank and places.
        name: The model, as the recipe names it.
        section: The recipe's section, for remedies.

    Raises:
        ModelError: A name in `target_modules` is no linear layer's.
    """
    backbone = part.model.base_model
    layers = (backbone.get_submodule(target) for target in _targets(backbone, lora, name, section))
    return [lora.r * width for layer in layers for width in (layer.in_features, layer.out_features)]


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Add adapters to the weights that they stand beside, by the names of a model without adapters.

    Args:
        model: Says which layers have them.
        weights: Full weights by the model's names, on any device.

    Returns:
        The weights themselves where the model has none.
    """
    layers = dict(_layers(model))
    if not layers:
        return weights
    merged = {_plain(key): tensor for key, tensor in weights.items() if not _OF_ADAPTER.search(key)}
    for name, layer in layers.items():
        a_RI, b_OR = (weights[f"{name}.{part}.{_NAME}.weight"].float() for part in _PARTS)
        merged[f"{name}.weight"] = merged[f"{name}.weight"].float() + layer.scaling[_NAME] * (b_OR @ a_RI)
    return merged


def plain_names(model: nn.Module) -> list[str]:
    """Return the names of a model's weights as they are without adapters."""
    return [_plain(name) for name in model.state_dict() if not _OF_ADAPTER.search(name)]


def save_adapters(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a model's adapters as peft loads them; nothing where it has none.

    Args:
        model: As in `merged_weights`, with its configuration.
        folder: The model's; a folder is made in it.
        weights: As in `merged_weights`.
    """
    layers = dict(_layers(model))
    if not layers:
        return
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    model.base_model.peft_config[_NAME].save_pretrained(target)
    tensors = {
        f"{_PEFT_PREFIX}{name}.{part}.weight": weights[f"{name}.{part}.{_NAME}.weight"].detach().float().cpu().clone()
        for name in layers
        for part in _PARTS
    }
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def read_adapters(parts: list[Adapted], folder: Path) -> dict[str, Tensor]:
    """Read the adapters of a saved model, by the names of our model's parameters.

    Args:
        parts: Of the model, which has adapters.
        folder: Where it was saved.
    """
    found = {}
    for part in parts:
        for key, tensor in load_file(folder / part.folder / FOLDER / "adapter_model.safetensors").items():
            found[f"{part.prefix}{key.removeprefix(_PEFT_PREFIX).removesuffix('.weight')}.{_NAME}.weight"] = tensor
    return found


def _targets(backbone: Any, lora: LoraConfig, name: str, section: str) -> list[str]:
    """Return the full names of the layers that get adapters; a pooler is no part of the layers."""
    pooler = getattr(backbone, "pooler", None)
    above = set() if pooler is None else set(pooler.modules())
    linear = [own for own, one in backbone.named_modules() if isinstance(one, nn.Linear) and one not in above]
    if lora.target_modules == "all-linear":
        wanted = [""]
        found = linear
    else:
        wanted = [one for one in lora.target_modules if not any(_ends_in(own, one) for own in linear)]
        found = [own for own in linear if any(_ends_in(own, one) for one in lora.target_modules)]
    if not found or (wanted and lora.target_modules != "all-linear"):
        kinds = sorted({own.rpartition(".")[2] for own in linear})
        raise ModelError(
            f"{section}.lora.target_modules has {', '.join(wanted) or 'all-linear'}, which match no linear layer of "
            f"{name}",
            expected=f"some of {listed(kinds, _LISTED)}, or all-linear",
            remedy=f"set {section}.lora.target_modules to such names, or leave it out for all linear layers",
        )
    return found


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, one) for name, one in model.named_modules() if hasattr(one, "lora_A") and hasattr(one, "base_layer"))


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")

"""Making a model smaller: which of its layers are kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import ModelError
from engine.models.compiled import layer_lists


def keep_layers(config: Any, kept: int | Sequence[int] | None, name: str) -> None:
    """Let a configuration have some layers alone.

    Args:
        config: Of transformers; changed in place.
        kept: How many of the first, or which, counted from 0; None for all.
        name: As the recipe names the model.

    Raises:
        ModelError: It has fewer, or does not say how many.
    """
    if kept is None:
        return
    present = getattr(config, "num_hidden_layers", None)
    asked, words = (kept, f"num_layers is {kept}") if isinstance(kept, int) else (max(kept) + 1, f"layers is {[*kept]}")
    if present is None or asked > present:
        have = f"{present} layers" if present is not None else "no known number of layers"
        numbers = f"1 to {present}" if isinstance(kept, int) else f"numbers from 0 to {(present or 0) - 1}"
        raise ModelError(
            f"{words}, but {name} has {have}",
            expected=numbers if present is not None else "a model with num_hidden_layers in its config.json",
            remedy="name layers that it has, or leave it out",
        )
    chosen = range(kept) if isinstance(kept, int) else kept
    config.num_hidden_layers = len(chosen)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [config.layer_types[layer] for layer in chosen]


def choose_layers(model: Any, kept: Sequence[int], name: str) -> Any:
    """Make a model of some of another's layers, in their order.

    Args:
        model: Of transformers, with all its layers.
        kept: Numbers of the layers, from 0, ascending.
        name: As the recipe names the model.

    Returns:
        The model of this configuration with `len(kept)` layers; weights outside the layers are the same.

    Raises:
        ModelError: It has not so many layers, or not one list of them.
    """
    lists = layer_lists(model)
    if len(lists) != 1:
        raise ModelError(
            f"{name} has {len(lists)} lists of layers, of which some should be kept",
            expected="a model with one",
            remedy="set num_layers, or leave layers out",
        )
    (prefix,) = lists
    config = copy.deepcopy(model.config)
    keep_layers(config, kept, name)
    with torch.random.fork_rng(devices=[]):
        smaller = type(model)._from_config(config, attn_implementation=config._attn_implementation, dtype=torch.float32)
    places, inside = {str(layer): place for place, layer in enumerate(kept)}, f"{prefix}."
    weights = {}
    for key, tensor in model.state_dict().items():
        if not key.startswith(inside):
            weights[key] = tensor
            continue
        layer, rest = key.removeprefix(inside).split(".", 1)
        if layer in places:
            weights[f"{inside}{places[layer]}.{rest}"] = tensor
    smaller.load_state_dict(weights)
    return smaller.train(model.training)

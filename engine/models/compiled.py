"""Compiling the layers of a model, as an option: fewer passes over memory for the time the compiler takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from engine.errors import ModelError


def compile_layers(model: nn.Module) -> int:
    """Compile each layer of a model's backbones, for inputs of any size.

    Names of weights and modules stay as they are, so the model is saved and loaded as before. The compiler works at the
    first forward, some seconds to a minute; layers of one form share its result.

    Args:
        model: Changed in place.

    Returns:
        How many layers are compiled.

    Raises:
        ModelError: No list of layers was found.
    """
    layers: list[Any] = [layer for found in layer_lists(model).values() for layer in found]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no list of layers that could be compiled", remedy="set compile to false"
        )
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find the lists of layers of a model's backbones.

    Returns:
        By name: each list of as many modules as the configuration has layers.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == _num_layers(model)
    }


def _num_layers(model: nn.Module) -> int:
    counts = (getattr(getattr(one, "config", None), "num_hidden_layers", None) for one in model.modules())
    return next((int(count) for count in counts if count), 0)

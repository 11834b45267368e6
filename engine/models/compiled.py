"""Compiling the layers of a model, as an option: fewer passes over memory for the time the compiler takes."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn

from engine.errors import ConfigError, ModelError


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
        ConfigError: This machine has no compiler that the generated code could be built with.
    """
    layers: list[Any] = [layer for found in layer_lists(model).values() for layer in found]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no list of layers that could be compiled", remedy="set compile_layers to false"
        )
    _require_compiler()
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _require_compiler() -> None:
    """Refuse a machine on which torch would miss a compiler, which it does at a phase's first step."""
    # On a GPU as Triton looks for it, else as torch's inductor.
    variable, names, language = ("CC", ["gcc", "clang"], "C") if torch.cuda.is_available() else ("CXX", ["g++"], "C++")
    asked = os.environ.get(variable)
    if not any(map(shutil.which, [asked] if asked else names)):
        raise ConfigError(
            f"compile_layers is set, and this machine has no {language} compiler"
            + (f" {asked} (the environment's {variable})" if asked else ""),
            expected=f"{' or '.join(names)} on the PATH, or another that {variable} names",
            remedy="install it on every host, or leave compile_layers out",
        )


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

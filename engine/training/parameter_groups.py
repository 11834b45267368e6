"""The groups in which an optimizer has a model's parameters: by weight decay, and a head with a rate of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from engine.config.training import OptimConfig

NO_DECAY = ("bias", "LayerNorm.weight", "layer_norm.weight", "norm.weight")
"""Ends of the names of parameters without weight decay."""


def parameter_groups(module: nn.Module, optim: OptimConfig, head: Collection[str] = ()) -> list[dict[str, Any]]:
    """Split a model's trained parameters.

    Args:
        module: The model.
        optim: Of its first stage.
        head: Names of the parameters that may have a learning rate of their own.

    Returns:
        Groups as torch's optimizers take them, none of them empty. `decayed` says whether weight decay applies,
        `of_head` whether they are the head's. The order in which ZeRO lays out weights follows from them; checkpoints
        do not, which are by parameter.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (of_head, decayed): [] for of_head in (False, True) for decayed in (True, False)
    }
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[name in head, not name.endswith(NO_DECAY)].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "decayed": decayed,
            "of_head": of_head,
        }
        for (of_head, decayed), parameters in groups.items()
        if parameters
    ]

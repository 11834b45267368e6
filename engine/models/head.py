"""What lies above a classifier's layers: its head sees first tokens only, and computes in float32.

A classifier's head reads the state of each input's first token, `hidden_states[:, 0]`. In a packed batch all inputs
are one row, so behind the layers their first tokens are laid out as N inputs of one token each, and the head, in
whatever form the model has it, is given what it would read from a padded batch.

In bfloat16 a score is rounded to three digits, coarser than the differences between good candidates. The head is a
sliver of the work, so it computes in float32 whatever its weights are.

Shapes: N inputs, T tokens of all of them, H hidden size, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from engine.models.attention import KEYWORD, Layout


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 at least, whatever the type of its inputs and weights."""

    def forward(self, inputs_NI: Tensor) -> Tensor:
        """Map [..., I] to [..., O], float32 or float64."""
        dtype = torch.promote_types(torch.float32, self.weight.dtype)
        bias_O = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(inputs_NI.to(dtype), self.weight.to(dtype), bias_O)


class Float32LayerNorm(nn.LayerNorm):
    """A layer normalisation that computes in float32 at least."""

    def forward(self, inputs_NI: Tensor) -> Tensor:
        """Normalise [..., I] to float32 or float64."""
        dtype = torch.promote_types(torch.float32, inputs_NI.dtype)
        weight_I = None if self.weight is None else self.weight.to(dtype)
        bias_I = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.layer_norm(inputs_NI.to(dtype), self.normalized_shape, weight_I, bias_I, self.eps)


_IN_FLOAT32: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Float32Linear, nn.LayerNorm: Float32LayerNorm}


def compute_head_in_float32(classifier: Any) -> None:
    """Let the layers above a classifier's backbone compute in float32, as far as their kinds are known.

    Args:
        classifier: A Hugging Face model for sequence classification; in float32 its results stay what they were.
    """
    head = list(_head_modules(classifier))
    known = (*_IN_FLOAT32, *_IN_FLOAT32.values())
    if any(list(module.parameters(recurse=False)) and type(module) not in known for module in head):
        return  # float32 in one layer would meet another type in the next
    for module in head:
        if type(module) in _IN_FLOAT32:
            # The very module, so that names, hooks and parameters stay.
            module.__class__ = _IN_FLOAT32[type(module)]


def head_parameters(model: Any) -> set[str]:
    """Return the names of the parameters above a model's layers: those of a classifier's head, and of a pooler.

    Args:
        model: A transformers classifier, or a backbone, whose pooler alone lies above its layers.
    """
    head = set(_head_modules(model))
    return {
        f"{place}.{name}" if place else name
        for place, module in model.named_modules()
        if module in head
        for name, _ in module.named_parameters(recurse=False)
    }


def has_trained_classifier(backbone: Any, unused: Collection[str]) -> bool:
    """Tell whether the checkpoint of a backbone had the head of a classifier of transformers, of any number of logits.

    Args:
        backbone: Loaded without a head.
        unused: Names of the checkpoint's weights that it has no place for.
    """
    auto_class: Any = AutoModelForSequenceClassification
    if type(backbone.config) not in auto_class._model_mapping:
        return False
    with torch.device("meta"):
        classifier = auto_class.from_config(backbone.config)
    own = {name for name in head_parameters(classifier) if not name.startswith(f"{classifier.base_model_prefix}.")}
    return bool(own) and own <= set(unused)


def without_pooler(model: Any) -> Any:
    """Take a backbone's pooler out of training, where its output is not used, and return the backbone.

    An unused parameter gets no gradient, which sharded optimizers handle badly.
    """
    if getattr(model, "pooler", None) is None:
        return model
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None
    else:  # the class calls it whether it is there or not
        model.pooler.requires_grad_(False)
    return model


def show_first_tokens(classifier: Any) -> None:
    """Give the head of a classifier the first tokens of packed inputs; padded batches are not touched.

    What has no list of layers is left alone: the trial of packed batches tells.

    Args:
        classifier: A Hugging Face model for sequence classification.
    """
    for module in classifier.base_model.modules():
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            module.register_forward_hook(_first_tokens, with_kwargs=True)
            return


def _first_tokens(_module: nn.Module, _words: Any, settings: dict[str, Any], output: Any) -> Any:
    layout: Layout | None = settings.get(KEYWORD)
    if layout is None:
        return None
    first_N1H = output[0][0].index_select(0, layout.batch.first_N)[:, None]
    if isinstance(output, tuple):
        return (first_N1H, *output[1:])
    output.last_hidden_state = first_N1H
    return output


def _head_modules(classifier: Any) -> Iterator[nn.Module]:
    backbone = classifier.base_model
    below = set(backbone.modules()) - set(_modules(getattr(backbone, "pooler", None)))
    return (module for module in classifier.modules() if module not in below)


def _modules(module: nn.Module | None) -> Iterator[nn.Module]:
    return iter(()) if module is None else module.modules()

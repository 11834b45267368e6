"""The layers that some retrievers have above their pooling: linear maps with an activation.

sentence-transformers calls such a layer Dense. It is read from there, trained with the rest, and written in the same
form. Like a ranker's head it is a sliver of the work, and computes in float32 whatever its weights are.

Shapes: N inputs, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import ModelError
from engine.models.head import Float32Linear
from shards.files import write_json

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    f"torch.nn.modules.{module}.{kind.__name__}": kind
    for module, kinds in {
        "linear": (nn.Identity,),
        "activation": (
            nn.ELU,
            nn.GELU,
            nn.Hardtanh,
            nn.LeakyReLU,
            nn.LogSigmoid,
            nn.Mish,
            nn.ReLU,
            nn.Sigmoid,
            nn.SiLU,
            nn.Softplus,
            nn.Softsign,
            nn.Tanh,
        ),
    }.items()
    for kind in kinds
}
"""Activations by the names that sentence-transformers writes: without weights, one number at a time."""
EMBEDDING, SCORES = "sentence_embedding", "scores"
"""How sentence-transformers calls what a layer takes, and gives unless it says otherwise; and what a ranker gives."""
IDENTITY = "torch.nn.modules.linear.Identity"
_WEIGHTS, _OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """What a folder says of one layer.

    Attributes:
        path: Its folder, below the model's.
        in_features: Numbers that it takes.
        out_features: Numbers that it gives.
        bias: Whether it adds some.
        activation: Name in `ACTIVATIONS`.
        output: What the library is to call its result; an embedding, or the scores of a ranker's head.
    """

    path: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    output: str = EMBEDDING


class Dense(nn.Module):
    """One layer: a linear map and an activation.

    Args:
        layer: Its sizes and activation.
    """

    def __init__(self, layer: DenseLayer) -> None:
        super().__init__()
        self.layer = layer
        self.linear = Float32Linear(layer.in_features, layer.out_features, bias=layer.bias)
        self.activation = ACTIVATIONS[layer.activation]()

    def forward(self, embeddings_NI: Tensor) -> Tensor:
        """Map [N, I] to [N, O], float32 or float64."""
        mapped_NO: Tensor = self.activation(self.linear(embeddings_NI))
        return mapped_NO


def load_projection(folder: Path, layers: Sequence[DenseLayer], width: int) -> nn.Sequential:
    """Load the layers of a tower.

    Args:
        folder: The model's; each layer's lies below it.
        layers: Of which the first takes what is pooled; at least one.
        width: Numbers in a token's state.

    Raises:
        ModelError: The weights are missing, damaged or of other sizes, or a layer does not take what the one below it
            gives.
    """
    modules = []
    for layer in layers:
        if layer.in_features != width:
            raise ModelError(
                f"the Dense layer {layer.path} of {folder} takes {layer.in_features} numbers",
                expected=f"{width}, which the module before it gives",
                remedy="complete the folder with the files of one model",
            )
        width = layer.out_features
        # On the meta device, so that the global random state is left as it was.
        with torch.device("meta"):
            module = Dense(layer)
        module.load_state_dict(_weights(folder, layer), assign=True)
        modules.append(module)
    return nn.Sequential(*modules).requires_grad_(True)


def new_projection(layers: Sequence[DenseLayer]) -> nn.Sequential:
    """Make untrained layers, each on top of the one before it."""
    return nn.Sequential(*map(Dense, layers))


def projected_width(projection: nn.Module | None, width: int) -> int:
    """Return how many numbers an embedding has.

    Args:
        projection: What `load_projection` gave; None for none.
        width: Numbers in a token's state.
    """
    return width if projection is None else int(list(projection.children())[-1].layer.out_features)  # type: ignore[union-attr,arg-type]


def save_projection(projection: nn.Module, folder: Path, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write the layers of a tower as sentence-transformers reads them.

    Args:
        projection: What `load_projection` gave; its own weights may be partitioned.
        folder: The model's.
        weights: Full weights by the projection's names.
        names: A folder for each layer, below the model's.

    Raises:
        ModelError: A weight is missing.
    """
    for number, (module, name) in enumerate(zip(projection.children(), names, strict=True)):
        own = {key: f"{number}.{key}" for key in module.state_dict()}
        missing = [key for key in own.values() if key not in weights]
        if missing:
            raise ModelError(f"the weights of the Dense layer {name} are not given: {missing[0]}")
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        kept = {key: weights[full].detach().to("cpu", torch.float32, copy=True) for key, full in own.items()}
        save_file({key: tensor.contiguous() for key, tensor in kept.items()}, target / _WEIGHTS)
        layer: Any = module.layer
        named = (
            {} if layer.output == EMBEDDING else {"module_input_name": EMBEDDING, "module_output_name": layer.output}
        )
        write_json(
            target / "config.json",
            {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "bias": layer.bias,
                "activation_function": layer.activation,
                **named,
            },
        )


def _weights(folder: Path, layer: DenseLayer) -> dict[str, Tensor]:
    """Read a layer's weights in float32, from either of the forms in which they are written."""
    place = folder / layer.path
    new, old = place / _WEIGHTS, place / _OLD_WEIGHTS
    if not new.is_file() and not old.is_file():
        raise ModelError(
            f"the Dense layer {layer.path} of {folder} has no weights",
            expected=f"{_WEIGHTS} or {_OLD_WEIGHTS} in it",
            remedy="complete the folder: copy or download the model again",
        )
    try:
        found = dict(load_file(new) if new.is_file() else torch.load(old, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ModelError(
            f"the weights of the Dense layer {layer.path} of {folder} cannot be read: {error}",
            remedy="copy or download the model again",
        ) from error
    sizes: dict[str, tuple[int, ...]] = {"linear.weight": (layer.out_features, layer.in_features)}
    if layer.bias:
        sizes["linear.bias"] = (layer.out_features,)
    if {key: tuple(tensor.shape) for key, tensor in found.items()} != sizes:
        shown = {key: list(tensor.shape) for key, tensor in found.items()}
        raise ModelError(
            f"the weights of the Dense layer {layer.path} of {folder} are {shown}",
            expected=f"{ {key: list(size) for key, size in sizes.items()} }, by its config.json",
            remedy="put the files of one model together",
        )
    return {key: tensor.float() for key, tensor in found.items()}

"""Find, load and describe pre-trained models and tokenizers.

A model is named by a hub id, by a local folder, or as `package:NAME`, an installed package that carries weights. Code
that comes with a model is never run, weights are always loaded in float32 (the engine casts them), and a checkpoint
that lacks a part of the model is refused: transformers would fill it with random numbers and a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from engine.errors import ModelError
from shards.files import read_json, write_json

Attention = Literal["sdpa", "eager", "flash_attention_2"]
METADATA_FILE = "sparring.json"
"""Beside the weights that we save: pooling, similarity, lengths, and whatever else gives the same scores elsewhere."""

_PACKAGE = "package:"
_WEIGHTS = ("*.safetensors", "*.bin")
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "ibert"})
"""RoBERTa and its kin, which count positions from pad_token_id + 1."""
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
)


def resolve_model(name: str) -> str | Path:
    """Find where a model's files are.

    Args:
        name: `package:NAME`, a local folder, or a hub id.

    Returns:
        A folder, or the hub id as it was given.

    Raises:
        ModelError: The package is not installed or carries no weights; the folder is missing, or lacks config.json or
            weights.
    """
    if name.startswith(_PACKAGE):
        return _package_folder(name.removeprefix(_PACKAGE))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _require_model_files(folder)
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no model folder {name}", remedy="correct the path, or name a hub id or package:NAME"
        )
    return name


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer.

    Args:
        name: As in `resolve_model`; a retriever with two towers has the same tokenizer in both.

    Raises:
        ModelError: It cannot be found or loaded.
    """
    source = resolve_model(name)
    if isinstance(source, Path) and not (source / "config.json").exists():
        source = source / "query"
    with _loading(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


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
    num_layers: int | None = None,
    dropout: float | None = None,
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    settings: Mapping[str, Any] | None = None,
    may_be_fresh: Container[str] = (),
) -> Any:
    """Load a model in float32.

    Args:
        auto_class: Such as `transformers.AutoModel`.
        name: As in `resolve_model`.
        folder: Sub-folder of a local folder that holds the model.
        num_layers: Keep only the first layers; None keeps all.
        dropout: Dropout of hidden states and attention, in [0, 1); None keeps the model's own.
        attention: Attention kernel.
        gradient_checkpointing: Recompute activations in the backward pass.
        settings: Other values to set on the model's configuration.
        may_be_fresh: Names of modules, at most one level down, that the checkpoint may lack.

    Raises:
        ModelError: The model cannot be found or loaded, lacks weights, has fewer layers than asked for, or has none of
            the dropouts or kernels asked for.
    """
    source = resolve_model(name)
    if folder:
        source = Path(source) / folder
    with _loading(name, "model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    _keep_layers(config, num_layers, name)
    _set_dropout(config, dropout, name)
    for key, value in (settings or {}).items():
        setattr(config, key, value)
    with _loading(name, "model"):
        model, info = auto_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(
        key for key in info["missing_keys"] if not any(module in may_be_fresh for module in key.split(".")[:2])
    )
    if missing:
        raise ModelError(
            f"the weights of {name} lack {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}",
            expected="a checkpoint of this architecture; what is missing would stay random",
            remedy="name another model, or complete the folder",
        )
    if gradient_checkpointing:
        _checkpoint_activations(model, name)
    return model


def longest_input(config: Any) -> int | None:
    """Return how many tokens a model's positions allow, or None where its configuration does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    return positions - first_position(config)


def first_position(config: Any) -> int:
    """Return the position of an input's first token, from which the others count on."""
    return int(config.pad_token_id) + 1 if config.model_type in _OFFSET_POSITIONS else 0


def save_backbone(model: Any, folder: Path, tokenizer: Any, weights: Mapping[str, Tensor]) -> None:
    """Write a model as a Hugging Face folder, in float32.

    The weights come from outside because the model's own may be partitioned (ZeRO-3) or cast; transformers loads a
    checkpoint in the type it was written in, so that anything but float32 would score differently there.

    Args:
        model: Gives the configuration and the names of the weights.
        folder: An existing or new folder.
        tokenizer: Saved with it.
        weights: Full weights by the model's own names; others are ignored.

    Raises:
        ModelError: A weight is missing, or one has another shape than its configuration implies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(model.state_dict().keys())
    missing = [name for name in names if name not in weights]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(names)} weights of {type(model).__name__} are not given, such as {missing[0]}",
            expected="the full weights by the model's own names",
        )
    kept = {name: weights[name].detach().to(device="cpu", copy=True).contiguous() for name in names}
    kept = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures, config.dtype = [type(model).__name__], "float32"
    config.save_pretrained(folder)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write what must travel with a model's weights."""
    write_json(folder / METADATA_FILE, dict(metadata))


def saved_metadata(source: str | Path) -> dict[str, Any]:
    """Return what `write_metadata` wrote where `resolve_model` pointed; empty for a model from elsewhere.

    Raises:
        ArtifactError: It is damaged.
    """
    if not isinstance(source, Path) or not (source / METADATA_FILE).exists():
        return {}
    return dict(read_json(source / METADATA_FILE, "the description of the model"))


def read_metadata(folder: Path, model: Literal["retriever", "ranker"]) -> dict[str, Any]:
    """Read what `write_metadata` wrote.

    Args:
        folder: A folder saved by a retriever or a ranker.
        model: Which of the two it must be.

    Raises:
        ArtifactError: There is none, or it is damaged.
        ModelError: The folder holds the other model.
    """
    metadata: dict[str, Any] = read_json(folder / METADATA_FILE, f"the description of the {model}")
    if metadata.get("model") != model:
        raise ModelError(f"{folder} holds a {metadata.get('model')}", expected=f"a {model}")
    return metadata


def under_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the weights of one sub-module, named as in that sub-module."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's weights by name."""
    return dict(module.state_dict())


def _package_folder(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"the package {package} is not installed", remedy=f"pip install {package}, or name another model"
        ) from None
    # The package's own code is not imported: where its files lie is enough.
    folders = sorted({Path(str(file.locate())).parent for file in files if file.name == "config.json"})
    usable = [folder for folder in folders if _has_weights(folder)]
    if len(usable) != 1:
        raise ModelError(
            f"the package {package} carries {len(usable)} models",
            expected="exactly one folder with config.json and weights in it",
            remedy="name the folder itself" if usable else "name a package that carries weights",
        )
    return usable[0]


def _require_model_files(folder: Path) -> None:
    if saved_metadata(folder).get("tied") is False:
        for tower in ("query", "document"):
            _require_files_here(folder / tower)
        return
    _require_files_here(folder)


def _require_files_here(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {folder} has no config.json", remedy="name a Hugging Face model folder")
    if not _has_weights(folder):
        raise ModelError(
            f"the model folder {folder} has no weights",
            expected=f"a file {' or '.join(_WEIGHTS)} beside its config.json",
            remedy="complete the folder; a clone without Git LFS, for one, has none",
        )


def _has_weights(folder: Path) -> bool:
    return any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern))


def _keep_layers(config: Any, num_layers: int | None, name: str) -> None:
    if num_layers is None:
        return
    present = getattr(config, "num_hidden_layers", None)
    if present is None or num_layers > present:
        raise ModelError(
            f"num_layers is {num_layers}, but {name} has {present if present is not None else 'no known number of'} "
            "layers",
            expected=f"1 to {present}" if present is not None else "a model with num_hidden_layers in its config.json",
            remedy="lower num_layers, or leave it out",
        )
    config.num_hidden_layers = num_layers
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:num_layers]


def _set_dropout(config: Any, dropout: float | None, name: str) -> None:
    if dropout is None:
        return
    present = [key for key in _DROPOUTS if isinstance(getattr(config, key, None), int | float)]
    if not present:
        raise ModelError(f"{name} has no dropout that is known by name", remedy="leave dropout out")
    for key in present:
        setattr(config, key, dropout)


def _checkpoint_activations(model: Any, name: str) -> None:
    try:
        # Reentrant checkpointing fails under ZeRO-2 and 3 when one encoder runs twice before a backward.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{name} cannot recompute activations: {error}", remedy="set gradient_checkpointing to false"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and reports that transformers writes while it loads a model."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """Turn the many exceptions of a load into one that says what to do."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the {what} {name} cannot be loaded: {reason}",
            remedy="check the name: a hub id needs the network or a filled cache, a folder or package:NAME does not",
        ) from error

"""Consolidated weights: what an iteration's models are, for everyone who does not train them.

After each training stage all weights are gathered from the engine (under ZeRO-3 they lie in pieces on all ranks) and
published as a plain Hugging Face folder with a hash. Encoding, scoring, evaluation and export load that folder, so
they are the same under every ZeRO stage and tied to weights that can be named.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from engine.config.recipe import Config, ModelConfig
from engine.errors import ArtifactError
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.run import Run
from shards.files import read_json, sha256_file, write_json

if TYPE_CHECKING:  # who only reads weights needs no DeepSpeed
    from engine.training.backend import TrainedModel

ZERO_SHOT = "zero-shot"
"""The name of the state before any training, where others are named by their iteration."""
M = TypeVar("M", bound=nn.Module)
_MARKER = "weights.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HasTokenizer(Protocol):
    """What goes with a model and has its tokenizer, such as `engine.data.tokenization.ModelText`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        ...


def iteration_name(iteration: int) -> str:
    """Return how artifacts of an iteration are named: `000` for the warm-up, then `001` and on."""
    return f"{iteration:03d}"


def publish_weights(run: Run, model: TrainedModel, text: HasTokenizer, name: str) -> dict[str, str]:
    """Gather a model's weights and publish them under an iteration's name. A collective.

    Args:
        run: Whose folder takes them.
        model: The engine; its state is on the device.
        text: The tokenizer that goes with it.
        name: Iteration's name.

    Returns:
        The weights' sha256 under `_weights_sha256`.
    """
    state = model.full_state_dict()
    folder = run.folder.weights(model.name, name)
    metadata = describe_model(run.config, model.name)
    digest = run.coordinator.only_rank_zero(
        f"publish {model.name} {name}", lambda: _write(folder, model, text, state, metadata)
    )
    return {"_weights_sha256": str(digest)}


def describe_model(config: Config, name: str) -> dict[str, Any]:
    """Return what a saved model must carry beside its weights to give the same scores elsewhere."""
    section = config.retriever if name == "retriever" else config.ranker
    described: dict[str, Any] = {
        "model": name,
        "base": section.name,
        "max_length": section.max_length,
        "score_scale": section.score_scale,
        "template": config.data.template,
    }
    described["query_max_length"] = config.retriever.query_max_length
    return described


def weights_sha256(folder: Path) -> str:
    """Return the hash of published weights.

    Raises:
        ArtifactError: There are none.
    """
    marker = folder / _MARKER
    if not marker.exists():
        raise ArtifactError(
            f"there are no published weights in {folder}",
            remedy="let the run finish the stage that makes them",
        )
    return str(read_json(marker, "the record of published weights")["sha256"])


def frozen_retriever(config: Config, folder: Path, device: torch.device) -> Retriever:
    """Load published retriever weights for inference, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    _verify(folder)
    section = config.retriever
    model = Retriever.load(
        str(folder),
        pooling=section.pooling,
        similarity=section.similarity,
        tied=section.tied,
        attention=section.attention,
    )
    return _frozen(model, section, device)


def frozen_ranker(config: Config, folder: Path, device: torch.device) -> Ranker:
    """Load published ranker weights for inference, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    _verify(folder)
    return _frozen(Ranker.load(str(folder), attention=config.ranker.attention), config.ranker, device)


def _frozen(model: M, section: ModelConfig, device: torch.device) -> M:
    model.to(device=device, dtype=_DTYPES[section.precision])
    model.eval()
    model.requires_grad_(False)
    return model


def _write(
    folder: Path, model: TrainedModel, text: HasTokenizer, state: dict[str, torch.Tensor], metadata: dict[str, Any]
) -> str:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.module.save(temporary, text.tokenizer, state_dict=state, metadata=metadata)  # type: ignore[operator]
    files = _weight_files(temporary)
    digest = _digest(files)
    write_json(temporary / _MARKER, {"sha256": digest, "files": {str(key): value for key, value in files.items()}})
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return digest


def _weight_files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name}:{digest}\n" for name, digest in files.items()).encode()).hexdigest()


def _verify(folder: Path) -> None:
    recorded, found = weights_sha256(folder), _digest(_weight_files(folder))
    if recorded != found:
        raise ArtifactError(
            f"the weights in {folder} have sha256 {found}",
            expected=f"{recorded}, which was recorded when they were published",
            remedy="the files were changed or damaged; restore them, or start in a new run folder",
        )

"""Consolidated weights: what an iteration's models are, for everyone who does not train them.

After each training stage `engine.training.publishing` gathers all weights from the engine and publishes them as a plain
Hugging Face folder with a hash. Encoding, scoring, evaluation and export load that folder, so they are the same under
every ZeRO stage and tied to weights that can be named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.config.models import (
    BottleneckConfig,
    CondenserConfig,
    LexicalConfig,
    ModelConfig,
    RankerConfig,
    RetrieverConfig,
)
from engine.errors import ArtifactError
from engine.models.bottleneck import BottleneckLM
from engine.models.condenser import CondenserLM
from engine.models.lexical import Lexical
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.source import saved_metadata
from shards.files import canonical_json, read_record, sha256_file

M = TypeVar("M", Retriever, Lexical, Ranker, BottleneckLM, CondenserLM)
WORDS = ("prompts", "pair_template", "answers")
"""What a description says of the words around texts."""
MARKER = "weights.json"
"""Beside published weights, written last."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The numeric types of models by their names in a recipe."""


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """The record of published weights.

    Attributes:
        sha256: The one hash that stands for all files.
        files: File name to sha256.
    """

    sha256: str
    files: dict[str, str]


def weights_sha256(folder: Path) -> str:
    """Return the hash of published weights.

    Raises:
        ArtifactError: There are none.
    """
    marker = folder / MARKER
    if not marker.exists():
        raise ArtifactError(
            f"there are no published weights in {folder}",
            remedy="let the run finish the stage that makes them",
        )
    return read_record(marker, PublishedWeights, "the record of published weights").sha256


def frozen_retriever(section: RetrieverConfig, folder: Path, device: torch.device) -> Retriever:
    """Load published retriever weights for inference, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    verify_weights(folder)
    model = Retriever.load(
        str(folder),
        pooling=section.pooling,
        similarity=section.similarity,
        tied=section.tied,
        attention=section.attention,
    )
    return _frozen(model, section, device)


def frozen_lexical(section: LexicalConfig, folder: Path, device: torch.device) -> Lexical:
    """Load published weights of a lexical retriever for inference, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    verify_weights(folder)
    return _frozen(Lexical.load(str(folder), tied=section.tied, attention=section.attention), section, device)


def frozen_ranker(section: RankerConfig, folder: Path, device: torch.device) -> Ranker:
    """Load published ranker weights for inference, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    verify_weights(folder)
    model = Ranker.load(str(folder), head=section.head, answers=section.answers, attention=section.attention)
    return _frozen(model, section, device)


def frozen_bottleneck(section: BottleneckConfig, folder: Path, device: torch.device) -> BottleneckLM:
    """Load published weights of a bottleneck model, its decoder with them, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    verify_weights(folder)
    model = BottleneckLM.load(str(folder), num_decoder_layers=section.decoder_layers, attention=section.attention)
    return _frozen(model, section, device)


def frozen_condenser(section: CondenserConfig, folder: Path, device: torch.device) -> CondenserLM:
    """Load published weights of a Condenser, its head with them, in the training's numeric type.

    Raises:
        ArtifactError: The weights are missing or damaged.
    """
    verify_weights(folder)
    model = CondenserLM.load(
        str(folder),
        skip_from=section.skip_from,
        num_decoder_layers=section.decoder_layers,
        attention=section.attention,
    )
    return _frozen(model, section, device)


def _frozen(model: M, section: ModelConfig, device: torch.device) -> M:
    model.to(device=device, dtype=DTYPES[section.precision])
    model.eval()
    model.requires_grad_(False)
    # On a GPU a pass over the corpus wins by it; on a CPU the fused layers are faster.
    model.compiles = section.compile_layers and device.type == "cuda"
    return model


def weight_files(folder: Path) -> dict[str, str]:
    """Hash a folder's weights: file name to sha256."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def digest_of(files: dict[str, str], words: Mapping[str, Any] | None = None) -> str:
    """Return the one hash that stands for a folder's weights, and for what its texts are put into.

    Args:
        files: Of the weights, file name to sha256.
        words: What `words_of` a folder are; None or empty for none, which leave the hash of the weights alone.
    """
    told = f"words:{canonical_json(dict(words))}\n" if words else ""
    return hashlib.sha256(
        "".join([*(f"{name}:{digest}\n" for name, digest in files.items()), told]).encode()
    ).hexdigest()


def words_of(folder: Path) -> Mapping[str, Any]:
    """Return what a folder says of the words around its model's texts: with others, its results would be others.

    Raises:
        ArtifactError: The description is damaged.
    """
    saved = saved_metadata(folder)
    return {key: saved[key] for key in WORDS if saved.get(key)}


def verify_weights(folder: Path) -> None:
    """Refuse published weights that are not those that were recorded.

    Raises:
        ArtifactError: They are missing or damaged.
    """
    recorded, found = weights_sha256(folder), digest_of(weight_files(folder), words_of(folder))
    if recorded != found:
        raise ArtifactError(
            f"the weights in {folder} have sha256 {found}, with the prompts that they are used with",
            expected=f"{recorded}, which was recorded when they were published",
            remedy="the files were changed or damaged; restore them, or start in a new run folder",
        )

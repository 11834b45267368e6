"""The kinds of model: from a section of the configuration to a module, before any training."""

from __future__ import annotations

import functools
from collections.abc import Callable

from engine.config.models import (
    BottleneckConfig,
    CondenserConfig,
    LexicalConfig,
    ModelConfig,
    RankerConfig,
    RetrieverConfig,
)
from engine.errors import ConfigError
from engine.models.adapters import Adapted, add_adapters
from engine.models.bottleneck import BottleneckLM
from engine.models.compiled import compile_layers
from engine.models.condenser import CondenserLM
from engine.models.dual import SHARED, DualEncoder
from engine.models.lexical import Lexical
from engine.models.prompts import prompts_of
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.source import TRANSFORMER
from engine.models.yes_no import YES_NO

Model = DualEncoder | Ranker | BottleneckLM
"""A model of any kind."""


def load_untrained(section: ModelConfig, source: str, *, seed: int, name: str = "") -> Model:
    """Load a model as it is before any training, on the CPU.

    Args:
        section: Its kind and settings.
        source: Its weights: a hub id, a folder, or `package:NAME`.
        seed: Initialises what the weights lack and may lack, equally on every rank.
        name: Of the section, for remedies; left out, its kind's.

    Raises:
        ModelError: It cannot be found or loaded.
        ConfigError: There is no such kind.
    """
    model = _load(section, source, seed, name or section.kind)
    if isinstance(section, RetrieverConfig | RankerConfig) and section.lora is not None:
        add_adapters(parts_of(model), section.lora, name=section.name, seed=seed, section=name or section.kind)
    if section.compile_layers:
        compile_layers(model)
    return model


def parts_of(model: Model) -> list[Adapted]:
    """Return the models of transformers inside a retriever or a ranker, which may have adapters."""
    if isinstance(model, DualEncoder):
        return [
            Adapted(f"towers.{name}.", tower, "" if name == SHARED else name) for name, tower in model.towers.items()
        ]
    if not isinstance(model, Ranker):
        return []
    own = model.classifier is not model.backbone
    folder = TRANSFORMER if own and model.head != YES_NO else ""
    return [Adapted("classifier.backbone." if own else "classifier.", model.backbone, folder, has_own_head=not own)]


def _load(section: ModelConfig, source: str, seed: int, name: str) -> Model:
    if isinstance(section, RetrieverConfig):
        return Retriever.load(
            source,
            pooling=section.pooling,
            similarity=section.similarity,
            tied=section.tied,
            prompts=prompts_of(section, source),
            num_layers=section.kept_layers,
            dropout=section.dropout,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing is True,
            section=name,
        )
    if isinstance(section, RankerConfig):
        return Ranker.load(
            source,
            head=section.head,
            answers=section.answers,
            num_layers=section.kept_layers,
            dropout=section.dropout,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing is True,
            seed=seed,
            section=name,
        )
    if isinstance(section, LexicalConfig):
        return Lexical.load(
            source,
            tied=section.tied,
            prompts=prompts_of(section, source),
            num_layers=section.kept_layers,
            dropout=section.dropout,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing is True,
            section=name,
        )
    if isinstance(section, BottleneckConfig):
        load: Callable[..., BottleneckLM] = BottleneckLM.load
        if isinstance(section, CondenserConfig):
            load = functools.partial(CondenserLM.load, skip_from=section.skip_from)
        return load(
            source,
            num_decoder_layers=section.decoder_layers,
            num_layers=section.kept_layers,
            dropout=section.dropout,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing is True,
            section=name,
        )
    raise ConfigError(f"no model of the kind {section.kind!r} can be loaded", expected="a kind of `engine.models`")

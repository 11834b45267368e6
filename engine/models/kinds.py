"""The kinds of model: from a section of the configuration to a module, before any training."""

from __future__ import annotations

from engine.config.models import ModelConfig, RankerConfig, RetrieverConfig
from engine.errors import ConfigError
from engine.models.compiled import compile_layers
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever


def load_untrained(section: ModelConfig, source: str, *, seed: int) -> Retriever | Ranker:
    """Load a model as it is before any training, on the CPU.

    Args:
        section: Its kind and settings.
        source: Its weights: a hub id, a folder, or `package:NAME`.
        seed: Initialises what the weights lack and may lack, equally on every rank.

    Raises:
        ModelError: It cannot be found or loaded.
        ConfigError: There is no such kind.
    """
    model = _load(section, source, seed)
    if section.compile_layers:
        compile_layers(model)
    return model


def _load(section: ModelConfig, source: str, seed: int) -> Retriever | Ranker:
    if isinstance(section, RetrieverConfig):
        return Retriever.load(
            source,
            pooling=section.pooling,
            similarity=section.similarity,
            tied=section.tied,
            num_layers=section.num_layers,
            dropout=section.dropout,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing is True,
        )
    if isinstance(section, RankerConfig):
        return Ranker.load(
            source,
            num_layers=section.num_layers,
            dropout=section.dropout,
            attention=section.attention,
            gradient_checkpointing=section.gradient_checkpointing is True,
            seed=seed,
        )
    raise ConfigError(f"no model of the kind {section.kind!r} can be loaded", expected="a retriever or a ranker")

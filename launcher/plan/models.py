"""Shapes of the models: built on the meta device, so that counts are exact and no weight is read or held.

A shape comes from the model's transformers configuration (a folder, `package:NAME` or the hub), from the recipe's
`random_model`, or from words such as `bert-base` and `12x768`, where the configuration cannot be had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
)

from engine.config.models import (
    BottleneckConfig,
    EncoderConfig,
    Head,
    LexicalConfig,
    LoraConfig,
    ModelConfig,
    RankerConfig,
    RetrieverConfig,
)
from engine.config.recipe import Config
from engine.errors import ConfigError, ModelError
from engine.models.adapters import adapter_sizes, frozen_parameters
from engine.models.agreement import require_agreement
from engine.models.architecture import read_checkpoint, require_class, set_dropout
from engine.models.bottleneck import BottleneckLM
from engine.models.dual import DualEncoder
from engine.models.kinds import parts_of
from engine.models.layers import keep_layers
from engine.models.lexical import Lexical
from engine.models.projection import DenseLayer
from engine.models.ranker import Ranker
from engine.models.source import cached_source
from engine.models.start import read_retriever, transformers_of
from engine.training.parameter_groups import NO_DECAY
from launcher.plan.empty import empty_bottleneck, empty_model

NAMED_SHAPES = {
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
    "minilm-l6": (6, 384, 12),
    "minilm-l12": (12, 384, 12),
}
"""Layers, width, attention heads; the vocabulary is BERT's English one."""

_SIZES = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")
_HEAD_SIZE = 64
_TEXT_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory, work and traffic of a model follow from."""

    name: str
    """Where the shape comes from, for people."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: tuple[tuple[int, ...], ...]
    """Elements of each trained parameter, all towers together, in the optimizer's groups: decayed, and not decayed."""
    dimension: int
    """Numbers of a text's vector, for a retriever: of its embedding, or the words of a lexical one's vocabulary."""
    embedding: int
    """Elements of the largest parameter: the word embeddings."""
    towers: int
    """Backbones: 2 for a retriever with one for each side."""
    dropout: float
    """Of hidden states."""
    attention_dropout: float
    plain: bool
    """Whether the layers are BERT's, for which the formulas were checked."""
    longest: int | None
    """Tokens that its positions allow."""
    head_parameters: int = 0
    """Weights of the matrices above the layers that every token goes through: a lexical retriever's."""
    frozen: int = 0
    """Elements that are not trained: a backbone's with adapters."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each trained parameter."""
        return tuple(size for group in self.groups for size in group)

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(self.sizes)

    @property
    def weights(self) -> int:
        """All that a forward needs, trained or not."""
        return self.parameters + self.frozen

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer: four of attention, two of the feed-forward part."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.intermediate


def shapes_of(config: Config, given: Mapping[str, str] | None = None) -> dict[str, ModelShape]:
    """Find the shapes of all models of a recipe, by name.

    Args:
        config: The recipe.
        given: Words that take the place of a model's own configuration, by the model's name.

    Raises:
        ConfigError: The recipe has no such model, or words name no shape.
        ModelError: A model's configuration cannot be had.
    """
    given = given or {}
    strange = [name for name in given if name not in config.models]
    if strange:
        raise ConfigError(
            f"a shape is given for {', '.join(strange)}, but the models of the recipe are {', '.join(config.models)}",
            expected="one of these names, as in --shape NAME=bert-base",
        )
    return {name: shape_of(config, name, given.get(name)) for name in config.models}


def shape_of(config: Config, name: str, words: str | None = None) -> ModelShape:
    """Find the shape of a recipe's model.

    Args:
        config: The recipe; `num_layers`, `dropout`, `tied` of the model count.
        name: Of its section.
        words: Takes the place of the model's own configuration: a name in `NAMED_SHAPES`, or
            LAYERSxHIDDEN or LAYERSxHIDDENxHEADS.

    Raises:
        ConfigError: `words` names no shape.
        ModelError: The model's configuration cannot be had.
    """
    section = config.models[name]
    try:
        settings = named_settings(words) if words is not None else settings_of(config, name)
        dense = _read_dense(section, words)
    except ModelError as error:
        other = f"for a plan alone name its shape, such as --shape {name}=bert-base or 12x768"
        raise ModelError(error.fact, expected=error.expected, remedy=f"{error.remedy}; {other}") from error
    kept = section.kept_layers
    if kept is not None and words is not None:  # a shape that stands for the model may have fewer
        kept = min(kept if isinstance(kept, int) else len(kept), settings.num_hidden_layers)
    keep_layers(settings, kept, section.name)
    tied = not isinstance(section, EncoderConfig) or section.tied
    if section.dropout is not None:
        set_dropout(settings, section.dropout, section.name)
    decoder = section.decoder_layers if isinstance(section, BottleneckConfig) else 0
    head: Head = section.head if isinstance(section, RankerConfig) else "pooler"
    lora = section.lora if isinstance(section, RetrieverConfig | RankerConfig) else None
    if lora is not None and words is not None:  # layers of a shape that stands for the model have other names
        lora = LoraConfig(r=lora.r)
    return describe(
        settings,
        section.kind,
        name=words or section.name,
        tied=tied,
        dense=dense,
        decoder_layers=decoder,
        head=head,
        lora=lora,
        section=name,
    )


def encoder_of(config: Config) -> str:
    """Return the model that encodes the corpus: the one whose index is mined, else the first retriever.

    Raises:
        ConfigError: The recipe has no retriever.
    """
    mined = [mining.model for mining in config.timetable.minings if mining.model is not None]
    retrievers = [name for name, section in config.models.items() if isinstance(section, RetrieverConfig)]
    if not (mined or retrievers):
        raise ConfigError(
            f"none of the models {', '.join(config.models)} encodes the corpus", expected="a retriever among them"
        )
    return (mined or retrievers)[0]


def reranker_of(config: Config) -> str | None:
    """Return the model that re-orders what is found in evaluation; None without a ranker."""
    return next((name for name, section in config.models.items() if isinstance(section, RankerConfig)), None)


def all_of(number: int) -> str:
    """Return how a person speaks of all of so many models."""
    return "both" if number == 2 else "all"


def describe(
    settings: Any,
    kind: str,
    *,
    name: str,
    tied: bool = True,
    dense: Sequence[DenseLayer] = (),
    decoder_layers: int = 0,
    head: Head = "pooler",
    lora: LoraConfig | None = None,
    section: str = "",
) -> ModelShape:
    """Read the shape of a model off its transformers configuration.

    Args:
        settings: The configuration.
        kind: Of model that the engine makes of it: `retriever`, `lexical`, `ranker` or `bottleneck`.
        name: For people.
        tied: One tower for both sides of a retriever.
        dense: Layers above the pooling of each of its towers.
        decoder_layers: Of a bottleneck's decoder, which count as layers.
        head: Form of a ranker's.
        lora: Adapters that are trained in place of its backbone.
        section: The recipe's section, for remedies.
    """
    module = (
        empty_bottleneck(settings, decoder_layers)
        if decoder_layers
        else empty_model(settings, kind, tied=tied, dense=dense, head=head)
    )
    dropout = _number(settings, 0.0, "hidden_dropout_prob", "dropout")
    attention_dropout = _number(settings, dropout, "attention_probs_dropout_prob", "attention_dropout")
    groups, frozen = _groups(module), 0
    if lora is not None and not isinstance(module, BottleneckLM):
        groups, frozen = _with_adapters(module, lora, name, section)
    return ModelShape(
        name=name,
        layers=int(settings.num_hidden_layers) + decoder_layers,
        hidden=int(settings.hidden_size),
        intermediate=_intermediate(settings, module),
        heads=int(settings.num_attention_heads),
        groups=groups,
        frozen=frozen,
        dimension=module.dimension if isinstance(module, DualEncoder) else int(settings.hidden_size),
        embedding=max(parameter.numel() for parameter in module.parameters()),
        towers=1 if kind in (RankerConfig.kind, BottleneckConfig.kind) or tied else 2,
        dropout=dropout,
        attention_dropout=attention_dropout,
        plain=_is_plain(module),
        longest=module.longest_input,
        head_parameters=_head_parameters(module) if isinstance(module, Lexical) else 0,
    )


def named_settings(words: str) -> BertConfig:
    """Return the BERT configuration that words such as `bert-base` or `12x768` stand for.

    Raises:
        ConfigError: They name no shape.
    """
    if words in NAMED_SHAPES:
        layers, hidden, heads = NAMED_SHAPES[words]
    elif match := _SIZES.fullmatch(words):
        layers, hidden = int(match[1]), int(match[2])
        heads = int(match[3] or max(1, hidden // _HEAD_SIZE))
        if not (layers and hidden and heads) or hidden % heads:
            raise ConfigError(
                f"the shape {words!r} has {heads} attention heads for a width of {hidden}",
                expected="at least one of each, and a width that the heads divide",
                remedy="name the heads too, as in 6x384x12",
            )
    else:
        raise ConfigError(
            f"{words!r} is no shape of a model",
            expected=f"one of {', '.join(NAMED_SHAPES)}, or LAYERSxHIDDEN[xHEADS] such as 12x768x12",
        )
    return BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden
    )


def settings_of(config: Config, name: str) -> Any:
    """Return the transformers configuration of a recipe's model, or what stands for it.

    Args:
        config: The recipe.
        name: Of the model's section.

    Raises:
        ModelError: It cannot be had, or is of a model that no run takes.
    """
    section = config.models[name]
    if section.name == "random":
        shape = config.random_model
        return BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=4 * shape.hidden_size,
        )
    source = cached_source(section.name)
    if isinstance(source, Path):
        require_agreement(section, section.name, name)
        source = source / transformers_of(source)[-1].transformer  # a retriever's last tower is the documents'
    settings = read_checkpoint(source, section.name, section=name).config
    classes: dict[type[ModelConfig], Any] = {
        RankerConfig: AutoModelForSequenceClassification,
        LexicalConfig: AutoModelForMaskedLM,
        BottleneckConfig: AutoModelForMaskedLM,
    }
    if isinstance(section, RankerConfig) and section.head == "yes_no":
        classes[RankerConfig] = AutoModelForCausalLM
    auto_class = next((one for kind, one in classes.items() if isinstance(section, kind)), AutoModel)
    require_class(settings, auto_class, section.name, section=name, attention=section.attention)
    missing = [field for field in _TEXT_FIELDS if not isinstance(getattr(settings, field, None), int)]
    if missing:
        raise ModelError(
            f"the configuration of {section.name} does not say its {', '.join(missing)}",
            expected="what its size follows from",
            remedy=f"name another model by {name}.name",
        )
    return settings


def _read_dense(section: ModelConfig, words: str | None) -> tuple[DenseLayer, ...]:
    """Return the layers above a retriever's pooling, the documents' tower's for both."""
    if words is not None or section.name == "random" or not isinstance(section, RetrieverConfig):
        return ()
    return read_retriever(cached_source(section.name)).document.dense


def _head_parameters(module: Lexical) -> int:
    tower: Any = next(iter(module.towers.values()))
    below = set(tower.base_model.modules())
    matrices = (one for one in tower.modules() if isinstance(one, nn.Linear) and one not in below)
    return sum(one.weight.numel() for one in matrices)


def _groups(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Split parameters as the engine's optimizer does: matrices, then biases and LayerNorms."""
    decayed = [p.numel() for name, p in module.named_parameters() if not name.endswith(NO_DECAY)]
    plain = [p.numel() for name, p in module.named_parameters() if name.endswith(NO_DECAY)]
    return tuple(tuple(group) for group in (decayed, plain) if group)


def _with_adapters(
    module: DualEncoder | Ranker, lora: LoraConfig, name: str, section: str
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Split what is trained as `_groups` does, where adapters are; and count what is frozen."""
    parts = parts_of(module)
    frozen = {own for part in parts for own in frozen_parameters(part)}
    decayed = [size for part in parts for size in adapter_sizes(part, lora, name=name, section=section)]
    plain: list[int] = []
    for own, parameter in module.named_parameters():
        if own not in frozen:
            (plain if own.endswith(NO_DECAY) else decayed).append(parameter.numel())
    count = sum(parameter.numel() for own, parameter in module.named_parameters() if own in frozen)
    return tuple(tuple(group) for group in (decayed, plain) if group), count


def _intermediate(settings: Any, module: nn.Module) -> int:
    """Return the width of the feed-forward part: as the configuration says, or as the widest layer is."""
    stated = getattr(settings, "intermediate_size", None)
    if isinstance(stated, int):
        return stated
    layers = (one for parent in module.modules() if isinstance(parent, nn.ModuleList) for one in parent.modules())
    widths = [one.out_features for one in layers if isinstance(one, nn.Linear)]
    return max(widths, default=4 * int(settings.hidden_size))


def _number(settings: Any, default: float, *names: str) -> float:
    """Return the first of several settings that is a number."""
    values = (getattr(settings, name, None) for name in names)
    return next((float(value) for value in values if isinstance(value, int | float)), default)


def _is_plain(module: nn.Module) -> bool:
    """Tell whether the layers have BERT's parts: two dense layers and no gate in the feed-forward part."""
    return any(type(child).__name__.endswith("Intermediate") for child in module.modules())

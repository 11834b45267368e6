"""What stands around a model's texts: prompts, and the token that ends a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.config.models import LexicalConfig, ModelConfig, RankerConfig, RetrieverConfig
from engine.models.source import local_source
from engine.models.start import read_lexical, read_ranker, read_retriever

LAST = "last"
"""The pooling, and the form of a head, that a decoder has."""


def prompts_of(section: ModelConfig, source: str | Path) -> Mapping[str, str]:
    """Return what a retriever's texts begin with, by side, as the recipe or else its start says; a ranker's have none.

    Args:
        section: Of the model.
        source: Where its weights are: a hub id, a folder, or `package:NAME`.

    Raises:
        ModelError: As in `read_retriever`.
    """
    if isinstance(section, RetrieverConfig | LexicalConfig):
        read = read_lexical if isinstance(section, LexicalConfig) else read_retriever
        asked = {side: prompt for side, prompt in section.prompts.items() if prompt is not None}
        found = {**(read(local_source(str(source))).prompts or {}), **asked}
        return {side: prompt for side, prompt in found.items() if prompt}
    return {}


def ends_texts(section: ModelConfig, source: str | Path) -> bool:
    """Tell whether texts are to end with a special token: where the last token's state is newly taken for them.

    A start that pools by the last token already goes on with the tokens that it was trained with.

    Args:
        section: Of the model.
        source: As in `prompts_of`.

    Raises:
        ModelError: As in `read_retriever` and `read_ranker`.
    """
    if isinstance(section, RetrieverConfig):
        return section.pooling == LAST and not read_retriever(local_source(str(source))).query.pooling
    if isinstance(section, RankerConfig) and section.head == LAST:
        return read_ranker(local_source(str(source))).form is None
    return False

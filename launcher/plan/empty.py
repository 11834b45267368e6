"""Models without storage for their weights, built on the meta device as the engine builds its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from engine.config.models import Head, LexicalConfig, RankerConfig
from engine.models.bottleneck import BottleneckLM
from engine.models.dual import DOCUMENT, QUERY, SHARED, DualEncoder
from engine.models.failures import quiet_transformers
from engine.models.lexical import Lexical
from engine.models.pooled_score import PooledScore, empty_head
from engine.models.projection import Dense, DenseLayer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.yes_no import Answers, YesNoScore


def empty_model(
    settings: Any, kind: str, *, tied: bool = True, dense: Sequence[DenseLayer] = (), head: Head = "pooler"
) -> DualEncoder | Ranker:
    """Build a model without storage for its weights, as the engine builds it with.

    Args:
        settings: A transformers configuration.
        kind: Of model: `retriever`, `lexical` or `ranker`.
        tied: One tower for both sides of a retriever.
        dense: Layers above the pooling of each of its towers.
        head: Form of a ranker's.
    """
    with quiet_transformers(), torch.device("meta"):
        if kind == RankerConfig.kind:
            settings = copy.deepcopy(settings)
            settings.num_labels = 1
            if head == "yes_no":
                causal_lm: Any = AutoModelForCausalLM
                return Ranker(YesNoScore(causal_lm.from_config(settings), Answers(("yes", "no"), (0, 1))))
            if head != "pooler":
                return Ranker(PooledScore(_backbone(settings), head, empty_head(settings)))
            classifier: Any = AutoModelForSequenceClassification
            return Ranker(classifier.from_config(settings))
        names = (SHARED,) if tied else (QUERY, DOCUMENT)
        if kind == LexicalConfig.kind:
            masked_lm: Any = AutoModelForMaskedLM
            return Lexical({name: masked_lm.from_config(settings) for name in names})
        towers: dict[str, nn.Module] = {name: _backbone(settings) for name in names}
        projections = {name: nn.Sequential(*map(Dense, dense)) for name in names if dense}
        return Retriever(towers, pooling="cls", similarity="dot", projections=projections)


def empty_bottleneck(settings: Any, decoder_layers: int) -> BottleneckLM:
    """Build a bottleneck model without storage for its weights.

    Args:
        settings: A transformers configuration.
        decoder_layers: Of its decoder.
    """
    auto_class: Any = AutoModelForMaskedLM
    with quiet_transformers(), torch.device("meta"):
        return BottleneckLM.build(auto_class.from_config(settings), decoder_layers, name="the model", section="encoder")


def _backbone(settings: Any) -> nn.Module:
    auto_class: Any = AutoModel
    model = auto_class.from_config(settings)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # as the engine has it: its output is not used
    return model  # type: ignore[no-any-return]

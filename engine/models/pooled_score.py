"""A ranker's head on raw token states: one linear layer, without transformers' pooler below it.

AR2's equation and released code score a pair by a linear layer on the CLS state as the last layer gives it. The
classifiers of transformers are others: BERT's has a dense layer and a tanh between, whose fresh weights keep all scores
within a few hundredths of each other for the first steps. Weights of one form mean nothing in the other, so a folder
says which it holds, and the backbone lies in a folder of its own: no library takes it for a classifier of its own.

    transformer/   the backbone as transformers' AutoModel reads it, with the tokenizer
    head/          the linear layer as sentence-transformers' Dense reads it

Shapes: N pairs, H hidden size, L tokens of a padded batch, T of a packed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine.models.attention import KEYWORD, Layout
from engine.models.loading import save_backbone, under_prefix
from engine.models.packed import Pooling, pool_packed
from engine.models.projection import IDENTITY, SCORES, DenseLayer, load_projection, new_projection, save_projection
from engine.models.retriever import pool
from engine.models.source import HEAD, TRANSFORMER

_INITIAL_STD = 0.02
"""Of a fresh layer's weights where the backbone's configuration does not say its own (AR2's code, as BERT: 0.02)."""


class BackboneScore(nn.Module):
    """What scores pairs by a state of a backbone; it stands where a classifier of transformers may stand.

    Args:
        backbone: A transformers model.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def base_model(self) -> Any:
        """The model that gives states, as transformers' classifiers name theirs."""
        return self.backbone

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone's weights."""
        dtype: torch.dtype = self.backbone.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        device: torch.device = self.backbone.device
        return device

    def set_attn_implementation(self, kernel: str) -> None:
        """Let the backbone attend by another kernel."""
        self.backbone.set_attn_implementation(kernel)

    def pooled(self, inputs: Mapping[str, Any], pooling: Pooling) -> Tensor:
        """Return one state of each pair [N, H].

        Args:
            inputs: Pairs, padded or packed: what the backbone's forward takes.
            pooling: Which state.
        """
        states = self.base_model(**inputs)[0]
        layout: Layout | None = inputs.get(KEYWORD)
        if layout is None:
            return pool(states, inputs["attention_mask"], pooling)
        return pool_packed(states[0], layout.batch, pooling)


class PooledScore(BackboneScore):
    """A backbone and a linear layer on one state of each pair.

    Args:
        backbone: A transformers model without a pooler that is trained.
        pooling: Which state: the first or the last token's, or the mean over the tokens.
        head: The layer, as `load_projection` or `new_projection` gives it; it computes in float32.
    """

    def __init__(self, backbone: Any, pooling: Pooling, head: nn.Sequential) -> None:
        super().__init__(backbone)
        self.head = head
        self.pooling = pooling

    @property
    def form(self) -> Pooling:
        """The head's, as `ranker.head` calls it."""
        return self.pooling

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Score pairs, padded or packed; takes what the backbone's forward takes.

        Returns:
            `logits` [N, 1] in float32 or a wider type, in the order of the pairs.

        Source: AR2 Eq. 4, w . E([q, d]), with a bias as its released code has it.
        """
        return SimpleNamespace(logits=self.head(self.pooled(inputs, self.pooling)))


def empty_head(config: Any) -> nn.Sequential:
    """Make the layer for a backbone, with whatever weights torch gives it."""
    return new_projection([DenseLayer(HEAD, int(config.hidden_size), 1, True, IDENTITY, SCORES)])


def fresh_head(config: Any, seed: int) -> nn.Sequential:
    """Make an untrained layer, the same on every rank; the caller guards the global random state.

    Args:
        config: Of the backbone.
        seed: Of the weights; the bias begins at 0.
    """
    head = empty_head(config)
    torch.manual_seed(seed)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=float(getattr(config, "initializer_range", None) or _INITIAL_STD))
    return head


def trained_head(folder: Path, layer: DenseLayer, config: Any) -> nn.Sequential:
    """Load a trained layer.

    Args:
        folder: The model's.
        layer: What the folder says of it.
        config: Of the backbone.

    Raises:
        ModelError: Its weights are missing, damaged, or of another width than the backbone's states.
    """
    return load_projection(folder, [layer], int(config.hidden_size))


def save_pooled(model: PooledScore, folder: Path, tokenizer: Any, weights: Mapping[str, Tensor]) -> None:
    """Write backbone, tokenizer and layer, each where its library reads it.

    Args:
        model: Gives configurations and names; its own weights may be partitioned.
        folder: The ranker's.
        tokenizer: Saved with the backbone.
        weights: Full weights by the model's names.

    Raises:
        ModelError: A weight is missing.
    """
    save_backbone(model.backbone, folder / TRANSFORMER, tokenizer, under_prefix(weights, "backbone."))
    save_projection(model.head, folder, under_prefix(weights, "head."), [HEAD])

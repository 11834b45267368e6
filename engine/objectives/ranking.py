"""The ranker among a query's negatives: its warm-up, and its phase of the game.

Shapes: as in `engine.objectives`.

Source: AR2 Eq. 7, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine import losses
from engine.data.batches import Group, InputBuilder, Samples
from engine.metrics import Metric
from engine.objectives import Inputs, Means, inputs_of, spread
from engine.training.backend import TrainedModel

PriorOfGroups = Callable[[Sequence[Group]], Tensor]
"""From groups to what is added to a ranker's scores of their documents [B, N]."""


class ListwiseRanking:
    """The ranker: the positive among its query's negatives (Eq. 7).

    Args:
        samples: Queries, positives and negatives.
        builder: Makes the ranker's inputs.
        score_scale: The tau of Eq. 6.
        prior: What is added to the scores of groups [B, N]; None for nothing.
    """

    def __init__(
        self, samples: Samples, builder: InputBuilder, *, score_scale: float, prior: PriorOfGroups | None = None
    ) -> None:
        self.samples, self._builder, self._score_scale, self._prior = samples, builder, score_scale, prior
        self.token_counts = (builder.tokens_of_pairs,)

    def prepare(self, step: int) -> list[Inputs]:
        """Make the pairs of each micro-batch."""
        groups = self.samples.groups(step)
        return [
            inputs_of(micro, pairs=self._builder.pairs(micro.groups))
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]

    def backward(self, model: TrainedModel, batch: Sequence[Inputs]) -> dict[str, Metric]:
        """Accumulate the gradient of each micro-batch."""
        means = Means()
        for inputs in batch:
            torch.manual_seed(inputs.micro.seed)
            scores_BN = model(pairs=inputs.of["pairs"]).view(len(inputs.micro.groups), -1)
            if self._prior is not None:
                scores_BN = scores_BN + self._prior(inputs.micro.groups)
            loss, measured = self.loss(scores_BN)
            model.backward(loss, last=inputs.micro.last, share=inputs.micro.share)
            hits = (scores_BN.detach().argmax(1) == 0).float().mean()
            measured |= {"loss": loss.detach(), "accuracy": hits, "score_spread": spread(scores_BN)}
            means.add(inputs, measured)
        return means.metrics()

    def loss(self, scores_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the scores of some queries' documents, and what else is measured of it."""
        return losses.ranker_cross_entropy(scores_BN, score_scale=self._score_scale), {}

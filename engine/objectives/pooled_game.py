"""AR2's game with the contrast of the warm-up beside it, over the documents of the whole batch.

Eq. 9 and 12 look at a query's own documents, which its retriever found: they say how these stand to each other, and
nothing of how far they stay above all others. The contrast of Eq. 2 over the batch, which made G0, keeps that.

Shapes: as in `engine.objectives`.

Source: ours, as a weighed sum. AR2 trains G0 by the contrast and then leaves it out; SimLM (Wang et al. 2022) has such
a sum of a teacher's distillation and the contrast with weight 0.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.metrics import Metric
from engine.models.template import Batch, count_tokens
from engine.objectives import PooledBatch, own_scores, pooled_backward, spread
from engine.objectives.contrast import InBatchContrast
from engine.objectives.game import AdversarialGame
from engine.training.backend import TrainedModel


@dataclass(frozen=True, slots=True)
class PooledGame:
    """A rank's share of a step whose documents are all negatives of each other's queries, with the ranker's inputs.

    Attributes:
        pool: The retriever's inputs.
        pairs: The ranker's, chunk by chunk of the pool.
    """

    pool: PooledBatch
    pairs: Sequence[Batch]


class AdversarialGameInBatch(AdversarialGame):
    """As `AdversarialGame`, with Eq. 2 over the documents of the batch beside Eq. 9 and 12.

    The ranker scores a query's own documents; all other documents of the batch are negatives of the contrast alone. A
    share that does not fit into memory at once is taken by gradient caching.
    """

    @property
    def _contrast(self) -> InBatchContrast:  # of the samples as they are cut by now
        return InBatchContrast(
            self.samples, self._retriever_builder, score_scale=self._score_scales[0], token_counts=self.token_counts
        )

    def prepare(self, step: int) -> PooledGame:  # type: ignore[override]
        """Make a rank's inputs of both models, and mark what of the pool is no negative."""
        pool = self._contrast.prepare(step)
        return PooledGame(pool, [self._ranker_builder.pairs(chunk.micro.groups) for chunk in pool.chunks])

    def backward(self, model: TrainedModel, batch: PooledGame) -> dict[str, Metric]:  # type: ignore[override]
        """Let the ranker score each chunk, and differentiate all losses over the whole pool."""
        chunks = batch.pool.chunks
        with torch.no_grad():
            ranker_scores_BN = torch.cat(
                [
                    self.ranker_scores(chunk.micro.groups, pairs)
                    for chunk, pairs in zip(chunks, batch.pairs, strict=True)
                ]
            )
        return pooled_backward(
            model,
            batch.pool,
            lambda queries_BD, documents_ND: self._pooled_loss(batch.pool, queries_BD, documents_ND, ranker_scores_BN),
            further_tokens=count_tokens(*batch.pairs),
        )

    def _pooled_loss(
        self, pool: PooledBatch, queries_BD: Tensor, documents_ND: Tensor, ranker_scores_BN: Tensor
    ) -> tuple[Tensor, dict[str, Metric]]:
        retriever_scores_BN = own_scores(queries_BD, documents_ND)
        game, measured = self.loss(retriever_scores_BN, ranker_scores_BN)
        contrast, _ = self._contrast.loss(pool, queries_BD, documents_ND)
        loss = game + self._game.contrastive_weight * contrast
        measured |= {
            "loss": loss.detach(),
            "contrastive": contrast.detach(),
            "score_spread": spread(retriever_scores_BN),
        }
        return loss, {name: Metric(value) for name, value in measured.items()}

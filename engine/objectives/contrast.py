"""The contrast over a batch: every query is told its own document among those of all (Eq. 2), as in a warm-up.

Shapes: as in `engine.objectives`.

Source: AR2 Eq. 2; Karpukhin et al. 2020 (in-batch negatives).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from engine import losses
from engine.data.batches import G, Group, GroupTokens, InputBuilder, Samples, StepSamples
from engine.metrics import Metric
from engine.models.template import Batch
from engine.objectives import PooledBatch, gather_documents, inputs_of, no_negatives, pooled_backward, spread
from engine.training.backend import TrainedModel


class PoolContrast(Generic[G]):
    """A contrast over a batch: a sample's query is told its own document among the documents of all samples (Eq. 2).

    What a sample is, a class of contrast says by `inputs` and `excluded`.

    Args:
        samples: Of which each has a query, and a document that is its positive, before its hard negatives.
        token_counts: Count the tokens that a model takes of a sample.
        score_scale: The tau of Eq. 2.
    """

    def __init__(self, samples: StepSamples[G], token_counts: tuple[GroupTokens, ...], *, score_scale: float) -> None:
        self.samples, self.token_counts, self._score_scale = samples, token_counts, score_scale

    def inputs(self, groups: Sequence[G]) -> dict[str, Batch]:
        """Make a retriever's inputs of samples: `queries` and `documents`."""
        raise NotImplementedError

    def excluded(self, own: Sequence[G], pool: Sequence[G]) -> Tensor:
        """Mark what of a pool is no negative of each query, whose positive may be marked as well: bool [B, P]."""
        raise NotImplementedError

    def prepare(self, step: int) -> PooledBatch:
        """Make a rank's inputs, and mark what of the pool is no negative."""
        groups, phase = self.samples.groups(step), self.samples.visit.phase
        own = self.samples.share(groups)
        shared = phase.pool == "world"
        first = self.samples.rank * len(own) if shared else 0
        targets_B = (torch.arange(len(own)) + first) * (1 + phase.num_negatives)
        excluded_BP = self.excluded(own, groups if shared else own)
        chunks = [
            inputs_of(micro, **self.inputs(micro.groups))
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]
        return PooledBatch(chunks, targets_B, excluded_BP.scatter(1, targets_B[:, None], False), step)

    def backward(self, model: TrainedModel, batch: PooledBatch) -> dict[str, Metric]:
        """Differentiate the loss over the whole pool, chunk by chunk where there is more than one."""
        return pooled_backward(
            model, batch, lambda queries_BD, documents_ND: self.loss(batch, queries_BD, documents_ND)
        )

    def loss(self, batch: PooledBatch, queries_BD: Tensor, documents_ND: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of a rank's representations, and what is measured of it."""
        pool_PD = gather_documents(documents_ND) if self.samples.visit.phase.pool == "world" else documents_ND
        scores_BP = queries_BD @ pool_PD.T
        loss, measured = contrast_of(scores_BP, batch.targets_B, batch.excluded_BP, score_scale=self._score_scale)
        return loss, {"loss": Metric(loss.detach()), **measured}


class InBatchContrast(PoolContrast[Group]):
    """The retriever's warm-up: every document of the batch that is not a query's positive is its negative (Eq. 2).

    Args:
        samples: Queries, positives and hard negatives.
        builder: Makes the retriever's inputs.
        score_scale: The tau of Eq. 2.
        token_counts: Count all tokens of a group, where other models take it, too; None for the retriever's alone.
    """

    samples: Samples

    def __init__(
        self,
        samples: Samples,
        builder: InputBuilder,
        *,
        score_scale: float,
        token_counts: tuple[GroupTokens, ...] | None = None,
    ) -> None:
        super().__init__(samples, token_counts or (builder.tokens_of_texts,), score_scale=score_scale)
        self._builder = builder

    def inputs(self, groups: Sequence[Group]) -> dict[str, Batch]:
        """Join the queries of groups, and their documents."""
        return {"queries": self._builder.queries(groups), "documents": self._builder.documents(groups)}

    def excluded(self, own: Sequence[Group], pool: Sequence[Group]) -> Tensor:
        """Mark positives and known false negatives."""
        return no_negatives(self.samples.data, own, pool)


def contrast_of(
    scores_BP: Tensor, targets_B: Tensor, excluded_BP: Tensor, *, score_scale: float
) -> tuple[Tensor, dict[str, Metric]]:
    """Return the loss of Eq. 2 over a pool, and what is measured of its scores.

    Args:
        scores_BP: Of each query with each document of the pool.
        targets_B: Column of each query's positive, int64.
        excluded_BP: What is no negative of a query, bool.
        score_scale: The tau of Eq. 2.
    """
    loss = losses.contrastive(scores_BP, targets_B, score_scale=score_scale, excluded_BN=excluded_BP)
    best_B = scores_BP.detach().masked_fill(excluded_BP, -torch.inf).argmax(1)
    accuracy = (best_B == targets_B).float().mean()
    return loss, {"accuracy": Metric(accuracy), "score_spread": Metric(spread(scores_BP))}

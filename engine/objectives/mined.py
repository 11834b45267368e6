"""The contrast of a query's positive with its own mined negatives alone, as ANCE trains a retriever.

With in-batch negatives beside them it is `InBatchContrast`, which takes a phase's negatives too.

Shapes: as in `engine.objectives`.

Source: AR2 Eq. 2; Xiong et al. 2021, "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text
Retrieval" (ANCE, arXiv 2007.00808).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine import losses
from engine.data.batches import InputBuilder, Samples
from engine.metrics import Metric
from engine.objectives import Inputs, Means, inputs_of, own_scores, spread
from engine.training.backend import TrainedModel


class MinedContrast:
    """A retriever that tells a query's positive from its own n negatives (Eq. 2 as printed).

    Args:
        samples: Queries, positives and negatives.
        builder: Makes the retriever's inputs.
        score_scale: The tau of Eq. 2.
    """

    def __init__(self, samples: Samples, builder: InputBuilder, *, score_scale: float) -> None:
        self.samples, self._builder, self._score_scale = samples, builder, score_scale
        self.token_counts = (builder.tokens_of_texts,)

    def prepare(self, step: int) -> list[Inputs]:
        """Make the inputs of each micro-batch."""
        groups = self.samples.groups(step)
        return [
            inputs_of(
                micro, queries=self._builder.queries(micro.groups), documents=self._builder.documents(micro.groups)
            )
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]

    def backward(self, model: TrainedModel, batch: Sequence[Inputs]) -> dict[str, Metric]:
        """Accumulate the gradient of each micro-batch."""
        means = Means()
        for inputs in batch:
            torch.manual_seed(inputs.micro.seed)
            scores_BN = own_scores(*model(queries=inputs.of["queries"], documents=inputs.of["documents"]))
            targets_B = torch.zeros(len(scores_BN), dtype=torch.int64, device=scores_BN.device)
            loss = losses.contrastive(scores_BN, targets_B, score_scale=self._score_scale)
            model.backward(loss, last=inputs.micro.last, share=inputs.micro.share)
            measured = {
                "loss": loss.detach(),
                "entropy": losses.entropy(scores_BN, score_scale=self._score_scale),
                "accuracy": (scores_BN.detach().argmax(1) == 0).float().mean(),
                "score_spread": spread(scores_BN),
            }
            means.add(inputs, measured)
        return means.metrics()

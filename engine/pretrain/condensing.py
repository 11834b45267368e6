"""What one step of coCondenser computes: masked tokens twice, and each span's partner in the whole batch.

Shapes: N spans of this rank, two a document; P spans of all ranks; M masked tokens; V vocabulary; D state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import losses
from engine.data.batches import MicroBatch
from engine.metrics import Metric
from engine.models.condenser import Predictions
from engine.objectives import gather_documents
from engine.objectives.contrast import contrast_of
from engine.pretrain.documents import Reading, ReadingSamples
from engine.pretrain.reconstruction import masked_per_rank
from engine.pretrain.spans import MaskedSpans, SpanBuilder
from engine.training.backend import TrainedModel
from engine.training.gradient_cache import LossBeside, contrastive_backward

SIDES = ("late", "head")
"""Who predicts masked tokens: the encoder's last layer, and the head."""


@dataclass(frozen=True, slots=True)
class SpanShare:
    """A rank's share of a step.

    Attributes:
        pieces: The micro-batches, each with the spans of its documents.
        num_masked: Masked tokens of the share, float32 scalar.
        targets_N: Column of each span's partner among the spans of all ranks, int64 [N].
        excluded_NP: Spans that are no negatives of a span: of the same document, itself among them, bool [N, P].
    """

    pieces: list[tuple[MicroBatch[Reading], MaskedSpans]]
    num_masked: Tensor
    targets_N: Tensor
    excluded_NP: Tensor


class SpanContrast:
    """coCondenser's loss: the contrast of spans, and both predictions of masked tokens, with equal weights.

    Both are means over the whole batch, of spans and of masked tokens, so the loss is the same for any number of ranks
    and any cut into micro-batches.

    Args:
        samples: Documents.
        builder: Makes masked spans of them.
        score_scale: By which the spans' scores are multiplied.

    Source: Gao and Callan 2022 (arXiv 2108.05540), section 3.2 and 3.3, with the late masked-LM loss of their code.
    """

    def __init__(self, samples: ReadingSamples, builder: SpanBuilder, *, score_scale: float) -> None:
        self.samples, self._builder, self._score_scale = samples, builder, score_scale
        self.token_counts = (builder.num_tokens,)

    def prepare(self, step: int) -> SpanShare:
        """Draw the spans of this rank's share of a step."""
        readings, samples = self.samples.groups(step), self.samples
        own = samples.share(readings)
        pieces = [
            (micro, self._builder(micro.groups, samples.visit.phase.name))
            for micro in samples.micro_batches(readings, step, self.token_counts)
        ]
        count = sum(len(spans.inputs.labels_M) for _, spans in pieces)
        targets_N, excluded_NP = partners(own, readings, 2 * samples.rank * len(own))
        return SpanShare(pieces, torch.tensor(float(count)), targets_N, excluded_NP)

    def backward(self, model: TrainedModel, batch: SpanShare) -> dict[str, Metric]:
        """Differentiate the loss, chunk by chunk where there is more than one. A collective, as in edmlm's."""
        count = masked_per_rank(batch.num_masked)
        sums: dict[str, Tensor] = {}

        def predicted(number: int, predictions: Predictions) -> Tensor:
            labels_M = batch.pieces[number][1].inputs.labels_M
            parts = [losses.masked_language_model(logits_MV, labels_M, num_masked=count) for logits_MV in predictions]
            for side, logits_MV, part in zip(SIDES, predictions, parts, strict=True):
                hits = (logits_MV.detach().argmax(1) == labels_M).sum() / count
                for name, value in ((f"{side}_loss", part.detach()), (f"{side}_accuracy", hits)):
                    sums[name] = sums.get(name, value.new_zeros((), dtype=torch.float64)) + value.double()
            return parts[0] + parts[1]

        metrics = contrastive_backward(
            model,
            [{"spans": spans.inputs} for _, spans in batch.pieces],
            lambda vectors_ND: self.contrast(batch, vectors_ND),
            [micro.seed for micro, _ in batch.pieces],
            LossBeside(predicted, {"predicts": False}),
        )
        whole = metrics["contrastive"].value + sum(sums[f"{side}_loss"] for side in SIDES)
        tokens = float(sum(spans.num_tokens for _, spans in batch.pieces))
        measured = {"loss": whole, **sums}
        return metrics | {name: Metric(value) for name, value in measured.items()} | {"tokens": Metric(tokens, "sum")}

    def contrast(self, batch: SpanShare, vectors_ND: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """Return the contrast of a rank's spans with those of all ranks, and what is measured of it."""
        scores_NP = vectors_ND @ gather_documents(vectors_ND).T
        loss, measured = contrast_of(scores_NP, batch.targets_N, batch.excluded_NP, score_scale=self._score_scale)
        return loss, {"contrastive": Metric(loss.detach()), **measured}


def partners(own: Sequence[Reading], pool: Sequence[Reading], first: int) -> tuple[Tensor, Tensor]:
    """Find each span's partner in a pool, and what is no negative of it.

    Args:
        own: Documents of this rank, each with two spans.
        pool: Documents of all.
        first: Where this rank's spans begin in the pool.

    Returns:
        Columns of the partners, int64 [N], and what is excluded, bool [N, P]: all spans of the same document but the
        partner, the span itself among them.
    """
    targets_N = first + (torch.arange(2 * len(own)) ^ 1)
    own_N, pool_P = (np.repeat([one.document for one in readings], 2) for readings in (own, pool))
    excluded_NP = torch.from_numpy(own_N[:, None] == pool_P[None, :])
    return targets_N, excluded_NP.scatter(1, targets_N[:, None], False)

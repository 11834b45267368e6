"""What one step of bottleneck pre-training computes: the loss of the encoder's masked tokens and of the decoder's.

Shapes: M masked tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine import losses
from engine.data.batches import MicroBatch
from engine.metrics import Metric
from engine.pretrain.documents import DocumentSamples, MaskedInputBuilder, MaskedPair
from engine.training.backend import TrainedModel

SIDES = ("encoder", "decoder")
"""Who predicts masked tokens; their losses are added, with equal weights."""


@dataclass(frozen=True, slots=True)
class MaskedShare:
    """A rank's share of a step.

    Attributes:
        pieces: The micro-batches, each with what is read of its documents.
        num_masked: Masked tokens of the share, the encoder's and the decoder's, float32 [2].
    """

    pieces: list[tuple[MicroBatch[int], MaskedPair]]
    num_masked: Tensor


class BottleneckReconstruction:
    """Encoder and decoder predict what is masked; a step's loss is the mean over all its masked tokens, for each.

    So a token counts alike whatever document, micro-batch or rank it is in, and the loss is the same for any number of
    ranks and any cut. (SimLM's code takes a mean over each device's batch, and the mean of these.)

    Args:
        samples: Documents.
        builder: Makes masked inputs of them.

    Source: SimLM section 3.1: the encoder's loss plus the decoder's.
    """

    def __init__(self, samples: DocumentSamples, builder: MaskedInputBuilder) -> None:
        self.samples, self._builder = samples, builder
        self.token_counts = (builder.num_tokens,)

    def prepare(self, step: int) -> MaskedShare:
        """Mask the documents of this rank's share of a step."""
        documents, name = self.samples.groups(step), self.samples.visit.phase.name
        pieces = [
            (micro, self._builder(micro.groups, name, step))
            for micro in self.samples.micro_batches(documents, step, self.token_counts)
        ]
        counts = [[len(pair.encoder.labels_M), len(pair.decoder.labels_M)] for _, pair in pieces]
        return MaskedShare(pieces, torch.tensor(counts, dtype=torch.float32).sum(0))

    def backward(self, model: TrainedModel, batch: MaskedShare) -> dict[str, Metric]:
        """Accumulate the gradient of each micro-batch. A collective: the ranks count their masked tokens together."""
        per_rank = masked_per_rank(batch.num_masked)
        sums: dict[str, Tensor] = {}
        for micro, pair in batch.pieces:
            torch.manual_seed(micro.seed)
            logits = model(encoder=pair.encoder, decoder=pair.decoder)
            labels = pair.encoder.labels_M, pair.decoder.labels_M
            parts = [
                losses.masked_language_model(logits_MV, labels_M, num_masked=count)
                for logits_MV, labels_M, count in zip(logits, labels, per_rank, strict=True)
            ]
            model.backward(parts[0] + parts[1], last=micro.last)
            measured = {
                "loss": parts[0] + parts[1],
                **dict(zip((f"{side}_loss" for side in SIDES), parts, strict=True)),
            }
            for side, logits_MV, labels_M, count in zip(SIDES, logits, labels, per_rank, strict=True):
                measured[f"{side}_accuracy"] = (logits_MV.detach().argmax(1) == labels_M).sum() / count
            for name, value in measured.items():
                sums[name] = sums.get(name, value.new_zeros((), dtype=torch.float64)) + value.detach().double()
        tokens = float(sum(pair.num_tokens for _, pair in batch.pieces))
        return {name: Metric(value) for name, value in sums.items()} | {"tokens": Metric(tokens, "sum")}


def masked_per_rank(num_masked: Tensor) -> Tensor:
    """Return a rank's part of all ranks' masked tokens, by which their losses' mean is the mean over all tokens.

    Args:
        num_masked: Of this rank, float32, of any shape.

    Returns:
        As many, for this rank's sums to be divided by; where nothing is masked, so that 0 is divided by no 0.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return num_masked.clamp(min=1)
    whole = num_masked.clone()
    dist.all_reduce(whole)
    return whole.clamp(min=1) / dist.get_world_size()

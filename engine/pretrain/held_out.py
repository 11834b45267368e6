"""What encoder and decoder lose on documents that no step has taken, masked alike at every measurement.

Shapes: M masked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import losses
from engine.config.models import BottleneckConfig
from engine.config.timetable import WeightsOf
from engine.data.batches import cut_by_tokens
from engine.data.corpus import Data
from engine.models.bottleneck import BottleneckLM
from engine.models.weights import frozen_bottleneck
from engine.pretrain.documents import MaskedInputBuilder, MaskedPair, Split
from engine.pretrain.masking import MaskRates
from engine.pretrain.measurements import STREAM, HeldOut, record_held_out
from engine.reliability.progress import progress_bar
from engine.run import Stage
from shards.partition import split_range


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLosses(HeldOut):
    """Means over the masked tokens of the documents held out; None where nothing of them is masked.

    Attributes:
        encoder_loss: Cross-entropy of the encoder's masked tokens, in nats.
        decoder_loss: Of the decoder's.
        encoder_accuracy: Share of the encoder's masked tokens that it predicts.
        decoder_accuracy: Of the decoder's.
    """

    encoder_loss: float | None
    decoder_loss: float | None
    encoder_accuracy: float | None
    decoder_accuracy: float | None


def measure_held_out(stage: Stage, data: Data, split: Split, rates: MaskRates, *, weights: WeightsOf) -> HeldOutLosses:
    """Measure published weights on the documents held out, on all ranks, and record what comes out.

    Args:
        stage: Where this runs.
        data: The corpus.
        split: Which documents.
        rates: As in training.
        weights: Of the bottleneck model.
    """
    run, coordinator = stage.run, stage.run.coordinator
    section, text = run.config.model(weights.model, BottleneckConfig), data.texts[weights.model]
    own_range = split_range(len(split.held_out), coordinator.rank, coordinator.world_size)
    with coordinator.agreement(f"{stage.name}: measure"):
        model = frozen_bottleneck(section, run.folder.weights(weights.model, weights.state), run.device)
        builder = MaskedInputBuilder.of(
            data, weights.model, model.collator(text.template), rates, max_length=section.max_length, seed=stage.seed
        )
        documents = split.held_out[own_range.start : own_range.stop].tolist()
        sums = torch.zeros(2, 3, dtype=torch.float64)
        with progress_bar(stage.name, len(documents), "document", shown=run.is_main) as bar:
            for piece in _pieces(documents, builder, run.config.evaluation.tokens_per_batch):
                sums += _sums(model, builder(piece, STREAM, 0), run.device)
                bar.update(len(piece))
    of_ranks: list[list[list[float]]] = coordinator.gather(f"{stage.name}: sums", sums.tolist())
    found = _means(torch.tensor(of_ranks, dtype=torch.float64).sum(0), len(split.held_out), weights.iteration or 0)
    record_held_out(stage, found)
    return found


def _pieces(documents: Sequence[int], builder: MaskedInputBuilder, budget: int) -> Iterator[Sequence[int]]:
    """Cut documents into batches of so many tokens."""
    if documents:
        for piece in cut_by_tokens([builder.num_tokens(one) for one in documents], budget):
            yield documents[piece.start : piece.stop]


@torch.inference_mode()
def _sums(model: BottleneckLM, pair: MaskedPair, device: torch.device) -> Tensor:
    """Return summed losses, hits and masked tokens of a batch, for encoder and decoder: float64 [2, 3]."""
    read = pair.encoder.to(device), pair.decoder.to(device)
    sides = []
    for logits_MV, inputs in zip(model(*read), read, strict=True):
        loss = losses.masked_language_model(logits_MV, inputs.labels_M, num_masked=1)
        hits = (logits_MV.argmax(1) == inputs.labels_M).sum()
        sides.append([float(loss), float(hits), float(len(inputs.labels_M))])
    return torch.tensor(sides, dtype=torch.float64)


def _means(sums: Tensor, documents: int, iteration: int) -> HeldOutLosses:
    (encoder, decoder) = (
        [loss / count, hits / count] if count else [None, None] for loss, hits, count in sums.tolist()
    )
    return HeldOutLosses(
        encoder_loss=encoder[0],
        decoder_loss=decoder[0],
        encoder_accuracy=encoder[1],
        decoder_accuracy=decoder[1],
        documents=documents,
        iteration=iteration,
    )

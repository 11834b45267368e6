"""What a Condenser loses on documents that no step has taken, by spans and masks that are the same every time.

Each span's partner is looked for among the spans of all documents held out, as in a step of so large a batch.

Shapes: N spans of this rank, P spans of all; M masked tokens, V vocabulary, D state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import losses
from engine.config.models import CondenserConfig
from engine.config.timetable import WeightsOf
from engine.data.batches import cut_by_tokens
from engine.data.corpus import Data
from engine.models.condenser import CondenserLM
from engine.models.weights import frozen_condenser
from engine.pretrain.condensing import partners
from engine.pretrain.documents import Reading, Split
from engine.pretrain.measurements import STREAM, HeldOut, record_held_out
from engine.pretrain.spans import SpanBuilder, SpanRates
from engine.run import Stage
from shards.partition import split_range


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutCondensed(HeldOut):
    """Means over the documents held out; None where there are none, or nothing of them is masked.

    Attributes:
        contrastive_loss: Of the contrast of spans among all of them, in nats.
        accuracy: Share of the spans whose partner comes first.
        late_loss: Cross-entropy of masked tokens as the encoder predicts them, in nats.
        head_loss: As the head does.
        late_accuracy: Share of the masked tokens that the encoder predicts.
        head_accuracy: That the head does.
    """

    contrastive_loss: float | None
    accuracy: float | None
    late_loss: float | None
    head_loss: float | None
    late_accuracy: float | None
    head_accuracy: float | None


def measure_condensed(
    stage: Stage, data: Data, split: Split, rates: SpanRates, *, weights: WeightsOf
) -> HeldOutCondensed:
    """Measure published weights on the documents held out, on all ranks, and record what comes out.

    Args:
        stage: Where this runs.
        data: The corpus.
        split: Which documents.
        rates: As in training.
        weights: Of the Condenser.
    """
    run, coordinator = stage.run, stage.run.coordinator
    section, text = run.config.model(weights.model, CondenserConfig), data.texts[weights.model]
    readings = [Reading(one, 0) for one in split.held_out.tolist()]
    own = split_range(len(readings), coordinator.rank, coordinator.world_size)
    with coordinator.agreement(f"{stage.name}: measure"):
        model = frozen_condenser(section, run.folder.weights(weights.model, weights.state), run.device)
        lengths = section.max_length, section.stored_length
        builder = SpanBuilder.of(
            data, weights.model, model.collator(text.template), rates, lengths=lengths, seed=stage.seed
        )
        sums = torch.zeros(7, dtype=torch.float64)
        budget = run.config.evaluation.tokens_per_batch
        if own:
            firsts_PD = _firsts(model, builder, readings, budget, run.device)
            sums[:2] = _contrast(firsts_PD, readings, own, section.score_scale)
            for piece in _pieces(readings[own.start : own.stop], builder, budget):
                sums[2:] += _predicted(model, builder, piece, run.device)
    of_ranks: list[list[float]] = coordinator.gather(f"{stage.name}: sums", sums.tolist())
    whole = torch.tensor(of_ranks, dtype=torch.float64).sum(0).tolist()
    spans, masked = 2 * len(readings), whole[6]
    found = HeldOutCondensed(
        contrastive_loss=whole[0] / spans if spans else None,
        accuracy=whole[1] / spans if spans else None,
        late_loss=whole[2] / masked if masked else None,
        head_loss=whole[3] / masked if masked else None,
        late_accuracy=whole[4] / masked if masked else None,
        head_accuracy=whole[5] / masked if masked else None,
        documents=len(readings),
        iteration=weights.iteration or 0,
    )
    record_held_out(stage, found)
    return found


def _pieces(readings: Sequence[Reading], builder: SpanBuilder, budget: int) -> Iterator[Sequence[Reading]]:
    for piece in cut_by_tokens([builder.num_tokens(one) for one in readings], budget):
        yield readings[piece.start : piece.stop]


@torch.inference_mode()
def _firsts(
    model: CondenserLM, builder: SpanBuilder, readings: Sequence[Reading], budget: int, device: torch.device
) -> Tensor:
    """Return the first states of all spans, on the CPU; every rank computes all, which are few, and waits for none."""
    parts = [
        model(builder(piece, STREAM).inputs.to(device), predicts=False)[0].double().cpu()
        for piece in _pieces(readings, builder, budget)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def _contrast(firsts_PD: Tensor, readings: Sequence[Reading], own: range, score_scale: float) -> Tensor:
    """Return the summed loss and hits of this rank's spans: float64 [2]."""
    targets_N, excluded_NP = partners(readings[own.start : own.stop], readings, 2 * own.start)
    scores_NP = firsts_PD[2 * own.start : 2 * own.stop] @ firsts_PD.T
    loss = losses.contrastive(scores_NP, targets_N, score_scale=score_scale, excluded_BN=excluded_NP)
    hits = scores_NP.masked_fill(excluded_NP, -torch.inf).argmax(1) == targets_N
    return torch.tensor([float(loss) * len(targets_N), float(hits.sum())], dtype=torch.float64)


@torch.inference_mode()
def _predicted(model: CondenserLM, builder: SpanBuilder, readings: Sequence[Reading], device: torch.device) -> Tensor:
    """Return summed losses and hits, late and the head's, and the masked tokens: float64 [5]."""
    inputs = builder(readings, STREAM).inputs.to(device)
    predictions = model(inputs)[1]
    sums = [float(losses.masked_language_model(one_MV, inputs.labels_M, num_masked=1)) for one_MV in predictions]
    hits = [float((one_MV.argmax(1) == inputs.labels_M).sum()) for one_MV in predictions]
    return torch.tensor([*sums, *hits, float(len(inputs.labels_M))], dtype=torch.float64)

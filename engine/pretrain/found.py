"""How well a retriever finds documents that no step has taken, by pseudo queries that are the same every time.

Each query's own document is looked for among all that are held out, as in a step of so large a batch.

Shapes: B queries of this rank, P documents held out, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine import losses
from engine.config.models import RetrieverConfig
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.models.encode import encode_queries
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from engine.models.weights import frozen_retriever
from engine.pretrain.cloze import Cloze, ClozeBuilder, ClozeRates
from engine.pretrain.documents import Reading, Split
from engine.pretrain.measurements import STREAM, HeldOut, record_held_out
from engine.run import Stage
from shards.partition import split_range


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutFound(HeldOut):
    """Means over the pseudo queries of the documents held out; None where there are none.

    Attributes:
        loss: Of the contrast among all documents held out, in nats.
        accuracy: Share of the queries whose own document comes first.
        reciprocal_rank: Of the own document.
    """

    loss: float | None
    accuracy: float | None
    reciprocal_rank: float | None


def measure_found(stage: Stage, data: Data, split: Split, rates: ClozeRates, *, weights: WeightsOf) -> HeldOutFound:
    """Measure published weights on the documents held out, on all ranks, and record what comes out.

    Args:
        stage: Where this runs.
        data: The corpus.
        split: Which documents.
        rates: As in training.
        weights: Of the retriever.
    """
    run, coordinator = stage.run, stage.run.coordinator
    section, text = run.config.model(weights.model, RetrieverConfig), data.texts[weights.model]
    readings = [Reading(one, 0) for one in split.held_out.tolist()]
    own = split_range(len(readings), coordinator.rank, coordinator.world_size)
    sums = torch.zeros(3, dtype=torch.float64)
    with coordinator.agreement(f"{stage.name}: measure"):
        model = frozen_retriever(section, run.folder.weights(weights.model, weights.state), run.device)
        lengths = section.max_length, section.query_max_length
        builder = ClozeBuilder.of(
            data, weights.model, model.collator(text.template), rates, lengths=lengths, seed=stage.seed
        )
        drawn = [builder.draw(one, STREAM) for one in readings]
        if own:
            queries_BD, documents_PD = _encoded(stage, model, text.template, drawn, own, section)
            sums = sums_of(queries_BD @ documents_PD.T, torch.tensor(list(own)), section.score_scale)
    of_ranks: list[list[float]] = coordinator.gather(f"{stage.name}: sums", sums.tolist())
    means = [sum(column) / len(readings) if readings else None for column in zip(*of_ranks, strict=True)]
    found = HeldOutFound(
        loss=means[0],
        accuracy=means[1],
        reciprocal_rank=means[2],
        documents=len(readings),
        iteration=weights.iteration or 0,
    )
    record_held_out(stage, found)
    return found


def sums_of(scores_BP: Tensor, targets_B: Tensor, score_scale: float) -> Tensor:
    """Return the summed loss, hits at the first place and reciprocal ranks of queries.

    Args:
        scores_BP: Of all documents; one that is as good as the own one comes before it.
        targets_B: Column of the own document, int64.
        score_scale: By which scores are multiplied.

    Returns:
        float64 [3].
    """
    loss = losses.contrastive(scores_BP, targets_B, score_scale=score_scale) * len(targets_B)
    ranks_B = (scores_BP >= scores_BP.gather(1, targets_B[:, None])).sum(1)
    return torch.tensor([float(loss), float((ranks_B == 1).sum()), float((1 / ranks_B.double()).sum())]).double()


def _encoded(
    stage: Stage,
    model: Retriever,
    template: InputTemplate,
    drawn: Sequence[Cloze],
    own: range,
    section: RetrieverConfig,
) -> tuple[Tensor, Tensor]:
    """Encode this rank's queries, and all documents: they are few, and others would have to wait for a part of them."""
    budget, device = stage.run.config.evaluation.tokens_per_batch, stage.run.device
    queries_BD = encode_queries(
        model.query_encoder(),
        template.for_queries(),
        [drawn[place].query.tolist() for place in own],
        max_length=section.query_max_length,
        tokens_per_batch=budget,
        device=device,
    )
    documents_PD = encode_queries(
        model.document_encoder(),
        template.for_documents(),
        [one.document.tolist() for one in drawn],
        max_length=section.max_length,
        tokens_per_batch=budget,
        device=device,
    )
    return torch.from_numpy(queries_BD).double(), torch.from_numpy(documents_PD).double()

"""A step of the inverse cloze task: the loss of a batch, computed here pair by pair in float64, however it is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.timetable import Phase
from engine.config.training import OptimConfig
from engine.metrics import Metric
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from engine.pretrain.cloze import ClozeBuilder, ClozeRates
from engine.pretrain.contrast import ClozeContrast
from engine.pretrain.documents import ReadingSamples
from shards.reader import CorpusShards
from tests.unit.engine.pretrain.test_reconstruction import Plain

DOCUMENTS, SCALE = 9, 3.0


@pytest.fixture(scope="module")
def retriever(folder: Path) -> Retriever:
    return Retriever.load(str(folder), pooling="mean", similarity="cosine", tied=False, dropout=0.0)


@pytest.fixture(scope="module")
def builder(corpus: CorpusShards, tokenizer: Any, retriever: Retriever) -> ClozeBuilder:
    collate = retriever.collator(InputTemplate.from_tokenizer(tokenizer))
    rates = ClozeRates(0.1, 3)
    return ClozeBuilder(corpus, "encoder", tokenizer, collate, rates, max_length=24, query_max_length=12, seed=7)


def objective_of(
    builder: ClozeBuilder, micro: int, batch_size: int = DOCUMENTS, rank: int = 0, world_size: int = 1
) -> ClozeContrast:
    phase = Phase("ict", "ict", "retriever", 5, batch_size, micro, 0, OptimConfig(), ("",), 1, pool="world")
    names = [f"d{number}" for number in range(DOCUMENTS)]
    samples = ReadingSamples(phase.visits[0], 7, np.arange(DOCUMENTS), names, rank, world_size)
    return ClozeContrast(samples, builder, score_scale=SCALE)


def by_brute_force(
    retriever: Retriever, builder: ClozeBuilder, objective: ClozeContrast, step: int
) -> dict[str, float]:
    """One query and one document at a time, in float64; an own document elsewhere in the batch counts for nothing."""
    readings = objective.samples.groups(step)
    wide = retriever.double()
    with torch.no_grad():
        pairs = [wide(**builder([one], "ict")) for one in readings]
    retriever.float()
    losses, hits = [], 0
    for place, (query, _) in enumerate(pairs):
        scores = {
            other: float(query[0] @ document[0])
            for other, (_, document) in enumerate(pairs)
            if other == place or readings[other].document != readings[place].document
        }
        losses.append(math.log(sum(math.exp(SCALE * (one - scores[place])) for one in scores.values())))
        hits += max(scores, key=lambda other: scores[other]) == place
    return {"loss": sum(losses) / len(losses), "accuracy": hits / len(losses)}


def values_of(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: float(metric.value) for name, metric in metrics.items()}


@pytest.mark.parametrize("micro", [2, 4, 9])
@pytest.mark.parametrize("step", [0, 2])
def test_the_loss_is_that_of_the_whole_batch_however_it_is_cut(
    retriever: Retriever, builder: ClozeBuilder, micro: int, step: int
) -> None:
    objective = objective_of(builder, micro)
    engine = Plain(retriever)  # type: ignore[arg-type]
    measured = values_of(objective.backward(engine, objective.prepare(step)))  # type: ignore[arg-type]
    expected = by_brute_force(retriever, builder, objective, step)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert engine.lasts == [False] * (len(engine.lasts) - 1) + [True]


def test_the_cached_gradient_is_the_plain_batchs(retriever: Retriever, builder: ClozeBuilder) -> None:
    gradients = []
    for micro in (2, 9):
        objective = objective_of(builder, micro)
        retriever.zero_grad()
        objective.backward(Plain(retriever), objective.prepare(1))  # type: ignore[arg-type]
        gradients.append({name: one.grad.clone() for name, one in retriever.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("towers.query") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_a_document_of_two_epochs_is_no_negative_of_itself(retriever: Retriever, builder: ClozeBuilder) -> None:
    """A batch of 12 from 9 documents: three come twice, with other queries and other rests."""
    objective = objective_of(builder, 12, batch_size=12)
    readings = objective.samples.groups(0)
    assert [one.epoch for one in readings] == [0] * 9 + [1] * 3
    batch = objective.prepare(0)
    assert int(batch.excluded_BP.sum()) == 6
    measured = values_of(objective.backward(Plain(retriever), batch))  # type: ignore[arg-type]
    expected = by_brute_force(retriever, builder, objective, 0)
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_two_ranks_read_what_one_reads_and_point_into_one_pool(builder: ClozeBuilder) -> None:
    whole = objective_of(builder, 4, batch_size=8).prepare(1)
    halves = [objective_of(builder, 4, batch_size=8, rank=rank, world_size=2).prepare(1) for rank in range(2)]
    assert [chunk.micro.groups for half in halves for chunk in half.chunks] == [
        chunk.micro.groups for chunk in whole.chunks
    ]
    assert torch.equal(torch.cat([half.targets_B for half in halves]), whole.targets_B)
    assert torch.equal(torch.cat([half.excluded_BP for half in halves]), whole.excluded_BP)


def test_every_epoch_draws_anew_and_every_step_alike(builder: ClozeBuilder) -> None:
    first, second = objective_of(builder, 9), objective_of(builder, 9)
    queries = [objective.prepare(step).chunks[0].of["queries"] for objective, step in ((first, 0), (second, 0))]
    assert torch.equal(queries[0].input_ids, queries[1].input_ids)  # type: ignore[union-attr]
    drawn = [
        {one.document: builder.draw(one, "ict").query.tolist() for one in first.samples.groups(step)} for step in (0, 1)
    ]
    assert drawn[0].keys() == drawn[1].keys()
    assert sum(drawn[0][document] != drawn[1][document] for document in drawn[0]) > 3


def test_tokens_are_counted_at_most(builder: ClozeBuilder) -> None:
    objective = objective_of(builder, 1)
    for chunk in objective.prepare(0).chunks:
        (reading,) = chunk.micro.groups
        assert chunk.num_tokens <= builder.num_tokens(reading) <= 24 + 12

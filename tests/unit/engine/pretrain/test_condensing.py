"""A step of coCondenser: spans without a token in common, and the loss of a batch in float64 however it is cut."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.timetable import Phase
from engine.config.training import OptimConfig
from engine.data.negatives import step_rng
from engine.models.condenser import CondenserLM
from engine.models.template import InputTemplate
from engine.pretrain.condensing import SpanContrast, partners
from engine.pretrain.documents import Reading, ReadingSamples
from engine.pretrain.spans import SpanBuilder, SpanRates, draw_spans
from shards.reader import CorpusShards
from tests.unit.engine.pretrain.test_contrast import values_of
from tests.unit.engine.pretrain.test_reconstruction import Plain

DOCUMENTS, SCALE = 9, 0.1


@pytest.fixture(scope="module")
def condenser(folder: Path) -> CondenserLM:
    return CondenserLM.load(str(folder), skip_from=1, dropout=0.0)


@pytest.fixture(scope="module")
def builder(corpus: CorpusShards, tokenizer: Any, condenser: CondenserLM) -> SpanBuilder:
    collate = condenser.collator(InputTemplate.from_tokenizer(tokenizer))
    return SpanBuilder(
        corpus, "encoder", tokenizer, collate, SpanRates(0.3, 2), max_length=12, document_length=48, seed=7
    )


def objective_of(builder: SpanBuilder, micro: int, batch_size: int = DOCUMENTS) -> SpanContrast:
    phase = Phase(
        "cocondenser", "cocondenser", "encoder", 5, batch_size, micro, 0, OptimConfig(), ("",), 1, pool="world"
    )
    samples = ReadingSamples(phase.visits[0], 7, np.arange(DOCUMENTS), [f"d{one}" for one in range(DOCUMENTS)], 0, 1)
    return SpanContrast(samples, builder, score_scale=SCALE)


def by_brute_force(
    condenser: CondenserLM, builder: SpanBuilder, objective: SpanContrast, step: int
) -> dict[str, float]:
    """One document at a time, one token and one pair of spans at a time, in float64."""
    readings = objective.samples.groups(step)
    vectors, sums, hits, count = [], [0.0, 0.0], [0, 0], 0
    wide = condenser.double()
    with torch.no_grad():
        for reading in readings:
            inputs = builder([reading], "cocondenser").inputs
            first_NH, predictions = wide(inputs)
            vectors += [(reading.document, place, vector) for place, vector in zip("ab", first_NH, strict=True)]
            count += len(inputs.labels_M)
            for side, logits_MV in enumerate(predictions):
                for row, label in zip(logits_MV.numpy(), inputs.labels_M.tolist(), strict=True):
                    sums[side] += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
                    hits[side] += int(row.argmax() == label)
    condenser.float()
    contrast, found = [], 0
    for place, (document, _, vector) in enumerate(vectors):
        scores = {
            other: SCALE * float(vector @ one)
            for other, (of, _, one) in enumerate(vectors)
            if other == place ^ 1 or of != document
        }
        own = scores[place ^ 1]
        contrast.append(math.log(sum(math.exp(score - own) for score in scores.values())))
        found += max(scores, key=lambda other: scores[other]) == place ^ 1
    expected = {
        "contrastive": sum(contrast) / len(contrast),
        "accuracy": found / len(contrast),
        "late_loss": sums[0] / count,
        "head_loss": sums[1] / count,
        "late_accuracy": hits[0] / count,
        "head_accuracy": hits[1] / count,
    }
    return expected | {"loss": expected["contrastive"] + expected["late_loss"] + expected["head_loss"]}


@pytest.mark.parametrize("length", [2, 3, 7, 20, 50])
def test_spans_have_no_token_in_common_and_are_long_enough(length: int) -> None:
    document = np.arange(100, 100 + length, dtype=np.uint32)
    seen = set()
    for item in range(200):
        first, second = draw_spans(document, 4, 10, step_rng(1, "spans", 0, item))
        assert min(4, length // 2) <= min(len(first), len(second))
        assert max(len(first), len(second)) <= 10
        assert first[-1] + 1 == second[0], "one behind the other"
        assert (np.diff(first) == 1).all()
        assert (np.diff(second) == 1).all()
        seen |= {*first.tolist(), *second.tolist()}
    assert seen == set(document.tolist()), "every token is read at some time"


@pytest.mark.parametrize("length", [0, 1])
def test_of_less_than_two_tokens_both_spans_are_the_document(length: int) -> None:
    document = np.arange(length, dtype=np.uint32)
    assert [one.tolist() for one in draw_spans(document, 4, 10, step_rng(1, "s", 0, 0))] == [document.tolist()] * 2


def test_spans_are_of_the_documents_first_tokens_however_deep_the_shards_are(
    corpus: CorpusShards, tokenizer: Any, condenser: CondenserLM, builder: SpanBuilder
) -> None:
    """Symptom: where deeper shards lay beside the data, the same run drew other spans."""
    assert corpus.num_tokens(8, "encoder") == 29
    collate = condenser.collator(InputTemplate.from_tokenizer(tokenizer))
    few = SpanBuilder(
        corpus, "encoder", tokenizer, collate, SpanRates(0.3, 2), max_length=12, document_length=16, seed=7
    )
    cut: Any = SimpleNamespace(
        tokens=lambda document, stream: corpus.tokens(document, stream)[:16], num_tokens=lambda document, stream: 16
    )
    shallow = SpanBuilder(
        cut, "encoder", tokenizer, collate, SpanRates(0.3, 2), max_length=12, document_length=16, seed=7
    )
    readings = [Reading(8, epoch) for epoch in range(20)]
    for one in readings:
        ours, theirs = few([one], "s"), shallow([one], "s")
        assert ours.inputs.labels_M.tolist() == theirs.inputs.labels_M.tolist()
        assert ours.inputs.places_M.tolist() == theirs.inputs.places_M.tolist()
        assert ours.num_tokens == theirs.num_tokens
        assert few.num_tokens(one) == shallow.num_tokens(one) == 20
    assert max(builder([one], "s").num_tokens for one in readings) == 24, "two spans of full length"


@pytest.mark.parametrize("micro", [2, 4, 9])
def test_the_loss_is_that_of_the_whole_batch_however_it_is_cut(
    condenser: CondenserLM, builder: SpanBuilder, micro: int
) -> None:
    objective = objective_of(builder, micro)
    engine = Plain(condenser)
    measured = values_of(objective.backward(engine, objective.prepare(2)))  # type: ignore[arg-type]
    expected = by_brute_force(condenser, builder, objective, 2)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert engine.lasts == [False] * (len(engine.lasts) - 1) + [True]


def test_the_cached_gradient_is_the_plain_batchs(condenser: CondenserLM, builder: SpanBuilder) -> None:
    gradients = []
    for micro in (2, 9):
        objective = objective_of(builder, micro)
        condenser.zero_grad()
        objective.backward(Plain(condenser), objective.prepare(1))  # type: ignore[arg-type]
        gradients.append({name: one.grad.clone() for name, one in condenser.named_parameters() if one.grad is not None})
    names = {name for name, _ in condenser.named_parameters()}
    assert gradients[0].keys() == gradients[1].keys() == names, "a parameter has no gradient"
    for name in names:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)


def test_a_document_of_two_epochs_is_no_negative_of_itself(condenser: CondenserLM, builder: SpanBuilder) -> None:
    objective = objective_of(builder, 12, batch_size=12)
    batch = objective.prepare(0)
    assert int(batch.excluded_NP.sum()) == 6 * 2 + 6 * 2 * 3, "itself; and of three that come twice, two spans more"
    measured = values_of(objective.backward(Plain(condenser), batch))  # type: ignore[arg-type]
    expected = by_brute_force(condenser, builder, objective, 0)
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_partners_point_into_the_pool_of_all_ranks() -> None:
    pool = [Reading(document, 0) for document in (5, 6, 7, 8)]
    targets_N, excluded_NP = partners(pool[2:], pool, 4)
    assert targets_N.tolist() == [5, 4, 7, 6]
    assert excluded_NP.nonzero().tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]], "a span is no negative of itself"


def test_every_epoch_draws_and_masks_anew_and_the_same_one_alike(builder: SpanBuilder) -> None:
    readings = [[Reading(document, epoch) for document in range(DOCUMENTS)] for epoch in (0, 0, 1)]
    labels = [builder(one, "cocondenser").inputs.labels_M.tolist() for one in readings]
    assert labels[0] == labels[1]
    assert labels[0] != labels[2]
    assert sum(map(builder.num_tokens, readings[0])) >= builder(readings[0], "cocondenser").num_tokens

"""A step's loss is the mean over its masked tokens, computed here token by token in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.timetable import Phase
from engine.config.training import OptimConfig
from engine.metrics import Metric
from engine.models.bottleneck import BottleneckLM
from engine.pretrain.documents import DocumentSamples, MaskedInputBuilder
from engine.pretrain.reconstruction import BottleneckReconstruction
from tests.unit.engine.pretrain.conftest import TEXTS

Builder = Callable[..., MaskedInputBuilder]


class Plain:
    """Stands for a DeepSpeed engine: adds up what is differentiated."""

    def __init__(self, model: BottleneckLM) -> None:
        self.model, self.lasts = model, list[bool]()
        self.total = 0.0

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool, share: float = 1.0) -> None:
        (loss * share).backward()  # type: ignore[no-untyped-call]
        self.total += float(loss.detach()) * share
        self.lasts.append(last)


def objective_of(builder: MaskedInputBuilder, micro: int, documents: Any = None) -> BottleneckReconstruction:
    taken = np.arange(len(TEXTS)) if documents is None else np.array(documents)
    phase = Phase("edmlm", "edmlm", "encoder", 5, len(taken), micro, 0, OptimConfig(), ("documents",))
    samples = DocumentSamples(phase.visits[0], 7, taken, [f"d{number}" for number in range(20)], 0, 1)
    return BottleneckReconstruction(samples, builder)


def by_brute_force(
    model: BottleneckLM, builder: MaskedInputBuilder, documents: list[int], step: int
) -> dict[str, float]:
    """One document at a time, unpacked, in float64, one token at a time."""
    sums, hits, counts = [0.0, 0.0], [0, 0], [0, 0]
    wide = model.double()
    with torch.no_grad():
        for document in documents:
            pair = builder([document], "edmlm", step)
            outputs = wide(encoder=pair.encoder, decoder=pair.decoder)
            for side, (logits_MV, inputs) in enumerate(zip(outputs, (pair.encoder, pair.decoder), strict=True)):
                for row, label in zip(logits_MV.numpy(), inputs.labels_M.tolist(), strict=True):
                    sums[side] += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
                    hits[side] += int(row.argmax() == label)
                    counts[side] += 1
    model.float()
    losses, accuracies = ([part / count for part, count in zip(parts, counts, strict=True)] for parts in (sums, hits))
    return {
        "loss": sum(losses),
        "encoder_loss": losses[0],
        "decoder_loss": losses[1],
        "encoder_accuracy": accuracies[0],
        "decoder_accuracy": accuracies[1],
    }


def values_of(metrics: dict[str, Metric]) -> dict[str, float]:
    return {name: float(metric.value) for name, metric in metrics.items()}


@pytest.mark.parametrize("micro", [1, 3, 11])
def test_the_loss_is_the_mean_over_all_masked_tokens_however_the_step_is_cut(
    builder_of: Builder, model: BottleneckLM, micro: int
) -> None:
    """Documents differ in length tenfold: a mean of the micro-batches' means would be another number."""
    objective = objective_of(builder_of(), micro)
    engine = Plain(model)
    measured = values_of(objective.backward(engine, objective.prepare(2)))  # type: ignore[arg-type]
    expected = by_brute_force(model, builder_of(packs=False), objective.samples.groups(2), 2)
    tokens = measured.pop("tokens")
    assert measured == pytest.approx(expected, rel=1e-5)
    assert engine.total == pytest.approx(expected["loss"], rel=1e-5)
    assert engine.lasts == [False] * (len(engine.lasts) - 1) + [True]
    assert tokens == sum(map(builder_of().num_tokens, range(len(TEXTS))))


def test_the_gradient_does_not_depend_on_the_cut(builder_of: Builder, model: BottleneckLM) -> None:
    gradients = []
    for micro in (2, 11):
        objective = objective_of(builder_of(), micro)
        model.zero_grad()
        objective.backward(Plain(model), objective.prepare(0))  # type: ignore[arg-type]
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    names = {name for name, _ in model.named_parameters()}
    assert gradients[0].keys() == gradients[1].keys() == names, "a parameter has no gradient"
    for name in names:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)


def test_a_step_is_a_function_of_its_number(builder_of: Builder) -> None:
    objective, again = objective_of(builder_of(), 3), objective_of(builder_of(), 3)
    one, same, other = objective.prepare(1), again.prepare(1), again.prepare(2)
    for (_, left), (_, right) in zip(one.pieces, same.pieces, strict=True):
        assert torch.equal(left.decoder.places_M, right.decoder.places_M)
        assert torch.equal(left.encoder.labels_M, right.encoder.labels_M)
    masked = [[pair.encoder.labels_M.tolist() for _, pair in share.pieces] for share in (one, other)]
    assert masked[0] != masked[1]


def test_a_step_with_nothing_to_mask_has_loss_0(builder_of: Builder, model: BottleneckLM) -> None:
    objective = objective_of(builder_of(), 1, documents=[9])
    measured = values_of(objective.backward(Plain(model), objective.prepare(0)))  # type: ignore[arg-type]
    assert measured["loss"] == 0.0


def test_micro_batches_may_be_found_by_trial(builder_of: Builder) -> None:
    """What is replaced where `micro_batch_tokens: auto` tries sizes: the visit of the samples."""
    objective = objective_of(builder_of(), 3)
    phase = replace(objective.samples.visit.phase, micro_batch_tokens=40)
    objective.samples = objective.samples.of(replace(objective.samples.visit, phase=phase))
    share = objective.prepare(0)
    sizes = [sum(map(builder_of().num_tokens, micro.groups)) for micro, _ in share.pieces]
    assert len(sizes) > 2
    assert all(size <= 40 for size in sizes)

"""Steps of IRGAN and ANCE: the losses of all queries of a batch, however micro-batches and ranks cut it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import losses
from engine.config.ar2 import Ar2Config
from engine.data.batches import Group
from engine.metrics import Metric
from engine.objectives.irgan import Discriminator, Generator, discriminator, generator, reward
from engine.objectives.mined import MinedContrast
from tests.unit.engine.objectives.test_distillation import Numbers, Student, samples

CUTS = [(1, 4), (1, 1), (1, 3), (2, 2), (2, 1)]
"""Ranks and queries of a micro-batch, of four queries a step."""


class Pairs(Numbers):
    """As `Numbers`, for a ranker too: a pair is both numbers."""

    def pairs(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        rows = torch.tensor([[group.query, document] for group in groups for document in group.documents.tolist()])
        return {"numbers": rows, "attention_mask": torch.ones(len(rows), 1)}

    def tokens_of_pairs(self, group: Group) -> int:
        return 1


class Ranker(Student):
    """Scores pairs by its own table; stands for an engine, and for an opponent."""

    def forward(self, *, pairs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        queries, documents = pairs["numbers"].unbind(1)
        return 3 * (self.of_queries[queries] * self.of_documents[documents]).sum(1)


def opponent(pairs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return Ranker()(pairs=pairs)


def scores_of(model: Student, groups: Sequence[Group], factor: float = 1.0) -> Tensor:
    documents_BN = torch.from_numpy(np.stack([group.documents for group in groups]))
    queries_BD = model.of_queries[torch.tensor([group.query for group in groups])]
    return factor * torch.einsum("bd,bnd->bn", queries_BD, model.of_documents[documents_BN])


def assert_step(
    objective_of: type, model: Student, expected: Tensor, cut: tuple[int, int], **words: object
) -> dict[str, Metric]:
    """Take the step on every rank of a cut, and compare mean loss and gradient with those of the batch at once."""
    found = type(model)()
    num_ranks, micro = cut
    values = []
    for rank in range(num_ranks):
        objective = objective_of(samples(rank, num_ranks, micro_batch_size=micro), **words)
        metrics = objective.backward(found, objective.prepare(0))
        values.append(float(metrics["loss"].value))
    expected.backward()  # type: ignore[no-untyped-call]
    assert sum(values) / num_ranks == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad / num_ranks, theirs.grad)
    return metrics


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_of_ance_is_the_contrast_with_a_querys_own_negatives(cut: tuple[int, int]) -> None:
    reference, groups = Student(), samples().groups(0)
    scores_BN = 2.0 * scores_of(reference, groups)
    expected = -scores_BN.log_softmax(1)[:, 0].mean()
    metrics = assert_step(MinedContrast, reference, expected, cut, builder=Numbers(), score_scale=2.0)
    assert float(metrics["tokens"].value) > 0
    if cut[0] == 1:
        hits = (scores_BN.argmax(1) == 0).float().mean()
        assert float(metrics["accuracy"].value) == pytest.approx(float(hits))
        assert float(metrics["entropy"].value) == pytest.approx(float(losses.entropy(scores_BN)), rel=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_of_the_discriminator(cut: tuple[int, int]) -> None:
    reference, groups = Ranker(), samples().groups(0)
    scores_BN = scores_of(reference, groups, 3)
    expected = discriminator(scores_BN, score_scale=0.5)
    metrics = assert_step(Discriminator, reference, expected, cut, builder=Pairs(), score_scale=0.5)
    if cut[0] == 1:
        believed_BN = (0.5 * scores_BN.detach()).sigmoid()
        assert float(metrics["believed_positive"].value) == pytest.approx(float(believed_BN[:, 0].mean()), rel=1e-5)
        assert float(metrics["believed_negative"].value) == pytest.approx(float(believed_BN[:, 1:].mean()), rel=1e-5)


@pytest.mark.parametrize("support", ["group", "negatives"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_of_the_generator(cut: tuple[int, int], support: str) -> None:
    reference, groups = Student(), samples().groups(0)
    ranker_BN = scores_of(Ranker(), groups, 3).detach()
    scales = {"retriever_score_scale": 2.0, "ranker_score_scale": 0.5}
    expected = generator(scores_of(reference, groups), ranker_BN, support=support, **scales)  # type: ignore[arg-type]
    metrics = assert_step(
        Generator,
        reference,
        expected,
        cut,
        retriever_builder=Numbers(),
        ranker_builder=Pairs(),
        ranker=opponent,
        game=Ar2Config(objective="irgan", irgan_support=support),  # type: ignore[arg-type]
        score_scales=(2.0, 0.5),
    )
    if cut[0] == 1:
        paid_BN = reward(ranker_BN, score_scale=0.5)
        assert float(metrics["reward"].value) == pytest.approx(float(paid_BN[:, 1:].mean()), rel=1e-5)
        assert float(metrics["reward_positive"].value) == pytest.approx(float(paid_BN[:, 0].mean()), rel=1e-5)

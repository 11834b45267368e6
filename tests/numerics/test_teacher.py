"""The weight of a teacher by its lead: against a brute force in float64, its limits, and what it makes of the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import losses
from engine.config.ar2 import Ar2Config
from engine.objectives.game import retriever_loss
from engine.objectives.teacher import lead
from tests.numerics.test_losses import PHI, THETA, brute_force_adversarial, random_scores, softmax

SCALES = {"retriever_score_scale": 0.3, "ranker_score_scale": 2.0}


def surprise(row: list[float], scale: float) -> float:
    return -math.log(softmax([scale * score for score in row])[0])


def brute_force_lead(theta: Tensor, phi: Tensor, scales: tuple[float, float] = (1.0, 1.0)) -> list[float]:
    return [
        surprise(other, scales[0]) / (surprise(other, scales[0]) + surprise(one, scales[1]))
        for other, one in zip(theta.tolist(), phi.tolist(), strict=True)
    ]


def game(**values: Any) -> Ar2Config:
    return Ar2Config(**{"teacher": "lead", "adversarial_weight": 0.7, "distillation_weight": 1.3} | values)


def test_golden_leads() -> None:
    """The retriever's -log p of the positives are .495182 and 1.446302, the ranker's 1.034697 and 1.266295."""
    theta, phi = (torch.tensor(rows, dtype=torch.float64) for rows in (THETA, PHI))
    torch.testing.assert_close(
        lead(theta, phi), torch.tensor([0.323674, 0.533180], dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 2.0)])
def test_leads_equal_brute_force(scales: tuple[float, float]) -> None:
    theta, phi = random_scores(11, num_queries=20)
    found = lead(theta, phi, retriever_score_scale=scales[0], ranker_score_scale=scales[1])
    expected = brute_force_lead(theta, phi, scales)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert 0 < sum(value > 0.5 for value in expected) < 20, "the case has groups of both kinds"
    assert not found.requires_grad


def test_a_ranker_leads_by_a_half_where_both_are_equally_sure() -> None:
    theta = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [90.0, 0.0, 0.0]])
    phi = torch.tensor([[90.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 90.0, 1.0]])
    assert lead(theta, phi).tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [20.0, 60.0, 80.0, 500.0])
def test_leads_are_numbers_where_both_are_nearly_sure(margin: float, dtype: torch.dtype) -> None:
    """Symptom: a softmax rounds p of the positive to 1, and 0 / 0 makes the loss of the whole batch no number."""
    theta = torch.tensor([[margin, 0.0, 0.0]] * 2, dtype=dtype)
    phi = torch.tensor([[1.25 * margin, 0.0, 0.0], [margin, 0.0, 0.0]], dtype=dtype)
    ahead, level = lead(theta, phi).tolist()
    if margin < 100 or dtype == torch.float64:
        assert ahead > 0.99
        assert level == 0.5
    else:
        assert (ahead, level) == (0.0, 0.0), "beyond float32 both have nothing left to learn"


def test_leads_of_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"retriever scores have shape \(2, 3\), ranker scores \(2, 1\)"):
        lead(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"expected both \[B, 1 \+ n\]"):
        lead(torch.zeros(2, 1), torch.zeros(2, 1))


# --- weights of queries in the losses ---------------------------------------------------------------------------------


def test_weights_multiply_each_querys_term() -> None:
    theta, phi = random_scores(12)
    weights_B = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    for form in ("paper", "with_positive", "released"):
        terms = brute_force_adversarial(theta, phi, form, (1.0, 1.0))
        expected = 0.5 * terms[0] + 2 * terms[2]
        options: dict[str, Any] = {"form": form, "weights_B": weights_B}
        assert losses.adversarial(theta, phi, reduction="sum", **options).item() == pytest.approx(expected, rel=1e-12)
        assert losses.adversarial(theta, phi, **options).item() == pytest.approx(expected / 3, rel=1e-12)
    for loss, alone in (
        (losses.distillation(theta, phi, weights_B=weights_B), lambda row: losses.distillation(theta[row], phi[row])),
        (
            losses.ranker_cross_entropy(theta, weights_B=weights_B),
            lambda row: losses.ranker_cross_entropy(theta[row]),
        ),
    ):
        one, _, three = (alone(slice(row, row + 1)).item() for row in range(3))
        assert loss.item() == pytest.approx((0.5 * one + 2 * three) / 3, rel=1e-12)


def test_weights_of_another_shape_are_refused() -> None:
    """Symptom: weights [B, 1] would broadcast to [B, B] and give a plausible number."""
    theta, phi = random_scores(13)
    with pytest.raises(ValueError, match=r"weights have shape \(3, 1\), expected \(3,\)"):
        losses.distillation(theta, phi, weights_B=torch.ones(3, 1))


# --- the retriever's objective ----------------------------------------------------------------------------------------


def brute_force_loss(theta: Tensor, phi: Tensor, form: str) -> list[float]:
    """w (.7 Eq. 9 + 1.3 Eq. 12) + (1 - w) CE of each query, with Python floats."""
    scales = SCALES["retriever_score_scale"], SCALES["ranker_score_scale"]
    values = []
    for row, (weight, eq_9) in enumerate(
        zip(brute_force_lead(theta, phi, scales), brute_force_adversarial(theta, phi, form, scales), strict=True)
    ):
        p_theta = softmax([scales[0] * score for score in theta[row].tolist()])
        p_phi = softmax([scales[1] * score for score in phi[row].tolist()])
        eq_12 = -sum(target * math.log(p) for target, p in zip(p_phi, p_theta, strict=True))
        values.append(weight * (0.7 * eq_9 + 1.3 * eq_12) - (1 - weight) * math.log(p_theta[0]))
    return values


@pytest.mark.parametrize("form", ["paper", "with_positive", "released"])
def test_the_weighed_objective_equals_brute_force(form: str) -> None:
    theta, phi = random_scores(14, num_queries=8)
    loss, parts = retriever_loss(game(adversarial=form), theta, phi, **SCALES)
    expected = brute_force_loss(theta, phi, form)
    assert loss.item() == pytest.approx(sum(expected) / 8, rel=1e-9)
    together = 0.7 * parts["adversarial"] + 1.3 * parts["distillation"] + parts["label"]
    torch.testing.assert_close(parts["loss"], together)
    leads = brute_force_lead(theta, phi, (0.3, 2.0))
    assert parts["lead"].item() == pytest.approx(sum(leads) / 8)
    assert parts["ranker_leads"].item() == pytest.approx(sum(value > 0.5 for value in leads) / 8)
    assert parts["taught"].item() == parts["lead"].item()


def test_no_gradient_flows_through_the_lead() -> None:
    """The gradient is that of the sum with the weights as numbers, not that of the weights too."""
    theta, phi = random_scores(15, num_queries=6)
    loss, _ = retriever_loss(game(), theta, phi)
    (gradient,) = torch.autograd.grad(loss, theta)
    weights_B = torch.tensor(brute_force_lead(theta, phi), dtype=torch.float64)
    fixed = (
        0.7 * losses.adversarial(theta, phi, form="paper", weights_B=weights_B)
        + 1.3 * losses.distillation(theta, phi, weights_B=weights_B)
        + losses.ranker_cross_entropy(theta, weights_B=1 - weights_B)
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(fixed, theta)[0])
    by_difference = torch.autograd.functional.jacobian(lambda scores: retriever_loss(game(), scores, phi)[0], theta)
    torch.testing.assert_close(gradient, by_difference)


def test_a_ranker_that_is_far_behind_leaves_a_group_to_its_label() -> None:
    """Symptom: a ranker that is sure of a negative pushes a positive down that the retriever had right."""
    theta = torch.tensor([[8.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([[0.0, 30.0, 0.0]], dtype=torch.float64)
    weighed, always = (
        torch.autograd.grad(retriever_loss(game(teacher=teacher), theta, phi)[0], theta)[0]
        for teacher in ("lead", "always")
    )
    assert always[0, 0] > 0.5
    assert abs(float(weighed[0, 0])) < 0.01


@pytest.mark.parametrize("trust", [0.0, 0.25, 1.0])
def test_a_trust_is_the_weight_of_every_group(trust: float) -> None:
    theta, phi = random_scores(18)
    loss, parts = retriever_loss(game(teacher="dev"), theta, phi, trust=trust)
    taught = 0.7 * losses.adversarial(theta, phi, form="paper") + 1.3 * losses.distillation(theta, phi)
    torch.testing.assert_close(loss, trust * taught + (1 - trust) * losses.ranker_cross_entropy(theta))
    assert parts["taught"].item() == pytest.approx(trust)
    assert retriever_loss(game(), theta, phi, trust=trust)[0] == retriever_loss(game(), theta, phi)[0], "not read"


def test_a_ranker_that_is_sure_teaches_as_in_the_paper() -> None:
    theta, phi = random_scores(16)
    phi = phi + torch.tensor([900.0, 0, 0, 0, 0])
    weighed, always = (retriever_loss(game(teacher=teacher), theta, phi)[0] for teacher in ("lead", "always"))
    torch.testing.assert_close(weighed, always)


@pytest.mark.parametrize("cuts", [[3, 3], [1, 2, 3], [6]])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(cuts: list[int]) -> None:
    """Ranks and micro-batches: each part counts by its share of the queries, and so does its gradient."""
    theta, phi = random_scores(17, num_queries=6)
    whole, measured = retriever_loss(game(), theta, phi)
    parts = [
        (one, *retriever_loss(game(), rows, others))
        for one, rows, others in zip(cuts, theta.split(cuts), phi.split(cuts), strict=True)
    ]
    together = torch.stack([loss * size / 6 for size, loss, _ in parts]).sum()
    torch.testing.assert_close(together, whole)
    torch.testing.assert_close(torch.autograd.grad(together, theta)[0], torch.autograd.grad(whole, theta)[0])
    for name in ("lead", "ranker_leads", "label"):
        mean = torch.stack([own[name] * size / 6 for size, _, own in parts]).sum()
        torch.testing.assert_close(mean, measured[name])

"""The losses against golden values, against a brute force in float64, and against what the paper says they do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import TrainingError
from engine.losses import (
    AdversarialForm,
    adversarial,
    contrastive,
    distillation,
    entropy,
    masked_language_model,
    pairwise_reward,
    ranker_cross_entropy,
)

FORMS: tuple[AdversarialForm, ...] = ("paper", "with_positive", "released")
THETA = [[2.0, 1.0, 0.5, -1.0], [0.3, 0.9, -0.2, 0.1]]
PHI = [[1.5, 2.0, -0.5, -2.0], [0.7, -0.1, 0.2, 1.1]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def golden_scores(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.tensor(THETA, dtype=dtype, requires_grad=True), torch.tensor(PHI, dtype=dtype, requires_grad=True)


def random_scores(seed: int, num_queries: int = 3, num_documents: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    theta, phi = (
        torch.randn(num_queries, num_documents, generator=generator, dtype=torch.float64) * 2 for _ in range(2)
    )
    return theta.requires_grad_(), phi


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def brute_force_adversarial(theta: Tensor, phi: Tensor, form: str, scales: tuple[float, float]) -> list[float]:
    """One value a query, written with Python floats and loops from the equations."""
    per_query = []
    for row_theta, row_phi in zip(theta.tolist(), phi.tolist(), strict=True):
        scaled = [scales[0] * score for score in row_theta]
        rewards = [math.log(softmax([scales[1] * row_phi[0], scales[1] * negative])[0]) for negative in row_phi[1:]]
        if form == "paper":
            value = sum(p * r for p, r in zip(softmax(scaled[1:]), rewards, strict=True))
        elif form == "with_positive":
            value = sum(p * r for p, r in zip(softmax(scaled)[1:], rewards, strict=True))
        else:
            weights = [math.log(0.5 + 1e-7), *(math.log(math.exp(reward) + 1e-7) for reward in rewards)]
            value = sum(r * math.log(p + 1e-7) for p, r in zip(softmax(scaled), weights, strict=True))
        per_query.append(value)
    return per_query


# ---- golden values -----------------------------------------------------------------------------------------------

GOLDEN: dict[str, tuple[float, list[list[float]]]] = {
    "paper": (-0.566343, [[0, -0.105735, 0.083360, 0.022375], [0, 0.043727, 0.004939, -0.048666]]),
    "distillation": (
        1.362623,
        [[0.127063, -0.180819, 0.043950, 0.009807], [-0.023217, 0.151172, -0.014082, -0.113873]],
    ),
    "released": (5.899240, [[0.418448, -0.565143, 0.121103, 0.025593], [-0.116005, 0.680519, -0.124023, -0.440491]]),
}


def golden_loss(name: str, theta: Tensor, phi: Tensor) -> Tensor:
    if name == "distillation":
        return distillation(theta, phi)
    if name == "released":
        return adversarial(theta, phi, form="released", reduction="sum")
    return adversarial(theta, phi, form="paper")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    theta, phi = golden_scores(dtype)
    loss = golden_loss(name, theta, phi)
    loss.backward()  # type: ignore[no-untyped-call]
    value, gradient = GOLDEN[name]
    assert loss.item() == pytest.approx(value, abs=1e-6 if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(theta.grad, torch.tensor(gradient, dtype=dtype), atol=1e-6, rtol=0)
    assert phi.grad is None, "the ranker is fixed while the retriever learns"


def test_golden_released_mixture_and_ranker() -> None:
    theta, phi = golden_scores()
    mixture = 0.5 * adversarial(theta, phi, form="released", reduction="sum") + 0.5 * distillation(theta, phi)
    assert mixture.item() == pytest.approx(3.630931, abs=1e-6)
    assert ranker_cross_entropy(phi).item() == pytest.approx(1.150496, abs=1e-6)


def test_released_gradients_differ_from_the_papers_on_the_positive() -> None:
    """Symptom: the released form trained with in place of the paper's lowers scores of positives."""
    theta, phi = golden_scores()
    released = torch.autograd.grad(adversarial(theta, phi, form="released"), theta)[0]
    assert released[0, 0].item() == pytest.approx(0.418448 / 2, abs=1e-6)


# ---- brute force, gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("form", FORMS)
def test_adversarial_equals_brute_force(form: AdversarialForm, scales: tuple[float, float]) -> None:
    theta, phi = random_scores(1)
    expected = brute_force_adversarial(theta, phi, form, scales)
    options: dict[str, Any] = {"form": form, "retriever_score_scale": scales[0], "ranker_score_scale": scales[1]}
    assert adversarial(theta, phi, **options).item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert adversarial(theta, phi, reduction="sum", **options).item() == pytest.approx(sum(expected), rel=1e-12)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.3, 2.0)])
def test_distillation_equals_brute_force(scales: tuple[float, float]) -> None:
    theta, phi = random_scores(2)
    expected = [
        -sum(
            target * math.log(p)
            for target, p in zip(
                softmax([scales[1] * s for s in row_phi]), softmax([scales[0] * s for s in row_theta]), strict=True
            )
        )
        for row_theta, row_phi in zip(theta.tolist(), phi.tolist(), strict=True)
    ]
    found = distillation(theta, phi, retriever_score_scale=scales[0], ranker_score_scale=scales[1])
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_likelihoods_equal_brute_force(scale: float) -> None:
    theta, phi = random_scores(3)
    targets = torch.tensor([4, 0, 2])
    rows = [[scale * score for score in row] for row in theta.tolist()]
    expected = [-math.log(softmax(row)[target]) for row, target in zip(rows, targets.tolist(), strict=True)]
    assert contrastive(theta, targets, score_scale=scale).item() == pytest.approx(sum(expected) / 3, rel=1e-12)
    expected = [-math.log(softmax([scale * score for score in row])[0]) for row in phi.tolist()]
    assert ranker_cross_entropy(phi, score_scale=scale).item() == pytest.approx(sum(expected) / 3, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_adversarial_gradcheck(form: AdversarialForm) -> None:
    theta, phi = random_scores(4)
    assert torch.autograd.gradcheck(lambda scores: adversarial(scores, phi, form=form), (theta,))


def test_other_losses_gradcheck() -> None:
    theta, phi = random_scores(5)
    targets = torch.tensor([1, 3, 0])
    excluded = torch.zeros(3, 5, dtype=torch.bool)
    excluded[0, 2] = excluded[2, 4] = True
    assert torch.autograd.gradcheck(lambda scores: contrastive(scores, targets, excluded_BN=excluded), (theta,))
    assert torch.autograd.gradcheck(lambda scores: distillation(scores, phi), (theta,))
    assert torch.autograd.gradcheck(ranker_cross_entropy, (phi.requires_grad_(),))


def test_paper_gradient_is_equation_10() -> None:
    """p_j (r_j - sum_i p_i r_i) / B on the negatives, exactly 0 on the positive."""
    theta, phi = random_scores(6)
    gradient = torch.autograd.grad(adversarial(theta, phi, form="paper"), theta)[0]
    p, r = theta.detach()[:, 1:].softmax(-1), pairwise_reward(phi)
    torch.testing.assert_close(gradient[:, 1:], p * (r - (p * r).sum(-1, keepdim=True)) / 3)
    assert torch.equal(gradient[:, 0], torch.zeros(3, dtype=torch.float64))


# ---- what the objectives mean ------------------------------------------------------------------------------------


def test_raising_a_fooling_negative_lowers_the_paper_objective() -> None:
    """The sign of the game: the retriever is paid for negatives that the ranker takes for the positive."""
    phi = torch.tensor([[1.0, 3.0, -4.0]], dtype=torch.float64)  # document 1 fools the ranker, document 2 does not
    even = torch.zeros(1, 3, dtype=torch.float64)
    fooling, harmless = even.clone(), even.clone()
    fooling[0, 1] = harmless[0, 2] = 0.5
    for form in FORMS:
        at_even = adversarial(even, phi, form=form)
        assert adversarial(fooling, phi, form=form) < at_even
        assert adversarial(harmless, phi, form=form) > at_even


def test_with_positive_pushes_the_positive_down() -> None:
    theta, phi = golden_scores()
    gradient = torch.autograd.grad(adversarial(theta, phi, form="with_positive"), theta)[0]
    assert bool((gradient[:, 0] > 0).all())


def test_mean_is_independent_of_the_batch_and_sum_is_not() -> None:
    """Symptom: the same recipe trains differently on another number of GPUs."""
    theta, phi = golden_scores()
    for form in FORMS:
        once, twice = (
            [
                adversarial(theta.repeat(times, 1), phi.repeat(times, 1), form=form, reduction=reduction).item()
                for reduction in ("mean", "sum")
            ]
            for times in (1, 2)
        )
        assert twice[0] == pytest.approx(once[0])
        assert twice[1] == pytest.approx(2 * once[1])


def test_reward_is_log_half_for_a_tie_and_stays_finite() -> None:
    reward = pairwise_reward(torch.tensor([[0.0, 0.0, 500.0, -500.0]], requires_grad=True))
    torch.testing.assert_close(reward, torch.tensor([[math.log(0.5), -500.0, 0.0]]))
    assert not reward.requires_grad


def test_extreme_scores_give_finite_losses_and_gradients() -> None:
    """Symptom: one confident ranker score turns the retriever's loss into inf or NaN."""
    theta = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    phi = torch.tensor([[-400.0, 400.0, -400.0]])
    for form in FORMS:
        loss = adversarial(theta, phi, form=form)
        gradient = torch.autograd.grad(loss, theta)[0]
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())


def test_objective_of_equation_8_is_bounded_by_equation_9() -> None:
    """J <= J_hat for each query: a pairwise probability is never below the listwise one."""
    for seed in range(20):
        theta, phi = random_scores(seed, num_queries=1)
        assert -ranker_cross_entropy(phi) <= adversarial(theta, phi, form="paper")
    theta, phi = golden_scores()
    expected = [(-1.035, -0.606), (-1.266, -0.527)]
    for row, (listwise, bound) in enumerate(expected):
        assert -ranker_cross_entropy(phi[row : row + 1]).item() == pytest.approx(listwise, abs=1e-3)
        found = adversarial(theta[row : row + 1], phi[row : row + 1], form="paper").item()
        assert found == pytest.approx(bound, abs=1e-3)


def test_distillation_is_least_where_the_retriever_agrees() -> None:
    _, phi = random_scores(7)
    agreed = distillation(phi + 3.0, phi)
    assert agreed.item() == pytest.approx(entropy(phi).item())
    assert distillation(phi * 1.1, phi) > agreed


@pytest.mark.parametrize("name", [*FORMS, "distillation"])
def test_order_of_negatives_and_constant_shifts_do_not_matter(name: str) -> None:
    def loss(theta: Tensor, phi: Tensor) -> Tensor:
        if name == "distillation":
            return distillation(theta, phi)
        return adversarial(theta, phi, form=name)  # type: ignore[arg-type]

    theta, phi = random_scores(8)
    order = torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(loss(theta[:, order], phi[:, order]), loss(theta, phi))
    shift = torch.tensor([[5.0], [-3.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(loss(theta + shift, phi - 2 * shift), loss(theta, phi))
    shuffled_apart = loss(theta[:, order], phi)
    assert not torch.allclose(shuffled_apart, loss(theta, phi)), "the columns of both models belong together"


# ---- exclusion, entropy, precision, misuse -----------------------------------------------------------------------


def test_excluded_documents_take_no_mass_and_no_gradient() -> None:
    theta, _ = random_scores(9, num_queries=2)
    targets = torch.tensor([0, 1])
    excluded = torch.zeros(2, 5, dtype=torch.bool)
    excluded[0, 3] = True
    without = (contrastive(theta[:1, [0, 1, 2, 4]], targets[:1]) + contrastive(theta[1:], targets[1:])) / 2
    loss = contrastive(theta, targets, excluded_BN=excluded)
    torch.testing.assert_close(loss, without)
    gradient = torch.autograd.grad(loss, theta)[0]
    assert gradient[0, 3] == 0.0
    assert bool((gradient[1] != 0).all())
    assert bool(gradient.isfinite().all())


def test_excluding_a_target_names_its_row() -> None:
    excluded = torch.tensor([[False, False], [False, True]])
    with pytest.raises(TrainingError, match=r"rows \[1\]"):
        contrastive(torch.zeros(2, 2), torch.tensor([0, 1]), excluded_BN=excluded)


def test_entropy_in_nats() -> None:
    assert entropy(torch.zeros(2, 15)).item() == pytest.approx(math.log(15))
    one_sided = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]])
    assert entropy(one_sided).item() == pytest.approx(math.log(2) / 2)
    scores = torch.tensor([[0.3, -1.2, 2.0]])
    probabilities = softmax([0.6, -2.4, 4.0])
    assert entropy(scores, score_scale=2.0).item() == pytest.approx(
        -sum(p * math.log(p) for p in probabilities), rel=1e-6
    )


def test_half_precision_scores_are_raised_before_the_softmax() -> None:
    theta, phi = (scores.detach().to(torch.bfloat16) for scores in golden_scores())
    for loss in (*(adversarial(theta, phi, form=form) for form in FORMS), distillation(theta, phi)):
        assert loss.dtype == torch.float32
    exact = adversarial(theta.double(), phi.double(), form="paper").item()
    assert adversarial(theta, phi, form="paper").item() == pytest.approx(exact, abs=1e-6)
    assert contrastive(theta, torch.tensor([0, 1])).dtype == torch.float32
    assert ranker_cross_entropy(phi).dtype == torch.float32


def test_masked_tokens_are_summed_and_divided_by_the_number_of_all() -> None:
    """Token by token with Python floats; parts of a step add up to the whole step's loss."""
    logits_MV, _ = random_scores(3, 5, 7)
    labels_M = torch.tensor([0, 6, 2, 2, 5])
    per_token = [
        -math.log(softmax(row)[label]) for row, label in zip(logits_MV.tolist(), labels_M.tolist(), strict=True)
    ]
    whole = masked_language_model(logits_MV, labels_M, num_masked=5)
    assert whole.item() == pytest.approx(sum(per_token) / 5, abs=1e-12)
    parts = [masked_language_model(logits_MV[one], labels_M[one], num_masked=5) for one in (slice(1), slice(1, 5))]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-12)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert masked_language_model(logits_MV[order] + 3, labels_M[order], num_masked=5).item() == pytest.approx(
        whole.item()
    )
    assert torch.autograd.gradcheck(lambda logits: masked_language_model(logits, labels_M, num_masked=5), (logits_MV,))
    raised = logits_MV.detach().clone()
    raised[0, 0] += 1
    assert masked_language_model(raised, labels_M, num_masked=5) < whole
    assert masked_language_model(logits_MV.bfloat16(), labels_M, num_masked=5).dtype == torch.float32
    assert masked_language_model(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), num_masked=1).item() == 0


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        masked_language_model(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64), num_masked=2)
    with pytest.raises(ValueError, match="same documents"):
        adversarial(torch.zeros(2, 4), torch.zeros(2, 1), form="paper")
    with pytest.raises(ValueError, match="same documents"):
        distillation(torch.zeros(2, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="at least one negative"):
        adversarial(torch.zeros(2, 1), torch.zeros(2, 1), form="paper")
    with pytest.raises(ValueError, match="targets"):
        contrastive(torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="excluded"):
        contrastive(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), excluded_BN=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="two dimensions"):
        ranker_cross_entropy(torch.zeros(4))


def test_unknown_names_are_refused() -> None:
    theta, phi = golden_scores()
    with pytest.raises(ValueError, match="printed"):
        adversarial(theta, phi, form="printed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="median"):
        adversarial(theta, phi, form="paper", reduction="median")  # type: ignore[arg-type]

"""IRGAN's losses against a brute force in float64, and its gradient against the policy gradient that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.objectives.irgan import Support, discriminator, generator, reward

SUPPORTS: list[Support] = ["group", "negatives"]
FIRST = {"group": 0, "negatives": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_scores(seed: int, num_queries: int = 3, num_documents: int = 5) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    retriever, ranker = (
        torch.randn(num_queries, num_documents, generator=random, dtype=torch.float64) * 2 for _ in range(2)
    )
    return retriever.requires_grad_(), ranker


def believed(score: float) -> float:
    """D: the probability that the ranker gives a document of being relevant."""
    return 1 / (1 + math.exp(-score))


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def gradient_of(loss: Tensor, scores: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, scores)
    return found


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_discriminator_equals_eq_3(scale: float) -> None:
    """Minus log D of the positive, minus the mean of log (1 - D) over the negatives, written in Python's floats."""
    _, ranker = random_scores(1)
    expected = 0.0
    for positive, *negatives in ranker.tolist():
        doubts = [math.log(1 - believed(scale * score)) for score in negatives]
        expected -= (math.log(believed(scale * positive)) + sum(doubts) / len(doubts)) / len(ranker)
    assert discriminator(ranker, score_scale=scale).item() == pytest.approx(expected, rel=1e-12)


def test_golden_values() -> None:
    """2 log 2 where nothing is known; log 2 of each expectation."""
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    assert discriminator(zeros).item() == pytest.approx(2 * math.log(2), rel=1e-12)
    for support in SUPPORTS:
        assert generator(zeros, zeros, support=support).item() == pytest.approx(-math.log(2), rel=1e-12)
    # p_theta = (1/3, 2/3) over the two negatives, D = (1/2, 3/4): (1/3) log(1/2) + (2/3) log(1/4).
    retriever, ranker = (
        torch.tensor([[5.0, 0.0, math.log(2)]]).double(),
        torch.tensor([[9.0, 0.0, math.log(3)]]).double(),
    )
    expected = math.log(1 / 2) / 3 + 2 * math.log(1 / 4) / 3
    assert generator(retriever, ranker, support="negatives").item() == pytest.approx(expected, rel=1e-6)


def test_all_negatives_together_weigh_as_much_as_the_positive() -> None:
    """Symptom: with n negatives the ranker learns to doubt everything."""
    scores = torch.zeros(1, 16, dtype=torch.float64, requires_grad=True)
    slopes = gradient_of(discriminator(scores), scores)[0]
    assert slopes[0].item() == pytest.approx(-0.5)
    assert slopes[1:].sum().item() == pytest.approx(0.5)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (20.0, 0.5)])
@pytest.mark.parametrize("support", SUPPORTS)
def test_the_generator_equals_brute_force(support: Support, scales: tuple[float, float]) -> None:
    retriever, ranker = random_scores(2)
    expected = 0.0
    for row_g, row_d in zip(retriever.tolist(), ranker.tolist(), strict=True):
        drawn = softmax([scales[0] * score for score in row_g[FIRST[support] :]])
        doubts = [math.log(1 - believed(scales[1] * score)) for score in row_d[FIRST[support] :]]
        expected += sum(p * doubt for p, doubt in zip(drawn, doubts, strict=True)) / len(retriever)
    found = generator(retriever, ranker, support=support, retriever_score_scale=scales[0], ranker_score_scale=scales[1])
    assert found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("support", SUPPORTS)
def test_gradients_by_finite_differences(support: Support) -> None:
    retriever, ranker = random_scores(3)
    assert torch.autograd.gradcheck(lambda scores: generator(scores, ranker, support=support), (retriever,))
    assert torch.autograd.gradcheck(discriminator, (ranker.clone().requires_grad_(),))


@pytest.mark.parametrize("baseline", ["none", "expected reward", "7.5"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_the_gradient_is_the_policy_gradient_whatever_the_baseline(support: Support, baseline: str) -> None:
    """E[(r - b) grad log p_theta(d)], the score function's form, summed over all documents that can be drawn."""
    retriever, ranker = random_scores(4)
    first = FIRST[support]
    found = gradient_of(generator(retriever, ranker, support=support), retriever)
    log_p, r = retriever[:, first:].log_softmax(1), reward(ranker)[:, first:]
    p = log_p.detach().exp()
    b = {"none": torch.zeros(len(p), 1), "expected reward": (p * r).sum(1, keepdim=True), "7.5": torch.tensor(7.5)}
    by_score_function = -(p * (r - b[baseline]) * log_p).sum(1).mean()
    torch.testing.assert_close(found, gradient_of(by_score_function, retriever))


def test_drawn_documents_estimate_the_same_gradient() -> None:
    """IRGAN's own estimate, the mean over documents that are drawn from p_theta, comes to ours within its noise."""
    retriever, ranker = random_scores(5, num_queries=1)
    found = gradient_of(generator(retriever, ranker, support="group"), retriever)[0]
    p, r = retriever.detach().softmax(1)[0], reward(ranker)[0]
    drawn = torch.multinomial(p, 40_000, replacement=True, generator=torch.Generator().manual_seed(1))
    # grad log p(d) = one-hot(d) - p
    terms = -(r[drawn] - (p * r).sum())[:, None] * (torch.eye(len(p), dtype=torch.float64)[drawn] - p)
    errors = terms.std(0) / math.sqrt(len(drawn))
    assert ((terms.mean(0) - found).abs() < 5 * errors).all()
    assert errors.max() < 0.05 * found.abs().max(), "otherwise it would agree with anything"


def test_raising_a_document_that_the_ranker_believes_lowers_the_loss() -> None:
    retriever, ranker = random_scores(6, num_queries=1)
    for support in SUPPORTS:
        slopes = gradient_of(generator(retriever, ranker, support=support), retriever)[0]
        group = ranker[0, FIRST[support] :]
        assert slopes[FIRST[support] + int(group.argmax())] < 0
        assert slopes[FIRST[support] + int(group.argmin())] > 0
    assert slopes[0] == 0, "over the negatives alone the positive is taught nothing"


def test_no_gradient_flows_into_the_ranker() -> None:
    retriever, ranker = random_scores(7)
    ranker.requires_grad_()
    generator(retriever, ranker, support="group").backward()
    assert ranker.grad is None
    assert retriever.grad is not None


def test_a_constant_added_to_a_querys_scores() -> None:
    """p_theta does not change; the ranker judges each document alone, so that its losses do."""
    retriever, ranker = random_scores(8)
    for support in SUPPORTS:
        loss = generator(retriever, ranker, support=support)
        torch.testing.assert_close(generator(retriever + 3, ranker, support=support), loss)
        assert generator(retriever, ranker + 3, support=support) < loss
    assert abs((discriminator(ranker + 3) - discriminator(ranker)).item()) > 0.1


def test_a_batch_is_the_mean_of_its_parts() -> None:
    """So that neither the number of ranks nor the cut into micro-batches changes the loss."""
    retriever, ranker = random_scores(9, num_queries=4)
    whole = torch.stack([discriminator(ranker), *(generator(retriever, ranker, support=one) for one in SUPPORTS)])
    halves = [
        torch.stack([discriminator(d), *(generator(g, d, support=one) for one in SUPPORTS)])
        for g, d in ((retriever[:2], ranker[:2]), (retriever[2:], ranker[2:]))
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


def test_half_precision_is_raised_and_extreme_scores_stay_finite() -> None:
    scores = torch.tensor([[4.0, 500.0, -500.0]], dtype=torch.bfloat16, requires_grad=True)
    for loss in (discriminator(scores), generator(scores, scores.detach(), support="group")):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient_of(loss, scores).isfinite().all()
    exact = discriminator(torch.tensor([[1.001, -1.001]]).double())
    torch.testing.assert_close(discriminator(torch.tensor([[1.001, -1.001]])).double(), exact, atol=1e-6, rtol=1e-6)


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one negative"):
        discriminator(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least one negative"):
        generator(torch.zeros(2, 1), torch.zeros(2, 1), support="group")
    with pytest.raises(ValueError, match="both score the same documents"):
        generator(torch.zeros(2, 3), torch.zeros(2, 1), support="group")
    with pytest.raises(ValueError, match="support is 'all', expected one of: group, negatives"):
        generator(torch.zeros(2, 3), torch.zeros(2, 3), support="all")  # type: ignore[arg-type]

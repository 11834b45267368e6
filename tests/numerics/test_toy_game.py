"""What Eq. 9 does to a retriever in a game of a few numbers: the scores themselves are what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config.ar2 import Ar2Config
from engine.losses import AdversarialForm
from engine.objectives.game import retriever_loss

NUM_QUERIES, STEPS = 200, 100


def scores(seed: int, gap: float, num_negatives: int = 15) -> Tensor:
    """Scores of positives, in column 0, that are above those of the negatives by a gap on average."""
    scores_BN = torch.randn(
        NUM_QUERIES, 1 + num_negatives, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scores_BN[:, 0] += gap
    return scores_BN


def reciprocal_rank(scores_BN: Tensor) -> float:
    return float((1 / (1 + (scores_BN[:, 1:] >= scores_BN[:, :1]).sum(1)).double()).mean())


def played(
    theta: Tensor, phi: Tensor, form: AdversarialForm, *, weight: float = 1.0, regulariser: float = 0.0
) -> Tensor:
    """Return the retriever's scores after a game against a fixed ranker."""
    game = Ar2Config(
        adversarial=form, adversarial_weight=weight, distillation_weight=regulariser, teacher="always", iterations=0
    )
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (NUM_QUERIES * retriever_loss(game, theta, phi)[0]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return theta.detach()


def test_eq_9_as_printed_alone_lowers_the_retriever_and_the_released_form_raises_it() -> None:
    """Symptom: AR2 without R (Table 6: R@1 57.8 against 58.7 with it) came out far below its own warm-up."""
    theta, phi = scores(0, 1.0), scores(1, 2.5)
    before = reciprocal_rank(theta)
    assert reciprocal_rank(phi) > before + 0.2, "a ranker that has much to teach"
    printed, released = played(theta, phi, "paper"), played(theta, phi, "released")
    assert reciprocal_rank(printed) < before - 0.05
    assert reciprocal_rank(released) > before + 0.3


def test_eq_9_as_printed_raises_the_negatives_that_fool_the_ranker_and_leaves_the_positive() -> None:
    theta, phi = scores(0, 1.0), scores(1, 2.5)
    after = played(theta, phi, "paper")
    assert torch.equal(after[:, 0], theta[:, 0])
    rows, fooling = torch.arange(NUM_QUERIES), 1 + phi[:, 1:].argmax(1)
    assert bool((after[rows, fooling] > theta[rows, fooling]).all())
    assert float((after[:, 1:].argmax(1) + 1 == fooling).double().mean()) > 0.5, "it found them"


def test_with_one_negative_eq_9_as_printed_teaches_nothing() -> None:
    """AR2's Table 4 reports gains at n = 1, which this form cannot have made."""
    theta, phi = scores(0, 1.0, 1), scores(1, 2.5, 1)
    assert torch.equal(played(theta, phi, "paper"), theta)
    assert reciprocal_rank(played(theta, phi, "released")) > reciprocal_rank(theta)


@pytest.mark.parametrize("form", ["paper", "with_positive", "released"])
def test_a_ranker_that_is_worse_drags_the_retriever_down_by_eq_12_and_more_by_eq_9(form: AdversarialForm) -> None:
    theta, phi = scores(0, 3.0), scores(1, 0.5)
    by_12 = reciprocal_rank(played(theta, phi, form, weight=0.0, regulariser=1.0))
    by_both = reciprocal_rank(played(theta, phi, form, weight=1.0, regulariser=1.0))
    assert by_both < by_12 < reciprocal_rank(theta)

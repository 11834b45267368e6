"""The penalty that makes a lexical retriever's vectors sparse, against a brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.objectives.lexical import flops, quadratic_rise


def random_weights(num_texts: int = 5, num_words: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num_texts, num_words, generator=generator, dtype=torch.float64).relu().requires_grad_()


def test_flops_equals_brute_force() -> None:
    weights_NV = random_weights()
    rows = weights_NV.tolist()
    expected = sum((sum(row[word] for row in rows) / len(rows)) ** 2 for word in range(len(rows[0])))
    assert float(flops(weights_NV).detach()) == pytest.approx(expected, rel=1e-12)
    assert flops(torch.zeros(3, 4)) == 0.0
    with pytest.raises(ValueError, match="two dimensions"):
        flops(torch.zeros(4))


def test_flops_is_the_mean_inner_product_of_two_texts() -> None:
    weights_NV = random_weights().detach()
    torch.testing.assert_close(flops(weights_NV), (weights_NV @ weights_NV.T).mean())


def test_flops_gradient_presses_a_words_texts_alike_and_common_words_more() -> None:
    weights_NV = random_weights()
    flops(weights_NV).backward()
    assert weights_NV.grad is not None
    expected_V = 2 * weights_NV.detach().mean(0) / len(weights_NV)
    torch.testing.assert_close(weights_NV.grad, expected_V.expand_as(weights_NV))
    assert torch.autograd.gradcheck(flops, (random_weights(),))


def test_one_words_weight_costs_more_in_all_texts_than_many_words_in_one_each() -> None:
    common = torch.zeros(4, 4)
    common[:, 0] = 1.0
    assert float(flops(common)) == 1.0
    assert float(flops(torch.eye(4))) == 0.25


def test_flops_of_means_of_equal_parts_is_that_of_the_whole() -> None:
    weights_NV = random_weights(6)
    parts = torch.stack([part.mean(0) for part in weights_NV.split(3)])
    torch.testing.assert_close(flops(parts), flops(weights_NV))


def test_flops_of_half_precision_is_computed_in_float32() -> None:
    weights_NV = torch.full((3, 1000), 1 / 3, dtype=torch.bfloat16)
    assert flops(weights_NV).dtype == torch.float32
    assert float(flops(weights_NV)) == pytest.approx(1000 * float(weights_NV[0, 0]) ** 2, rel=1e-5)


def test_the_penalty_rises_with_the_square_of_the_steps() -> None:
    assert [quadratic_rise(step, 4) for step in range(6)] == [1 / 16, 4 / 16, 9 / 16, 1.0, 1.0, 1.0]
    assert quadratic_rise(0, 0) == quadratic_rise(0, 1) == 1.0
    assert quadratic_rise(24_999, 50_000) == 0.25

"""The losses of distillation against a brute force in float64, and against what they are for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.losses import distillation, entropy, kl_distillation, margin_mse, score_mse

Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {"kl": kl_distillation, "margin_mse": margin_mse, "mse": score_mse}
SCALES = [(1.0, 1.0), (20.0, 0.5)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_scores(seed: int, num_queries: int = 3, num_documents: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(num_queries, num_documents, generator=generator, dtype=torch.float64) * 2 for _ in range(2)
    )
    return student.requires_grad_(), teacher


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def brute_force(name: str, student: list[float], teacher: list[float]) -> float:
    """One query, written with Python floats and loops from the definitions."""
    if name == "kl":
        pairs = zip(softmax(teacher), softmax(student), strict=True)
        return sum(t * (math.log(t) - math.log(s)) for t, s in pairs)
    if name == "margin_mse":
        margins = [(student[0] - s) - (teacher[0] - t) for s, t in zip(student[1:], teacher[1:], strict=True)]
        return sum(margin**2 for margin in margins) / len(margins)
    return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_brute_force(name: str, scales: tuple[float, float]) -> None:
    student, teacher = random_scores(1)
    expected = [
        brute_force(name, [scales[0] * score for score in row_s], [scales[1] * score for score in row_t])
        for row_s, row_t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    found = LOSSES[name](student, teacher, student_score_scale=scales[0], teacher_score_scale=scales[1])
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    student, teacher = random_scores(2)
    assert torch.autograd.gradcheck(lambda scores: LOSSES[name](scores, teacher), (student,))
    teacher.requires_grad_()
    LOSSES[name](student, teacher).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None, "the teacher is a constant"


@pytest.mark.parametrize("scales", SCALES)
def test_kl_has_the_gradient_of_the_cross_entropy_and_lacks_the_teachers_entropy(scales: tuple[float, float]) -> None:
    student, teacher = random_scores(3)
    kl = kl_distillation(student, teacher, student_score_scale=scales[0], teacher_score_scale=scales[1])
    cross = distillation(student, teacher, retriever_score_scale=scales[0], ranker_score_scale=scales[1])
    torch.testing.assert_close(kl, cross - entropy(teacher, score_scale=scales[1]))
    torch.testing.assert_close(torch.autograd.grad(kl, student)[0], torch.autograd.grad(cross, student)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_scores_as_the_teacher_has_nothing_to_learn(name: str) -> None:
    _, teacher = random_scores(4)
    student = teacher.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    gradient = torch.autograd.grad(loss, student)[0]
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert LOSSES[name](student * 1.1, teacher) > 1e-4


SHIFT = torch.tensor([[5.0], [-3.0], [0.5]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["kl", "margin_mse"])
def test_a_constant_added_to_a_querys_scores_changes_nothing(name: str) -> None:
    """What makes margins enough: a teacher that is known up to a constant a query teaches the same."""
    student, teacher = random_scores(5)
    loss = LOSSES[name](student, teacher)
    torch.testing.assert_close(LOSSES[name](student + SHIFT, teacher - 2 * SHIFT), loss)


def test_scores_themselves_are_compared_by_mse() -> None:
    student, teacher = random_scores(5)
    torch.testing.assert_close(score_mse(student + SHIFT, teacher + SHIFT), score_mse(student, teacher))
    assert not torch.allclose(score_mse(student + SHIFT, teacher), score_mse(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_negatives_does_not_matter_and_the_columns_belong_together(name: str) -> None:
    student, teacher = random_scores(6)
    order = torch.tensor([0, 3, 1, 4, 2])
    loss = LOSSES[name](student, teacher)
    torch.testing.assert_close(LOSSES[name](student[:, order], teacher[:, order]), loss)
    assert not torch.allclose(LOSSES[name](student[:, order], teacher), loss)


@pytest.mark.parametrize("name", LOSSES)
def test_a_document_that_the_teacher_likes_better_is_raised(name: str) -> None:
    """The sign: a step against the gradient moves the student's scores towards the teacher's order."""
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 3.0, -4.0]], dtype=torch.float64)
    gradient = torch.autograd.grad(LOSSES[name](student, teacher), student)[0][0]
    assert gradient[1] < 0 < gradient[2]


def test_margins_of_several_negatives_are_the_mean_over_pairs() -> None:
    student, teacher = random_scores(7)
    pairs = [margin_mse(student[:, [0, place]], teacher[:, [0, place]]) for place in range(1, 5)]
    torch.testing.assert_close(margin_mse(student, teacher), torch.stack(pairs).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_raised_and_extreme_scores_stay_finite(name: str) -> None:
    """Symptom: one confident score of the teacher turns the student's loss into inf or NaN."""
    student = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    loss = LOSSES[name](student, torch.tensor([[-400.0, 400.0, -400.0]]))
    assert bool(loss.isfinite())
    assert bool(torch.autograd.grad(loss, student)[0].isfinite().all())
    assert LOSSES[name](student.bfloat16(), torch.zeros(1, 3)).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"student scores have shape \(2, 4\), teacher scores \(2, 1\); both"):
        LOSSES[name](torch.zeros(2, 4), torch.zeros(2, 1))


def test_a_margin_needs_a_negative() -> None:
    with pytest.raises(ValueError, match="at least one negative"):
        margin_mse(torch.zeros(2, 1), torch.zeros(2, 1))

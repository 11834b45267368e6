"""The objective of distillation: which loss of which scores, and what happens where there is no score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine import losses
from engine.config.distillation import DistillationConfig, student_phase
from engine.data.batches import Samples
from engine.data.teacher_scores import TeacherScores, scores_of_queries
from engine.errors import ConfigError, DataError
from engine.metrics import Metric
from engine.objectives import no_negatives
from engine.objectives.distillation import Distillation, DistillationInBatch, require_scores, student_loss
from tests.unit.engine.objectives.tables import (
    N_DOCUMENTS,
    N_QUERIES,
    STAMP,
    Numbers,
    Student,
    samples,
    teacher_score,
)

STUDENT = torch.tensor([[2.0, 1.0, 0.5], [0.1, 0.3, -0.2]])
TEACHER = torch.tensor([[1.0, 3.0, -1.0], [4.0, 0.5, 0.2]])


def settings(**values: Any) -> DistillationConfig:
    return DistillationConfig(**values)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "function"), [("kl", losses.kl_distillation), ("margin_mse", losses.margin_mse), ("mse", losses.score_mse)]
)
def test_the_loss_is_the_one_that_is_named_with_both_scales(loss: str, function: Any) -> None:
    found, parts = student_loss(settings(loss=loss, teacher_score_scale=0.5), STUDENT, TEACHER, score_scale=3.0)
    expected = function(STUDENT, TEACHER, student_score_scale=3.0, teacher_score_scale=0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(parts["distillation"], expected)


def test_the_contrastive_loss_is_replaced_unless_it_has_a_weight() -> None:
    """R2ANKER Appendix C replaces it; SimLM adds it with 0.2."""
    kl = losses.kl_distillation(STUDENT, TEACHER, student_score_scale=2.0)
    contrast = losses.ranker_cross_entropy(STUDENT, score_scale=2.0)
    torch.testing.assert_close(student_loss(settings(), STUDENT, TEACHER, score_scale=2.0)[0], kl)
    loss, parts = student_loss(settings(contrastive_weight=0.2), STUDENT, TEACHER, score_scale=2.0)
    torch.testing.assert_close(loss, kl + 0.2 * contrast)
    torch.testing.assert_close(parts["contrastive"], contrast)


def test_what_is_measured_of_student_and_teacher() -> None:
    student = STUDENT.clone().requires_grad_()
    _, parts = student_loss(settings(), student, TEACHER)
    assert {name: float(parts[name]) for name in ("accuracy", "teacher_accuracy", "agreement")} == {
        "accuracy": 0.5,
        "teacher_accuracy": 0.5,
        "agreement": 0.0,
    }
    assert not any(part.requires_grad for part in parts.values())


# --- a step ----------------------------------------------------------------------------------------------------------


def teacher(*, without: tuple[str, int] | None = None) -> TeacherScores:
    pairs = []
    for row in range(N_QUERIES):
        qid, documents = f"q{row}", [row, *range(N_QUERIES, N_DOCUMENTS)]
        kept = [document for document in documents if (qid, document) != without]
        said = np.array([teacher_score(qid, document) for document in kept], dtype=np.float32)
        pairs.append((qid, np.array(kept, dtype=np.int64), said))
    return scores_of_queries("ranker", STAMP, pairs)


def step_of(drawn: Samples, student: Student, config: DistillationConfig, step: int = 0) -> dict[str, Metric]:
    objective = Distillation(drawn, Numbers(), teacher(), config, score_scale=2.0)  # type: ignore[arg-type]
    return objective.backward(student, objective.prepare(step))  # type: ignore[arg-type]


@pytest.mark.parametrize("micro_batch_size", [4, 1, 3])
def test_a_step_is_the_loss_of_all_its_queries_however_it_is_cut(micro_batch_size: int) -> None:
    """The teacher's scores stay with their documents, and the gradient is that of the whole batch at once."""
    drawn, student = samples(micro_batch_size=micro_batch_size), Student()
    metrics = step_of(drawn, student, settings())
    reference, groups = Student(), drawn.groups(0)
    scores_BN = torch.stack(
        [reference.of_documents[torch.from_numpy(g.documents)] @ reference.of_queries[g.query] for g in groups]
    )
    said_BN = torch.tensor(
        [[teacher_score(f"q{g.query}", document) for document in g.documents.tolist()] for g in groups]
    )
    loss = losses.kl_distillation(scores_BN, said_BN, student_score_scale=2.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(metrics["loss"].value) == pytest.approx(loss.item(), rel=1e-5)
    for found, expected in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert float(metrics["tokens"].value) > 0


@pytest.mark.parametrize("micro_batch_size", [4, 1, 3])
def test_the_contrast_of_the_batch_stands_beside_the_teachers_scores(micro_batch_size: int) -> None:
    """By hand: KL over a query's own three documents, and the positive's likelihood among all that are negatives."""
    config = settings(contrastive_weight=0.2, contrastive_negatives="batch")
    drawn, student = samples(micro_batch_size=micro_batch_size, pool_of="world"), Student()
    objective = DistillationInBatch(drawn, Numbers(), teacher(), config, score_scale=2.0)  # type: ignore[arg-type]
    metrics = objective.backward(student, objective.prepare(0))  # type: ignore[arg-type]
    reference, groups = Student(), drawn.groups(0)
    every = torch.from_numpy(np.concatenate([g.documents for g in groups]))
    banned = no_negatives(drawn.data, groups, groups)
    rows = []
    for place, g in enumerate(groups):
        scores_P = 2.0 * (reference.of_documents[every] @ reference.of_queries[g.query])
        own = slice(3 * place, 3 * place + 3)
        said = torch.tensor([teacher_score(f"q{g.query}", document) for document in g.documents.tolist()])
        kl = (said.softmax(0) * (said.log_softmax(0) - scores_P[own].log_softmax(0))).sum()
        allowed = [p for p in range(12) if p == 3 * place or not banned[place, p]]
        rows.append(kl - 0.2 * scores_P[allowed].log_softmax(0)[allowed.index(3 * place)])
    loss = torch.stack(rows).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(metrics["loss"].value) == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < float(metrics["distillation"].value) < float(metrics["loss"].value)
    for found, expected in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_two_ranks_share_what_one_has() -> None:
    whole, halves = Student(), [Student(), Student()]
    step_of(samples(), whole, settings(loss="margin_mse"))
    for rank, half in enumerate(halves):
        step_of(samples(rank, 2), half, settings(loss="margin_mse"))
    for expected, one, other in zip(whole.parameters(), halves[0].parameters(), halves[1].parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close((one.grad + other.grad) / 2, expected.grad)


@pytest.mark.parametrize("loss", ["kl", "margin_mse", "mse"])
def test_a_student_learns_the_teachers_order(loss: str) -> None:
    student, drawn = Student(), samples(steps=200)
    optimizer, measured = torch.optim.Adam(student.parameters(), lr=0.05), []
    for step in range(200):
        optimizer.zero_grad()
        measured.append(float(step_of(drawn, student, settings(loss=loss), step)["distillation"].value))
        optimizer.step()
    assert np.mean(measured[-10:]) < 0.01 * np.mean(measured[:10])
    said = torch.tensor([[teacher_score(f"q{row}", document) for document in range(4, 12)] for row in range(4)])
    learnt = student.of_queries.detach() @ student.of_documents.detach()[4:].T
    assert torch.equal(learnt.argmax(1), said.argmax(1))


# --- what is not scored ----------------------------------------------------------------------------------------------


def drawn_pair(drawn: Samples, *, place: int) -> tuple[str, int]:
    group = drawn.groups(2)[1]
    return f"q{group.query}", int(group.documents[place])


@pytest.mark.parametrize(("place", "what"), [(0, "positive"), (2, "negative")])
def test_a_drawn_document_without_a_score_is_named_before_the_first_step(place: int, what: str) -> None:
    """Symptom guarded against: a NaN among the targets, which the guards find hours later as a loss."""
    drawn = samples()
    qid, document = drawn_pair(drawn, place=place)
    scores = teacher(without=(qid, document))
    message = (
        rf"the {what} 'd{document}' of query '{qid}' has no score of ranker, nor have 0 more of the 3 documents that "
        r"student draws for it in a step; 8 documents of the query are scored.*score the candidates"
    )
    with pytest.raises(DataError, match=message):
        require_scores(drawn, scores)
    objective = Distillation(drawn, Numbers(), scores, settings(), score_scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        objective.prepare(2)


def test_each_rank_looks_at_its_share_of_the_steps_and_together_they_see_all() -> None:
    qid, document = drawn_pair(samples(), place=1)
    scores, found = teacher(without=(qid, document)), 0
    for rank in range(2):
        try:
            require_scores(samples(rank, 2), scores)
        except DataError:
            found += 1
    assert found >= 1
    require_scores(samples(), teacher())


def test_margins_alone_do_not_teach_scores() -> None:
    scores = teacher()
    scores.margins_only = True
    Distillation(samples(), Numbers(), scores, settings(loss="margin_mse"), score_scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"scores of ranker are margins.*set loss to kl or margin_mse"):
        Distillation(samples(), Numbers(), scores, settings(loss="mse"), score_scale=1.0)  # type: ignore[arg-type]


# --- the section -----------------------------------------------------------------------------------------------------


def test_the_sections_defaults_are_the_papers() -> None:
    """R2ANKER Appendix C: KL alone, 5e-5, 16 x (1 positive and 10 negatives), 4 epochs."""
    found = settings()
    assert (found.loss, found.contrastive_weight, found.optim.lr) == ("kl", 0.0, 5e-5)
    assert (found.batch_size, found.num_negatives, found.epochs) == (16, 10, 4.0)


def test_a_row_of_the_timetable_has_the_sections_numbers() -> None:
    names: dict[str, Any] = {"model": "student", "candidates": "joint", "iteration": 1, "section": "r.student"}
    phase = student_phase(settings(), num_queries=1000, **names)
    assert (phase.steps, phase.batch_size, phase.num_negatives, phase.pool) == (250, 16, 10, "none")
    assert (phase.visits[0].stage, phase.visits[0].iteration, phase.visits[0].candidates) == ("student", 1, "joint")
    phase = student_phase(
        settings(steps=7, contrastive_weight=0.2, contrastive_negatives="batch"), num_queries=None, **names
    )
    assert (phase.steps, phase.pool) == (7, "world")
    with pytest.raises(ConfigError, match=r"r\.student\.epochs"):
        student_phase(settings(), num_queries=None, **names)


def test_negatives_of_a_loss_without_a_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"contrastive_weight 0 leaves that loss out.*give it a weight"):
        settings(contrastive_negatives="batch")


@pytest.mark.parametrize("values", [{"scores_are": "probabilities"}, {"trust_pickle": True}])
def test_words_about_a_file_that_is_not_named_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name a file by `scores`"):
        settings(**values)
    settings(scores="scores.jsonl", **values)

"""The objectives of the phases: which losses, weighed how, over which documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import losses
from engine.config.ar2 import Ar2Config
from engine.config.lexical import FlopsConfig
from engine.config.timetable import Phase
from engine.config.training import OptimConfig
from engine.data.batches import Group, Samples
from engine.data.corpus import TrainingQueries
from engine.objectives import no_negatives
from engine.objectives.contrast import InBatchContrast
from engine.objectives.game import retriever_loss
from engine.objectives.lexical import LexicalContrast
from shards.records import Query

G_BN = torch.tensor([[2.0, 1.0, 0.5], [0.1, 0.3, -0.2]])
D_BN = torch.tensor([[1.0, 3.0, -1.0], [0.0, 0.5, 0.2]])


def game(**values: Any) -> Ar2Config:
    """The paper's game, whose ranker teaches every group, with Eq. 9 as heavy as Eq. 12, unless it is said."""
    return Ar2Config(**{"teacher": "always", "adversarial_weight": 1.0} | values)


# --- the retriever's objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "with_positive", "released"])
def test_the_objective_is_the_weighed_sum_of_eq_9_and_eq_12(form: str) -> None:
    loss, parts = retriever_loss(game(adversarial=form, adversarial_weight=0.5, distillation_weight=2.0), G_BN, D_BN)
    eq_9 = losses.adversarial(G_BN, D_BN, form=form)  # type: ignore[arg-type]
    eq_12 = losses.distillation(G_BN, D_BN)
    torch.testing.assert_close(loss, 0.5 * eq_9 + 2.0 * eq_12)
    torch.testing.assert_close(parts["adversarial"], eq_9)
    torch.testing.assert_close(parts["distillation"], eq_12)
    torch.testing.assert_close(parts["loss"], loss)


def test_a_weight_of_zero_leaves_a_part_out_of_the_loss_but_in_the_log() -> None:
    loss, parts = retriever_loss(game(adversarial_weight=0.0), G_BN, D_BN)
    torch.testing.assert_close(loss, losses.distillation(G_BN, D_BN))
    assert parts["adversarial"] < 0
    loss, parts = retriever_loss(game(distillation_weight=0.0), G_BN, D_BN)
    torch.testing.assert_close(loss, losses.adversarial(G_BN, D_BN, form="paper"))
    assert parts["distillation"] > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_the_sum_is_scaled_by_the_reference_batch_whatever_the_batch_is(batch: int) -> None:
    """The released code sums over the queries of a GPU; here the form must not depend on the number of ranks."""
    rows = slice(0, batch)
    _, parts = retriever_loss(game(adversarial_reduction="sum", reference_batch_size=8), G_BN[rows], D_BN[rows])
    torch.testing.assert_close(parts["adversarial"], 8 * losses.adversarial(G_BN[rows], D_BN[rows], form="paper"))
    torch.testing.assert_close(parts["distillation"], losses.distillation(G_BN[rows], D_BN[rows]))


def test_the_scales_of_both_models_reach_all_parts() -> None:
    scales = {"retriever_score_scale": 3.0, "ranker_score_scale": 0.5}
    loss, parts = retriever_loss(game(), G_BN, D_BN, **scales)
    expected = losses.adversarial(G_BN, D_BN, form="paper", **scales) + losses.distillation(G_BN, D_BN, **scales)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["reward"], losses.pairwise_reward(D_BN, score_scale=0.5).mean())
    torch.testing.assert_close(parts["entropy"], losses.entropy(G_BN, score_scale=3.0))


def test_no_gradient_flows_into_the_ranker() -> None:
    retriever_BN, ranker_BN = G_BN.clone().requires_grad_(), D_BN.clone().requires_grad_()
    loss, parts = retriever_loss(game(), retriever_BN, ranker_BN)
    loss.backward()
    assert ranker_BN.grad is None
    assert retriever_BN.grad is not None
    assert retriever_BN.grad.abs().sum() > 0
    assert not any(part.requires_grad for part in parts.values())


def test_accuracies_are_how_often_the_positive_wins() -> None:
    _, parts = retriever_loss(game(), G_BN, D_BN)
    assert (float(parts["accuracy"]), float(parts["ranker_accuracy"])) == (0.5, 0.0)


# --- the warm-up's pool ----------------------------------------------------------------------------------------------


def data_of(positives: Sequence[Sequence[int]]) -> Any:
    arrays, nothing = [np.array(known) for known in positives], [[1]] * len(positives)
    queries = [Query(f"q{row}", "text") for row in range(len(positives))]
    return SimpleNamespace(train=TrainingQueries(queries, arrays, {"retriever": nothing}))


def group(query: int, *documents: int) -> Group:
    return Group(query, np.array(documents, dtype=np.int64))


def test_a_passage_that_two_queries_share_is_no_negative_of_either() -> None:
    data = data_of([[5], [5], [7, 8]])
    pool = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 8)]
    assert no_negatives(data, pool, pool).tolist() == [
        [True, False, True, False, False, False],
        [True, False, True, False, False, False],
        [False, False, False, False, True, True],
    ]


def test_the_document_that_is_the_query_is_no_negative_in_the_batch_either() -> None:
    """Symptom: where two questions ask the same, each is the other's positive, and was pushed away from itself."""
    data = data_of([[1], [0]])
    data.train = replace(data.train, own_documents={"q0": 0, "q1": 1})
    pool = [group(0, 1, 5), group(1, 0, 6)]
    assert no_negatives(data, pool, pool).tolist() == [[True, False, True, False]] * 2


def test_a_known_false_negative_is_no_negative_in_the_batch_either() -> None:
    data = data_of([[5], [7]])
    data.train = replace(data.train, false_negatives=[np.array([7]), np.array([], dtype=np.int64)])
    pool = [group(0, 5, 1), group(1, 7, 5)]
    assert no_negatives(data, pool, pool).tolist() == [[True, False, True, True], [False, False, True, False]]


def test_a_rank_marks_its_own_queries_against_everybodys_documents() -> None:
    data = data_of([[5], [5], [7]])
    pool = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 9)]
    assert no_negatives(data, pool[1:2], pool).tolist() == [[True, False, True, False, False, False]]


def warmup_loss(
    groups: list[Group],
    data: Any,
    embeddings: tuple[torch.Tensor, torch.Tensor],
    score_scale: float = 1.0,
    *,
    penalty: FlopsConfig | None = None,
    step: int = 0,
) -> dict[str, float]:
    """The warm-up's loss of given embeddings, without any model; a lexical retriever's with a penalty."""
    phase = Phase("warmup_retriever", "", "retriever", 1, len(groups), 8, 1, OptimConfig(), ("bm25",), pool="world")
    samples = Samples(phase.visits[0], 0, data, None, 0, 1)  # type: ignore[arg-type]
    builder: Any = NoTokens()
    objective = (
        InBatchContrast(samples, builder, score_scale=score_scale)
        if penalty is None
        else LexicalContrast(samples, builder, score_scale=score_scale, penalty=penalty)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "groups", lambda self, step: groups)
        batch = objective.prepare(step)
    return {
        name: float(metric.value) for name, metric in objective.backward(GivenEmbeddings(embeddings), batch).items()
    }  # type: ignore[arg-type]


class NoTokens:
    """Stands for a builder of inputs."""

    def queries(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        return {"attention_mask": torch.zeros(1, 1)}

    documents = queries

    def tokens_of_texts(self, group: Group) -> int:
        return 1


class GivenEmbeddings:
    """Stands for a retriever's engine."""

    def __init__(self, embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._embeddings = embeddings

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._embeddings

    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...


def test_every_document_of_the_batch_is_a_negative_but_the_querys_own_positives() -> None:
    """Eq. 2 by hand: queries 0 and 1 share their positive, so each has three negatives and not four."""
    groups = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 3)]
    generator = torch.Generator().manual_seed(0)
    queries_BD, documents_ND = torch.randn(3, 4, generator=generator), torch.randn(6, 4, generator=generator)
    measured = warmup_loss(groups, data_of([[5], [5], [7]]), (queries_BD, documents_ND))
    scores = (queries_BD @ documents_ND.T).double()
    pools = {0: [0, 1, 3, 4, 5], 1: [2, 1, 3, 4, 5], 2: [4, 0, 1, 2, 3, 5]}
    expected = [-torch.log_softmax(scores[row, pool], 0)[0] for row, pool in pools.items()]
    assert measured["loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_a_shared_passage_that_scores_higher_does_not_count_as_an_error() -> None:
    groups = [group(0, 5, 1), group(1, 5, 2)]
    queries_BD = torch.eye(2)
    documents_ND = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.5, 1.0], [0.0, 0.0]])
    measured = warmup_loss(groups, data_of([[5], [5]]), (queries_BD, documents_ND))
    assert measured["accuracy"] == 1.0


def test_the_scale_multiplies_the_scores_of_the_warm_up() -> None:
    groups = [group(0, 5, 1), group(1, 6, 2)]
    embeddings = (torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    loss = {scale: warmup_loss(groups, data_of([[5], [6]]), embeddings, scale)["loss"] for scale in (1.0, 20.0)}
    assert loss[1.0] == pytest.approx(float(torch.log(1 + 3 * torch.exp(torch.tensor(-1.0)))), rel=1e-5)
    assert loss[20.0] < 1e-6


def test_equal_scores_have_no_spread() -> None:
    groups = [group(0, 5, 1), group(1, 6, 2)]
    for documents, spread in ((torch.ones(4, 2), 0.0), (torch.eye(2).repeat(2, 1), 1.0)):
        measured = warmup_loss(groups, data_of([[5], [6]]), (torch.eye(2), documents))
        assert measured["score_spread"] == spread


# --- a lexical retriever's objective ---------------------------------------------------------------------------------


def lexical_case() -> tuple[list[Group], Any, tuple[torch.Tensor, torch.Tensor]]:
    groups = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 3)]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 8, generator=generator).relu(), torch.randn(6, 8, generator=generator).relu()
    return groups, data_of([[5], [5], [7]]), weights


@pytest.mark.parametrize(("step", "rise"), [(0, 1 / 16), (1, 4 / 16), (3, 1.0), (90, 1.0)])
def test_the_lexical_loss_is_the_contrast_and_the_penalty_of_both_sides(step: int, rise: float) -> None:
    case, penalty = lexical_case(), FlopsConfig(query_flops=0.5, document_flops=0.25, flops_steps=4)
    plain = warmup_loss(*case, 1.5)
    found = warmup_loss(*case, 1.5, penalty=penalty, step=step)
    queries_BV, documents_NV = (weights.double() for weights in case[2])
    of_queries = float(sum((column.sum() / 3) ** 2 for column in queries_BV.T))
    of_documents = float(sum((column.sum() / 6) ** 2 for column in documents_NV.T))
    assert found["contrastive"] == pytest.approx(plain["loss"], rel=1e-6)
    assert found["flops_query"] == pytest.approx(of_queries, rel=1e-5)
    assert found["flops_document"] == pytest.approx(of_documents, rel=1e-5)
    expected = plain["loss"] + rise * (0.5 * of_queries + 0.25 * of_documents)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert (found["accuracy"], found["score_spread"]) == (plain["accuracy"], plain["score_spread"])


def test_the_terms_of_a_text_are_counted() -> None:
    groups, data, (queries_BV, documents_NV) = lexical_case()
    found = warmup_loss(groups, data, (queries_BV, documents_NV), penalty=FlopsConfig())
    assert found["query_terms"] == sum(float(weight > 0) for row in queries_BV for weight in row) / 3
    assert found["document_terms"] == sum(float(weight > 0) for row in documents_NV for weight in row) / 6
    assert 0 < found["query_terms"] < 8

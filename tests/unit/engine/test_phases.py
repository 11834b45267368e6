"""The objectives of the phases: which losses, weighed how, over which documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import losses, phases
from engine.config.file import parse_config
from engine.config.recipe import Config
from engine.data.batches import BatchPlan, Group
from engine.data.corpus import TrainingQueries
from engine.phases import _batch_ids, _chunk_seed, _contrastive_objective, _no_negatives, retriever_loss
from engine.run import Run, Stage
from shards.records import Query

Open = Callable[..., Run]
G_BN = torch.tensor([[2.0, 1.0, 0.5], [0.1, 0.3, -0.2]])
D_BN = torch.tensor([[1.0, 3.0, -1.0], [0.0, 0.5, 0.2]])


def config(retriever: dict[str, Any] | None = None, ranker: dict[str, Any] | None = None, **ar2: Any) -> Config:
    tree = {
        "run": {"path": "nowhere"},
        "retriever": {"name": "random", **(retriever or {})},
        "ranker": {"name": "random", **(ranker or {})},
        "ar2": ar2,
    }
    return parse_config(tree, origin="test")


# --- the retriever's objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "with_positive", "released"])
def test_the_objective_is_the_weighed_sum_of_eq_9_and_eq_12(form: str) -> None:
    loss, parts = retriever_loss(config(adversarial=form, adversarial_weight=0.5, distillation_weight=2.0), G_BN, D_BN)
    eq_9 = losses.adversarial(G_BN, D_BN, form=form)  # type: ignore[arg-type]
    eq_12 = losses.distillation(G_BN, D_BN)
    torch.testing.assert_close(loss, 0.5 * eq_9 + 2.0 * eq_12)
    torch.testing.assert_close(parts["adversarial"], eq_9)
    torch.testing.assert_close(parts["distillation"], eq_12)
    torch.testing.assert_close(parts["loss"], loss)


def test_a_weight_of_zero_leaves_a_part_out_of_the_loss_but_in_the_log() -> None:
    loss, parts = retriever_loss(config(adversarial_weight=0.0), G_BN, D_BN)
    torch.testing.assert_close(loss, losses.distillation(G_BN, D_BN))
    assert parts["adversarial"] < 0
    loss, parts = retriever_loss(config(distillation_weight=0.0), G_BN, D_BN)
    torch.testing.assert_close(loss, losses.adversarial(G_BN, D_BN, form="paper"))
    assert parts["distillation"] > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_the_sum_is_scaled_by_the_reference_batch_whatever_the_batch_is(batch: int) -> None:
    """The released code sums over the queries of a GPU; here the form must not depend on the number of ranks."""
    rows = slice(0, batch)
    _, parts = retriever_loss(config(adversarial_reduction="sum", reference_batch_size=8), G_BN[rows], D_BN[rows])
    torch.testing.assert_close(parts["adversarial"], 8 * losses.adversarial(G_BN[rows], D_BN[rows], form="paper"))
    torch.testing.assert_close(parts["distillation"], losses.distillation(G_BN[rows], D_BN[rows]))


def test_the_scales_of_both_models_reach_all_parts() -> None:
    scales = {"retriever_score_scale": 3.0, "ranker_score_scale": 0.5}
    loss, parts = retriever_loss(config({"score_scale": 3.0}, {"score_scale": 0.5}), G_BN, D_BN)
    expected = losses.adversarial(G_BN, D_BN, form="paper", **scales) + losses.distillation(G_BN, D_BN, **scales)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["reward"], losses.pairwise_reward(D_BN, score_scale=0.5).mean())
    torch.testing.assert_close(parts["entropy"], losses.entropy(G_BN, score_scale=3.0))


def test_no_gradient_flows_into_the_ranker() -> None:
    retriever_BN, ranker_BN = G_BN.clone().requires_grad_(), D_BN.clone().requires_grad_()
    loss, parts = retriever_loss(config(), retriever_BN, ranker_BN)
    loss.backward()
    assert ranker_BN.grad is None
    assert retriever_BN.grad is not None
    assert retriever_BN.grad.abs().sum() > 0
    assert not any(part.requires_grad for part in parts.values())


def test_accuracies_are_how_often_the_positive_wins() -> None:
    _, parts = retriever_loss(config(), G_BN, D_BN)
    assert (float(parts["accuracy"]), float(parts["ranker_accuracy"])) == (0.5, 0.0)


# --- the warm-up's pool ----------------------------------------------------------------------------------------------


def data_of(positives: Sequence[Sequence[int]]) -> Any:
    arrays, nothing = [np.array(known) for known in positives], [[1]] * len(positives)
    queries = [Query(f"q{row}", "text") for row in range(len(positives))]
    return SimpleNamespace(train=TrainingQueries(queries, arrays, nothing, nothing))


def group(query: int, *documents: int) -> Group:
    return Group(query, np.array(documents, dtype=np.int64))


def test_a_passage_that_two_queries_share_is_no_negative_of_either() -> None:
    data = data_of([[5], [5], [7, 8]])
    pool = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 8)]
    assert _no_negatives(data, pool, pool).tolist() == [
        [True, False, True, False, False, False],
        [True, False, True, False, False, False],
        [False, False, False, False, True, True],
    ]


def test_a_known_false_negative_is_no_negative_in_the_batch_either() -> None:
    data = data_of([[5], [7]])
    data.train = replace(data.train, false_negatives=[np.array([7]), np.array([], dtype=np.int64)])
    pool = [group(0, 5, 1), group(1, 7, 5)]
    assert _no_negatives(data, pool, pool).tolist() == [[True, False, True, True], [False, False, True, False]]


def test_a_rank_marks_its_own_queries_against_everybodys_documents() -> None:
    data = data_of([[5], [5], [7]])
    pool = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 9)]
    assert _no_negatives(data, pool[1:2], pool).tolist() == [[True, False, True, False, False, False]]


def warmup_loss(
    run: Run, monkeypatch: pytest.MonkeyPatch, groups: list[Group], data: Any, embeddings: tuple[torch.Tensor, ...]
) -> dict[str, float]:
    """The warm-up's loss of given embeddings, without any model."""

    def backward(model: Any, chunks: Any, loss_of: Any, chunk_seed: Any) -> Any:
        return loss_of(*embeddings)[1]

    nothing = {"attention_mask": torch.zeros(1, 1)}
    monkeypatch.setattr(phases, "contrastive_backward", backward)
    monkeypatch.setattr(phases, "step_groups", lambda *_: groups)
    monkeypatch.setattr(phases, "query_batch", lambda *_: nothing)
    monkeypatch.setattr(phases, "document_batch", lambda *_: nothing)
    plan = BatchPlan("warmup_retriever", 0, len(groups), 1, 0, 1)
    objective = _contrastive_objective(Stage(run, "warmup_retriever"), plan, data, None)  # type: ignore[arg-type]
    return {name: float(metric.value) for name, metric in objective(None, 0).items()}  # type: ignore[arg-type]


def test_every_document_of_the_batch_is_a_negative_but_the_querys_own_positives(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eq. 2 by hand: queries 0 and 1 share their positive, so each has three negatives and not four."""
    groups = [group(0, 5, 1), group(1, 5, 2), group(2, 7, 3)]
    generator = torch.Generator().manual_seed(0)
    queries_BD, documents_ND = torch.randn(3, 4, generator=generator), torch.randn(6, 4, generator=generator)
    measured = warmup_loss(open_run(), monkeypatch, groups, data_of([[5], [5], [7]]), (queries_BD, documents_ND))
    scores = (queries_BD @ documents_ND.T).double()
    pools = {0: [0, 1, 3, 4, 5], 1: [2, 1, 3, 4, 5], 2: [4, 0, 1, 2, 3, 5]}
    expected = [-torch.log_softmax(scores[row, pool], 0)[0] for row, pool in pools.items()]
    assert measured["loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_a_shared_passage_that_scores_higher_does_not_count_as_an_error(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [group(0, 5, 1), group(1, 5, 2)]
    queries_BD = torch.eye(2)
    documents_ND = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.5, 1.0], [0.0, 0.0]])
    measured = warmup_loss(open_run(), monkeypatch, groups, data_of([[5], [5]]), (queries_BD, documents_ND))
    assert measured["accuracy"] == 1.0


def test_the_scale_multiplies_the_scores_of_the_warm_up(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(0, 5, 1), group(1, 6, 2)]
    embeddings = (torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    loss = {
        scale: warmup_loss(
            open_run(f"retriever.score_scale={scale}"), monkeypatch, groups, data_of([[5], [6]]), embeddings
        )["loss"]
        for scale in (1.0, 20.0)
    }
    assert loss[1.0] == pytest.approx(float(torch.log(1 + 3 * torch.exp(torch.tensor(-1.0)))), rel=1e-5)
    assert loss[20.0] < 1e-6


# --- any number of ranks ---------------------------------------------------------------------------------------------


def plan_of(rank: int, world_size: int) -> BatchPlan:
    return BatchPlan("retriever", 0, 12, 1, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_micro_batch_draws_the_same_dropout_on_whichever_rank_it_is(open_run: Open, world_size: int) -> None:
    """Symptom: resumed on another number of ranks, a run with dropout trains on to other weights."""
    stage, share = Stage(open_run(), "retriever/1"), 12 // world_size
    alone = [_chunk_seed(stage, plan_of(0, 1), 5, 2)(number) for number in range(6)]
    shared = [
        _chunk_seed(stage, plan_of(rank, world_size), 5, 2)(number)
        for rank in range(world_size)
        for number in range(share // 2)
    ]
    assert shared == alone
    assert len(set(alone)) == 6


def test_a_step_is_named_rank_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(row, row, 11) for row in range(12)]
    monkeypatch.setattr(phases, "step_groups", lambda plan, data, candidates, step: groups if step == 7 else [])
    data = data_of([[row] for row in range(12)])
    data.shards = SimpleNamespace(docids=[f"d{number}" for number in range(12)])
    ids = _batch_ids(plan_of(1, 3), data, None)(7)  # type: ignore[arg-type]
    assert [entry["rank"] for entry in ids] == [0] * 4 + [1] * 4 + [2] * 4
    assert ids[5] == {"rank": 1, "query": "q5", "documents": ["d5", "d11"]}


def test_equal_scores_have_no_spread(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(0, 5, 1), group(1, 6, 2)]
    for documents, spread in ((torch.ones(4, 2), 0.0), (torch.eye(2).repeat(2, 1), 1.0)):
        measured = warmup_loss(open_run(), monkeypatch, groups, data_of([[5], [6]]), (torch.eye(2), documents))
        assert measured["score_spread"] == spread

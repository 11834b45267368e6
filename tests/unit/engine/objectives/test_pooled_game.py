"""The game with the contrast of the batch beside it: which loss, however a step is cut; what the ranker is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config.ar2 import Ar2Config
from engine.data.batches import Group, Samples
from engine.metrics import Metric
from engine.objectives import no_negatives
from engine.objectives.game import AdversarialGame, retriever_loss
from engine.objectives.pooled_game import AdversarialGameInBatch
from engine.training.micro_batches import _cut_by
from tests.unit.engine.objectives.tables import Numbers, Student, samples, teacher_score


class Pairs:
    """Stands for the builder of a ranker's inputs, and for the ranker: a pair is a query's and a document's number."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def pairs(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        rows = [(group.query, document) for group in groups for document in group.documents.tolist()]
        return {"numbers": torch.tensor(rows), "attention_mask": torch.ones(len(rows), 1)}

    def tokens_of_pairs(self, group: Group) -> int:
        return 1

    def __call__(self, pairs: dict[str, Tensor]) -> Tensor:
        self.asked.append(pairs["numbers"])
        return torch.tensor([teacher_score(f"q{query}", document) for query, document in pairs["numbers"].tolist()])


def game(**values: Any) -> Ar2Config:
    return Ar2Config(**{"contrastive_weight": 0.4, "in_batch_negatives": "world", "num_negatives": 2} | values)


def step_of(drawn: Samples, student: Student, config: Ar2Config, of: type[AdversarialGame]) -> dict[str, Metric]:
    ranker = Pairs()
    objective = of(drawn, Numbers(), ranker, ranker, config, score_scales=(2.0, 0.5))  # type: ignore[arg-type]
    return objective.backward(student, objective.prepare(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("micro_batch_size", [4, 1, 3])
def test_the_contrast_of_the_batch_stands_beside_the_game(micro_batch_size: int) -> None:
    """By hand: the game over a query's own three documents, and the positive's likelihood among all negatives."""
    drawn, student = samples(micro_batch_size=micro_batch_size, pool_of="world"), Student()
    metrics = step_of(drawn, student, game(), AdversarialGameInBatch)
    reference, groups = Student(), drawn.groups(0)
    every = torch.from_numpy(np.concatenate([g.documents for g in groups]))
    banned = no_negatives(drawn.data, groups, groups)
    own, contrasts = [], []
    for place, g in enumerate(groups):
        scores_P = reference.of_documents[every] @ reference.of_queries[g.query]
        own.append(scores_P[3 * place : 3 * place + 3])
        allowed = [p for p in range(12) if p == 3 * place or not banned[place, p]]
        contrasts.append(-(2.0 * scores_P[allowed]).log_softmax(0)[allowed.index(3 * place)])
    said_BN = torch.tensor([[teacher_score(f"q{g.query}", d) for d in g.documents.tolist()] for g in groups])
    alone, _ = retriever_loss(game(), torch.stack(own), said_BN, 2.0, 0.5)
    contrast = torch.stack(contrasts).mean()
    loss = alone + 0.4 * contrast
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(metrics["loss"].value) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["contrastive"].value) == pytest.approx(contrast.item(), rel=1e-5)
    assert float(metrics["tokens"].value) == 4 + 12 + 12, "queries, documents and pairs"
    for found, expected in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_micro_batches_are_cut_by_what_was_found_for_them() -> None:
    """With `micro_batch_tokens: auto` the samples are replaced before the first step."""
    uncut = samples(pool_of="world")
    auto = uncut.of(replace(uncut.visit, phase=replace(uncut.visit.phase, micro_batch_tokens="auto")))
    ranker = Pairs()
    objective = AdversarialGameInBatch(auto, Numbers(), ranker, ranker, game(), score_scales=(2.0, 0.5))  # type: ignore[arg-type]
    objective.samples = _cut_by(objective.samples, 1)
    assert len(objective.prepare(0).pool.chunks) == len(uncut.groups(0))


def test_a_weight_near_nothing_leaves_the_game_as_it_is() -> None:
    pooled, plain = Student(), Student()
    step_of(samples(pool_of="world"), pooled, game(contrastive_weight=1e-12), AdversarialGameInBatch)
    step_of(samples(), plain, game(contrastive_weight=0, in_batch_negatives="none"), AdversarialGame)
    for found, expected in zip(pooled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_the_ranker_scores_each_querys_own_documents_once() -> None:
    """Symptom guarded against: a ranker that is asked about the whole pool, which costs B times as much."""
    drawn, ranker = samples(micro_batch_size=1, pool_of="world"), Pairs()
    objective = AdversarialGameInBatch(drawn, Numbers(), ranker, ranker, game(), score_scales=(2.0, 0.5))  # type: ignore[arg-type]
    objective.backward(Student(), objective.prepare(0))  # type: ignore[arg-type]
    asked = torch.cat(ranker.asked).tolist()
    assert asked == [[g.query, document] for g in drawn.groups(0) for document in g.documents.tolist()]

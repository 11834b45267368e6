"""A retriever's score inside a ranker's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import losses
from engine.config.ar2 import Ar2Recipe
from engine.config.file import load_config
from engine.config.timetable import WeightsOf
from engine.data.batches import Group
from engine.errors import ConfigError
from engine.objectives.ranking import ListwiseRanking
from engine.retrievers.prior import RankerPrior
from shards.records import Query

TINY = Path(__file__).resolve().parents[4] / "configs" / "tiny.yaml"


class Table:
    """A retriever whose scores are a table, query by document."""

    scores = ((0.5, -1.0, 2.0), (3.0, 0.0, 0.25))

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[self.scores[int(query.id)][one] for one in own] for query, own in zip(queries, documents, strict=True)]


def a_prior(scale: float) -> RankerPrior:
    data: Any = SimpleNamespace(train=SimpleNamespace(queries=[Query("1", "b"), Query("0", "a")]))
    return RankerPrior(Table(), data, scale, torch.device("cpu"))


GROUPS = [Group(0, np.array([0, 2])), Group(1, np.array([1, 0]))]
"""Row 0 of the training queries is query 1 of the table."""


def test_what_is_added_is_the_scaled_score_of_the_group() -> None:
    assert a_prior(2.0).of_documents([Query("0", "a")], [[2, 1]]) == [[4.0, -2.0]]
    assert a_prior(2.0).of_groups(GROUPS).tolist() == [[6.0, 0.5], [-2.0, 1.0]]


def test_its_scale_is_beta_times_tau() -> None:
    config = load_config(TINY, ["ranker.prior=0.5", "retriever.score_scale=20"])
    assert isinstance(config, Ar2Recipe)
    assert config.prior is not None
    assert (config.prior.weights, config.prior.scale) == (WeightsOf("retriever", 0), 10.0)
    assert load_config(TINY).prior is None
    assert load_config(TINY, ["ranker.prior=0.5", "ar2.objective=ance"]).prior is None


def test_a_recipe_without_g0_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"ranker.prior is 1, but r2anker has no G0"):
        load_config(TINY.with_name("r2anker_tiny.yaml"), ["ranker.prior=1"])


def test_the_ranker_learns_what_is_left_to_say() -> None:
    """The loss is that of the sum, and its gradient goes into the ranker's own scores."""
    own_BN = torch.tensor([[0.1, 0.2], [0.3, -0.4]], dtype=torch.float64, requires_grad=True)
    losses_seen: list[float] = []

    class Model:
        def __call__(self, pairs: object) -> torch.Tensor:
            return own_BN.view(-1)

        def backward(self, loss: torch.Tensor, *, last: bool, share: float) -> None:
            losses_seen.append(loss.item())
            loss.backward()

    builder: Any = SimpleNamespace(tokens_of_pairs=None)
    objective = ListwiseRanking(SimpleNamespace(), builder, score_scale=1.5, prior=a_prior(2.0).of_groups)  # type: ignore[arg-type]
    micro = SimpleNamespace(groups=GROUPS, seed=1, last=True, share=1.0)
    inputs: Any = SimpleNamespace(micro=micro, of={"pairs": None}, num_tokens=1.0)
    objective.backward(Model(), [inputs])  # type: ignore[arg-type]

    added_BN = torch.tensor([[6.0, 0.5], [-2.0, 1.0]], dtype=torch.float64)
    expected_BN = own_BN.detach().clone().requires_grad_()
    expected = losses.ranker_cross_entropy(expected_BN + added_BN, score_scale=1.5)
    expected.backward()
    assert losses_seen == [pytest.approx(float(expected), abs=1e-6)]
    assert own_BN.grad is not None and expected_BN.grad is not None  # noqa: PT018
    torch.testing.assert_close(own_BN.grad, expected_BN.grad, atol=1e-6, rtol=0)

"""Retrievers' scores inside a ranker's."""

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
from engine.config.recipe import Prior
from engine.config.timetable import WeightsOf
from engine.data.batches import Group
from engine.errors import ConfigError
from engine.objectives.ranking import ListwiseRanking
from engine.retrievers.prior import BM25Share, RankerPrior
from shards.records import Document, Query

TINY = Path(__file__).resolve().parents[4] / "configs" / "tiny.yaml"
R2ANKER = TINY.with_name("r2anker_tiny.yaml")


class Table:
    """A retriever whose scores are a table, query by document."""

    scores = ((0.5, -1.0, 2.0), (3.0, 0.0, 0.25))

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[self.scores[int(query.id)][one] for one in own] for query, own in zip(queries, documents, strict=True)]


def a_prior(*scales: float) -> RankerPrior:
    data: Any = SimpleNamespace(train=SimpleNamespace(queries=[Query("1", "b"), Query("0", "a")]))
    return RankerPrior([(Table(), scale) for scale in scales], data, torch.device("cpu"))


GROUPS = [Group(0, np.array([0, 2])), Group(1, np.array([1, 0]))]
"""Row 0 of the training queries is query 1 of the table."""


def test_what_is_added_is_the_scaled_score_of_the_group() -> None:
    assert a_prior(2.0).of_documents([Query("0", "a")], [[2, 1]]) == [[4.0, -2.0]]
    assert a_prior(2.0).of_groups(GROUPS).tolist() == [[6.0, 0.5], [-2.0, 1.0]]


def test_what_several_retrievers_add_is_the_sum() -> None:
    assert a_prior(2.0, 0.5).of_documents([Query("0", "a"), Query("1", "b")], [[2, 1], []]) == [[5.0, -2.5], []]
    assert a_prior(2.0, 0.5).of_groups(GROUPS).tolist() == [[7.5, 0.625], [-2.5, 1.25]]


def test_its_scale_is_beta_times_tau() -> None:
    config = load_config(TINY, ["ranker.prior=0.5", "retriever.score_scale=20"])
    assert isinstance(config, Ar2Recipe)
    assert config.priors == (Prior("dense", 10.0, WeightsOf("retriever", 0)),)
    assert load_config(TINY).priors == ()
    assert load_config(TINY, ["ranker.prior=0.5", "ranker.bm25_prior=3", "ar2.objective=ance"]).priors == ()


def test_bm25_has_a_say_with_g0_or_alone_in_any_recipe() -> None:
    both = load_config(TINY, ["ranker.prior=0.5", "ranker.bm25_prior=3", "retriever.score_scale=20"]).priors
    assert both == (Prior("dense", 10.0, WeightsOf("retriever", 0)), Prior("bm25", 3.0))
    for recipe in (TINY, R2ANKER):
        assert load_config(recipe, ["ranker.bm25_prior=3"]).priors == (Prior("bm25", 3.0),)


def test_a_recipe_without_bm25_refuses_its_say() -> None:
    without = ["bm25.enabled=false", "warmup_retriever.hard_negatives=0"]
    load_config(TINY, without)
    with pytest.raises(ConfigError, match=r"ranker.bm25_prior=3: set it to 0"):
        load_config(TINY, [*without, "ranker.bm25_prior=3"])


def test_embeddings_that_each_host_has_its_own_of_leave_bm25_its_say() -> None:
    local = ["index.embeddings=local", "index.local_folder=/scratch", "evaluation.fuse=false"]
    load_config(TINY, [*local, "ranker.bm25_prior=3"])
    with pytest.raises(ConfigError, match=r"ranker.prior=0"):
        load_config(TINY, [*local, "ranker.bm25_prior=3", "ranker.prior=1"])


def test_bm25s_say_is_a_share_of_what_the_query_is_worth() -> None:
    class Scored:
        """BM25 that gives each query's documents half and all but nothing of what its words are worth."""

        def worth(self, queries: Sequence[str]) -> np.ndarray:
            return np.array([{"long": 80.0, "short": 4.0}.get(query, 0.0) for query in queries])

        def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
            return [[most / 2, 0.0][: len(own)] for most, own in zip(self.worth_of(queries), documents, strict=True)]

        def score_texts(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[list[float]]:
            assert list(documents) == [["a title and a text"]]
            return [[float(self.worth(queries)[0]) / 4]]

        def worth_of(self, queries: Sequence[Query]) -> list[float]:
            worth: list[float] = self.worth([query.text for query in queries]).tolist()
            return worth

    share = BM25Share(Scored())  # type: ignore[arg-type]
    queries = [Query("0", "long"), Query("1", "short"), Query("2", "unheard")]
    assert share.score(queries, [[3, 4], [5], [6, 7]]) == [[0.5, 0.0], [0.5], [0.0, 0.0]]
    assert share.score_texts(["long"], [[Document("d", "a title", "and a text")]]) == [[0.25]]


def test_a_recipe_without_g0_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"ranker.prior is 1, but r2anker has no G0"):
        load_config(R2ANKER, ["ranker.prior=1"])


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

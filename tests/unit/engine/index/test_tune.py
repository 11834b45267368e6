"""The search is tuned to the recall that is asked for, at the least counted cost, the same everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.index import tune as index_tune
from engine.index.dense import document_parts
from engine.index.exact import exact_search, rescore
from engine.index.plan import IndexPlan, plan_index
from engine.index.probe import ProbedIndex
from engine.index.tune import exact_truth, recall_of, tune
from engine.search import Hits
from shards.embeddings import EmbeddingStore
from tests.embedding_stores import clustered, make_store, trained_index

SIZES = (400, 300, 500, 200, 100, 300, 150, 50, 2)
N, D, K = sum(SIZES), 16, 10
EMBEDDINGS_ND, QUERIES_QD = clustered(N, D, 0), clustered(40, D, 1)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path, EMBEDDINGS_ND, SIZES)


def plan_of(factory: str = "IVF40,PQ4x4", **settings: Any) -> IndexPlan:
    asked = IndexConfig(factory=factory, kmeans_iterations=3, recall_floor=0.0, **settings)
    return plan_index(asked, num_documents=N, dimension=D)


def probed(store: EmbeddingStore, plan: IndexPlan) -> ProbedIndex:
    index = trained_index(store.folder.parent, store, plan, 0)
    index.add_with_ids(EMBEDDINGS_ND, np.arange(N))
    return ProbedIndex(index)


def searched(index: ProbedIndex, store: EmbeddingStore, nprobe: int, refine_factor: int) -> float:
    truth = exact_search(store, QUERIES_QD, K)
    coarse = index.search(QUERIES_QD, min(N, refine_factor * K), nprobe=nprobe, needed=K)
    return recall_of(rescore(store, QUERIES_QD, coarse.documents_QK, K).scores_QK, truth, K)


def safely(index: ProbedIndex, store: EmbeddingStore, nprobe: int, refine_factor: int) -> float:
    """Return the recall of a search less its standard error over the queries."""
    truth = exact_search(store, QUERIES_QD, K)
    coarse = index.search(QUERIES_QD, min(store.num_documents, refine_factor * K), nprobe=nprobe, needed=K)
    found = rescore(store, QUERIES_QD, coarse.documents_QK, K)
    recall_Q = np.minimum((found.scores_QK >= truth.scores_QK[:, K - 1 : K]).sum(axis=1), K) / K
    return float(recall_Q.mean() - recall_Q.std() / np.sqrt(len(recall_Q)))


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
def test_the_cheapest_that_reaches_the_target_is_chosen(store: EmbeddingStore, target: float) -> None:
    plan = plan_of("IVF40,PQ8x4", recall_target=target)
    index, truth = probed(store, plan), exact_search(store, QUERIES_QD, K)
    best, trials = tune(index, D, plan, QUERIES_QD, truth, K)
    assert best.recall >= target
    assert best.recall == pytest.approx(searched(index, store, best.nprobe, best.refine_factor))
    assert best.cost == min(trial.cost for trial in trials if trial.safe_recall >= target)
    # No other step of the two ladders is cheaper and good enough, also none that was not tried.
    weight = 4 * D / plan.code_bytes
    for nprobe in (1, 2, 4, 8, 16, 32, 40):
        for factor in (1, 2, 4, 8, 16, 32):
            cost = index.visited(QUERIES_QD, nprobe=nprobe, needed=K) + weight * K * factor
            if cost < best.cost:
                assert safely(index, store, nprobe, factor) < target, (nprobe, factor)


def test_the_choice_does_not_depend_on_the_clock(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    index, truth = probed(store, plan), exact_search(store, QUERIES_QD, K)
    first = tune(index, D, plan, QUERIES_QD, truth, K)
    slow = ProbedIndex.search

    def search(self: ProbedIndex, *arguments: Any, nprobe: int, **more: Any) -> Hits:
        import time

        time.sleep(0.02 if nprobe > 2 else 0.0)
        return slow(self, *arguments, nprobe=nprobe, **more)

    monkeypatch.setattr(ProbedIndex, "search", search)
    assert tune(index, D, plan, QUERIES_QD, truth, K) == first


def test_what_is_given_by_hand_is_kept(store: EmbeddingStore) -> None:
    truth = exact_search(store, QUERIES_QD, K)
    index = probed(store, plan_of())
    best, trials = tune(index, D, plan_of(nprobe=3), QUERIES_QD, truth, K)
    assert {trial.nprobe for trial in trials} == {3} == {best.nprobe}
    best, trials = tune(index, D, plan_of(refine_factor=2), QUERIES_QD, truth, K)
    assert {trial.refine_factor for trial in trials} == {2} == {best.refine_factor}
    best, trials = tune(index, D, plan_of(nprobe=3, refine_factor=5), QUERIES_QD, truth, K)
    assert trials == [best]


def test_a_target_out_of_reach_gives_the_best_there_is(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("IVF40,PQ2x4", refine_factor=1)
    truth = exact_search(store, QUERIES_QD, K)
    index = probed(store, plan)
    best, trials = tune(index, D, plan, QUERIES_QD, truth, K)
    assert best.recall < 0.95
    assert best.recall == max(trial.recall for trial in trials)
    assert best.cost == min(trial.cost for trial in trials if trial.recall == best.recall)
    assert trials[-1].nprobe == 40
    monkeypatch.setattr(index_tune, "_FLAT_FROM", 4)  # more lists gain nothing there: the codes lose the rest
    monkeypatch.setattr(index_tune, "_FLAT_GAIN", 1.0)
    assert tune(index, D, plan, QUERIES_QD, truth, K)[1][-1].nprobe == 8


def test_small_corpora_are_not_searched_deeper_than_they_are(store: EmbeddingStore) -> None:
    plan = plan_of("IVF40,PQ2x4", recall_target=1.0)
    truth = exact_search(store, QUERIES_QD, 400)
    best, trials = tune(probed(store, plan), D, plan, QUERIES_QD, truth, 400)
    assert max(trial.refine_factor for trial in trials) == 8  # 8 * 400 candidates are the whole corpus
    assert best.recall == 1.0
    with pytest.raises(ValueError, match="at least one query"):
        tune(probed(store, plan), D, plan, QUERIES_QD[:0], truth, K)


def test_recall_counts_documents_that_tie_with_the_last() -> None:
    truth = Hits(np.array([[1, 2]]), np.array([[3.0, 2.0]], dtype=np.float32))
    for scores, recall in (([3.0, 2.0], 1.0), ([2.0, 2.0, 2.0], 1.0), ([3.0, 1.9], 0.5), ([-np.inf, -np.inf], 0.0)):
        assert recall_of(np.array([scores], dtype=np.float32), truth, 2) == recall


def test_documents_that_tie_with_the_last_are_as_good(tmp_path: Path) -> None:
    """With a copy of every document, the recall of a perfect search was told to be a half."""
    twice = np.concatenate([EMBEDDINGS_ND, EMBEDDINGS_ND])
    store = make_store(tmp_path, twice, [N, N])
    plan = plan_of("IVF4,Flat", nprobe=4, refine_factor=1)
    index = trained_index(store.folder.parent, store, plan, 0)
    index.add_with_ids(twice, np.arange(2 * N))
    for depth, recall in ((2 * K, 1.0), (5, 1.0)):
        k = min(K, depth)
        truth = exact_search(store, QUERIES_QD, depth)
        best, _ = tune(ProbedIndex(index), D, plan, QUERIES_QD, truth, k if depth > k else 4)
        assert best.recall == recall


def test_truth_of_parts_is_the_truth_of_the_whole(store: EmbeddingStore) -> None:
    parts = document_parts(store.manifest)
    found = exact_truth(Coordinator(LocalTransport()), "truth", store, QUERIES_QD, K, parts, device="cpu")
    whole = exact_search(store, QUERIES_QD, K)
    np.testing.assert_array_equal(found.documents_QK, whole.documents_QK)
    np.testing.assert_array_equal(found.scores_QK, whole.scores_QK)


def test_a_query_in_a_short_list_visits_more(store: EmbeddingStore) -> None:
    """With one list visited, a query whose list is short had fewer negatives than were asked for."""
    index = probed(store, plan_of("IVF200,PQ4x4"))
    found = index.search(QUERIES_QD, 60, nprobe=1, needed=50)
    assert ((found.documents_QK >= 0).sum(axis=1) >= 50).all()
    assert ((index.search(QUERIES_QD, 60, nprobe=1, needed=1).documents_QK >= 0).sum(axis=1) < 50).any()
    assert (index.search(QUERIES_QD[:3], N + 4, nprobe=1, needed=N).documents_QK[:, :N] >= 0).all()
    again = index.search(QUERIES_QD, 60, nprobe=1, needed=50)
    np.testing.assert_array_equal(again.documents_QK, found.documents_QK)
    alone = [index.search(QUERIES_QD[row : row + 1], 60, nprobe=1, needed=50).documents_QK[0] for row in range(9)]
    np.testing.assert_array_equal(np.stack(alone), found.documents_QK[:9])


def test_a_replaced_plan_is_another(store: EmbeddingStore) -> None:
    assert replace(plan_of(), reasons=("other",)) == plan_of()
    assert plan_of(recall_target=0.9) != plan_of()

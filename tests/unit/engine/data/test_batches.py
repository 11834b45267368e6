"""The order of queries and the drawing of negatives, which must not depend on the number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engine.data.batches import BatchPlan, micro_batches, own_share, query_rows, step_groups
from engine.errors import ConfigError


def plan(world_size: int = 1, rank: int = 0, batch_size: int = 4, n: int = 3) -> BatchPlan:
    return BatchPlan("ranker", 42, batch_size, n, rank, world_size)


def data(num_queries: int = 10) -> SimpleNamespace:
    class Train(SimpleNamespace):
        def __len__(self) -> int:
            return num_queries

    return SimpleNamespace(train=Train(positives=[np.array([100 + row, 200 + row]) for row in range(num_queries)]))


def candidates(row: int) -> np.ndarray:
    return np.arange(20) + 1000 * row


def test_an_epoch_sees_every_query_once_and_the_next_in_another_order() -> None:
    first, second = query_rows(42, "ranker", 0, 10, 10), query_rows(42, "ranker", 10, 10, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_places_do_not_depend_on_how_they_are_asked_for() -> None:
    whole = query_rows(42, "retriever", 0, 25, 10)
    parts = np.concatenate([query_rows(42, "retriever", start, 5, 10) for start in range(0, 25, 5)])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_samples_in_the_same_order(world_size: int) -> None:
    alone = step_groups(plan(), data(), candidates, step=3)
    shared = [
        group
        for rank in range(world_size)
        for group in own_share(plan(world_size, rank), step_groups(plan(world_size, rank), data(), candidates, 3))
    ]
    assert [group.query for group in shared] == [group.query for group in alone]
    for one, other in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(one.documents, other.documents)


def test_negatives_are_drawn_afresh_at_every_step() -> None:
    """Symptom guarded against: the same n negatives of a query in every epoch."""
    drawn = {
        tuple(group.documents[1:].tolist())
        for step in range(30)
        for group in step_groups(plan(batch_size=10, n=5), data(), candidates, step)
        if group.query == 4
    }
    assert len(drawn) > 20


def test_the_positive_comes_first_and_is_one_of_the_query() -> None:
    for group in step_groups(plan(), data(), candidates, 0):
        assert group.documents[0] in (100 + group.query, 200 + group.query)
        assert len(set(group.documents[1:].tolist())) == 3


def test_micro_batches_weigh_by_their_size() -> None:
    groups = step_groups(plan(batch_size=5), data(), candidates, 0)
    cut = list(micro_batches(groups, 2))
    assert [len(chunk) for chunk, *_ in cut] == [2, 2, 1]
    assert [share for _, share, _ in cut] == pytest.approx([0.4, 0.4, 0.2])
    assert [last for *_, last in cut] == [False, False, True]


def test_a_batch_that_ranks_cannot_share_equally_is_refused() -> None:
    with pytest.raises(ConfigError, match="use a multiple of 3"):
        plan(world_size=3, batch_size=4)

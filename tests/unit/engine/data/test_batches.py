"""The order of queries and the drawing of negatives, which must not depend on the number of ranks."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from engine.config.timetable import Phase
from engine.config.training import OptimConfig
from engine.data.batches import Group, Samples, cut_by_tokens, rows_drawn, shuffled_rows
from engine.data.candidates import Candidates
from engine.errors import ConfigError
from shards.embeddings import Stamp
from shards.records import Query


class Train(SimpleNamespace):
    positive: Literal["drawn", "first"] = "drawn"

    def __len__(self) -> int:
        return len(self.queries)


PINNED_GROUPS = [[104, 4019, 4003, 4011], [203, 3013, 3018, 3000], [206, 6000, 6005, 6009], [207, 7012, 7014, 7018]]
"""What a step of the plain recipe drew before negatives could come from anything but one retriever's candidates."""


def numbered_candidates(num_queries: int) -> Candidates:
    """Of query q3, documents 3000 and on."""
    documents_QK = np.arange(20) + 1000 * np.arange(num_queries)[:, None]
    scores_QK = -documents_QK.astype(np.float32)
    qids = [f"q{row}" for row in range(num_queries)]
    return Candidates("dense", Stamp("0", "a", "b"), qids, documents_QK, scores_QK, Counter())


def samples(
    world_size: int = 1,
    rank: int = 0,
    batch_size: int = 4,
    n: int = 3,
    micro: int = 2,
    num_queries: int = 10,
    tokens: int | None = None,
) -> Samples:
    queries = [Query(f"q{row}", "text") for row in range(num_queries)]
    train = Train(queries=queries, positives=[np.array([100 + row, 200 + row]) for row in range(num_queries)])
    data: Any = SimpleNamespace(train=train, shards=SimpleNamespace(docids=[f"d{index}" for index in range(20_000)]))
    optim = OptimConfig()
    phase = Phase("ranker", "ar2.ranker", "ranker", 5, batch_size, micro, n, optim, ("000",) * 4, 1, tokens)
    return Samples(phase.visits[0], 42, data, numbered_candidates(num_queries), rank, world_size)


def test_the_plain_recipe_draws_what_it_always_drew() -> None:
    assert [group.documents.tolist() for group in samples().groups(7)] == PINNED_GROUPS


def test_the_first_positive_is_taken_where_the_recipe_says_so() -> None:
    """AR2's released code trains on the first of several positives; here one is drawn, unless that is asked for."""
    of_first = samples()
    of_first.data.train.positive = "first"
    groups = of_first.groups(7)
    assert [group.documents[0] for group in groups] == [100 + group.query for group in groups]
    assert [group.documents[1:].tolist() for group in groups] == [row[1:] for row in PINNED_GROUPS], (
        "the same negatives"
    )


def test_every_positive_is_drawn_and_as_often_on_any_number_of_ranks() -> None:
    """With 40 epochs of two positives each, both come about 20 times; which one follows from step and place alone."""
    drawn = Counter(
        (group.query, int(group.documents[0]) // 100)
        for step in range(40)
        for rank in range(2)
        for of_rank in [samples(2, rank, batch_size=10)]
        for group in of_rank.share(of_rank.groups(step))
    )
    assert len(drawn) == 20
    assert all(8 <= number <= 32 for number in drawn.values())
    assert drawn == Counter(
        (group.query, int(group.documents[0]) // 100)
        for step in range(40)
        for group in samples(batch_size=10).groups(step)
    )


def test_an_epoch_sees_every_query_once_and_the_next_in_another_order() -> None:
    first, second = shuffled_rows(42, "ranker", 0, 10, 10), shuffled_rows(42, "ranker", 10, 10, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_places_do_not_depend_on_how_they_are_asked_for() -> None:
    whole = shuffled_rows(42, "retriever", 0, 25, 10)
    parts = np.concatenate([shuffled_rows(42, "retriever", start, 5, 10) for start in range(0, 25, 5)])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_samples_in_the_same_order(world_size: int) -> None:
    alone = samples().groups(3)
    ranks = [samples(world_size, rank) for rank in range(world_size)]
    shared = [group for of_rank in ranks for group in of_rank.share(of_rank.groups(3))]
    assert [group.query for group in shared] == [group.query for group in alone]
    for one, other in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(one.documents, other.documents)


def test_negatives_are_drawn_afresh_at_every_step() -> None:
    """Symptom guarded against: the same n negatives of a query in every epoch."""
    drawn = {
        tuple(group.documents[1:].tolist())
        for step in range(30)
        for group in samples(batch_size=10, n=5).groups(step)
        if group.query == 4
    }
    assert len(drawn) > 20


def test_the_positive_comes_first_and_is_one_of_the_query() -> None:
    for group in samples().groups(0):
        assert group.documents[0] in (100 + group.query, 200 + group.query)
        assert len(set(group.documents[1:].tolist())) == 3


def test_micro_batches_weigh_by_their_size() -> None:
    five = samples(batch_size=5)
    cut = list(five.micro_batches(five.groups(0), 0, []))
    assert [len(micro.groups) for micro in cut] == [2, 2, 1]
    assert [micro.share for micro in cut] == pytest.approx([0.4, 0.4, 0.2])
    assert [micro.last for micro in cut] == [False, False, True]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_micro_batch_draws_the_same_dropout_on_whichever_rank_it_is(world_size: int) -> None:
    """Symptom: resumed on another number of ranks, a run with dropout trains on to other weights."""

    def seeds(of_rank: Samples) -> list[int]:
        return [micro.seed for micro in of_rank.micro_batches(of_rank.groups(5), 5, [])]

    alone = seeds(samples(batch_size=12))
    shared = [seed for rank in range(world_size) for seed in seeds(samples(world_size, rank, batch_size=12))]
    assert shared == alone
    assert len(set(alone)) == 6


def test_a_step_is_named_rank_by_rank() -> None:
    of_rank = samples(3, 1, batch_size=9, n=1)
    names, groups = of_rank.names(7), of_rank.groups(7)
    assert [entry.rank for entry in names] == [0] * 3 + [1] * 3 + [2] * 3
    assert [entry.query for entry in names] == [f"q{group.query}" for group in groups]
    assert names[5].documents == [f"d{document}" for document in groups[5].documents.tolist()]


def test_the_rows_drawn_are_those_of_the_steps() -> None:
    of_visit = samples(num_queries=100)
    steps = range(of_visit.visit.first_step, of_visit.visit.first_step + of_visit.visit.phase.steps)
    drawn = {group.query for step in steps for group in of_visit.groups(step)}
    assert rows_drawn([of_visit.visit], 42, 100).tolist() == sorted(drawn)
    assert rows_drawn([], 42, 100).tolist() == []


def test_a_batch_that_ranks_cannot_share_equally_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"use a multiple of 3 for ar2\.ranker\.batch_size"):
        samples(world_size=3, batch_size=4)


# --- micro-batches by tokens -----------------------------------------------------------------------------------------


def test_runs_hold_as_much_as_fits() -> None:
    assert cut_by_tokens([3, 3, 3, 9, 1, 1], 6) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut_by_tokens([50, 50], 10) == [range(0, 1), range(1, 2)], "one group alone may exceed the budget"
    assert cut_by_tokens([1, 1, 1, 1], 100) == [range(0, 4)]


def test_more_runs_are_made_where_other_ranks_have_more() -> None:
    assert cut_by_tokens([1, 1, 1, 1, 1], 100, num_pieces=3) == [range(0, 2), range(2, 3), range(3, 5)]
    assert [len(piece) for piece in cut_by_tokens([1] * 4, 100, num_pieces=4)] == [1] * 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_cut_into_equally_many_micro_batches(world_size: int) -> None:
    """Symptom: under ZeRO-3, where a forward is a collective, a rank with one micro-batch more waits for ever."""

    def tokens(group: Group) -> int:
        return 10 * (1 + group.query)

    cuts = []
    for rank in range(world_size):
        of_rank = samples(world_size, rank, batch_size=12, tokens=120, num_queries=12)
        cuts.append(list(of_rank.micro_batches(of_rank.groups(0), 0, [tokens])))
        own = of_rank.share(of_rank.groups(0))
        assert [group.query for micro in cuts[-1] for group in micro.groups] == [group.query for group in own]
        assert sum(micro.share for micro in cuts[-1]) == pytest.approx(1)
        assert [micro.last for micro in cuts[-1]] == [False] * (len(cuts[-1]) - 1) + [True]
        assert all(len(micro.groups) == 1 or sum(map(tokens, micro.groups)) <= 120 for micro in cuts[-1])
    assert len({len(cut) for cut in cuts}) == 1
    assert len(cuts[0]) > 12 // world_size // 12


def test_no_rows_of_an_order_are_none() -> None:
    """Symptom: with a warm-up of 0 steps and `mine: sampled` a run ended in a ValueError of numpy."""
    assert shuffled_rows(1, "warmup", 5, 0, 7).shape == (0,)
    assert shuffled_rows(1, "warmup", 5, 4, 7).dtype == np.int64

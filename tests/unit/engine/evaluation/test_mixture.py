"""Weights on the simplex: which points there are, which is chosen, and what is said of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engine.evaluation.mixture import Fusion, MeasuredPart, best_point, fit, held_out_values, simplex


@pytest.mark.parametrize(("num_parts", "steps"), [(1, 10), (2, 10), (3, 10), (4, 5)])
def test_the_grid_has_all_weights_that_sum_to_1_the_simplest_first(num_parts: int, steps: int) -> None:
    points = simplex(num_parts, steps)
    assert len(set(points)) == len(points) == math.comb(num_parts + steps - 1, steps)
    assert all(math.fsum(point) == pytest.approx(1) and min(point) >= 0 for point in points)
    alone = [tuple(float(place == part) for place in range(num_parts)) for part in range(num_parts)]
    assert points[:num_parts] == alone
    used = [sum(weight > 0 for weight in point) for point in points]
    assert used == sorted(used)
    assert simplex(2, 4)[2:] == [(0.75, 0.25), (0.5, 0.5), (0.25, 0.75)], "then the most weight on the first"


def test_of_points_that_are_equally_good_the_first_is_taken() -> None:
    """Symptom guarded against: sums that differ in the last digit, by the order of adding, hide that they are equal."""
    row = [0.1, 0.2, 0.3, 1 / 3, 0.5] * 7
    assert best_point(np.array([[*sorted(row)[:-1], 0.4], sorted(row), row, row[::-1]])) == 1
    assert best_point(np.zeros((3, 0))) == 0


def test_held_out_values_never_know_their_own_fold() -> None:
    values_PQ = np.random.default_rng(0).integers(0, 3, (6, 23)) / 2
    expected = []
    for query in range(23):
        others = [other for other in range(23) if other % 5 != query % 5]
        means = [sum(values_PQ[point, other] for other in others) for point in range(6)]
        expected.append(values_PQ[means.index(max(means)), query])
    assert held_out_values(values_PQ, 5).tolist() == expected
    assert held_out_values(np.array([[0.0], [1.0]]), 5).tolist() == [0.0], "of one query nothing can be learnt"


def fitted(values_PQ: Any, first_Q: Any, second_Q: Any) -> Fusion:
    parts = [
        MeasuredPart("G", "retriever", "a", np.array(first_Q)),
        MeasuredPart("D", "ranker", "b", np.array(second_Q)),
    ]
    settings: Any = {
        "iteration": 3,
        "split": "dev",
        "metric": "MRR@10",
        "relevance_threshold": 1,
        "rerank_depth": 9,
        "seed": 0,
    }
    return fit(np.array(values_PQ), simplex(2, 2), parts, **settings)


def test_a_mixture_that_is_better_is_said_to_be() -> None:
    one, other = np.tile([1.0, 0.5], 20), np.tile([0.5, 1.0], 20)
    fusion = fitted([one, other, np.ones(40)], one, other)
    assert (fusion.weights, fusion.value, fusion.held_out_value) == ({"G": 0.5, "D": 0.5}, 1.0, 1.0)
    assert (fusion.best_part, fusion.num_queries) == ("G", 40)
    assert fusion.p < 0.001
    assert fusion.beats_its_parts
    assert "fused of iteration 3 = 0.5 G + 0.5 D" in fusion.told
    assert "better than G alone (0.750" in fusion.told
    assert "NOT" not in fusion.told


def test_a_mixture_that_is_better_by_chance_keeps_its_weights_and_is_told() -> None:
    one = [0.0, 1.0] * 20
    mixed = [1.0, 1.0, 1.0, *one[3:]]
    fusion = fitted([one, [0.0] * 40, mixed], one, [0.0] * 40)
    assert fusion.weights == {"G": 0.5, "D": 0.5}
    assert fusion.held_out_value > 0.5
    assert not fusion.beats_its_parts
    assert "NOT better by more than chance than G alone" in fusion.told


def test_a_part_alone_is_taken_where_a_mixture_is_no_better_on_what_it_has_not_seen() -> None:
    """Symptom guarded against: .699 on the queries of the fit and .688 held out, where the ranker alone had .693."""
    one = [0.0, 1.0] * 20
    fusion = fitted([one, [0.0] * 40, [1.0, *one[1:]]], one, [0.0] * 40)
    assert fusion.weights == {"G": 1.0, "D": 0.0}
    assert (fusion.value, fusion.held_out_value) == (0.5, 0.5)
    assert "fused of iteration 3 = G alone: MRR@10 0.500 +- 0.080 on 40 queries" in fusion.told
    assert "the weights of a fit have 0.500 on queries held out, NOT better" in fusion.told
    # The other part's order of the same documents, though the first's own ranking is above both.
    lists = [[0.4] * 40, [0.5] * 40, [0.6] + [0.5] * 39]
    assert fitted(lists, [0.9] * 40, [0.5] * 40).weights == {"G": 0.0, "D": 1.0}
    # A gain of .02 +- .05 on queries that were not seen: five of them are better and four worse.
    by_chance = np.array(one)
    by_chance[[0, 2, 4, 6, 8]], by_chance[[1, 3, 5, 7]] = 1.0, 0.0
    fusion = fitted([one, [0.0] * 40, by_chance], one, [0.0] * 40)
    assert fusion.weights == {"G": 1.0, "D": 0.0}


def test_a_mixture_that_is_worse_than_a_part_by_its_own_ranking_is_told() -> None:
    """BM25 may find what the first retriever did not, and then no order of that one's documents is as good."""
    fusion = fitted([[0.0] * 40, [0.1] * 40, [0.1] * 40], [0.0] * 40, [1.0] * 40)
    assert fusion.weights == {"G": 0.0, "D": 1.0}, "of two that are equal, the simpler one"
    assert "WORSE than D alone" in fusion.told


def test_one_query_has_no_error_and_no_verdict() -> None:
    fusion = fitted([[0.0], [1.0], [1.0]], [0.0], [1.0])
    assert (fusion.standard_error, fusion.parts[0].standard_error, fusion.p) == (None, None, 1.0)
    assert fusion.told.endswith("MRR@10 1.000 on 1 query of dev; none of which can be held out"), (
        "a value held out would be that of weights that were fitted to nothing"
    )
    assert "+-" not in fusion.told

"""Standard errors and paired tests against brute force and against scipy, which ir_measures brings along."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from engine.evaluation.significance import against, bootstrap, holm, randomisation_test, standard_error


def test_a_standard_error_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).random(50)
    assert standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)
    assert standard_error([1.0, 0.0]) == pytest.approx(0.5)
    assert math.isnan(standard_error([0.5])), "one query tells nothing of the spread"


@pytest.mark.parametrize("num_queries", [1, 5, 11])
def test_few_queries_are_counted_exactly(num_queries: int) -> None:
    generator = np.random.default_rng(num_queries)
    first, second = generator.integers(0, 4, num_queries) / 3, generator.integers(0, 4, num_queries) / 3
    seen = abs((first - second).sum())
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, first - second, strict=True)))
        for signs in product((-1, 1), repeat=num_queries)
    ]
    expected = sum(value >= seen - 1e-9 for value in sums) / len(sums)
    assert randomisation_test(first, second, seed=0) == pytest.approx(expected, abs=1e-12)
    assert randomisation_test(second, first, seed=7) == pytest.approx(expected, abs=1e-12), "of two sides"


def test_many_queries_agree_with_the_t_test_where_that_holds() -> None:
    generator = np.random.default_rng(3)
    first = generator.random(400)
    second = first + generator.normal(0.003, 0.1, 400)
    p = randomisation_test(first, second, seed=1)
    assert 0.01 < p < 0.5, "neither end, where any test would agree"
    assert p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)
    assert randomisation_test(first, second, seed=1) == p, "the seed decides"
    assert randomisation_test(first, second, seed=2) != p


def test_p_is_never_zero_and_one_where_nothing_differs() -> None:
    ones, zeros = np.ones(200), np.zeros(200)
    assert randomisation_test(ones, zeros, seed=0, num_samples=999) == pytest.approx(1 / 1000)
    assert randomisation_test(ones, ones, seed=0) == 1.0


def test_queries_that_do_not_differ_change_nothing() -> None:
    first, second = [1.0, 0.5, 0.0, 1.0], [0.0, 0.25, 0.5, 0.5]
    same = [0.5] * 300
    assert randomisation_test(first + same, second + same, seed=0) == randomisation_test(first, second, seed=0)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 0.0]), ([], []), ([float("nan")], [1.0])])
def test_what_is_not_paired_is_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="paired test"):
        randomisation_test(first, second, seed=0)
    with pytest.raises(ValueError, match="paired test"):
        bootstrap(first, second, seed=0)


def test_a_true_hypothesis_is_rejected_as_often_as_the_level_says() -> None:
    generator = np.random.default_rng(11)
    p_values = [randomisation_test(*generator.random((2, 20)), seed=number, num_samples=400) for number in range(400)]
    rejected = sum(p <= 0.1 for p in p_values) / len(p_values)
    assert 0.055 < rejected < 0.145, "three standard errors around .1"


@pytest.mark.parametrize("num_queries", [2, 3, 5])
def test_an_interval_has_the_ends_of_all_ways_to_draw_few_queries(num_queries: int) -> None:
    generator = np.random.default_rng(num_queries)
    first, second = generator.random((2, num_queries))
    sets = product(range(num_queries), repeat=num_queries)
    means = np.array([sum(first[query] - second[query] for query in drawn) / num_queries for drawn in sets])
    low, high = bootstrap(first, second, seed=1, num_samples=40_000)
    share_below, share_above = float((means < low - 1e-12).mean()), float((means > high + 1e-12).mean())
    noise = 4 * math.sqrt(0.025 * 0.975 / 40_000)
    assert share_below <= 0.025 + noise
    assert float((means <= low + 1e-12).mean()) >= 0.025 - noise
    assert share_above <= 0.025 + noise
    assert float((means >= high - 1e-12).mean()) >= 0.025 - noise
    assert bootstrap(second, first, seed=1, num_samples=40_000) == pytest.approx((-high, -low), abs=1e-12)


def test_an_interval_of_many_queries_is_that_of_the_normal_distribution() -> None:
    """The queries are drawn in pairs: what both systems have in common widens no interval."""
    generator = np.random.default_rng(4)
    hardness = generator.random(500)
    first, second = hardness + generator.normal(0.02, 0.1, 500), hardness + generator.normal(0, 0.1, 500)
    low, high = bootstrap(first, second, seed=2)
    middle, error = float((first - second).mean()), stats.sem(first - second)
    assert (low, high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.15 * error)
    narrow = bootstrap(first, second, seed=2, level=0.5)
    assert narrow == pytest.approx((middle - 0.6745 * error, middle + 0.6745 * error), abs=0.1 * error)
    assert bootstrap(first, second, seed=2) == (low, high), "the seed decides"
    assert bootstrap(first, second, seed=3) != (low, high)


def test_one_query_has_no_interval() -> None:
    assert all(map(math.isnan, bootstrap([1.0], [0.0], seed=0)))
    assert bootstrap([0.5] * 9, [0.5] * 9, seed=0) == (0.0, 0.0)


def test_holms_correction_by_hand() -> None:
    """Four comparisons: .01 * 4, .02 * 3, .03 * 2 (not below the one before), .5 * 1."""
    corrected = holm({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02})
    assert list(corrected) == ["c", "a", "d", "b"]
    assert corrected == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.5})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_every_system_is_tested_against_one() -> None:
    generator = np.random.default_rng(5)
    best = generator.random(100)
    values = {"best": best, "alike": best + generator.normal(0, 0.2, 100), "worse": best - 0.3}
    p = against(values, "best", seed=0, num_samples=2000)
    assert set(p) == {"alike", "worse"}
    assert p["worse"] < 0.01 < 0.05 < p["alike"]
    alone = randomisation_test(values["worse"], best, seed=0, num_samples=2000)
    assert p["worse"] == pytest.approx(2 * alone), "the smaller of two"

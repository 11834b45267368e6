"""Distributions of negatives and their divergence, against brute force and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import special, stats  # type: ignore[import-untyped]

from engine.errors import DataError
from engine.evaluation.distributions import Form, distribution, divergence, divergences, mixture

SCORES = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.0}


def some(seed: int, docids: str) -> dict[str, float]:
    return dict(zip(docids, np.random.default_rng(seed).normal(size=len(docids)).tolist(), strict=True))


# --- one distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalisation", "by_hand"),
    [
        ("none", lambda x: x),
        ("minmax", lambda x: (x - x.min()) / (x.max() - x.min())),
        ("zscore", stats.zscore),
    ],
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_softmax_of_normalised_scores(normalisation: Any, by_hand: Any, temperature: float) -> None:
    scores = some(0, "abcdefgh")
    found = distribution("q", scores, Form(normalisation=normalisation, temperature=temperature))
    expected = special.softmax(by_hand(np.array(list(scores.values()))) / temperature)
    assert found == pytest.approx(dict(zip(scores, expected.tolist(), strict=True)), rel=1e-12)
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)


def test_the_top_is_taken_after_the_positives_are_out() -> None:
    form = Form(top=2, normalisation="none")
    found = distribution("q", SCORES, form, {"a"})
    assert found == pytest.approx({"c": math.e / (1 + math.e), "b": 1 / (1 + math.e)})
    assert distribution("q", SCORES, form, set(SCORES)) == {}


@pytest.mark.parametrize("normalisation", ["minmax", "zscore"])
def test_shifted_and_scaled_scores_are_the_same_distribution(normalisation: Any) -> None:
    """So that BM25's scores, inner products and logits can be compared."""
    form = Form(normalisation=normalisation)
    moved = {docid: 70.0 + 12 * score for docid, score in SCORES.items()}
    assert distribution("q", moved, form) == pytest.approx(distribution("q", SCORES, form), rel=1e-9)


@pytest.mark.parametrize("form", [Form(), Form(normalisation="minmax"), Form(weights="uniform")])
def test_documents_of_equal_scores_have_equal_shares(form: Form) -> None:
    assert distribution("q", dict.fromkeys("abcd", 7.0), form) == pytest.approx(dict.fromkeys("abcd", 0.25))


def test_drawn_uniformly_all_of_the_top_count_alike() -> None:
    assert distribution("q", SCORES, Form(top=3, weights="uniform")) == pytest.approx(dict.fromkeys("acb", 1 / 3))


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="'b' for query 'q' is not a number"):
        distribution("q", {"a": 1.0, "b": float("nan")}, Form())


@pytest.mark.parametrize("words", [{"top": 0}, {"temperature": 0.0}, {"epsilon": 0.0}, {"epsilon": 1.0}])
def test_a_form_that_has_no_finite_divergence_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="epsilon above 0"):
        Form(**words)


# --- several retrievers ----------------------------------------------------------------------------------------------


def test_a_joint_distribution_is_a_draw_from_the_lists_laid_end_to_end() -> None:
    """R2ANKER App. B: without removing repetitions, so what two of three found is twice as likely."""
    form = Form(top=3, weights="uniform")
    lists = [{"a": 3.0, "b": 2.0, "c": 1.0}, {"b": 3.0, "c": 2.0, "d": 1.0}, {"b": 3.0, "e": 2.0, "f": 1.0}]
    concatenated = [docid for one in lists for docid in one]
    joint = mixture([distribution("q", one, form) for one in lists])
    assert joint == pytest.approx({docid: concatenated.count(docid) / 9 for docid in set(concatenated)})


def test_who_found_nothing_has_no_share() -> None:
    one = {"a": 0.75, "b": 0.25}
    assert mixture([one, {}]) == one
    assert mixture([{}, {}]) == {}


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.5])
def test_the_divergence_is_that_of_the_smoothed_distributions(epsilon: float) -> None:
    first, second = distribution("q", some(1, "abcdef"), Form()), distribution("q", some(2, "defghij"), Form())
    union = sorted(first.keys() | second.keys())
    p, q = (
        (1 - epsilon) * np.array([one.get(docid, 0.0) for docid in union]) + epsilon / len(union)
        for one in (first, second)
    )
    assert divergence(first, second, epsilon) == pytest.approx(stats.entropy(p, q), rel=1e-12)
    assert divergence(first, second, epsilon) != pytest.approx(divergence(second, first, epsilon), rel=1e-3)
    assert divergence(first, first, epsilon) == 0.0


def test_a_divergence_by_hand() -> None:
    """Union {a, b, c}, epsilon .3: p = (.45, .45, .1), q = (.1, .1, .8)."""
    found = divergence({"a": 0.5, "b": 0.5}, {"c": 1.0}, 0.3)
    assert found == pytest.approx(0.9 * math.log(4.5) - 0.1 * math.log(8), rel=1e-12)


def test_lists_that_share_nothing_are_as_far_as_epsilon_says() -> None:
    first, second = dict.fromkeys("abcd", 0.25), dict.fromkeys("efgh", 0.25)
    found = [divergence(first, second, epsilon) for epsilon in (0.1, 0.01, 0.001)]
    assert found == sorted(found), "less of the uniform distribution, farther apart"
    assert found[1] == pytest.approx(0.99 * math.log((0.99 / 4 + 0.01 / 8) / (0.01 / 8)), rel=1e-12)


def test_an_empty_distribution_is_compared_with_nothing() -> None:
    with pytest.raises(ValueError, match="empty"):
        divergence({}, {"a": 1.0}, 0.1)


def test_queries_are_compared_one_by_one_and_those_that_cannot_be_are_counted() -> None:
    form = Form(top=2, weights="uniform", epsilon=0.3)
    dense = {"q1": {"a": 2.0, "b": 1.0, "+": 9.0}, "q2": {"a": 1.0}, "q3": {"+": 1.0}}
    lexical = {"q1": {"b": 5.0, "c": 4.0}}
    bm25 = {"q1": {"b": 9.0, "c": 8.0}, "q3": {"a": 1.0}}
    found = divergences([dense, lexical], bm25, {"q1": {"+"}, "q2": set(), "q3": {"+"}, "q4": set()}, form)
    joint = {"a": 0.25, "b": 0.5, "c": 0.25}
    assert found.values == pytest.approx({"q1": divergence(joint, {"b": 0.5, "c": 0.5}, 0.3)})
    assert found.num_without == 3


def test_constrained_negatives_are_those_that_the_other_retriever_found_too() -> None:
    """R2ANKER Table 6: the top N of what is left, not what is left of the top N."""
    form = Form(top=2, weights="uniform", epsilon=0.3)
    dense = {"q1": {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}, "q2": {"a": 1.0}}
    bm25 = {"q1": {"d": 9.0, "b": 8.0, "c": 7.0}, "q2": {"b": 1.0}}
    positives = {"q1": set[str](), "q2": set[str]()}
    found = divergences([dense], bm25, positives, form, within=[bm25])
    assert found.values == pytest.approx({"q1": divergence({"b": 0.5, "c": 0.5}, {"d": 0.5, "b": 0.5}, 0.3)})
    assert found.num_without == 1, "nothing of q2 is left"
    free = divergences([dense], bm25, positives, form)
    assert free.values["q1"] == pytest.approx(divergence({"a": 0.5, "b": 0.5}, {"d": 0.5, "b": 0.5}, 0.3))

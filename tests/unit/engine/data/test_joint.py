"""The joint pool draws from the lists as if they were laid end to end; every number here is also counted by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.data.candidates import Candidates
from engine.data.filtered import Filtered
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.data.joint import Entries, JointLists, JointPool, draw, weigh
from engine.data.negatives import step_rng
from engine.data.samplers import RankWindow, Sampler, SimAns, draw_weighted
from engine.errors import ArtifactError, ConfigError, DataError
from shards.embeddings import Stamp

ALL = RankWindow(1, None)
OVERLAPPING = [[10, 11, 12, 13], [12, 20, 10], [12, 30]]
"""Document 12 is in three lists, 10 in two."""


def found_by(
    source: str, lists: Sequence[Sequence[int]], *, top_k: int = 4, positives: FoundPositives | None = None
) -> Candidates:
    """Queries q0, q1, ...; the document at rank r scores 10 - r."""
    documents_QK = np.full((len(lists), top_k), -1, dtype=np.int64)
    scores_QK = np.full((len(lists), top_k), -np.inf, dtype=np.float32)
    for row, documents in enumerate(lists):
        documents_QK[row, : len(documents)] = documents
        scores_QK[row, : len(documents)] = 10 - np.arange(1, len(documents) + 1)
    stamp, qids = Stamp(source, source * 8, "corpus"), [f"q{row}" for row in range(len(lists))]
    return Candidates(source, stamp, qids, documents_QK, scores_QK, Counter(), positives or FoundPositives())


def lists_of(*lists: Sequence[int]) -> JointLists:
    """One query, each list of another retriever."""
    return JointLists([found_by(f"r{number}", [documents]) for number, documents in enumerate(lists)])


def exactly(log_weights: np.ndarray, items: Sequence[int], n: int) -> dict[tuple[int, ...], float]:
    """The probability of every ordered draw of n items without replacement, each time by what is left."""
    weights = np.exp(log_weights)
    chances = {}
    for places in itertools.permutations(range(len(items)), n):
        chance, left = 1.0, weights.sum()
        for place in places:
            chance *= weights[place] / left
            left -= weights[place]
        chances[tuple(items[place] for place in places)] = chance
    return chances


def fits(drawn: Counter[Any], expected: Mapping[Any, float]) -> bool:
    """Pearson's chi-square test: what was drawn is as likely as one of a thousand samples of the expected chances."""
    total = drawn.total()
    statistic = sum((drawn[key] - total * chance) ** 2 / (total * chance) for key, chance in expected.items())
    freedom = len(expected) - 1
    # The .999 quantile of the chi-square distribution, by Wilson and Hilferty.
    critical = freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3
    return set(drawn) <= set(expected) and statistic < critical


def test_the_chi_square_test_sees_a_wrong_distribution() -> None:
    even = {"a": 0.5, "b": 0.5}
    assert fits(Counter(a=5050, b=4950), even)
    assert not fits(Counter(a=5300, b=4700), even)
    assert not fits(Counter(a=5000, b=5000, c=1), even)


def by_the_letter(lists: Sequence[Sequence[int]], n: int, *, repeats: bool) -> dict[tuple[int, ...], float]:
    """Appendix B by enumeration: all orders of the concatenated lists, each as likely; the first n of each.

    Without repeats, a document that came already is passed over.
    """
    entries = [document for documents in lists for document in documents]
    chances: dict[tuple[int, ...], float] = defaultdict(float)
    orders = math.factorial(len(entries))
    for order in itertools.permutations(entries):
        taken = order if repeats else tuple(dict.fromkeys(order))
        chances[taken[:n]] += 1 / orders
    return chances


# ---- the joint distribution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lists",
    [
        pytest.param([[10, 11, 12], [12, 20, 10]], id="overlapping"),
        pytest.param([[10, 11], [20, 21]], id="apart"),
        pytest.param([[10, 11, 12], [10]], id="short"),
        pytest.param([[10, 11, 12], [], [11]], id="one finds nothing"),
        pytest.param([[10, 11], [10, 11], [11, 10]], id="the same"),
    ],
)
def test_the_weights_are_those_of_the_concatenated_lists(lists: list[list[int]]) -> None:
    entries = lists_of(*lists).of("q0")
    log_weights_E = weigh(entries, ALL, positive=1, n=2)
    np.testing.assert_allclose(np.exp(log_weights_E), 1.0)
    documents, of_entry = np.unique(entries.documents_E, return_inverse=True)
    multiplicity = np.bincount(of_entry).astype(float)
    expected = by_the_letter(lists, 2, repeats=False)
    found = exactly(np.log(multiplicity), documents.tolist(), 2)
    assert {key: pytest.approx(chance) for key, chance in expected.items()} == found


@pytest.mark.parametrize("repeats", [False, True])
def test_draws_follow_the_enumerated_distribution(repeats: bool) -> None:
    lists = [[10, 11, 12], [12, 20], [12]]
    expected = by_the_letter(lists, 2, repeats=repeats)
    entries, rng, num_draws = lists_of(*lists).of("q0"), step_rng(1, "joint", 0, int(repeats)), 8_000
    drawn = Counter(tuple(draw(entries, ALL, 1, 2, rng, repeats=repeats).tolist()) for _ in range(num_draws))
    assert set(drawn) == set(expected), "with repeats 12 may stand twice, without them never"
    assert ((12, 12) in drawn) == repeats
    assert fits(drawn, expected)


def test_a_document_of_k_retrievers_is_k_times_as_likely() -> None:
    entries, rng = lists_of(*OVERLAPPING).of("q0"), step_rng(2, "joint", 0, 0)
    drawn = Counter(draw(entries, ALL, 1, 1, rng, repeats=False).item() for _ in range(9_000))
    times = {10: 2, 11: 1, 12: 3, 13: 1, 20: 1, 30: 1}
    assert fits(drawn, {document: k / 9 for document, k in times.items()})


def test_one_list_is_drawn_from_uniformly() -> None:
    entries, rng = lists_of([10, 11, 12, 13]).of("q0"), step_rng(3, "joint", 0, 0)
    drawn = Counter(tuple(draw(entries, ALL, 1, 2, rng, repeats=False).tolist()) for _ in range(6_000))
    assert fits(drawn, dict.fromkeys(itertools.permutations([10, 11, 12, 13], 2), 1 / 12))


def test_draws_end_where_there_is_no_more() -> None:
    entries, rng = lists_of(*OVERLAPPING).of("q0"), step_rng(4, "joint", 0, 0)
    assert sorted(draw(entries, ALL, 1, 50, rng, repeats=False).tolist()) == [10, 11, 12, 13, 20, 30]
    assert sorted(draw(entries, ALL, 1, 50, rng, repeats=True).tolist()) == [10, 10, 11, 12, 12, 12, 13, 20, 30]
    assert draw_weighted(np.array([-np.inf, 0.0, -np.inf]), 2, rng).tolist() == [1]


# ---- samplers --------------------------------------------------------------------------------------------------------


def with_positives(*scores: float | None) -> Entries:
    """Lists of 10, 11, 12 with scores 9, 8, 7; each retriever scores positive 1 as told, or did not find it."""
    lists, positives = [[10, 11, 12], [12, 20, 10]], []
    for score in scores:
        positives.append(FoundPositives.of([[] if score is None else [FoundPositive(1, 1, score)]]))
    parts = [found_by(f"r{number}", [lists[number]], positives=found) for number, found in enumerate(positives)]
    return JointLists(parts).of("q0")


@pytest.mark.parametrize(("form", "a", "b"), [("squared", 0.5, 1.0), ("squared", 0.5, 0.0), ("absolute", 3.0, 0.0)])
def test_simans_weighs_by_the_distance_from_the_positive(form: str, a: float, b: float) -> None:
    """The forms of the released code, in float64 and by hand."""
    s_pos = 8.25
    found = np.exp(weigh(with_positives(s_pos), SimAns(form, a, b), 1, 2))
    raw = [math.exp(-a * (s - s_pos + b) ** 2 if form == "squared" else -a * abs(s - s_pos)) for s in (9, 8, 7)]
    np.testing.assert_allclose(found, [3 * one / sum(raw) for one in raw], rtol=1e-12)


def test_lists_are_mixed_by_their_lengths_whatever_a_retriever_calls_its_scores() -> None:
    """A retriever whose scores are a hundred times as large would otherwise be the only one that is drawn from."""
    entries = with_positives(8.25, 700.0)
    weights = np.exp(weigh(entries, SimAns("squared", 0.5, 0.0), 1, 2))
    assert weights[:3].sum() == pytest.approx(3)
    assert weights[3:].sum() == pytest.approx(3)


def test_simans_without_the_positive_takes_the_last_n() -> None:
    sampler = SimAns("squared", 0.5, 0.0)
    weights = np.exp(weigh(with_positives(None, 8.0), sampler, 1, 2))
    np.testing.assert_allclose(weights[:3], [0, 1.5, 1.5])
    assert (weights[3:] > 0).all(), "the other retriever found it"
    np.testing.assert_allclose(
        np.exp(weigh(with_positives(8.0), sampler, 77, 1)), [0, 0, 3], err_msg="another positive"
    )
    np.testing.assert_allclose(np.exp(weigh(with_positives(None), sampler, 1, 9)), [1, 1, 1], err_msg="fewer than n")


def test_simans_draws_by_its_weights_without_replacement() -> None:
    sampler, entries, rng = SimAns("squared", 0.5, 0.0), with_positives(8.25), step_rng(5, "simans", 0, 0)
    expected = exactly(weigh(entries, sampler, 1, 2), entries.documents_E.tolist(), 2)
    drawn = Counter(tuple(draw(entries, sampler, 1, 2, rng, repeats=False).tolist()) for _ in range(8_000))
    assert fits(drawn, expected)


def test_scores_far_from_the_positive_still_leave_n_to_draw() -> None:
    """Symptom guarded against: weights of exp(-4000) are 0, and the query has too few negatives."""
    sampler = SimAns("squared", 0.5, 0.0)
    drawn = draw(with_positives(-80.0), sampler, 1, 3, step_rng(6, "simans", 0, 0), repeats=False)
    assert sorted(drawn.tolist()) == [10, 11, 12]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(RankWindow(2, 3), {11, 12, 20, 10}), (RankWindow(1, 1), {10, 12}), (ALL, {10, 11, 12, 20})],
)
def test_a_window_of_ranks_holds_in_each_list(sampler: Sampler, expected: set[int]) -> None:
    entries = lists_of([10, 11, 12], [12, 20, 10]).of("q0")
    assert set(draw(entries, sampler, 1, 9, step_rng(7, "window", 0, 0), repeats=False).tolist()) == expected


# ---- what stands in a pool -------------------------------------------------------------------------------------------


def test_entries_tell_who_found_a_document_where_and_with_which_score() -> None:
    entries = lists_of(*OVERLAPPING).of("q0")
    of_12 = entries.documents_E == 12
    assert entries.sources_E[of_12].tolist() == [0, 1, 2]
    assert entries.ranks_E[of_12].tolist() == [3, 1, 1]
    assert entries.scores_E[of_12].tolist() == [7, 9, 9]
    assert (len(entries), entries.num_documents) == (9, 6)
    assert len(lists_of([], []).of("q0")) == 0, "nobody found anything"


def test_ties_keep_their_ranks_and_are_as_likely_as_any_other() -> None:
    tied = found_by("r0", [[10, 11, 12]])
    tied.scores_QK[0, :3] = 5.0
    entries = JointLists([tied]).of("q0")
    assert entries.ranks_E.tolist() == [1, 2, 3]
    np.testing.assert_allclose(np.exp(weigh(entries, SimAns("absolute", 3.0, 0.0), 1, 2)), [0, 1.5, 1.5])
    np.testing.assert_allclose(np.exp(weigh(entries, ALL, 1, 2)), 1)


def test_documents_that_mining_drew_at_random_are_nobodys() -> None:
    """Symptom: a query for which BM25 found nothing has its joint negatives diluted by random documents."""
    mined = found_by("bm25", [[10, 77, 78]])
    mined.scores_QK[0, 1:] = -np.inf
    assert JointLists([mined]).of("q0").documents_E.tolist() == [10]


def test_a_retriever_that_was_not_asked_for_a_query_is_named() -> None:
    lists = JointLists([found_by("dense", [[10], [11]]), found_by("bm25", [[12]])])
    assert lists.of("q0").documents_E.tolist() == [10, 12]
    with pytest.raises(DataError, match=r"candidates of bm25 .* lack query 'q1'.*Remedy: mine all training queries"):
        lists.of("q1")


def test_scores_that_are_no_numbers_and_other_corpora_are_refused() -> None:
    broken, other = found_by("dense", [[10, 11]]), found_by("bm25", [[12]])
    broken.scores_QK[0, 1] = np.nan
    with pytest.raises(ArtifactError, match="dense score a document of query 'q0' with no finite number"):
        JointLists([broken, other]).of("q0")
    with pytest.raises(ArtifactError, match="2 corpora"):
        JointLists([broken, replace(other, stamp=replace(other.stamp, corpus_sha256="another"))])
    with pytest.raises(ConfigError, match="no retriever"):
        JointLists([])


def test_a_pool_draws_what_filters_left_and_then_what_was_drawn_for_it() -> None:
    lists = lists_of([10, 11, 12], [12, 20])
    kept = np.packbits(np.array([1, 0, 1, 0, 1, 0, 0, 0], dtype=np.bool_))  # lists of four places each
    pool = JointPool(lists, Filtered.of("x", (), ["q0"], [kept], [[90, 91]], Counter(), width=8), ALL, repeats=False)
    assert sorted(pool.entries("q0").documents_E.tolist()) == [10, 12, 12]
    assert (pool.qids, pool.row("q0").tolist()) == (["q0"], [10, 12, 90, 91])
    rng = step_rng(8, "pool", 0, 0)
    assert {tuple(sorted(pool.draw("q0", 1, 2, rng).tolist())) for _ in range(50)} == {(10, 12)}
    assert sorted(pool.draw("q0", 1, 4, rng).tolist()) == [10, 12, 90, 91]
    with pytest.raises(ConfigError, match="num_negatives is 5, but query 'q0' has 2 candidates and 2 documents"):
        pool.draw("q0", 1, 5, rng)
    with pytest.raises(DataError, match="'q1' is not in the joint pool"):
        pool.draw("q1", 1, 1, rng)

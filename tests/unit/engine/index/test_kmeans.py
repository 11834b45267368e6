"""The sums and lists of a k-means over parts, against brute force in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from engine.index.kmeans import Assigner, ListSums, movement_of, normalized, quantum_of, split_empty
from tests.embedding_stores import clustered

N, D, L = 5000, 16, 40
ROWS_ND = clustered(N, D, 0) * np.geomspace(1e-3, 1e3, N, dtype=np.float32)[:, None]
CENTROIDS_LD = normalized(clustered(L, D, 1))


def added(order: list[np.ndarray], labels_N: np.ndarray) -> ListSums:
    """Add rows by parts, each to sums of its own, and the parts' sums in the order given."""
    quantum = quantum_of(float(np.linalg.norm(ROWS_ND.astype(np.float64), axis=1).max()), N)
    whole = ListSums(L, D, quantum)
    for rows in order:
        part = ListSums(L, D, quantum)
        part.add(ROWS_ND[rows], labels_N[rows], ROWS_ND[rows, 0])
        whole.sums_LD += part.sums_LD
        whole.counts_L += part.counts_L
        whole.score += part.score
    return whole


def test_sums_are_those_of_float64_in_any_order_and_any_parts() -> None:
    labels_N = np.random.default_rng(2).integers(L - 1, size=N).astype(np.int32)
    rng = np.random.default_rng(3)
    one = added([np.arange(N)], labels_N)
    cuts = [0, 1, 700, 701, 4000, N]
    three = added([np.arange(*ends) for ends in pairwise(cuts)], labels_N)
    mixed = added(np.array_split(rng.permutation(N), 37), labels_N)
    for other in (three, mixed):
        assert np.array_equal(one.sums_LD, other.sums_LD)
        assert np.array_equal(one.counts_L, other.counts_L)
        assert one.score == other.score
    brute_LD = np.array([ROWS_ND[labels_N == number].astype(np.float64).sum(axis=0) for number in range(L)])
    largest = np.abs(ROWS_ND).max()
    assert np.abs(one.sums_LD - brute_LD).max() < 1e-9 * largest
    assert one.counts_L.tolist() == np.bincount(labels_N, minlength=L).tolist()
    assert one.score == pytest.approx(ROWS_ND[:, 0].astype(np.float64).sum(), rel=1e-9)
    assert np.array_equal(one.sums_LD, np.rint(one.sums_LD / quantum_of(largest, N)) * quantum_of(largest, N))
    unrounded = [ROWS_ND[rows, 0].astype(np.float64).sum() for rows in np.array_split(rng.permutation(N), 37)]
    assert sum(unrounded) != ROWS_ND[:, 0].astype(np.float64).sum(), "without rounding, order would not matter here"


def test_each_row_gets_the_list_of_the_highest_product_by_any_number_of_threads() -> None:
    labels_N, scores_N = Assigner(CENTROIDS_LD, 1).nearest(ROWS_ND)
    exact_NL = ROWS_ND.astype(np.float64) @ CENTROIDS_LD.T.astype(np.float64)
    assert labels_N.tolist() == exact_NL.argmax(axis=1).tolist()
    assert np.allclose(scores_N, exact_NL.max(axis=1), rtol=1e-5)
    again_N, same_N = Assigner(CENTROIDS_LD, 3).nearest(ROWS_ND)
    assert labels_N.tobytes() == again_N.tobytes()
    assert scores_N.tobytes() == same_N.tobytes()
    nothing, _ = Assigner(CENTROIDS_LD, 3).nearest(ROWS_ND[:0])
    assert nothing.shape == (0,)


def test_an_empty_list_gets_half_of_the_largest() -> None:
    centroids_LD, counts_L = CENTROIDS_LD[:6].copy(), np.array([5, 0, 40, 0, 0, 16])
    assert split_empty(centroids_LD, counts_L) == 3
    assert counts_L.tolist() == [5, 10, 10, 10, 10, 16]
    assert np.allclose(np.linalg.norm(centroids_LD, axis=1), 1, atol=1e-6)
    for number in (1, 3, 4):
        assert np.abs(centroids_LD[number] - CENTROIDS_LD[2]).max() < 3 / 1024
    assert len(np.unique(centroids_LD, axis=0)) == 6
    assert np.array_equal(centroids_LD[[0, 5]], CENTROIDS_LD[[0, 5]])
    assert split_empty(centroids_LD, counts_L) == 0


def test_movement_is_relative_to_the_length() -> None:
    assert movement_of(CENTROIDS_LD, CENTROIDS_LD) == 0
    assert movement_of(CENTROIDS_LD, CENTROIDS_LD * 1.25) == pytest.approx(0.25, rel=1e-6)
    assert movement_of(np.zeros((2, 3), dtype=np.float32), np.ones((2, 3), dtype=np.float32)) == 0

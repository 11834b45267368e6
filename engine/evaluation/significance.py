"""Whether one system is better than another, or only on these queries: standard errors and paired tests over queries.

All systems of a comparison are measured on the same queries, so each query is its own control: what is tested is the
mean of the differences, by changing their signs. That asks nothing of how a metric is distributed; MRR@10 takes eleven
values, most of them 0. Shapes: Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEVEL = 0.05
"""A p below which a difference counts as more than chance."""
NUM_SAMPLES = 20_000
"""Assignments of signs that are drawn where there are too many to count: a p of .05 then has a standard error of
.0015."""
_MOST_COUNTED = 14
"""Differences that are not 0 up to which all 2^Q assignments are counted."""
_DRAWN_TOGETHER = 1 << 22
"""Signs that are held at once."""
NUM_RESAMPLES = 10_000
"""Sets of queries that a bootstrap draws: an end of an interval of 95 % then has 250 of them beyond it."""
_SAME = 1e-12
"""Two sums that differ by less, in parts of the sum of all differences, are the same but for the order of adding."""


def standard_error(values_Q: Sequence[float] | Floats) -> float:
    """Return the standard error of a mean over queries.

    Args:
        values_Q: A metric of each query [Q].

    Returns:
        Sample deviation over the root of Q; NaN for fewer than two queries, of which none can be told.
    """
    values = np.asarray(values_Q, dtype=np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def randomisation_test(
    first_Q: Sequence[float] | Floats, second_Q: Sequence[float] | Floats, *, seed: int, num_samples: int = NUM_SAMPLES
) -> float:
    """Test whether two systems have the same mean, by Fisher's paired randomisation test with two sides.

    Under the hypothesis that the systems are alike, each query's difference could as well have the other sign. Up to 14
    differences all assignments of signs are counted, and p is exact; of more, a sample is drawn, and the assignment
    that was seen is counted among it, so that p is never 0.

    Args:
        first_Q: A metric of each query [Q].
        second_Q: Of the other system, for the same queries [Q].
        seed: Draws the signs.
        num_samples: How many assignments are drawn.

    Returns:
        The share of assignments whose mean difference is at least as large as the one seen, in (0, 1].

    Raises:
        ValueError: The two have different numbers of queries, or none, or a value is NaN.

    Source: Smucker, Allan and Carterette (2007), "A comparison of statistical significance tests for information
    retrieval evaluation", section 3.1.
    """
    differences = _paired_differences(first_Q, second_Q)
    differences = differences[differences != 0]  # either sign of 0 is the same
    if not len(differences):
        return 1.0
    seen = abs(differences.sum()) - _SAME * np.abs(differences).sum()
    if len(differences) <= _MOST_COUNTED:
        numbers = np.arange(1 << len(differences))[:, None]
        signs = 1.0 - 2.0 * ((numbers >> np.arange(len(differences))) & 1)
        return float((np.abs(signs @ differences) >= seen).mean())
    generator, extreme, left = np.random.default_rng(seed), 1, num_samples
    while left > 0:
        rows = min(left, max(1, _DRAWN_TOGETHER // len(differences)))
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(rows, len(differences)), dtype=np.int8)
        extreme += int((np.abs(signs @ differences) >= seen).sum())
        left -= rows
    return extreme / (num_samples + 1)


def bootstrap(
    first_Q: Sequence[float] | Floats,
    second_Q: Sequence[float] | Floats,
    *,
    seed: int,
    num_samples: int = NUM_RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return an interval for the difference of two systems' means, by drawing the queries anew.

    A query is drawn with the values of both systems, since they are paired; the ends are quantiles of the means of the
    differences (percentile bootstrap).

    Args:
        first_Q: A metric of each query [Q].
        second_Q: Of the other system, for the same queries [Q].
        seed: Draws the queries.
        num_samples: How many sets of Q queries are drawn.
        level: Share of the sets' means that lie between the ends, 0..1.

    Returns:
        Lower and upper end of first less second; NaN for a single query, which tells nothing of others.

    Raises:
        ValueError: The two have different numbers of queries, or none, or a value is NaN.

    Source: Efron and Tibshirani (1993), "An introduction to the bootstrap", section 13.3.
    """
    differences = _paired_differences(first_Q, second_Q)
    if len(differences) == 1:
        return float("nan"), float("nan")
    generator, means_S, done = np.random.default_rng(seed), np.empty(num_samples), 0
    while done < num_samples:
        rows = min(num_samples - done, max(1, _DRAWN_TOGETHER // len(differences)))
        drawn = generator.integers(0, len(differences), size=(rows, len(differences)), dtype=np.int32)
        means_S[done : done + rows] = differences[drawn].mean(1)
        done += rows
    low, high = np.quantile(means_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for the number of comparisons, so that the chance of any false finding keeps its level.

    Args:
        p_values: One for each comparison, by its name.

    Returns:
        Corrected values in the same order: the k-th smallest of m times m - k + 1, at least as large as those of
        smaller ones, at most 1.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def against(
    values: Mapping[str, Sequence[float] | Floats], compared: str, *, seed: int, num_samples: int = NUM_SAMPLES
) -> dict[str, float]:
    """Test every system against one, and correct for their number.

    Args:
        values: System -> its metric of each query [Q], the same queries in the same order.
        compared: The one that the others are tested against.
        seed: Draws the signs, the same for every pair.
        num_samples: As of `randomisation_test`.

    Returns:
        System -> p after Holm's correction; without the one that is compared with.
    """
    return holm(
        {
            name: randomisation_test(one, values[compared], seed=seed, num_samples=num_samples)
            for name, one in values.items()
            if name != compared
        }
    )


def _paired_differences(first_Q: Sequence[float] | Floats, second_Q: Sequence[float] | Floats) -> Floats:
    first, second = np.asarray(first_Q, dtype=np.float64), np.asarray(second_Q, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"a paired test of {first.shape} against {second.shape} values")
    differences: Floats = first - second
    if np.isnan(differences).any():
        raise ValueError("a paired test of values that are not numbers")
    return differences

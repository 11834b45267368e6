"""Several seeds of one setting as one system, and such systems against each other.

A query's value is its mean over the runs that measured it; that is what is compared, query by query. How far the seeds
lie from each other is told beside it (`spread`): the tests are over queries, and say nothing of other seeds.
Shapes: Q queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.errors import ConfigError
from engine.evaluation.significance import LEVEL, Floats, against, bootstrap, standard_error


@dataclass(frozen=True, slots=True)
class Seeded:
    """One of the systems that are pooled.

    Attributes:
        setting: What it is called without its seed; what is pooled has one.
        seed: Of its run; None where it is of no run, such as a run file.
    """

    setting: str
    seed: int | None


@dataclass(frozen=True, slots=True)
class Pooled:
    """One metric of one or several runs that differ in their seed alone.

    Attributes:
        values: Query id -> mean over the runs that measured it.
        run_means: The mean over queries, run by run.
        query_sets: How many runs were measured on each set of queries.
    """

    values: Mapping[str, float]
    run_means: tuple[float, ...]
    query_sets: Counter[frozenset[str]] = field(repr=False)

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, float]]) -> Pooled:
        """Pool the values of runs, query id -> value; at least one run with at least one query."""
        by_query: dict[str, list[float]] = {}
        for values in runs:
            for qid, value in values.items():
                by_query.setdefault(qid, []).append(value)
        return cls(
            {qid: math.fsum(own) / len(own) for qid, own in by_query.items()},
            tuple(math.fsum(values.values()) / len(values) for values in runs),
            Counter(frozenset(values) for values in runs),
        )

    @property
    def mean(self) -> float:
        """Over queries."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def standard_error(self) -> float:
        """Of the mean, over queries; NaN for one query."""
        return standard_error(list(self.values.values()))

    @property
    def spread(self) -> float | None:
        """Sample deviation of the runs' means; None for one run, which tells nothing of other seeds."""
        return float(np.std(self.run_means, ddof=1)) if len(self.run_means) > 1 else None

    @property
    def shown(self) -> str:
        """Mean and standard error."""
        error = "" if math.isnan(self.standard_error) else f" ±{self.standard_error:.4f}"
        return f"{self.mean:.4f}{error}"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one system lies from another on the same queries.

    Attributes:
        mean: Of the differences, the first less the second.
        standard_error: Of that mean, over queries; NaN for one query.
        low: Lower end of the interval of 95 %; NaN for one query.
        high: Upper end.
        p: Of the randomisation test, corrected for the number of systems.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p: float

    @property
    def is_noise(self) -> bool:
        """Whether it could be chance: p is not below the level."""
        return self.p >= LEVEL


def differences(
    pooled: Mapping[str, Pooled], compared: str, *, seed: int, metric: str, of_queries: str
) -> dict[str, Difference]:
    """Compare systems with one of them.

    Args:
        pooled: Name -> system.
        compared: The one that the others are compared with.
        seed: Of tests and intervals.
        metric: For the error.
        of_queries: Such as `queries of dev`, for the error.

    Returns:
        Name -> difference to that one, without itself; Holm's correction is over all of them.

    Raises:
        ConfigError: They were measured on different queries.
    """
    require_same_queries(pooled, f"{metric} on {of_queries}")
    qids = list(pooled[compared].values)
    by_name: dict[str, Floats] = {
        name: np.array([one.values[qid] for qid in qids], dtype=np.float64) for name, one in pooled.items()
    }
    p_values = against(by_name, compared, seed=seed)
    found = {}
    for name, p in p_values.items():
        own_Q = by_name[name] - by_name[compared]
        low, high = bootstrap(by_name[name], by_name[compared], seed=seed)
        found[name] = Difference(float(own_Q.mean()), standard_error(own_Q), low, high, p)
    return found


def require_same_queries(pooled: Mapping[str, Pooled], what: str) -> None:
    """Refuse systems that were measured on different queries.

    Each run may have a sample of its own, drawn by its seed; then every system must have the same samples.

    Args:
        pooled: Name -> system.
        what: What was measured, for the error.

    Raises:
        ConfigError: They were.
    """
    name, *others = pooled
    first = pooled[name].query_sets
    for other in others:
        theirs = pooled[other].query_sets
        if theirs == first or (len(theirs) == len(first) == 1 and theirs.keys() == first.keys()):
            continue
        # One whole split may stand for any number of seeds; samples by seed must be the same samples.
        shared = len(pooled[name].values.keys() & pooled[other].values.keys())
        raise ConfigError(
            f"{what}: {name} was measured on {_told(first)}, {other} on {_told(theirs)}; they share {shared}",
            expected="the same queries for all: a whole split, or samples of one size by the same seeds",
            remedy="name runs of the same seeds, take rankings of one size by --queries N, or measure the others again "
            "by `sparring evaluate RUN --split SPLIT`",
        )


def _told(sets: Counter[frozenset[str]]) -> str:
    sizes = " and ".join(f"{len(own)}" for own in sorted(sets, key=len))
    return f"{sizes} queries" + ("" if len(sets) == 1 else ", a sample for each seed")

"""What metrics are called: `R@20` is recall in the top 20; which exist, and which a recipe reports unless it says."""

from __future__ import annotations

import re
from collections.abc import Iterable

JUDGED, ANSWERED = ("R", "MRR", "nDCG", "MAP"), ("A",)
"""Families: those by judgements, and those by answers in the text."""
DEFAULT_METRICS = (
    *("R@1", "R@5", "R@10", "R@20", "R@50", "R@100", "R@1000", "MRR@10", "nDCG@10"),
    *("A@1", "A@5", "A@20", "A@100"),
)
"""AR2's for MS MARCO (MRR@10, R@50, R@1000) and for answers (1, 5, 20, 100), with nDCG@10 as BEIR and TREC have it."""
ENTROPY_DEPTH = 15
"""Documents over which the entropy of a retriever's distribution is taken (AR2 Table 6)."""
ENTROPY = f"entropy@{ENTROPY_DEPTH}"
"""What it is called in curves and tables."""
_USUAL = "MRR@10"
_NAME = re.compile(rf"({'|'.join((*JUDGED, *ANSWERED))})@([1-9][0-9]{{0,5}})")


def family_of(name: str) -> str:
    """Return what a metric measures, whatever its rank: `R` for `R@20`.

    Raises:
        ValueError: There is no such metric.
    """
    return _parts(name)[0]


def cutoff_of(name: str) -> int:
    """Return the rank to which a metric looks: 20 for `R@20`.

    Raises:
        ValueError: There is no such metric.
    """
    return int(_parts(name)[1])


def compared_by(measured: Iterable[str], asked: str | None = None) -> str | None:
    """Return by which of the metrics that were measured iterations and rows are compared; None where there are none.

    Args:
        measured: Their names, in the order of `evaluation.metrics`.
        asked: `run.keep_best`. Where it is none of them it is MRR@10, else the first by judgements, else the first.
    """
    names = list(measured)
    judged = [name for name in names if family_of(name) in JUDGED]
    return next(iter([*(name for name in (asked, _USUAL) if name in names), *judged, *names]), None)


def _parts(name: str) -> tuple[str, str]:
    found = _NAME.fullmatch(name)
    if found is None:
        families = ", ".join(f"{family}@k" for family in (*JUDGED, *ANSWERED))
        raise ValueError(f"{name!r} is no metric: there are {families}, with a rank k from 1, such as MRR@10")
    return found.group(1), found.group(2)

"""Distributions of negatives and their divergence: how far what a ranker was trained on lies from BM25's candidates.

Source: R2ANKER section 4.3 (Figure 2) and 4.4 (Figure 3). The paper applies "a discrete KL divergence between the top
retrieved results" and leaves open on which documents the distributions live, how scores become probabilities, and what
a document counts that one retriever found and the other did not. Here:

- The top N of a retriever without the query's positives (the D without d+ of Eq. 3) is its distribution's own support.
- Scores become probabilities by a softmax over scores that are brought to one range, since BM25's, inner products and
  logits have different ones; or all N count alike, which is how the negatives are drawn (App. B).
- A joint distribution is the mean of its members': the top N of all are put together without removing repetitions, and
  one of them is drawn (App. B). A document that k of M retrievers found has k shares; Eq. 9 writes a product, which
  would be 0 wherever one retriever did not find the document.
- Two distributions are compared on the union of their supports, each mixed with a little of the uniform distribution on
  it, so that the divergence is finite. How much decides what a document counts that only one of them has.

Distributions are mappings from docid to probability. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.data.trec import best_first

Distribution = Mapping[str, float]
Normalisation = Literal["minmax", "zscore", "none"]
Weights = Literal["softmax", "uniform"]


@dataclass(frozen=True, slots=True)
class Form:
    """What the paper leaves open, as one reads it."""

    top: int = 200
    """Documents of a query that a distribution lives on (N); App. B draws negatives from 200."""
    weights: Weights = "softmax"
    """`softmax` of the scores, or `uniform` over the top N."""
    normalisation: Normalisation = "zscore"
    """How scores are brought to one range before the softmax: to mean 0 and deviation 1 (`zscore`), to 0..1 (`minmax`),
    or as they are (`none`)."""
    temperature: float = 1.0
    """Divides the scores after that; above 0."""
    epsilon: float = 0.01
    """Share of the uniform distribution that each is mixed with before they are compared, above 0 and below 1."""

    def __post_init__(self) -> None:
        if self.top < 1 or not self.temperature > 0 or not 0 < self.epsilon < 1:
            raise ValueError(f"{self}: top from 1, temperature above 0, epsilon above 0 and below 1")


def distribution(qid: str, scores: Mapping[str, float], form: Form, excluded: Set[str] = frozenset()) -> Distribution:
    """Make a distribution of a query's ranking.

    Args:
        qid: The query, for errors.
        scores: Of its documents; the best N of those that are not excluded are taken.
        form: How.
        excluded: Documents that are no negatives: the positives.

    Returns:
        Docid -> probability, all above 0 and adding up to 1; empty where nothing is left.

    Raises:
        DataError: A score is NaN.

    Source: R2ANKER Eq. 3 and App. B.
    """
    top = [docid for docid in best_first(qid, scores) if docid not in excluded][: form.top]
    if form.weights == "uniform" or not top:
        return dict.fromkeys(top, 1 / max(1, len(top)))
    values_N = np.array([scores[docid] for docid in top], dtype=np.float64)
    if form.normalisation != "none":
        low, span = values_N.min(), np.ptp(values_N)
        if form.normalisation == "zscore":
            low, span = values_N.mean(), values_N.std()
        # Where all scores are alike, so are all documents.
        values_N = (values_N - low) / span if span > 0 else np.zeros_like(values_N)
    weights_N = np.exp((values_N - values_N.max()) / form.temperature)
    return dict(zip(top, (weights_N / weights_N.sum()).tolist(), strict=True))


def mixture(members: Sequence[Distribution]) -> Distribution:
    """Return the joint distribution of several retrievers: one of them is chosen, and it draws.

    Args:
        members: One for each retriever; one that found nothing has no share.

    Returns:
        The mean of those that are not empty; empty where all are.

    Source: R2ANKER App. B.
    """
    found = [member for member in members if member]
    joint: dict[str, float] = {}
    for member in found:
        for docid, probability in member.items():
            joint[docid] = joint.get(docid, 0.0) + probability / len(found)
    return joint


def divergence(first: Distribution, second: Distribution, epsilon: float) -> float:
    """Return KL(first || second) on the union of their supports.

    Args:
        first: A distribution that is not empty.
        second: Likewise.
        epsilon: Share of the uniform distribution that each is mixed with.

    Returns:
        Nats, 0 or more, and at most the logarithm of 1 + (1 - epsilon) |union| / epsilon.

    Raises:
        ValueError: One of them is empty.

    Source: R2ANKER section 4.3, Figure 2.
    """
    if not first or not second:
        raise ValueError("the divergence of an empty distribution")
    union = first.keys() | second.keys()
    floor, total = epsilon / len(union), 0.0
    for docid in sorted(union):
        p = (1 - epsilon) * first.get(docid, 0.0) + floor
        q = (1 - epsilon) * second.get(docid, 0.0) + floor
        total += p * math.log(p / q)
    return max(0.0, total)


Rankings = Mapping[str, Mapping[str, float]]
"""Query id -> document id -> score."""


@dataclass(frozen=True, slots=True)
class Divergences:
    """KL of one side to the other, query by query."""

    values: dict[str, float]
    """Query id -> nats."""
    num_without: int
    """Queries for which one of the sides has no document, and nothing can be compared."""


def divergences(
    members: Sequence[Rankings],
    reference: Rankings,
    positives: Mapping[str, Set[str]],
    form: Form,
    *,
    within: Sequence[Rankings] = (),
) -> Divergences:
    """Compare the joint distribution of some rankings with that of another one, query by query.

    Args:
        members: Rankings of the retrievers whose joint distribution it is; one of them alone is its own.
        reference: What it is compared with, such as BM25's.
        positives: Query id -> its positives, which are taken out of all; the queries that are compared.
        form: How.
        within: Rankings that the members are kept to: what one of these has not found is no negative (R2ANKER Table 6).

    Returns:
        The divergences of the queries for which both sides have a document.

    Raises:
        DataError: A score is NaN.
    """
    values: dict[str, float] = {}
    for qid, excluded in positives.items():
        lists = [one.get(qid, {}) for one in members]
        for ranking in within:
            kept = ranking.get(qid, {}).keys()
            lists = [{docid: score for docid, score in one.items() if docid in kept} for one in lists]
        joint = mixture([distribution(qid, one, form, excluded) for one in lists])
        other = distribution(qid, reference.get(qid, {}), form, excluded)
        if joint and other:
            values[qid] = divergence(joint, other, form.epsilon)
    return Divergences(values, len(positives) - len(values))

"""Chooses how many lists are visited and how many candidates re-scored, by measuring recall against exact search.

The choice is the cheapest that reaches the target on a sample of real queries. Cost is counted, not timed: the visited
documents, and for each re-scored candidate as many of them as their codes make up the bytes of one embedding. So a run
that is resumed on another machine chooses the same.

Shapes: Q queries, D embedding dimension, K >= k documents of exact search, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.coordination.coordinator import Coordinator
from engine.index.exact import Floats, exact_search, merge_hits
from engine.index.plan import IndexPlan
from engine.index.probe import ProbedIndex
from engine.search import Hits
from shards.embeddings import EmbeddingStore

_REFINE_FACTORS = (1, 2, 4, 8, 16, 32)
_FLAT_FROM, _FLAT_GAIN = 64, 0.002
"""Lists from which doubling them must gain so much recall, else the codes are what limits it and tuning stops."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A way to search, what it found and what it costs."""

    nprobe: int
    refine_factor: int
    recall: float
    """Share of the exact best k that it found, 0 to 1, the mean over the queries."""
    error: float
    """Standard error of that mean: other queries of the same kind are expected to lie this far off."""
    cost: float
    """Of a query, in visited documents."""

    @property
    def safe_recall(self) -> float:
        """The recall less its standard error, which is what must reach the target: a sample is not all queries."""
        return self.recall - self.error


def exact_truth(
    coordinator: Coordinator,
    name: str,
    store: EmbeddingStore,
    queries_QD: Floats,
    depth: int,
    parts: Sequence[range],
    *,
    device: str,
    timeout_seconds: float | None = None,
    homes: Sequence[str] | None = None,
) -> Hits:
    """Search exactly on all ranks, which are handed parts of the corpus.

    Args:
        coordinator: Between the ranks.
        name: What is searched, the same on all ranks.
        store: The embeddings.
        queries_QD: float32 [Q, D], the same on all ranks.
        depth: Documents a query, at least 1.
        parts: Ranges of documents, which cover the corpus.
        device: Where the products are computed.
        timeout_seconds: How long ranks wait for each other.
        homes: Of each part the host that has its embeddings; any where it is left out.

    Returns:
        Hits [Q, depth], on every rank.
    """
    found = Hits(np.full((len(queries_QD), depth), -1), np.full((len(queries_QD), depth), -np.inf, dtype=np.float32))
    with coordinator.agreement(name, timeout_seconds):
        for number in coordinator.hand_out(name, range(len(parts)), timeout_seconds, homes=homes):
            new = exact_search(store, queries_QD, depth, documents=parts[number], device=device)
            found = merge_hits([found, new], depth)
    if coordinator.world_size == 1:
        return found
    own = [found.documents_QK.tolist(), np.where(found.documents_QK >= 0, found.scores_QK, 0).tolist()]
    every = []
    for documents, scores in coordinator.gather(f"{name}: merge", own, timeout_seconds):
        documents_QK = np.array(documents, dtype=np.int64).reshape(len(queries_QD), depth)
        scores_QK = np.array(scores, dtype=np.float32).reshape(len(queries_QD), depth)
        scores_QK[documents_QK < 0] = -np.inf
        every.append(Hits(documents_QK, scores_QK))
    return merge_hits(every, depth)


def recall_of(scores_QC: Floats, truth: Hits, k: int) -> float:
    """Return which share of the exact best k a search found.

    A document that scores as high as the k-th counts as one of them, so that documents of equal embeddings may stand
    for each other.

    Args:
        scores_QC: Exact scores of what was found [Q, C]; -inf where there is nothing.
        truth: Of exact search, at least k deep, without padding before that.
        k: Depth.
    """
    found_Q = np.minimum((scores_QC >= truth.scores_QK[:, k - 1 : k]).sum(axis=1), k)
    return float(found_Q.mean() / k)


def tune(
    index: ProbedIndex, dimension: int, plan: IndexPlan, queries_QD: Floats, truth: Hits, k: int
) -> tuple[Trial, list[Trial]]:
    """Choose `nprobe` and `refine_factor`, as far as the plan leaves them open.

    Lists are doubled until what is visited alone costs more than the best choice so far. Of each number of lists, one
    search to the greatest depth tells the recall of all depths, without looking at any embedding.

    Args:
        index: What is searched.
        dimension: D, of the embeddings that re-score.
        plan: With `recall_target`, and what is given by hand.
        queries_QD: float32 [Q, D], at least one query.
        truth: Of exact search, at least k deep; deeper, so that documents that tie with the k-th count as it.
        k: Depth of the recall, at most the number of documents.

    Returns:
        The cheapest trial whose recall less its standard error reaches the target, else the one of the highest recall;
        and all trials.

    Raises:
        ValueError: There is no query.
    """
    if not len(queries_QD):
        raise ValueError("recall needs at least one query")
    wanted = [
        documents_K[scores_K >= scores_K[k - 1]]
        for documents_K, scores_K in zip(truth.documents_QK, truth.scores_QK, strict=True)
    ]
    factors = [plan.refine_factor] if plan.refine_factor else _useful_factors(index.num_documents, k)
    weight = max(1.0, 4 * dimension / plan.code_bytes)
    trials: list[Trial] = []
    best, before = float("inf"), 0.0
    for nprobe in [plan.nprobe] if plan.nprobe else _ladder(index.num_lists):
        visited = index.visited(queries_QD, nprobe=nprobe, needed=k)
        if visited + weight * k * factors[0] >= best:
            break
        recalls = _recalls(index, queries_QD, wanted, k, nprobe, factors)
        here = [
            Trial(nprobe, factor, recall, error, visited + weight * k * factor)
            for factor, (recall, error) in zip(factors, recalls, strict=True)
        ]
        trials += here
        best = min([best, *(trial.cost for trial in here if trial.safe_recall >= plan.recall_target)])
        if best == float("inf") and nprobe > _FLAT_FROM and recalls[-1][0] - before < _FLAT_GAIN:
            break
        before = recalls[-1][0]
    reached = [trial for trial in trials if trial.safe_recall >= plan.recall_target]
    for trial in sorted(reached, key=lambda trial: (trial.cost, trial.nprobe)):
        # Candidates whose codes tie are cut elsewhere at the trial's own depth, so that alone is what counts.
        ((recall, error),) = _recalls(index, queries_QD, wanted, k, trial.nprobe, [trial.refine_factor])
        tried = replace(trial, recall=recall, error=error)
        if tried.safe_recall >= plan.recall_target:
            return tried, trials
    return min(trials, key=lambda trial: (-trial.recall, trial.cost)), trials


def _recalls(
    index: ProbedIndex,
    queries_QD: Floats,
    wanted: Sequence[npt.NDArray[np.int64]],
    k: int,
    nprobe: int,
    factors: Sequence[int],
) -> list[tuple[float, float]]:
    """Return recall and its standard error at every depth of re-scoring.

    What is wanted and among the candidates will come out on top, so that nothing need be scored.
    """
    depth = min(index.num_documents, k * factors[-1])
    found = index.search(queries_QD, depth, nprobe=nprobe, needed=k)
    places = [np.flatnonzero(np.isin(row_C, ids)) for row_C, ids in zip(found.documents_QK, wanted, strict=True)]
    measured = []
    for factor in factors:
        recall_Q = np.array([min(k, (here < k * factor).sum()) for here in places]) / k
        measured.append((float(recall_Q.mean()), float(recall_Q.std() / np.sqrt(len(recall_Q)))))
    return measured


def _useful_factors(num_documents: int, k: int) -> list[int]:
    """Return the depths that differ: the first that re-scores every document is the last."""
    deepest = next((factor for factor in _REFINE_FACTORS if factor * k >= num_documents), _REFINE_FACTORS[-1])
    return [factor for factor in _REFINE_FACTORS if factor <= deepest]


def _ladder(num_lists: int) -> Iterator[int]:
    nprobe = 1
    while nprobe < num_lists:
        yield nprobe
        nprobe *= 2
    yield num_lists

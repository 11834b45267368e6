"""Which queries, positives and negatives a step takes, and how they become padded tensors.

Everything is a function of (seed, stream, step): the order of the queries is a fresh permutation for each epoch, the
negatives of a query are drawn by a generator keyed by the step and its place in the batch. So any number of ranks sees
the same samples in the same order, a rank takes its slice of the step's batch, and a resumed run needs no more state
than the step's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.data.corpus import Data
from engine.data.negatives import sample_negatives, step_rng
from engine.errors import ConfigError
from shards.partition import split_range

TokenBatch = dict[str, Tensor]
"""`input_ids` and `attention_mask`, int64 [N, L], and `token_type_ids` where the model has them."""


@dataclass(frozen=True, slots=True)
class Group:
    """A query with its documents; all are numbers, of a training query or of a document in the corpus.

    Attributes:
        query: Row in `Data.train`.
        documents: int64 [1 + n]; the positive first.
    """

    query: int
    documents: np.ndarray


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the queries of a step are shared out.

    Attributes:
        stream: Names the order of queries; stages that go on in the same order share it.
        seed: Of the run.
        batch_size: Queries of a step over all ranks.
        num_negatives: n.
        rank: This rank.
        world_size: Number of ranks.
    """

    stream: str
    seed: int
    batch_size: int
    num_negatives: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ConfigError(
                f"the batch of {self.batch_size} queries of {self.stream!r} cannot be shared equally by "
                f"{self.world_size} ranks",
                expected="a batch_size that the number of ranks divides",
                remedy=f"use a multiple of {self.world_size}",
            )


def query_rows(seed: int, stream: str, start: int, count: int, num_queries: int) -> np.ndarray:
    """Return places `start` to `start + count` of an endless order of the training queries.

    Args:
        seed: Of the run.
        stream: Names the order.
        start: First place; epochs follow each other, each a permutation of its own.
        count: Number of places.
        num_queries: Size of the train split.

    Returns:
        Row numbers, int64 [count]; within an epoch none repeats.
    """
    rows: list[np.ndarray] = []
    while count > 0:
        epoch, offset = divmod(start, num_queries)
        permutation = step_rng(seed, f"order/{stream}", epoch, 0).permutation(num_queries)
        taken = permutation[offset : offset + count]
        rows.append(taken)
        start, count = start + len(taken), count - len(taken)
    return np.concatenate(rows).astype(np.int64)


def step_groups(plan: BatchPlan, data: Data, candidates_of: Callable[[int], np.ndarray], step: int) -> list[Group]:
    """Draw the whole step's groups, the same on every rank.

    Args:
        plan: Sizes and seed.
        data: Training queries and their positives.
        candidates_of: Training row to its candidates, int64 [K], best first.
        step: Number of the step in the stream.

    Returns:
        `batch_size` groups in the order of the batch.

    Raises:
        ConfigError: A query has fewer candidates than n.
    """
    rows = query_rows(plan.seed, plan.stream, step * plan.batch_size, plan.batch_size, len(data.train))
    groups = []
    for place, row in enumerate(rows.tolist()):
        rng = step_rng(plan.seed, f"negatives/{plan.stream}", step, place)
        positive = rng.choice(data.train.positives[row])
        negatives = (
            sample_negatives(candidates_of(row), plan.num_negatives, rng)
            if plan.num_negatives
            else np.empty(0, dtype=np.int64)
        )
        groups.append(Group(row, np.concatenate([[positive], negatives]).astype(np.int64)))
    return groups


def own_share(plan: BatchPlan, groups: Sequence[Group]) -> list[Group]:
    """Return this rank's slice of a step's groups."""
    share = split_range(len(groups), plan.rank, plan.world_size)
    return [groups[place] for place in share]


def micro_batches(groups: Sequence[Group], size: int) -> Iterator[tuple[Sequence[Group], float, bool]]:
    """Cut a rank's groups into micro-batches.

    Yields:
        The groups, their share of the rank's mean, and whether they are the last.
    """
    for start in range(0, len(groups), size):
        chunk = groups[start : start + size]
        yield chunk, len(chunk) / len(groups), start + size >= len(groups)


def query_batch(data: Data, groups: Sequence[Group], max_length: int, device: torch.device) -> TokenBatch:
    """Pad the queries of groups for the retriever: `input_ids` [B, L]."""
    template = data.retriever_text.template
    items = [template.single(data.train.retriever_tokens[group.query], max_length) for group in groups]
    return _to(template.pad(items), device)


def document_batch(data: Data, groups: Sequence[Group], max_length: int, device: torch.device) -> TokenBatch:
    """Pad the documents of groups for the retriever: `input_ids` [B * (1 + n), L], group by group."""
    text = data.retriever_text
    items = [
        text.template.single(data.shards.tokens(int(document), text.stream).tolist(), max_length)
        for group in groups
        for document in group.documents
    ]
    return _to(text.template.pad(items), device)


def pair_batch(data: Data, groups: Sequence[Group], max_length: int, device: torch.device) -> TokenBatch:
    """Pad query-document pairs of groups for the ranker: `input_ids` [B * (1 + n), L], group by group."""
    text = data.ranker_text
    items = [
        text.template.pair(
            data.train.ranker_tokens[group.query], data.shards.tokens(int(document), text.stream).tolist(), max_length
        )
        for group in groups
        for document in group.documents
    ]
    return _to(text.template.pad(items), device)


def count_tokens(*batches: TokenBatch) -> float:
    """Count the tokens of batches, padding left out."""
    return float(sum(int(batch["attention_mask"].sum()) for batch in batches))


def _to(batch: TokenBatch, device: torch.device) -> TokenBatch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

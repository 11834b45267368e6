"""Objectives: what one step of a phase computes.

An objective is asked twice for a step: to prepare its batch, a function of the step's number that needs no model and
no device, and to run its forward and backward passes. The loop (`engine.training.loop`) does the rest.

Shapes: B queries of a micro-batch or of this rank, n negatives of a query, N = 1 + n of its documents (column 0 is the
positive), P documents in a shared pool, D the embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from engine.data.batches import Group, MicroBatch
from engine.data.corpus import Data
from engine.metrics import Metric
from engine.models.template import Batch, count_tokens
from engine.training.backend import TrainedModel
from engine.training.gradient_cache import LossOf, contrastive_backward


@dataclass(frozen=True, slots=True)
class Inputs:
    """A micro-batch with the inputs that models get for it.

    Attributes:
        micro: Its samples: queries with their documents, in most cases.
        of: Inputs by the names under which a model's forward takes them: `queries`, `documents`, `pairs`.
        num_tokens: Tokens of all, padding left out.
    """

    micro: MicroBatch[Any]
    of: dict[str, Batch]
    num_tokens: float


def inputs_of(micro: MicroBatch[Any], **of: Batch) -> Inputs:
    """Join a micro-batch with its inputs."""
    return Inputs(micro, of, count_tokens(*of.values()))


@dataclass(frozen=True, slots=True)
class PooledBatch:
    """A rank's share of a step whose documents are all negatives of each other's queries.

    Attributes:
        chunks: The share in pieces that fit into memory.
        targets_B: Column of each query's positive in the pool, int64 [B].
        excluded_BP: Documents of the pool that are no negatives of a query, bool [B, P].
        step: Its number, counted over all visits of the phase.
    """

    chunks: list[Inputs]
    targets_B: Tensor
    excluded_BP: Tensor
    step: int


def pooled_backward(
    model: TrainedModel, batch: PooledBatch, loss_of: LossOf, *, further_tokens: float = 0.0
) -> dict[str, Metric]:
    """Differentiate a loss over a whole pool, chunk by chunk where there is more than one.

    Args:
        model: The retriever.
        batch: This rank's share.
        loss_of: From the representations of its queries [B, D] and documents [N, D] to the loss and its metrics.
        further_tokens: Of what other models have read for it.

    Returns:
        The loss's metrics, with the number of tokens.
    """
    chunks = batch.chunks
    metrics = contrastive_backward(
        model, [chunk.of for chunk in chunks], loss_of, [chunk.micro.seed for chunk in chunks]
    )
    return metrics | {"tokens": Metric(sum(chunk.num_tokens for chunk in chunks) + further_tokens, "sum")}


class Means:
    """Means over the queries of a rank's micro-batches; they stay on the device, so that nothing waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_tokens = 0.0

    def add(self, inputs: Inputs, measured: dict[str, Tensor]) -> None:
        """Take in the means over a micro-batch, scalars."""
        for name, value in measured.items():
            weighed = value.double() * inputs.micro.share
            self._sums[name] = self._sums[name] + weighed if name in self._sums else weighed
        self._num_tokens += inputs.num_tokens

    def metrics(self) -> dict[str, Metric]:
        """Return them, with the number of tokens."""
        return {name: Metric(value) for name, value in self._sums.items()} | {"tokens": Metric(self._num_tokens, "sum")}


def own_scores(queries_BD: Tensor, documents_ND: Tensor) -> Tensor:
    """Score each query's own documents.

    Args:
        queries_BD: Representations of B queries [B, D].
        documents_ND: Representations of their documents, query by query, equally many of each [B * N, D].

    Returns:
        Inner products [B, N].
    """
    documents_BND = documents_ND.view(len(queries_BD), -1, queries_BD.shape[-1])
    return torch.einsum("bd,bnd->bn", queries_BD, documents_BND)


def spread(scores_BN: Tensor) -> Tensor:
    """Return how far apart a query's highest and lowest score are, on average."""
    return (scores_BN.detach().amax(1) - scores_BN.detach().amin(1)).mean()


def no_negatives(data: Data, own: Sequence[Group], pool: Sequence[Group]) -> Tensor:
    """Mark pool documents that are positives or known false negatives of a query: bool [B, P]."""
    documents_P = np.concatenate([group.documents for group in pool])
    return torch.from_numpy(np.stack([np.isin(documents_P, list(data.train.known(group.query))) for group in own]))


def gather_documents(documents_ND: Tensor) -> Tensor:
    """Gather documents over the ranks with gradients: [N, D] -> [W * N, D], in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return documents_ND
    return torch.cat(all_gather(documents_ND.contiguous()))  # type: ignore[no-untyped-call]

"""Gradient caching: the gradient of one large contrastive batch, in memory for a small one.

A contrastive loss needs the representations of all texts at once, but no activations. So: represent every chunk
without a graph; differentiate the loss with respect to the representations; then represent each chunk again, with a
graph, and push its part of that gradient through it. Dropout draws the same numbers in both passes. The result equals
the plain large batch under ZeRO 0 to 3; each chunk's surrogate is a scalar, because DeepSpeed drops gradients that
are handed to a non-scalar backward.

Source: the technique is known from Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine.metrics import Metric
from engine.models.template import Batch
from engine.training.backend import TrainedModel

Representations = tuple[Tensor, Tensor]
"""Query embeddings [B, D] and document embeddings [N, D]."""
Chunk = Mapping[str, Batch]
"""The retriever's forward arguments, `queries` and `documents`."""
LossOf = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Metric]]]
"""From the representations of this rank's whole batch to the scalar loss and its metrics."""


def contrastive_backward(
    model: TrainedModel, chunks: Sequence[Chunk], loss_of: LossOf, seeds: Sequence[int]
) -> dict[str, Metric]:
    """Run forward and backward of a step, with the cache where there is more than one chunk.

    Args:
        model: The retriever's engine.
        chunks: This rank's batch, cut so that one chunk's activations fit; all ranks have equally many.
        loss_of: The loss; called once.
        seeds: Of the random numbers of each chunk.

    Returns:
        The loss's metrics.
    """
    if len(chunks) == 1:
        torch.manual_seed(seeds[0])
        loss, metrics = loss_of(*model(**chunks[0]))
        model.backward(loss, last=True)
        return metrics
    represented = _represent(model, chunks, seeds)
    gradients, metrics = _differentiate(represented, loss_of)
    _replay(model, chunks, gradients, seeds)
    return metrics


def _represent(model: TrainedModel, chunks: Sequence[Chunk], seeds: Sequence[int]) -> list[Representations]:
    represented = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)
            represented.append(model(**chunk))
    return represented


def _differentiate(
    represented: Sequence[Representations], loss_of: LossOf
) -> tuple[list[Representations], dict[str, Metric]]:
    queries_BD = torch.cat([queries for queries, _ in represented]).requires_grad_()
    documents_ND = torch.cat([documents for _, documents in represented]).requires_grad_()
    loss, metrics = loss_of(queries_BD, documents_ND)
    query_gradients, document_gradients = torch.autograd.grad(loss, (queries_BD, documents_ND))
    return (
        list(
            zip(
                torch.split(query_gradients, [len(queries) for queries, _ in represented]),
                torch.split(document_gradients, [len(documents) for _, documents in represented]),
                strict=True,
            )
        ),
        metrics,
    )


def _replay(
    model: TrainedModel,
    chunks: Sequence[Chunk],
    gradients: Sequence[Representations],
    seeds: Sequence[int],
) -> None:
    for number, (chunk, (query_gradient, document_gradient)) in enumerate(zip(chunks, gradients, strict=True)):
        torch.manual_seed(seeds[number])
        queries_BD, documents_ND = model(**chunk)
        surrogate = (queries_BD * query_gradient).sum() + (documents_ND * document_gradient).sum()
        model.backward(surrogate, last=number == len(chunks) - 1)

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.metrics import Metric
from engine.training.backend import TrainedModel

Representations = tuple[Tensor, ...]
"""Of a retriever: query embeddings [B, D] and document embeddings [N, D]."""
Chunk = Mapping[str, Any]
"""The model's forward arguments, of a retriever `queries` and `documents`."""
LossOf = Callable[..., tuple[Tensor, dict[str, Metric]]]
"""From the representations of this rank's whole batch, one argument each, to the scalar loss and its metrics."""


@dataclass(frozen=True, slots=True)
class LossBeside:
    """A loss that is a sum over chunks, and is added to that of the representations.

    The model then returns its representations and, behind them, what this loss is made of.

    Attributes:
        loss_of: From a chunk's number and that last output to a scalar; called once for each chunk.
        left_out: Forward arguments by which a pass leaves that output out; its other random numbers stay the same.
    """

    loss_of: Callable[[int, Any], Tensor]
    left_out: Mapping[str, Any]


def contrastive_backward(
    model: TrainedModel,
    chunks: Sequence[Chunk],
    loss_of: LossOf,
    seeds: Sequence[int],
    beside: LossBeside | None = None,
) -> dict[str, Metric]:
    """Run forward and backward of a step, with the cache where there is more than one chunk.

    Args:
        model: The engine of the retriever, or of whatever returns representations.
        chunks: This rank's batch, cut so that one chunk's activations fit; all ranks have equally many.
        loss_of: The loss; called once.
        seeds: Of the random numbers of each chunk.
        beside: A further loss of each chunk by itself; None for none.

    Returns:
        The loss's metrics, those of a further loss left out.
    """
    if len(chunks) == 1:
        torch.manual_seed(seeds[0])
        represented, more = _parted(model(**chunks[0]), 0, beside)
        loss, metrics = loss_of(*represented)
        model.backward(loss + more, last=True)
        return metrics
    cached = _represent(model, chunks, seeds, beside)
    gradients, metrics = _differentiate(cached, loss_of)
    _replay(model, chunks, gradients, seeds, beside)
    return metrics


def _parted(output: tuple[Any, ...], number: int, beside: LossBeside | None) -> tuple[Representations, Tensor | float]:
    """Return a chunk's representations, and its further loss."""
    return (output, 0.0) if beside is None else (output[:-1], beside.loss_of(number, output[-1]))


def _represent(
    model: TrainedModel, chunks: Sequence[Chunk], seeds: Sequence[int], beside: LossBeside | None
) -> list[Representations]:
    represented = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)
            represented.append(model(**chunk) if beside is None else model(**chunk, **beside.left_out)[:-1])
    return represented


def _differentiate(
    represented: Sequence[Representations], loss_of: LossOf
) -> tuple[list[Representations], dict[str, Metric]]:
    """Return the loss's gradient with respect to each chunk's representations."""
    sides = [torch.cat(side).requires_grad_() for side in zip(*represented, strict=True)]
    loss, metrics = loss_of(*sides)
    gradients = torch.autograd.grad(loss, sides)
    parts = [
        torch.split(gradient, [len(chunk[number]) for chunk in represented])
        for number, gradient in enumerate(gradients)
    ]
    return list(zip(*parts, strict=True)), metrics


def _replay(
    model: TrainedModel,
    chunks: Sequence[Chunk],
    gradients: Sequence[Representations],
    seeds: Sequence[int],
    beside: LossBeside | None,
) -> None:
    for number, (chunk, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        torch.manual_seed(seeds[number])
        represented, more = _parted(model(**chunk), number, beside)
        surrogates = [(one * part).sum() for one, part in zip(represented, gradient, strict=True)]
        model.backward(torch.stack(surrogates).sum() + more, last=number == len(chunks) - 1)

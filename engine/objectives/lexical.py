"""A lexical retriever's training: the contrast of the batch, and a penalty that presses its vectors to be sparse.

Shapes: as in `engine.objectives`; V words of a vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from engine.config.lexical import FlopsConfig
from engine.data.batches import InputBuilder, Samples
from engine.metrics import Metric
from engine.objectives import PooledBatch
from engine.objectives.contrast import InBatchContrast


class LexicalContrast(InBatchContrast):
    """A lexical retriever's training: the contrast of the batch (Eq. 2), and a penalty for words that many texts have.

    loss = contrast + rise(t) (query_flops FLOPS(queries) + document_flops FLOPS(documents)),

    where the means of FLOPS are over the texts of all ranks, whether or not the ranks share their documents as
    negatives: so the penalty is the same for any number of ranks, and for any cut of a batch. The documents are
    positives and negatives together.

    Args:
        samples: Queries, positives and hard negatives.
        builder: Makes the retriever's inputs.
        score_scale: The tau of Eq. 2.
        penalty: Weights of FLOPS, and how they rise.

    Source: arXiv 2109.10086, the ranking loss with in-batch negatives and both penalties.
    """

    def __init__(self, samples: Samples, builder: InputBuilder, *, score_scale: float, penalty: FlopsConfig) -> None:
        super().__init__(samples, builder, score_scale=score_scale)
        self._penalty = penalty

    def loss(self, batch: PooledBatch, queries_BD: Tensor, documents_ND: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of a rank's weights of words, and what is measured of it."""
        contrast, metrics = super().loss(batch, queries_BD, documents_ND)
        means_2V = mean_over_ranks(torch.stack([queries_BD.mean(0), documents_ND.mean(0)]))
        of_queries, of_documents = (flops(mean_1V) for mean_1V in (means_2V[:1], means_2V[1:]))
        rise = quadratic_rise(batch.step, self._penalty.flops_steps)
        loss = contrast + rise * (self._penalty.query_flops * of_queries + self._penalty.document_flops * of_documents)
        measured = {
            "loss": loss.detach(),
            "contrastive": contrast.detach(),
            "flops_query": of_queries.detach(),
            "flops_document": of_documents.detach(),
            "query_terms": num_terms(queries_BD),
            "document_terms": num_terms(documents_ND),
        }
        return loss, metrics | {name: Metric(value) for name, value in measured.items()}


def flops(weights_NV: Tensor) -> Tensor:
    """Return the FLOPS penalty: the inner product of two texts of a batch, on average over all pairs of them.

    An inverted index multiplies once for each word that query and document share. How many texts have a word has no
    gradient; the mean of its weights has, and its square is high where many texts have it. So words that all texts have
    are pressed towards 0 first, and the lists of the index become equally long.

    The mean is over all rows that are given: SPLADE's released code adds up half of the penalty of the positives and
    half of that of the negatives instead. With means over parts of a batch, one row each, it is that of the whole.

    Args:
        weights_NV: Weights >= 0 of N texts and V words, or one row with their means [N, V].

    Returns:
        Sum over the words of the squared mean over the texts, scalar >= 0.

    Raises:
        ValueError: They have not two dimensions.

    Source: Paria et al. 2020 (arXiv 2004.05665), as SPLADE uses it (arXiv 2109.10086).
    """
    if weights_NV.dim() != 2:
        raise ValueError(f"weights have shape {tuple(weights_NV.shape)}, expected two dimensions")
    raised_NV = weights_NV if weights_NV.dtype == torch.float64 else weights_NV.float()
    return raised_NV.mean(dim=0).square().sum()


def quadratic_rise(step: int, steps: int) -> float:
    """Return the share of a penalty's full weight at a step: it rises with the square of the steps that were taken.

    A penalty of full weight at the start empties all vectors, from which no gradient leads back.

    Args:
        step: Number of the step, from 0. Its share is that of the step's end, so that the first is above 0, as in
            SPLADE's released code.
        steps: Steps until the full weight (T); 0 for the full weight from the start.

    Returns:
        min(1, (t / T)^2) with t = step + 1.

    Source: arXiv 2004.05665; SPLADE's released code has T = 50,000.
    """
    return 1.0 if step + 1 >= steps else ((step + 1) / steps) ** 2


def num_terms(weights_NV: Tensor) -> Tensor:
    """Return how many words a text has a weight for, on average."""
    return (weights_NV.detach() != 0).sum(1).double().mean()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average over the ranks with gradients; each rank has as many texts as any other."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total: Tensor = all_reduce(values.contiguous())  # type: ignore[no-untyped-call]
    return total / dist.get_world_size()

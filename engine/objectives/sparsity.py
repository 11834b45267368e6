"""What presses a lexical retriever's vectors to be sparse: a penalty of its weights, and how the penalty rises.

Pure functions, as those of `engine.losses`. Shapes: N texts, V words of a vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

"""How far a ranker that teaches is ahead of the retriever that it teaches, group by group.

Pure functions, as those of `engine.losses`. Shapes: B queries, N = 1 + n documents of a query, column 0 its positive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lead(
    retriever_scores_BN: Tensor,
    ranker_scores_BN: Tensor,
    *,
    retriever_score_scale: float = 1.0,
    ranker_score_scale: float = 1.0,
) -> Tensor:
    """Return how far the ranker is ahead of the retriever on each query's documents: CE_theta / (CE_theta + CE_phi).

    CE is minus the log likelihood of the positive: the ranker's by Eq. 6, the retriever's by the same softmax of its
    own scores. So it is 1 for a ranker that is sure of the positive where the retriever is not, a half for two that are
    equally sure, and near 0 where the retriever is far surer: from such a ranker it would unlearn. It is a function of
    one query's scores: the same for any batch, any cut of it, any number of ranks, and after a resume.

    The stricter max(0, 1 - CE_phi / CE_theta) takes a strong ranker's word away where it is worth most, among documents
    that are relevant and not labelled so: there no ranker is surer of the label than a retriever that was trained on it
    (docs/ar2.md has numbers).

    Args:
        retriever_scores_BN: Retriever scores, the positive in column 0 [B, N], N >= 2.
        ranker_scores_BN: Raw ranker scores of the same documents [B, N].
        retriever_score_scale: The paper's tau in p_theta.
        ranker_score_scale: The paper's tau in p_phi.

    Returns:
        Values 0..1 without gradient [B]; 0 where both have nothing left to learn.

    Raises:
        ValueError: The shapes differ, or there is no negative.

    Source: none, it is ours. In AR2 the ranker teaches every query alike (Eq. 9, 12).
    """
    shapes = tuple(retriever_scores_BN.shape), tuple(ranker_scores_BN.shape)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] < 2:
        raise ValueError(
            f"retriever scores have shape {shapes[0]}, ranker scores {shapes[1]}, expected both [B, 1 + n]"
        )
    student_B = _surprise(retriever_scores_BN, retriever_score_scale)
    teacher_B = _surprise(ranker_scores_BN, ranker_score_scale).to(student_B.dtype)
    return student_B / (student_B + teacher_B).clamp(min=torch.finfo(student_B.dtype).tiny)


def _surprise(scores_BN: Tensor, score_scale: float) -> Tensor:
    """Minus the log likelihood of the positive, exact also where a softmax would round it to 0."""
    raised_BN = scores_BN if scores_BN.dtype == torch.float64 else scores_BN.float()
    logits_BN = raised_BN.detach() * score_scale
    return F.softplus(logits_BN[:, 1:].logsumexp(dim=-1) - logits_BN[:, 0])

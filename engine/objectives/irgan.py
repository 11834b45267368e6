"""IRGAN's game between the same models: the ranker judges each document alone, the retriever is paid for fooling it.

AR2's paper put its own retriever and ranker in the places of IRGAN's generative and discriminative models (Table 5),
and says no more of it than Eq. 3:

    min_theta max_phi  E_{d ~ true} [log D(d, q)] + E_{d- ~ G_theta} [log(1 - D(d-, q))],  D = sigmoid of the score.

What is open there is settled here, at the two functions. There is no regularisation (Eq. 12).

Shapes: as in `engine.objectives`.

Source: AR2 Eq. 3 and section 4.4; Wang et al. 2017, "IRGAN: A Minimax Game for Unifying Generative and Discriminative
Information Retrieval Models" (arXiv 1705.10513), section 2, pointwise; and its released code for web search.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import losses
from engine.objectives.game import AdversarialGame
from engine.objectives.ranking import ListwiseRanking

Support = Literal["group", "negatives"]
"""Which documents of a query's group the generator draws from: see `generator`."""


def discriminator(ranker_scores_BN: Tensor, *, score_scale: float = 1.0) -> Tensor:
    """Return the ranker's pointwise cross-entropy: -log D(d, q) - mean_i log(1 - D(d_i, q)).

    Eq. 3 has one expectation over positives and one over negatives, so a query's positive weighs as much as all its
    negatives together, as in the released code, which draws one negative for each positive; summed over pairs, n
    negatives would outweigh it n times. The negatives are those that the ranker's phase draws from what the retriever
    found last; IRGAN draws them from p_theta over all documents.

    Unlike the listwise loss (Eq. 7) it changes where a constant is added to a query's scores.

    Args:
        ranker_scores_BN: Raw ranker scores, the positive in column 0 [B, N], N >= 2.
        score_scale: Multiplies a score before the sigmoid.

    Returns:
        Mean over the queries, scalar >= 0; 2 log 2 where all scores are 0.

    Raises:
        ValueError: There is no negative.

    Source: AR2 Eq. 3 (maximised there, so the sign is turned); IRGAN section 2, its discriminator.
    """
    logits_BN = _raised(ranker_scores_BN) * score_scale
    # softplus(x) is -log(1 - sigmoid(x)), and neither overflows nor loses small numbers.
    return (F.softplus(-logits_BN[:, 0]) + F.softplus(logits_BN[:, 1:]).mean(dim=-1)).mean()


def generator(
    retriever_scores_BN: Tensor,
    ranker_scores_BN: Tensor,
    *,
    support: Support,
    retriever_score_scale: float = 1.0,
    ranker_score_scale: float = 1.0,
) -> Tensor:
    """Return what the retriever minimises to be believed: E_{d ~ p_theta} [log(1 - D(d, q))].

    It is minus the expected reward of IRGAN's policy gradient, log(1 + exp f_phi(d, q)), which is the same quantity.
    (The released code pays 2 D - 1 instead.) IRGAN estimates the gradient by documents drawn from p_theta; here the
    expectation over the documents of a query's group is computed whole, which has the same mean and no variance of its
    own. Its gradient is

        sum_i p_theta(d_i) (r_i - E r) grad s_i,

    so IRGAN's baseline, the expected reward, is in it already: subtracting it, or any other constant of a query, from
    the rewards changes nothing. p_theta is a softmax over the group, since over the corpus it cannot be computed; the
    group was drawn from what the retriever found last.

    Args:
        retriever_scores_BN: Retriever scores, the positive in column 0 [B, N], N >= 2.
        ranker_scores_BN: Raw ranker scores of the same documents [B, N]; a constant, no gradient flows into them.
        support: What p_theta is over. `group`: positive and negatives; IRGAN's generator draws from all documents of a
            query, and is paid for its positives as for the others. `negatives`: these alone, as d- in AR2's Eq. 3 may
            be read; then the positive's score gets no gradient.
        retriever_score_scale: The tau of p_theta.
        ranker_score_scale: As of `discriminator`.

    Returns:
        Mean over the queries, scalar <= 0.

    Raises:
        ValueError: The shapes differ, there is no negative, or `support` is unknown.

    Source: AR2 Eq. 3; IRGAN section 2, its generator.
    """
    if retriever_scores_BN.shape != ranker_scores_BN.shape:
        raise ValueError(
            f"retriever scores have shape {tuple(retriever_scores_BN.shape)}, ranker scores "
            f"{tuple(ranker_scores_BN.shape)}; both score the same documents"
        )
    first = {"group": 0, "negatives": 1}.get(support)
    if first is None:
        raise ValueError(f"support is {support!r}, expected one of: group, negatives")
    probabilities_BN = (_raised(retriever_scores_BN)[:, first:] * retriever_score_scale).softmax(dim=-1)
    rewards_BN = reward(ranker_scores_BN, score_scale=ranker_score_scale)[:, first:]
    return -(probabilities_BN * rewards_BN).sum(dim=-1).mean()


def reward(ranker_scores_BN: Tensor, *, score_scale: float = 1.0) -> Tensor:
    """Return what the retriever gets for each document: -log(1 - D(d, q)) = log(1 + exp f(d, q)).

    Args:
        ranker_scores_BN: Raw ranker scores [B, N], N >= 2.
        score_scale: As of `discriminator`.

    Returns:
        Numbers > 0, [B, N], without gradient.

    Raises:
        ValueError: There is no negative.

    Source: IRGAN section 2, its generator.
    """
    return F.softplus(_raised(ranker_scores_BN).detach() * score_scale)


class Discriminator(ListwiseRanking):
    """The ranker, which tells positives from negatives each by itself; arguments as of `ListwiseRanking`."""

    def loss(self, scores_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the pointwise loss, and how probable the ranker finds positives and negatives."""
        judged_BN = (scores_BN.detach().float() * self._score_scale).sigmoid()
        measured = {"believed_positive": judged_BN[:, 0].mean(), "believed_negative": judged_BN[:, 1:].mean()}
        return discriminator(scores_BN, score_scale=self._score_scale), measured


class Generator(AdversarialGame):
    """The retriever against a fixed ranker that judges each document alone; arguments as of `AdversarialGame`."""

    def loss(self, retriever_scores_BN: Tensor, ranker_scores_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's loss, and what is measured of it."""
        retriever_scale, ranker_scale = self._score_scales
        loss = generator(
            retriever_scores_BN,
            ranker_scores_BN,
            support=self._game.irgan_support,
            retriever_score_scale=retriever_scale,
            ranker_score_scale=ranker_scale,
        )
        with torch.no_grad():
            rewards_BN = reward(ranker_scores_BN, score_scale=ranker_scale)
            measured = {
                "loss": loss.detach(),
                "reward": rewards_BN[:, 1:].mean(),
                "reward_positive": rewards_BN[:, 0].mean(),
                "entropy": losses.entropy(retriever_scores_BN, score_scale=retriever_scale),
                "accuracy": (retriever_scores_BN.argmax(1) == 0).float().mean(),
                "ranker_accuracy": (ranker_scores_BN.argmax(1) == 0).float().mean(),
            }
        return loss, measured


def _raised(scores_BN: Tensor) -> Tensor:
    """Give scores at least float32, and refuse what is no group."""
    if scores_BN.dim() != 2 or scores_BN.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(scores_BN.shape)}; the game needs at least one negative")
    return scores_BN.to(torch.promote_types(scores_BN.dtype, torch.float32))

"""The objectives of AR2 and distillation, one pure function an equation: scores in, a scalar out; no model.

Names of shapes: B queries on this rank; N = 1 + n documents of a query, column 0 its positive and columns 1..n its
negatives; in `contrastive` alone, N counts all documents of the batch and the positive's column is given; V words of a
vocabulary.

Scores are raw (`w·E([q,d])` or an inner product, Eq. 4). The paper's tau multiplies a score before a softmax and is
called a scale here, in distillation too: a temperature T, which divides, is a scale of 1 / T. Half-precision scores are
raised to float32 first; float64 stays float64. All logarithms are natural ones.

Source: AR2 (Zhang et al., 2022), equations as noted, and for the losses of distillation R2ANKER (Zhou et al., 2023) and
Hofstaetter et al. (2020); where the authors' released code differs, the function says so.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import TrainingError

AdversarialForm = Literal["paper", "with_positive", "released"]
"""How Eq. 9 is read: see `adversarial`."""

OverQueries = Literal["mean", "sum"]
"""How the queries of a batch are combined."""

_RELEASED_EPSILON = 1e-7
"""What the released code adds to a probability before it takes the logarithm."""


def contrastive(
    scores_BN: Tensor,
    targets_B: Tensor,
    *,
    score_scale: float = 1.0,
    excluded_BN: Tensor | None = None,
) -> Tensor:
    """Return the negative log likelihood of each query's positive among the documents of the batch.

    Args:
        scores_BN: Retriever scores of B queries and all N documents that the batch shares [B, N].
        targets_B: Column of each query's positive, int64 [B].
        score_scale: The paper's tau.
        excluded_BN: True where a document must not be a negative of that query, such as its own second positive
            that another query brought along; such columns take no softmax mass and get no gradient. Bool [B, N].

    Returns:
        Mean over the queries, scalar >= 0.

    Raises:
        ValueError: The shapes do not fit.
        TrainingError: A query's own positive is excluded, which would make its loss infinite.

    Source: AR2 Eq. 2, with in-batch negatives.
    """
    logits_BN = _raised(scores_BN, "scores") * score_scale
    if targets_B.shape != logits_BN.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets_B.shape)}, scores {tuple(scores_BN.shape)}")
    if excluded_BN is not None:
        if excluded_BN.shape != logits_BN.shape:
            raise ValueError(f"excluded has shape {tuple(excluded_BN.shape)}, scores {tuple(scores_BN.shape)}")
        lost_B = excluded_BN.gather(1, targets_B[:, None]).squeeze(1)
        if bool(lost_B.any()):
            raise TrainingError(
                f"The positives of the queries in rows {lost_B.nonzero().flatten().tolist()} are excluded",
                expected="every query's own positive takes part in its softmax",
                remedy="exclude a query's other positives only",
            )
        logits_BN = logits_BN.masked_fill(excluded_BN, -torch.inf)
    return F.cross_entropy(logits_BN, targets_B)


def ranker_cross_entropy(
    ranker_scores_BN: Tensor, *, score_scale: float = 1.0, weights_B: Tensor | None = None
) -> Tensor:
    """Return the listwise cross-entropy of the ranker: minus the log likelihood that it picks the positive.

    Args:
        ranker_scores_BN: Raw ranker scores, or a retriever's that learns from the label, the positive in column 0
            [B, N].
        score_scale: The paper's tau.
        weights_B: What each query counts; None for 1 [B].

    Returns:
        Mean over the queries, scalar >= 0; the sum of the weighed terms is divided by B, not by the weights' sum.

    Raises:
        ValueError: The weights do not fit.

    Source: AR2 Eq. 6, 7 (maximised there, so the sign is turned).
    """
    logits_BN = _raised(ranker_scores_BN, "ranker scores") * score_scale
    return _reduced(-F.log_softmax(logits_BN, dim=-1)[:, 0], "mean", weights_B)


def pairwise_reward(ranker_scores_BN: Tensor, *, score_scale: float = 1.0) -> Tensor:
    """Return how surely the ranker prefers the positive to each negative alone: log p_phi(d | q, d, d_i).

    The lower it is, the better the negative fools the ranker. It is a constant for the retriever: no gradient flows.

    Args:
        ranker_scores_BN: Raw ranker scores, the positive in column 0 [B, N].
        score_scale: The paper's tau.

    Returns:
        Log probabilities <= 0, [B, n]; log 0.5 where the ranker scores a negative as high as the positive.

    Source: AR2 Eq. 9, its second factor.
    """
    logits_BN = _raised(ranker_scores_BN, "ranker scores").detach() * score_scale
    # log softmax of a pair is the log sigmoid of the difference, which neither overflows nor loses small differences.
    return F.logsigmoid(logits_BN[:, :1] - logits_BN[:, 1:])


def adversarial(
    retriever_scores_BN: Tensor,
    ranker_scores_BN: Tensor,
    *,
    form: AdversarialForm,
    reduction: OverQueries = "mean",
    retriever_score_scale: float = 1.0,
    ranker_score_scale: float = 1.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return what the retriever minimises to fool the ranker, in one of three readings of Eq. 9.

    - `paper`: the equation as printed, sum_i p_theta(d_i | q, D-) log p_phi(d | q, d, d_i), where p_theta is a
      softmax over the negatives alone. The value is <= 0, and the positive's score gets no gradient at all.
      With a single negative p_theta is 1 whatever the scores are, so there is no gradient either: what AR2 reports for
      n = 1 (Table 4) cannot come from this form. Nor can what it reports without Eq. 12 (Table 6): it is paid for
      raising the negatives that fool the ranker and teaches the positive nothing, so that alone it can lower the
      retriever. In a game whose scores themselves are trained (tests/numerics/test_toy_game.py) its MRR falls from .479
      to .386, and rises to .868 by `released`; in another one from .447 to .248, and to .508. Beside Eq. 12 it adds to
      the harm of a weak ranker: .848 at weight 1, .900 at .3, .920 at 0 in a small run (docs/ar2.md).
    - `with_positive`: the same sum over the negatives, with p_theta normalised over the positive and the negatives.
      Raising the positive takes mass from the negatives, whose terms are all <= 0; so minimising it also pushes the
      positive down, the more so the better the negatives fool the ranker.
    - `released`: what the authors' code computes, sum_i r_i log(p_theta(d_i | q, d, D-) + 1e-7) with the rewards
      r_i = log(p_phi(d | q, d, d_i) + 1e-7), over the positive (whose reward is the constant log 0.5) and the
      negatives, p_theta normalised over all of them. The value is >= 0. It is a cross-entropy with weights -r_i, not
      an expectation: every negative counts, however improbable, no reward is below log 1e-7 = -16.1, and the positive
      competes for mass with its constant weight.

    With `released`, the authors sum over the queries on a GPU and average the distillation term that is added to it,
    so that their mixing weight means something else for every batch size per GPU: their published commands use 8.
    `reduction="mean"` divides by B and makes it independent of the batch; a weight of 8 times theirs then keeps the
    proportion that they trained with. Their code leaves its temperature out of the reward; `ranker_score_scale` is
    applied here in all forms, so 1.0 is the one that matches.

    Args:
        retriever_scores_BN: Retriever scores, the positive in column 0 [B, N], N >= 2.
        ranker_scores_BN: Raw ranker scores of the same documents [B, N]; a constant, no gradient flows into them.
        form: Reading of Eq. 9.
        reduction: `mean` or `sum` over the queries.
        retriever_score_scale: The paper's tau in p_theta.
        ranker_score_scale: The paper's tau in p_phi.
        weights_B: What each query counts, such as `engine.objectives.teacher.lead`; None for 1 [B].

    Returns:
        Scalar; its gradient with respect to the retriever's scores is Eq. 10 for `paper`.

    Raises:
        ValueError: The shapes differ, there is no negative, or `form` or `reduction` is unknown.

    Source: AR2 Eq. 9, 10.
    """
    _check_same_documents(retriever_scores_BN, ranker_scores_BN)
    if retriever_scores_BN.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(retriever_scores_BN.shape)}; the game needs at least one negative")
    logits_BN = _raised(retriever_scores_BN, "retriever scores") * retriever_score_scale
    reward_Bn = pairwise_reward(ranker_scores_BN, score_scale=ranker_score_scale)
    if form == "paper":
        per_query_B = (logits_BN[:, 1:].softmax(dim=-1) * reward_Bn).sum(dim=-1)
    elif form == "with_positive":
        per_query_B = (logits_BN.softmax(dim=-1)[:, 1:] * reward_Bn).sum(dim=-1)
    elif form == "released":
        tie_B1 = torch.full_like(reward_Bn[:, :1], 0.5)  # the positive against itself
        reward_BN = (torch.cat([tie_B1, reward_Bn.exp()], dim=-1) + _RELEASED_EPSILON).log()
        per_query_B = (reward_BN * (logits_BN.softmax(dim=-1) + _RELEASED_EPSILON).log()).sum(dim=-1)
    else:
        raise ValueError(f"form is {form!r}, expected one of: paper, with_positive, released")
    return _reduced(per_query_B, reduction, weights_B)


def distillation(
    retriever_scores_BN: Tensor,
    ranker_scores_BN: Tensor,
    *,
    retriever_score_scale: float = 1.0,
    ranker_score_scale: float = 1.0,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy H(p_phi, p_theta) that draws the retriever's distribution to the ranker's.

    Args:
        retriever_scores_BN: Retriever scores, the positive in column 0 [B, N].
        ranker_scores_BN: Raw ranker scores of the same documents [B, N]; the target, no gradient flows into them.
        retriever_score_scale: The paper's tau in p_theta.
        ranker_score_scale: The paper's tau in p_phi. (The released code divides by a temperature instead.)
        weights_B: What each query counts, such as `engine.objectives.teacher.lead`; None for 1 [B].

    Returns:
        Mean over the queries, scalar; without weights at least the entropy of the ranker's distribution.

    Raises:
        ValueError: The shapes differ.

    Source: AR2 Eq. 11, 12; the paper gives it no weight beside Eq. 9.
    """
    _check_same_documents(retriever_scores_BN, ranker_scores_BN)
    target_BN = (_raised(ranker_scores_BN, "ranker scores").detach() * ranker_score_scale).softmax(dim=-1)
    logits_BN = _raised(retriever_scores_BN, "retriever scores") * retriever_score_scale
    return _reduced(-(target_BN * F.log_softmax(logits_BN, dim=-1)).sum(dim=-1), "mean", weights_B)


def entropy(scores_BN: Tensor, *, score_scale: float = 1.0) -> Tensor:
    """Measure how spread out the distribution over a query's documents is; a measurement, not a loss.

    Args:
        scores_BN: Scores of the documents that count [B, N]; -inf where a query has fewer.
        score_scale: The paper's tau.

    Returns:
        Mean over the queries in nats, scalar in 0..log N, without gradient.

    Source: AR2 Table 6 (there over the retrieved top 15 of the test queries).
    """
    probabilities_BN = (_raised(scores_BN, "scores").detach() * score_scale).softmax(dim=-1)
    nats_BN: Tensor = torch.special.entr(probabilities_BN)  # unlike -p log p, it is 0 where p is 0
    return nats_BN.sum(dim=-1).mean()


def masked_language_model(logits_MV: Tensor, labels_M: Tensor, *, num_masked: Tensor | float) -> Tensor:
    """Return the cross-entropy of masked tokens, summed here and divided by the number of all that are masked.

    Args:
        logits_MV: Over the vocabulary, at M masked tokens [M, V].
        labels_M: What they were, int64 [M].
        num_masked: Of the whole step, at least 1; these may be a part of it, so that a step may be cut in any way.

    Returns:
        Scalar >= 0; 0 where nothing is masked.

    Raises:
        ValueError: The shapes do not fit.

    Source: SimLM (Wang et al., 2022) section 3.1, of encoder and decoder; its code averages each device's batch.
    """
    return F.cross_entropy(_raised(logits_MV, "logits"), labels_M, reduction="sum") / num_masked


def kl_distillation(
    student_scores_BN: Tensor,
    teacher_scores_BN: Tensor,
    *,
    student_score_scale: float = 1.0,
    teacher_score_scale: float = 1.0,
) -> Tensor:
    """Return KL(p_teacher || p_student) over a query's documents: what the student has still to learn.

    Its gradient is that of `distillation`, whose value is higher by the entropy of the teacher's distribution. Unlike
    that one it is 0 for a student that has learnt all, and comparable between teachers. It is not multiplied by the
    square of a temperature, as some do: where a scale changes, so does the size of the gradient.

    Args:
        student_scores_BN: Student scores, the positive in column 0 [B, N].
        teacher_scores_BN: Raw scores of the same documents [B, N]; the target, no gradient flows into them.
        student_score_scale: The tau of the student's softmax.
        teacher_score_scale: The tau of the teacher's softmax.

    Returns:
        Mean over the queries, scalar >= 0. A constant added to all scores of a query, of either, changes nothing.

    Raises:
        ValueError: The shapes differ.

    Source: R2ANKER Appendix C ("a simple KL divergence loss" in the place of the contrastive one; no equation, no
        temperature given).
    """
    _check_same_documents(student_scores_BN, teacher_scores_BN, "student", "teacher")
    target_BN = (_raised(teacher_scores_BN, "teacher scores").detach() * teacher_score_scale).log_softmax(dim=-1)
    logits_BN = _raised(student_scores_BN, "student scores") * student_score_scale
    terms_BN = F.kl_div(logits_BN.log_softmax(dim=-1), target_BN, reduction="none", log_target=True)
    return terms_BN.sum(dim=-1).mean()


def margin_mse(
    student_scores_BN: Tensor,
    teacher_scores_BN: Tensor,
    *,
    student_score_scale: float = 1.0,
    teacher_score_scale: float = 1.0,
) -> Tensor:
    """Return the mean squared difference of student and teacher in how far the positive is above each negative.

    Args:
        student_scores_BN: Student scores, the positive in column 0 [B, N], N >= 2.
        teacher_scores_BN: Raw scores of the same documents [B, N]; the target, no gradient flows into them.
        student_score_scale: Multiplies the student's scores.
        teacher_score_scale: Multiplies the teacher's scores.

    Returns:
        Mean over queries and negatives, scalar >= 0. A constant added to all scores of a query, of either, changes
        nothing.

    Raises:
        ValueError: The shapes differ, or there is no negative.

    Source: Hofstaetter et al. 2020, "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
        Distillation", Margin-MSE; there with one negative of a query.
    """
    _check_same_documents(student_scores_BN, teacher_scores_BN, "student", "teacher")
    if student_scores_BN.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(student_scores_BN.shape)}; a margin needs at least one negative")
    student_BN = _raised(student_scores_BN, "student scores") * student_score_scale
    teacher_BN = _raised(teacher_scores_BN, "teacher scores").detach() * teacher_score_scale
    return F.mse_loss(student_BN[:, :1] - student_BN[:, 1:], teacher_BN[:, :1] - teacher_BN[:, 1:])


def score_mse(
    student_scores_BN: Tensor,
    teacher_scores_BN: Tensor,
    *,
    student_score_scale: float = 1.0,
    teacher_score_scale: float = 1.0,
) -> Tensor:
    """Return the mean squared difference of the scores themselves.

    Args:
        student_scores_BN: Student scores [B, N].
        teacher_scores_BN: Raw scores of the same documents [B, N]; the target, no gradient flows into them.
        student_score_scale: Multiplies the student's scores.
        teacher_score_scale: Multiplies the teacher's scores.

    Returns:
        Mean over queries and documents, scalar >= 0. Only a constant added to both sides changes nothing.

    Raises:
        ValueError: The shapes differ.

    Source: Hofstaetter et al. 2020, the pointwise MSE that Margin-MSE is compared with.
    """
    _check_same_documents(student_scores_BN, teacher_scores_BN, "student", "teacher")
    student_BN = _raised(student_scores_BN, "student scores") * student_score_scale
    return F.mse_loss(student_BN, _raised(teacher_scores_BN, "teacher scores").detach() * teacher_score_scale)


def _raised(scores: Tensor, name: str) -> Tensor:
    """Give scores at least float32: a softmax in bf16 has three digits."""
    if scores.dim() != 2:
        raise ValueError(f"{name} have shape {tuple(scores.shape)}, expected two dimensions")
    return scores if scores.dtype == torch.float64 else scores.float()


def _check_same_documents(
    first_BN: Tensor, second_BN: Tensor, first: str = "retriever", second: str = "ranker"
) -> None:
    # Without this, a [B, 1] would broadcast to a plausible number.
    if first_BN.shape != second_BN.shape:
        raise ValueError(
            f"{first} scores have shape {tuple(first_BN.shape)}, {second} scores {tuple(second_BN.shape)}; both score "
            "the same documents"
        )


def _reduced(per_query_B: Tensor, reduction: str, weights_B: Tensor | None = None) -> Tensor:
    if weights_B is not None:
        if weights_B.shape != per_query_B.shape:
            raise ValueError(f"weights have shape {tuple(weights_B.shape)}, expected {tuple(per_query_B.shape)}")
        per_query_B = per_query_B * weights_B
    if reduction == "mean":
        return per_query_B.mean()
    if reduction == "sum":
        return per_query_B.sum()
    raise ValueError(f"reduction is {reduction!r}, expected one of: mean, sum")

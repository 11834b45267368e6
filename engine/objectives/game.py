"""The game: a retriever learns from a fixed ranker, which is its opponent and its teacher.

Shapes: as in `engine.objectives`.

Source: AR2 Eq. 9 and 12, Algorithm 1; the weights of a query are ours (docs/ar2.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine import losses
from engine.config.ar2 import Ar2Config
from engine.data.batches import Group, InputBuilder, Samples
from engine.metrics import Metric
from engine.models.packed import Scorer
from engine.models.template import Batch
from engine.objectives import Inputs, Means, inputs_of, own_scores, spread
from engine.objectives.ranking import PriorOfGroups
from engine.objectives.teacher import lead
from engine.training.backend import TrainedModel


class AdversarialGame:
    """The retriever against a fixed ranker, which is its opponent and its teacher (Eq. 9 and 12).

    Args:
        samples: Queries, positives and negatives.
        retriever_builder: Makes the retriever's inputs.
        ranker_builder: Makes the ranker's inputs.
        ranker: Scores by the opponent's frozen weights, on the device.
        game: Weights and forms of both equations.
        score_scales: The taus of the retriever's and of the ranker's scores.
        trust: As of `retriever_loss`.
        prior: What is added to the ranker's scores of groups [B, N]; None for nothing.
    """

    def __init__(
        self,
        samples: Samples,
        retriever_builder: InputBuilder,
        ranker_builder: InputBuilder,
        ranker: Scorer,
        game: Ar2Config,
        *,
        score_scales: tuple[float, float],
        trust: float = 1.0,
        prior: PriorOfGroups | None = None,
    ) -> None:
        self.samples, self._ranker, self._game, self._trust = samples, ranker, game, trust
        self._prior = prior
        self._retriever_builder, self._ranker_builder = retriever_builder, ranker_builder
        self._score_scales = score_scales
        self.token_counts = retriever_builder.tokens_of_texts, ranker_builder.tokens_of_pairs

    def prepare(self, step: int) -> list[Inputs]:
        """Make both models' inputs of each micro-batch."""
        groups = self.samples.groups(step)
        return [
            inputs_of(
                micro,
                queries=self._retriever_builder.queries(micro.groups),
                documents=self._retriever_builder.documents(micro.groups),
                pairs=self._ranker_builder.pairs(micro.groups),
            )
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]

    def backward(self, model: TrainedModel, batch: Sequence[Inputs]) -> dict[str, Metric]:
        """Let the ranker score each micro-batch, and accumulate the retriever's gradient."""
        means = Means()
        for inputs in batch:
            torch.manual_seed(inputs.micro.seed)
            ranker_scores_BN = self.ranker_scores(inputs.micro.groups, inputs.of["pairs"])
            queries_BD, documents_ND = model(queries=inputs.of["queries"], documents=inputs.of["documents"])
            retriever_scores_BN = own_scores(queries_BD, documents_ND)
            loss, measured = self.loss(retriever_scores_BN, ranker_scores_BN)
            model.backward(loss, last=inputs.micro.last, share=inputs.micro.share)
            means.add(inputs, measured | {"score_spread": spread(retriever_scores_BN)})
        return means.metrics()

    def ranker_scores(self, groups: Sequence[Group], pairs: Batch) -> Tensor:
        """Return the ranker's scores of groups' documents, with what is added to them [B, N]."""
        scores_BN = self._ranker(pairs).view(len(groups), -1).clone()  # out of inference mode
        return scores_BN if self._prior is None else scores_BN + self._prior(groups)

    def loss(self, retriever_scores_BN: Tensor, ranker_scores_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the retriever's loss of both models' scores of the same documents, and what is measured of it."""
        scores = retriever_scores_BN, ranker_scores_BN
        return retriever_loss(self._game, *scores, *self._score_scales, trust=self._trust)


def retriever_loss(
    game: Ar2Config,
    retriever_scores_BN: Tensor,
    ranker_scores_BN: Tensor,
    retriever_score_scale: float = 1.0,
    ranker_score_scale: float = 1.0,
    *,
    trust: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh Eq. 9 and Eq. 12 into the retriever's objective.

    A query's terms are multiplied by what the ranker's word counts on it (w), and the rest of its weight learns from
    its label, by the cross-entropy of the positive among the same documents:

    w (adversarial_weight Eq. 9 + distillation_weight Eq. 12) + (1 - w) CE_theta.

    Args:
        game: Weights and forms. With `adversarial_reduction: sum` the mean is multiplied by `reference_batch_size`, so
            that the form of the released code does not depend on the number of ranks.
        retriever_scores_BN: G's scores, column 0 the positive.
        ranker_scores_BN: D's scores of the same documents; no gradient flows into them.
        retriever_score_scale: The tau of G's scores.
        ranker_score_scale: The tau of D's scores.
        trust: What the ranker's word counts (w) in every group, 0..1; not read with `teacher: lead`, which weighs each
            group by itself.

    Returns:
        The scalar loss, and its parts, as they are in it, with lead, reward and entropy (Table 6) for the log.
    """
    ranker_scores_BN = ranker_scores_BN.detach()
    scales = {"retriever_score_scale": retriever_score_scale, "ranker_score_scale": ranker_score_scale}
    lead_B = lead(retriever_scores_BN, ranker_scores_BN, **scales)
    taught_B = lead_B if game.teacher == "lead" else torch.full_like(lead_B, trust)
    adversarial = losses.adversarial(
        retriever_scores_BN, ranker_scores_BN, form=game.adversarial, reduction="mean", weights_B=taught_B, **scales
    )
    if game.adversarial_reduction == "sum":
        adversarial = adversarial * game.reference_batch_size
    distillation = losses.distillation(retriever_scores_BN, ranker_scores_BN, weights_B=taught_B, **scales)
    label = losses.ranker_cross_entropy(retriever_scores_BN, score_scale=retriever_score_scale, weights_B=1 - taught_B)
    loss = game.adversarial_weight * adversarial + game.distillation_weight * distillation + label
    with torch.no_grad():
        parts = {
            "loss": loss.detach(),
            "adversarial": adversarial.detach(),
            "distillation": distillation.detach(),
            "label": label.detach(),
            "lead": lead_B.mean(),
            "ranker_leads": (lead_B > 0.5).double().mean(),
            "taught": taught_B.mean(),
            "reward": losses.pairwise_reward(ranker_scores_BN, score_scale=ranker_score_scale).mean(),
            "entropy": losses.entropy(retriever_scores_BN, score_scale=retriever_score_scale),
            "accuracy": (retriever_scores_BN.argmax(1) == 0).float().mean(),
            "ranker_accuracy": (ranker_scores_BN.argmax(1) == 0).float().mean(),
        }
    return loss, parts

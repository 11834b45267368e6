"""Distillation: a retriever learns a ranker's scores, which were computed beforehand.

Source: R2ANKER Appendix C; the losses are `engine.losses`'.

Shapes: as in `engine.objectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine import losses
from engine.config.distillation import DistillationConfig
from engine.data.batches import Group, InputBuilder, Samples
from engine.data.scored_files import require_comparable
from engine.data.teacher_scores import TeacherScores
from engine.errors import DataError
from engine.metrics import Metric
from engine.objectives import Inputs, Means, PooledBatch, inputs_of, own_scores, pooled_backward, spread
from engine.objectives.contrast import InBatchContrast
from engine.training.backend import TrainedModel

_LOSSES = {"kl": losses.kl_distillation, "margin_mse": losses.margin_mse, "mse": losses.score_mse}


@dataclass(frozen=True, slots=True)
class ScoredInputs:
    """A micro-batch with what the teacher says of its documents.

    Attributes:
        inputs: The student's.
        teacher_scores_BN: The teacher's raw logits, column 0 the positive, float32 [B, N].
    """

    inputs: Inputs
    teacher_scores_BN: Tensor


@dataclass(frozen=True, slots=True)
class ScoredPool:
    """A rank's share of a step whose documents are all negatives of each other's queries, with the teacher's scores.

    Attributes:
        pool: The student's.
        teacher_scores_BN: The teacher's raw logits of each query's own documents, column 0 the positive, float32
            [B, N].
    """

    pool: PooledBatch
    teacher_scores_BN: Tensor


class _FromTeacher:
    """What both objectives of distillation are made of; see `Distillation`."""

    def __init__(
        self,
        samples: Samples,
        builder: InputBuilder,
        scores: TeacherScores,
        settings: DistillationConfig,
        *,
        score_scale: float,
    ) -> None:
        require_comparable(scores, settings)
        self.samples, self._builder, self._scores = samples, builder, scores
        self._settings, self._score_scale = settings, score_scale
        self.token_counts = (builder.tokens_of_texts,)

    def _teacher_scores(self, groups: Sequence[Group]) -> Tensor:
        return torch.from_numpy(np.stack([scores_of(self.samples, self._scores, group) for group in groups]))


class Distillation(_FromTeacher):
    """A retriever against a teacher's scores of its query's documents, in the place of the contrastive loss.

    The student may be any model whose forward gives representations of queries and documents, and whose score is
    their inner product. The teacher is on no device: its scores are read from the artifact.

    Args:
        samples: Queries, positives and negatives, all scored.
        builder: Makes the student's inputs.
        scores: The teacher's.
        settings: Which loss, and its scales.
        score_scale: The tau of the student's scores.

    Raises:
        ConfigError: The scores are known up to a constant a query, and the loss compares the scores themselves.

    Source: R2ANKER Appendix C.
    """

    def prepare(self, step: int) -> list[ScoredInputs]:
        """Make the student's inputs of each micro-batch, and look the teacher's scores up.

        Raises:
            DataError: A document that was drawn has no score.
        """
        groups = self.samples.groups(step)
        return [
            ScoredInputs(
                inputs_of(
                    micro, queries=self._builder.queries(micro.groups), documents=self._builder.documents(micro.groups)
                ),
                self._teacher_scores(micro.groups),
            )
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]

    def backward(self, model: TrainedModel, batch: Sequence[ScoredInputs]) -> dict[str, Metric]:
        """Accumulate the student's gradient of each micro-batch."""
        means = Means()
        for scored in batch:
            micro = scored.inputs.micro
            torch.manual_seed(micro.seed)
            queries_BD, documents_ND = model(
                queries=scored.inputs.of["queries"], documents=scored.inputs.of["documents"]
            )
            student_scores_BN = own_scores(queries_BD, documents_ND)
            loss, measured = student_loss(
                self._settings, student_scores_BN, scored.teacher_scores_BN, score_scale=self._score_scale
            )
            model.backward(loss, last=micro.last, share=micro.share)
            means.add(scored.inputs, measured | {"score_spread": spread(student_scores_BN)})
        return means.metrics()


class DistillationInBatch(_FromTeacher):
    """As `Distillation`, with the contrastive loss over the documents of the whole batch beside it.

    The teacher's scores are of a query's own documents; all other documents of the batch are negatives of the
    contrastive loss alone. A share that does not fit into memory at once is taken by gradient caching.

    Args:
        samples: As of `Distillation`; their phase has a pool.
        builder: As of `Distillation`.
        scores: As of `Distillation`.
        settings: As of `Distillation`; with a weight for the contrastive loss.
        score_scale: As of `Distillation`.

    Raises:
        ConfigError: As of `Distillation`.

    Source: Wang et al. 2022 (SimLM), whose last retriever is trained so; AR2 Eq. 2 for the contrastive loss.
    """

    @property
    def _contrast(self) -> InBatchContrast:
        return InBatchContrast(self.samples, self._builder, score_scale=self._score_scale)

    def prepare(self, step: int) -> ScoredPool:
        """Make a rank's inputs, mark what of the pool is no negative, and look the teacher's scores up.

        Raises:
            DataError: A document that was drawn has no score.
        """
        pool = self._contrast.prepare(step)
        own = [group for chunk in pool.chunks for group in chunk.micro.groups]
        return ScoredPool(pool, self._teacher_scores(own))

    def backward(self, model: TrainedModel, batch: ScoredPool) -> dict[str, Metric]:
        """Differentiate both losses over the whole pool, chunk by chunk where there is more than one."""
        return pooled_backward(
            model, batch.pool, lambda queries_BD, documents_ND: self._loss(batch, queries_BD, documents_ND)
        )

    def _loss(self, batch: ScoredPool, queries_BD: Tensor, documents_ND: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        contrastive, _ = self._contrast.loss(batch.pool, queries_BD, documents_ND)
        student_scores_BN = own_scores(queries_BD, documents_ND)
        loss, measured = student_loss(
            self._settings,
            student_scores_BN,
            batch.teacher_scores_BN,
            score_scale=self._score_scale,
            contrastive=contrastive,
        )
        measured["score_spread"] = spread(student_scores_BN)
        return loss, {name: Metric(value) for name, value in measured.items()}


def student_loss(
    settings: DistillationConfig,
    student_scores_BN: Tensor,
    teacher_scores_BN: Tensor,
    *,
    score_scale: float = 1.0,
    contrastive: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh what the teacher says, and the positive's label, into the student's objective.

    Args:
        settings: Loss, weight and scale.
        student_scores_BN: The student's scores, column 0 the positive.
        teacher_scores_BN: The teacher's raw logits of the same documents.
        score_scale: The tau of the student's scores.
        contrastive: The contrastive loss; None for that over the query's own documents.

    Returns:
        The scalar loss, and for the log its parts, how often student and teacher have the positive first, and how
        often they have the same document first.
    """
    distillation = _LOSSES[settings.loss](
        student_scores_BN,
        teacher_scores_BN,
        student_score_scale=score_scale,
        teacher_score_scale=settings.teacher_score_scale,
    )
    if contrastive is None:
        contrastive = losses.ranker_cross_entropy(student_scores_BN, score_scale=score_scale)
    loss = distillation + settings.contrastive_weight * contrastive if settings.contrastive_weight else distillation
    with torch.no_grad():
        student_first_B, teacher_first_B = student_scores_BN.argmax(1), teacher_scores_BN.argmax(1)
        measured = {
            "loss": loss.detach(),
            "distillation": distillation.detach(),
            "contrastive": contrastive.detach(),
            "accuracy": (student_first_B == 0).float().mean(),
            "teacher_accuracy": (teacher_first_B == 0).float().mean(),
            "agreement": (student_first_B == teacher_first_B).float().mean(),
        }
    return loss, measured


def scores_of(samples: Samples, scores: TeacherScores, group: Group) -> np.ndarray:
    """Look up what a teacher says of a query's documents.

    Args:
        samples: Of the phase that drew them.
        scores: The teacher's.
        group: The query with its documents.

    Returns:
        Raw logits, float32 [N], all finite.

    Raises:
        DataError: A document has no score.
    """
    qid = samples.data.train.queries[group.query].id
    found = scores.of(qid, group.documents)
    missing = np.flatnonzero(np.isnan(found))
    if missing.size:
        place, docid = int(missing[0]), samples.data.shards.docids[int(group.documents[missing[0]])]
        what = "negative" if place else "positive"
        raise DataError(
            f"the {what} {docid!r} of query {qid!r} has no score of {scores.source}, nor have {missing.size - 1} more "
            f"of the {len(found)} documents that {samples.visit.stage} draws for it in a step; "
            f"{len(scores.documents(qid))} documents of the query are scored",
            expected="a score for every document that a step draws",
            remedy="score the candidates that this phase draws from; of scores that were read from a file, draw only "
            "from what it scores",
        )
    return found


def require_scores(samples: Samples, scores: TeacherScores) -> None:
    """Look up all that a visit will draw before its first step; each rank looks at its share of the steps.

    Args:
        samples: Of the visit.
        scores: The teacher's.

    Raises:
        DataError: A document that a step will draw has no score.
    """
    phase, first = samples.visit.phase, samples.visit.first_step
    for step in range(first + samples.rank, first + phase.steps, samples.world_size):
        for group in samples.groups(step):
            scores_of(samples, scores, group)

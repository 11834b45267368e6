"""Objectives: what one step of a phase computes.

An objective is asked twice for a step: to prepare its batch, a function of the step's number that needs no model and
no device, and to run its forward and backward passes. The loop (`engine.training.loop`) does the rest.

Shapes: B queries of a micro-batch or of this rank, n negatives of a query, N = 1 + n of its documents (column 0 is the
positive), P documents in a shared pool, D the embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from engine import losses
from engine.config.ar2 import Ar2Config
from engine.data.batches import G, Group, GroupTokens, InputBuilder, MicroBatch, Samples, StepSamples
from engine.data.corpus import Data
from engine.metrics import Metric
from engine.models.packed import Scorer
from engine.models.template import Batch, count_tokens
from engine.objectives.teacher import lead
from engine.training.backend import TrainedModel
from engine.training.gradient_cache import LossOf, contrastive_backward

PriorOfGroups = Callable[[Sequence[Group]], Tensor]
"""From groups to what is added to a ranker's scores of their documents [B, N]."""


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


class PoolContrast(Generic[G]):
    """A contrast over a batch: a sample's query is told its own document among the documents of all samples (Eq. 2).

    What a sample is, a class of contrast says by `inputs` and `excluded`.

    Args:
        samples: Of which each has a query, and a document that is its positive, before its hard negatives.
        token_counts: Count the tokens that a model takes of a sample.
        score_scale: The tau of Eq. 2.
    """

    def __init__(self, samples: StepSamples[G], token_counts: tuple[GroupTokens, ...], *, score_scale: float) -> None:
        self.samples, self.token_counts, self._score_scale = samples, token_counts, score_scale

    def inputs(self, groups: Sequence[G]) -> dict[str, Batch]:
        """Make a retriever's inputs of samples: `queries` and `documents`."""
        raise NotImplementedError

    def excluded(self, own: Sequence[G], pool: Sequence[G]) -> Tensor:
        """Mark what of a pool is no negative of each query, whose positive may be marked as well: bool [B, P]."""
        raise NotImplementedError

    def prepare(self, step: int) -> PooledBatch:
        """Make a rank's inputs, and mark what of the pool is no negative."""
        groups, phase = self.samples.groups(step), self.samples.visit.phase
        own = self.samples.share(groups)
        shared = phase.pool == "world"
        first = self.samples.rank * len(own) if shared else 0
        targets_B = (torch.arange(len(own)) + first) * (1 + phase.num_negatives)
        excluded_BP = self.excluded(own, groups if shared else own)
        chunks = [
            inputs_of(micro, **self.inputs(micro.groups))
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]
        return PooledBatch(chunks, targets_B, excluded_BP.scatter(1, targets_B[:, None], False), step)

    def backward(self, model: TrainedModel, batch: PooledBatch) -> dict[str, Metric]:
        """Differentiate the loss over the whole pool, chunk by chunk where there is more than one."""
        return pooled_backward(
            model, batch, lambda queries_BD, documents_ND: self.loss(batch, queries_BD, documents_ND)
        )

    def loss(self, batch: PooledBatch, queries_BD: Tensor, documents_ND: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """Return the loss of a rank's representations, and what is measured of it."""
        pool_PD = gather_documents(documents_ND) if self.samples.visit.phase.pool == "world" else documents_ND
        scores_BP = queries_BD @ pool_PD.T
        loss = losses.contrastive(
            scores_BP, batch.targets_B, score_scale=self._score_scale, excluded_BN=batch.excluded_BP
        )
        best_B = scores_BP.detach().masked_fill(batch.excluded_BP, -torch.inf).argmax(1)
        measured = {
            "loss": loss.detach(),
            "accuracy": (best_B == batch.targets_B).float().mean(),
            "score_spread": spread(scores_BP),
        }
        return loss, {name: Metric(value) for name, value in measured.items()}


class InBatchContrast(PoolContrast[Group]):
    """The retriever's warm-up: every document of the batch that is not a query's positive is its negative (Eq. 2).

    Args:
        samples: Queries, positives and hard negatives.
        builder: Makes the retriever's inputs.
        score_scale: The tau of Eq. 2.
        token_counts: Count all tokens of a group, where other models take it, too; None for the retriever's alone.
    """

    samples: Samples

    def __init__(
        self,
        samples: Samples,
        builder: InputBuilder,
        *,
        score_scale: float,
        token_counts: tuple[GroupTokens, ...] | None = None,
    ) -> None:
        super().__init__(samples, token_counts or (builder.tokens_of_texts,), score_scale=score_scale)
        self._builder = builder

    def inputs(self, groups: Sequence[Group]) -> dict[str, Batch]:
        """Join the queries of groups, and their documents."""
        return {"queries": self._builder.queries(groups), "documents": self._builder.documents(groups)}

    def excluded(self, own: Sequence[Group], pool: Sequence[Group]) -> Tensor:
        """Mark positives and known false negatives."""
        return no_negatives(self.samples.data, own, pool)


class ListwiseRanking:
    """The ranker: the positive among its query's negatives (Eq. 7).

    Args:
        samples: Queries, positives and negatives.
        builder: Makes the ranker's inputs.
        score_scale: The tau of Eq. 6.
        prior: What is added to the scores of groups [B, N]; None for nothing.
    """

    def __init__(
        self, samples: Samples, builder: InputBuilder, *, score_scale: float, prior: PriorOfGroups | None = None
    ) -> None:
        self.samples, self._builder, self._score_scale, self._prior = samples, builder, score_scale, prior
        self.token_counts = (builder.tokens_of_pairs,)

    def prepare(self, step: int) -> list[Inputs]:
        """Make the pairs of each micro-batch."""
        groups = self.samples.groups(step)
        return [
            inputs_of(micro, pairs=self._builder.pairs(micro.groups))
            for micro in self.samples.micro_batches(groups, step, self.token_counts)
        ]

    def backward(self, model: TrainedModel, batch: Sequence[Inputs]) -> dict[str, Metric]:
        """Accumulate the gradient of each micro-batch."""
        means = Means()
        for inputs in batch:
            torch.manual_seed(inputs.micro.seed)
            scores_BN = model(pairs=inputs.of["pairs"]).view(len(inputs.micro.groups), -1)
            if self._prior is not None:
                scores_BN = scores_BN + self._prior(inputs.micro.groups)
            loss, measured = self.loss(scores_BN)
            model.backward(loss, last=inputs.micro.last, share=inputs.micro.share)
            hits = (scores_BN.detach().argmax(1) == 0).float().mean()
            measured |= {"loss": loss.detach(), "accuracy": hits, "score_spread": spread(scores_BN)}
            means.add(inputs, measured)
        return means.metrics()

    def loss(self, scores_BN: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the scores of some queries' documents, and what else is measured of it."""
        return losses.ranker_cross_entropy(scores_BN, score_scale=self._score_scale), {}


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
            documents_BND = documents_ND.view(len(queries_BD), -1, queries_BD.shape[-1])
            retriever_scores_BN = torch.einsum("bd,bnd->bn", queries_BD, documents_BND)
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

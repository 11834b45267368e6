"""The training phases that Algorithm 1 of AR2 names: both warm-ups, the retriever's phase and the ranker's.

Each builds an objective (what one step does), hands it to the loop, and publishes the weights that come out. Tensors:
B queries of this rank, N = 1 + n documents of a query (column 0 is the positive), P documents in a shared pool, D the
embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from engine import losses
from engine.config.recipe import Config
from engine.data.batches import (
    BatchPlan,
    Group,
    count_tokens,
    document_batch,
    micro_batches,
    own_share,
    pair_batch,
    query_batch,
    step_groups,
)
from engine.data.candidates import Candidates
from engine.data.corpus import Data
from engine.metrics import Metric
from engine.models.weights import frozen_ranker, iteration_name, publish_weights
from engine.run import Run, Stage
from engine.training.backend import Models, TrainedModel
from engine.training.gradient_cache import contrastive_backward
from engine.training.guards import BatchIds
from engine.training.loop import Objective, Schedule, step_seed, train
from engine.training.resume import checkpoints_of


def warmup_retriever(stage: Stage, models: Models, data: Data, bm25: Candidates) -> dict[str, Any]:
    """Train G0 with the negatives of the whole batch and BM25's (Algorithm 1 line 2, Eq. 2)."""
    config = stage.run.config.warmup_retriever
    plan = _plan(stage, "warmup_retriever", config.batch_size, config.hard_negatives)
    objective = _contrastive_objective(stage, plan, data, bm25)
    schedule = Schedule(config.optim, config.steps)
    return _train(stage, models, models.retriever, data, bm25, objective, schedule, plan, iteration=0)


def warmup_ranker(stage: Stage, models: Models, data: Data, candidates: Candidates) -> dict[str, Any]:
    """Train D0 on negatives that G0 retrieves (Algorithm 1 line 5, Eq. 7)."""
    config = stage.run.config.warmup_ranker
    plan = _plan(stage, "warmup_ranker", config.batch_size, config.num_negatives)
    objective = _ranker_objective(stage, plan, data, candidates, config.micro_batch_size)
    schedule = Schedule(config.optim, config.steps)
    return _train(stage, models, models.ranker, data, candidates, objective, schedule, plan, iteration=0)


def train_retriever(
    stage: Stage, models: Models, data: Data, candidates: Candidates, *, iteration: int, opponent: int
) -> dict[str, Any]:
    """Train G against the fixed ranker (Algorithm 1 lines 7-10, Eq. 9 and 12).

    Args:
        stage: Where this runs.
        models: Both players.
        data: Corpus and training queries.
        candidates: What the newest index retrieved.
        iteration: Number of the iteration, from 1.
        opponent: Iteration whose ranker is the opponent and teacher.
    """
    game = stage.run.config.ar2
    plan = _plan(stage, "retriever", game.retriever.batch_size, game.num_negatives)
    objective = _game_objective(stage, plan, data, candidates, _opponent(stage.run, opponent))
    schedule = Schedule(game.retriever.optim, game.retriever.steps * game.iterations)
    return _train(stage, models, models.retriever, data, candidates, objective, schedule, plan, iteration=iteration)


def train_ranker(stage: Stage, models: Models, data: Data, candidates: Candidates, *, iteration: int) -> dict[str, Any]:
    """Train D on negatives of the current retriever (Algorithm 1 lines 12-15, Eq. 7)."""
    game = stage.run.config.ar2
    plan = _plan(stage, "ranker", game.ranker.batch_size, game.num_negatives)
    objective = _ranker_objective(stage, plan, data, candidates, game.ranker.micro_batch_size)
    schedule = Schedule(game.ranker.optim, game.ranker.steps * game.iterations)
    return _train(stage, models, models.ranker, data, candidates, objective, schedule, plan, iteration=iteration)


def _train(
    stage: Stage,
    models: Models,
    model: TrainedModel,
    data: Data,
    candidates: Candidates,
    objective: Objective,
    schedule: Schedule,
    plan: BatchPlan,
    *,
    iteration: int,
) -> dict[str, Any]:
    """Train one player for its part of the schedule, the other one out of the way, and publish its weights."""
    text = data.retriever_text if model is models.retriever else data.ranker_text
    steps = schedule.total_steps // max(1, stage.run.config.ar2.iterations) if iteration else schedule.total_steps
    with models.training(model):
        result = train(
            stage,
            model,
            checkpoints_of(stage.run, model),
            objective,
            schedule,
            batch_ids=_batch_ids(plan, data, candidates),
            first_step=max(0, iteration - 1) * steps,
            steps=steps,
            tag=plan.stream,
        )
        return result | publish_weights(stage.run, model, text, iteration_name(iteration))


def _plan(stage: Stage, stream: str, batch_size: int, num_negatives: int) -> BatchPlan:
    coordinator = stage.run.coordinator
    return BatchPlan(stream, stage.seed, batch_size, num_negatives, coordinator.rank, coordinator.world_size)


def _batch_ids(plan: BatchPlan, data: Data, candidates: Candidates) -> BatchIds:
    """Name the queries and documents of a step, rank by rank."""

    def ids(step: int) -> list[dict[str, Any]]:
        groups = step_groups(plan, data, _candidates_of(data, candidates), step)
        share = len(groups) // plan.world_size
        return [
            {
                "rank": place // share,
                "query": data.train.queries[group.query].id,
                "documents": [data.shards.docids[document] for document in group.documents.tolist()],
            }
            for place, group in enumerate(groups)
        ]

    return ids


def _chunk_seed(stage: Stage, plan: BatchPlan, step: int, micro_batch_size: int) -> Callable[[int], int]:
    """Return the seed of each micro-batch of this rank: the same for any number of ranks that cuts the batch alike."""
    first = plan.rank * (plan.batch_size // plan.world_size)
    return lambda number: step_seed(stage, step, first + number * micro_batch_size)


def _spread(scores_BN: Tensor) -> Tensor:
    """Return how far apart a query's highest and lowest score are, on average."""
    return (scores_BN.detach().amax(1) - scores_BN.detach().amin(1)).mean()


def _candidates_of(data: Data, candidates: Candidates) -> Callable[[int], np.ndarray]:
    return lambda row: candidates.row(data.train.queries[row].id)


def _contrastive_objective(stage: Stage, plan: BatchPlan, data: Data, bm25: Candidates) -> Objective:
    config, settings = stage.run.config.warmup_retriever, stage.run.config.retriever
    device = stage.run.device

    def objective(model: TrainedModel, step: int) -> dict[str, Metric]:
        groups = step_groups(plan, data, _candidates_of(data, bm25), step)
        own = own_share(plan, groups)
        chunks = [
            {
                "queries": query_batch(data, chunk, settings.query_max_length, device),
                "documents": document_batch(data, chunk, settings.max_length, device),
            }
            for chunk, *_ in micro_batches(own, config.micro_batch_size)
        ]
        pool = groups if config.gather_negatives else own
        excluded_BP = _no_negatives(data, own, pool).to(device)
        first = plan.rank * len(own) if config.gather_negatives else 0

        def loss_of(queries_BD: Tensor, documents_ND: Tensor) -> tuple[Tensor, dict[str, Metric]]:
            pool_PD = gather_documents(documents_ND) if config.gather_negatives else documents_ND
            scores_BP = queries_BD @ pool_PD.T
            width = 1 + plan.num_negatives
            targets_B = (torch.arange(len(own), device=device) + first) * width
            excluded = excluded_BP.scatter(1, targets_B[:, None], False)
            loss = losses.contrastive(scores_BP, targets_B, score_scale=settings.score_scale, excluded_BN=excluded)
            hits = (scores_BP.detach().masked_fill(excluded, -torch.inf).argmax(1) == targets_B).float().mean()
            spread = _spread(scores_BP)
            return loss, {"loss": Metric(loss.detach()), "accuracy": Metric(hits), "score_spread": Metric(spread)}

        seed_of = _chunk_seed(stage, plan, step, config.micro_batch_size)
        metrics = contrastive_backward(model, chunks, loss_of, seed_of)
        tokens = sum(count_tokens(chunk["queries"], chunk["documents"]) for chunk in chunks)
        return metrics | {"tokens": Metric(tokens, "sum")}

    return objective


def _ranker_objective(
    stage: Stage, plan: BatchPlan, data: Data, candidates: Candidates, micro_batch_size: int
) -> Objective:
    settings, device = stage.run.config.ranker, stage.run.device

    def objective(model: TrainedModel, step: int) -> dict[str, Metric]:
        own = own_share(plan, step_groups(plan, data, _candidates_of(data, candidates), step))
        total, hits, spread, tokens = 0.0, 0.0, 0.0, 0.0
        seed_of = _chunk_seed(stage, plan, step, micro_batch_size)
        for number, (chunk, share, last) in enumerate(micro_batches(own, micro_batch_size)):
            torch.manual_seed(seed_of(number))
            pairs = pair_batch(data, chunk, settings.max_length, device)
            scores_BN = model(pairs=pairs).view(len(chunk), -1)
            loss = losses.ranker_cross_entropy(scores_BN, score_scale=settings.score_scale)
            model.backward(loss, last=last, share=share)
            total += float(loss.detach()) * share
            hits += float((scores_BN.detach().argmax(1) == 0).float().mean()) * share
            spread += float(_spread(scores_BN)) * share
            tokens += count_tokens(pairs)
        measured = {"loss": total, "accuracy": hits, "score_spread": spread}
        return {name: Metric(value) for name, value in measured.items()} | {"tokens": Metric(tokens, "sum")}

    return objective


def _game_objective(
    stage: Stage, plan: BatchPlan, data: Data, candidates: Candidates, ranker: torch.nn.Module
) -> Objective:
    config, device = stage.run.config, stage.run.device
    phase = config.ar2.retriever

    def objective(model: TrainedModel, step: int) -> dict[str, Metric]:
        own = own_share(plan, step_groups(plan, data, _candidates_of(data, candidates), step))
        sums: dict[str, float] = {}
        tokens = 0.0
        seed_of = _chunk_seed(stage, plan, step, phase.micro_batch_size)
        for number, (chunk, share, last) in enumerate(micro_batches(own, phase.micro_batch_size)):
            torch.manual_seed(seed_of(number))
            queries = query_batch(data, chunk, config.retriever.query_max_length, device)
            documents = document_batch(data, chunk, config.retriever.max_length, device)
            pairs = pair_batch(data, chunk, config.ranker.max_length, device)
            with torch.no_grad():
                ranker_scores_BN = ranker(pairs).view(len(chunk), -1)
            queries_BD, documents_MD = model(queries=queries, documents=documents)
            retriever_scores_BN = torch.einsum(
                "bd,bnd->bn", queries_BD, documents_MD.view(len(chunk), -1, queries_BD.shape[-1])
            )
            loss, parts = retriever_loss(stage.run.config, retriever_scores_BN, ranker_scores_BN)
            model.backward(loss, last=last, share=share)
            for name, value in (parts | {"score_spread": _spread(retriever_scores_BN)}).items():
                sums[name] = sums.get(name, 0.0) + float(value) * share
            tokens += count_tokens(queries, documents, pairs)
        return {name: Metric(value) for name, value in sums.items()} | {"tokens": Metric(tokens, "sum")}

    return objective


def retriever_loss(
    config: Config, retriever_scores_BN: Tensor, ranker_scores_BN: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh Eq. 9 and Eq. 12 into the retriever's objective.

    Args:
        config: For the weights, forms and score scales. With `adversarial_reduction: sum` the mean is multiplied by
            `reference_batch_size`, so that the form of the released code does not depend on the number of ranks.
        retriever_scores_BN: G's scores, column 0 the positive.
        ranker_scores_BN: D's scores of the same documents; no gradient flows into them.

    Returns:
        The scalar loss, and its parts with reward and entropy (Table 6) for the log.
    """
    game, tau_g, tau_d = config.ar2, config.retriever.score_scale, config.ranker.score_scale
    ranker_scores_BN = ranker_scores_BN.detach()
    adversarial = losses.adversarial(
        retriever_scores_BN,
        ranker_scores_BN,
        form=game.adversarial,
        reduction="mean",
        retriever_score_scale=tau_g,
        ranker_score_scale=tau_d,
    )
    if game.adversarial_reduction == "sum":
        adversarial = adversarial * game.reference_batch_size
    distillation = losses.distillation(
        retriever_scores_BN, ranker_scores_BN, retriever_score_scale=tau_g, ranker_score_scale=tau_d
    )
    loss = game.adversarial_weight * adversarial + game.distillation_weight * distillation
    with torch.no_grad():
        parts = {
            "loss": loss.detach(),
            "adversarial": adversarial.detach(),
            "distillation": distillation.detach(),
            "reward": losses.pairwise_reward(ranker_scores_BN, score_scale=tau_d).mean(),
            "entropy": losses.entropy(retriever_scores_BN, score_scale=tau_g),
            "accuracy": (retriever_scores_BN.argmax(1) == 0).float().mean(),
            "ranker_accuracy": (ranker_scores_BN.argmax(1) == 0).float().mean(),
        }
    return loss, parts


def _opponent(run: Run, iteration: int) -> torch.nn.Module:
    return frozen_ranker(run.config, run.folder.weights("ranker", iteration_name(iteration)), run.device)


def _no_negatives(data: Data, own: list[Group], pool: list[Group]) -> Tensor:
    """Mark pool documents that are positives or known false negatives of a query: bool [B, P]."""
    documents_P = np.concatenate([group.documents for group in pool])
    return torch.from_numpy(np.stack([np.isin(documents_P, list(data.train.known(group.query))) for group in own]))


def gather_documents(documents_ND: Tensor) -> Tensor:
    """Gather documents over the ranks with gradients: [N, D] -> [W * N, D], in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return documents_ND
    return torch.cat(all_gather(documents_ND.contiguous()))  # type: ignore[no-untyped-call]

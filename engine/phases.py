"""The training phases that the algorithms name: verbs, each of which says what its phase optimises.

A phase is a row of the timetable. Here it gets its objective (`engine.objectives`), goes through the loop
(`engine.training.loop`), and leaves published weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.config.ar2 import Ar2Config
from engine.config.timetable import Visit, iteration_name
from engine.data.batches import InputBuilder, Samples
from engine.data.candidates import Candidates
from engine.data.corpus import Data
from engine.models.weights import frozen_ranker
from engine.objectives import AdversarialGame, InBatchContrast, ListwiseRanking
from engine.results import NOT_SHOWN
from engine.run import Stage
from engine.training.loop import Objective, train
from engine.training.micro_batches import fit_micro_batches
from engine.training.models import Models
from engine.training.publishing import publish_weights


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training stage leaves in the ledger.

    Attributes:
        steps: Optimizer steps.
        loss: Mean over the last logged window; None without steps.
        checkpoint: Number of the model's checkpoint at the stage's end; 0 without one.
        weights_sha256: Of the published weights.
    """

    steps: int
    loss: float | None
    checkpoint: int = field(metadata=NOT_SHOWN)
    weights_sha256: str = field(metadata=NOT_SHOWN)


def warmup_retriever(stage: Stage, models: Models, data: Data, bm25: Candidates) -> Trained:
    """Train G0 with the negatives of the whole batch and BM25's (Algorithm 1 line 2, Eq. 2)."""

    def contrast(samples: Samples) -> Objective:
        section = stage.run.config.retriever
        builder = builder_of(stage, data, models, "retriever")
        return InBatchContrast(samples, builder, score_scale=section.score_scale)

    return train_visit(stage, models, data, bm25, contrast, stage.run.timetable.phase("warmup_retriever").visit(0))


def warmup_ranker(stage: Stage, models: Models, data: Data, candidates: Candidates) -> Trained:
    """Train D0 on negatives that G0 retrieves (Algorithm 1 line 5, Eq. 7)."""
    visit = stage.run.timetable.phase("warmup_ranker").visit(0)
    return train_visit(stage, models, data, candidates, _ranking(stage, data, models), visit)


def train_retriever(
    stage: Stage,
    models: Models,
    data: Data,
    candidates: Candidates,
    game: Ar2Config,
    *,
    iteration: int,
    opponent: int,
) -> Trained:
    """Train G against the fixed ranker (Algorithm 1 lines 7-10, Eq. 9 and 12).

    Args:
        stage: Where this runs.
        models: All models.
        data: Corpus and training queries.
        candidates: What the newest index retrieved.
        game: Forms and weights of both equations.
        iteration: Number of the iteration, from 1.
        opponent: Iteration whose ranker is the opponent and teacher.
    """
    run, config = stage.run, stage.run.config

    def against_ranker(samples: Samples) -> Objective:
        ranker = frozen_ranker(config.ranker, run.folder.weights("ranker", iteration_name(opponent)), run.device)
        builders = builder_of(stage, data, models, "retriever"), _builder(stage, data, "ranker", ranker)
        scales = config.retriever.score_scale, config.ranker.score_scale
        return AdversarialGame(samples, *builders, ranker.scorer(), game, score_scales=scales)

    return train_visit(
        stage, models, data, candidates, against_ranker, run.timetable.phase("retriever").visit(iteration)
    )


def train_ranker(stage: Stage, models: Models, data: Data, candidates: Candidates, *, iteration: int) -> Trained:
    """Train D on negatives of the current retriever (Algorithm 1 lines 12-15, Eq. 7)."""
    visit = stage.run.timetable.phase("ranker").visit(iteration)
    return train_visit(stage, models, data, candidates, _ranking(stage, data, models), visit)


def _ranking(stage: Stage, data: Data, models: Models) -> Callable[[Samples], Objective]:
    builder, score_scale = builder_of(stage, data, models, "ranker"), stage.run.config.ranker.score_scale
    return lambda samples: ListwiseRanking(samples, builder, score_scale=score_scale)


def builder_of(stage: Stage, data: Data, models: Models, name: str) -> InputBuilder:
    """Return what makes the inputs of a model in training."""
    return _builder(stage, data, name, models.engines[name].module)


def _builder(stage: Stage, data: Data, name: str, model: Any) -> InputBuilder:
    config = stage.run.config
    return InputBuilder(
        data,
        name,
        model.collator(data.texts[name].template),
        max_length=config.models[name].max_length,
        query_max_length=config.query_max_length,
    )


def train_visit(
    stage: Stage,
    models: Models,
    data: Data,
    candidates: Candidates,
    objective_of: Callable[[Samples], Objective],
    visit: Visit,
) -> Trained:
    """Train a model for one visit, the others out of the way, and publish its weights.

    Args:
        stage: Where this runs.
        models: All models.
        data: Corpus and training queries.
        candidates: From which the negatives are drawn.
        objective_of: From the samples of the visit to what its steps compute.
        visit: Of the timetable.
    """
    run, name = stage.run, visit.phase.model
    samples = Samples(visit, stage.seed, data, candidates, run.coordinator.rank, run.coordinator.world_size)
    with models.training(name) as model:
        objective = objective_of(samples)
        fit_micro_batches(stage, model, models.checkpoints[name], objective)
        progress = train(stage, visit, model, models.checkpoints[name], objective)
        digest = publish_weights(run, model, data.texts[name], iteration_name(visit.iteration))
    return Trained(progress.steps, progress.loss, progress.checkpoint, digest)

"""The training phases that the algorithms name: verbs, each of which says what its phase optimises.

A phase is a row of the timetable. Here it gets its objective (`engine.objectives`), goes through the loop
(`engine.training.loop`), and leaves published weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.config.ar2 import Ar2Config
from engine.config.distillation import DistillationConfig
from engine.config.lexical import FlopsConfig
from engine.config.models import RankerConfig
from engine.config.timetable import Visit, iteration_name
from engine.data.batches import InputBuilder, Samples
from engine.data.corpus import Data
from engine.data.negatives import NegativeSource
from engine.data.teacher_scores import TeacherScores
from engine.evaluation.chosen import ranker_has_led, trust_on_dev
from engine.log import get_logger
from engine.models.adapters import read_adapters
from engine.models.kinds import load_untrained, parts_of
from engine.models.weights import frozen_ranker, verify_weights
from engine.objectives.contrast import InBatchContrast
from engine.objectives.distillation import Distillation, DistillationInBatch, require_scores
from engine.objectives.game import AdversarialGame
from engine.objectives.irgan import Discriminator, Generator
from engine.objectives.lexical import LexicalContrast
from engine.objectives.mined import MinedContrast
from engine.objectives.pooled_game import AdversarialGameInBatch
from engine.objectives.ranking import ListwiseRanking, PriorOfGroups
from engine.results import NOT_SHOWN
from engine.retrievers.prior import RankerPrior, build_prior
from engine.run import Run, Stage
from engine.training.loop import Objective, train
from engine.training.micro_batches import fit_micro_batches
from engine.training.models import Models
from engine.training.publishing import publish_weights

log = get_logger(__name__)


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


def train_by_contrast(
    stage: Stage,
    models: Models,
    data: Data,
    candidates: NegativeSource,
    *,
    penalty: FlopsConfig | None = None,
) -> Trained:
    """Train a retriever by the contrast of positives with some of its candidates (AR2 Eq. 2).

    Where the phase has a pool, the documents of the whole batch are negatives as well.

    Args:
        stage: Of a visit.
        models: All models.
        data: Corpus and training queries.
        candidates: BM25's in AR2 (Algorithm 1 line 2); in R2ANKER, BM25's or the retriever's own (section 4.2); in
            ANCE, its own.
        penalty: What makes the vectors of a lexical retriever sparse; None for a dense one.
    """
    visit = stage.run.timetable.visit(stage.name)

    def contrast(samples: Samples) -> Objective:
        builder = builder_of(stage, data, models, visit.phase.model)
        score_scale = stage.run.config.models[visit.phase.model].score_scale
        if penalty is not None:
            return LexicalContrast(samples, builder, score_scale=score_scale, penalty=penalty)
        contrast_of = MinedContrast if visit.phase.pool == "none" else InBatchContrast
        return contrast_of(samples, builder, score_scale=score_scale)

    return train_visit(stage, models, data, candidates, contrast, visit)


def train_ranker(stage: Stage, models: Models, data: Data, candidates: NegativeSource) -> Trained:
    """Train a ranker to tell the positive from negatives of retrievers (AR2 Eq. 7, R2ANKER Eq. 5; in IRGAN Eq. 3).

    Args:
        stage: Of a visit.
        models: All models.
        data: Corpus and training queries.
        candidates: From which the negatives are drawn.
    """
    visit = stage.run.timetable.visit(stage.name)
    ranking_of = Discriminator if visit.phase.objective == "irgan" else ListwiseRanking

    def ranking(samples: Samples) -> Objective:
        builder = builder_of(stage, data, models, visit.phase.model)
        score_scale = stage.run.config.models[visit.phase.model].score_scale
        return ranking_of(samples, builder, score_scale=score_scale, prior=_prior(stage, data))

    return train_visit(stage, models, data, candidates, ranking, visit)


def train_retriever(
    stage: Stage,
    models: Models,
    data: Data,
    candidates: NegativeSource,
    game: Ar2Config,
    *,
    opponent: int,
) -> Trained:
    """Train G against the fixed ranker (Algorithm 1 lines 7-10, Eq. 9 and 12; in IRGAN Eq. 3).

    Args:
        stage: Of a visit.
        models: All models.
        data: Corpus and training queries.
        candidates: What the newest index retrieved.
        game: Forms and weights of the equations.
        opponent: Iteration whose ranker is the opponent and teacher.
    """
    run, config = stage.run, stage.run.config
    visit = run.timetable.visit(stage.name)
    if "ar2.adversarial_from=lead" in game.decided_on_dev and not ranker_has_led(run, visit.iteration):
        log.info("%s: without Eq. 9, since the ranker has not been above the retriever on dev", stage.name)
        game = game.model_copy(update={"adversarial_weight": 0.0})

    trust = trust_on_dev(run, visit.iteration - 1) if game.teacher == "dev" else 1.0

    def against_ranker(samples: Samples) -> Objective:
        folder = run.folder.weights("ranker", iteration_name(opponent))
        ranker = frozen_ranker(config.model("ranker", RankerConfig), folder, run.device)
        builders = builder_of(stage, data, models, "retriever"), _builder(stage, data, "ranker", ranker)
        scales = config.models["retriever"].score_scale, config.models["ranker"].score_scale
        ours = AdversarialGame if visit.phase.pool == "none" else AdversarialGameInBatch
        game_of = Generator if visit.phase.objective == "irgan" else ours
        return game_of(
            samples, *builders, ranker.scorer(), game, score_scales=scales, trust=trust, prior=_prior(stage, data)
        )

    return train_visit(stage, models, data, candidates, against_ranker, visit)


def published_state(run: Run, name: str, state: str) -> Mapping[str, Tensor]:
    """Load a model as it was published in some state: its parameters by name, on the CPU.

    Args:
        run: Whose folder has it.
        name: The model's.
        state: Such as that before any training.

    Raises:
        ArtifactError: It was not published.
    """
    folder, config = run.folder.weights(name, state), run.config
    verify_weights(folder)
    model = load_untrained(config.models[name], str(folder), seed=config.run.seed, name=name)
    section = config.models[name]
    if getattr(section, "lora", None) is None:
        return model.state_dict()
    return {**model.state_dict(), **read_adapters(parts_of(model), folder)}


def builder_of(stage: Stage, data: Data, models: Models, name: str) -> InputBuilder:
    """Return what makes the inputs of a model in training."""
    return _builder(stage, data, name, models.engines[name].module)


def _prior(stage: Stage, data: Data) -> PriorOfGroups | None:
    """Return what the recipe adds to a ranker's scores in training."""
    build_prior(stage.run, data)
    prior = RankerPrior.open(stage.run, data)
    return None if prior is None else prior.of_groups


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
    candidates: NegativeSource,
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
    coordinator = stage.run.coordinator
    samples = Samples(visit, stage.seed, data, candidates, coordinator.rank, coordinator.world_size)
    return train_by(stage, models, data, lambda: objective_of(samples), visit)


def train_by(stage: Stage, models: Models, data: Data, objective_of: Callable[[], Objective], visit: Visit) -> Trained:
    """Train a model for one visit by an objective that has its samples; as `train_visit`.

    Args:
        stage: Where this runs.
        models: All models.
        data: How the model reads text.
        objective_of: Makes what the visit's steps compute, while the model is on its device.
        visit: Of the timetable.
    """
    run, name = stage.run, visit.phase.model
    with models.training(name) as model:
        objective = objective_of()
        if visit.phase.restarts is not None and not models.checkpoints[name].is_within(stage.name):
            model.load_weights(published_state(run, name, visit.phase.restarts))
        fit_micro_batches(stage, model, models.checkpoints[name], objective)
        progress = train(stage, visit, model, models.checkpoints[name], objective)
        digest = publish_weights(run, model, data.texts[name], iteration_name(visit.iteration))
    return Trained(progress.steps, progress.loss, progress.checkpoint, digest)


def train_student(
    stage: Stage,
    models: Models,
    data: Data,
    candidates: NegativeSource,
    scores: TeacherScores,
    settings: DistillationConfig,
) -> Trained:
    """Train a retriever on what a teacher says of its queries' documents (R2ANKER Appendix C).

    Args:
        stage: Where this runs.
        models: All models.
        data: Corpus and training queries.
        candidates: From which the negatives are drawn.
        scores: The teacher's, of all that is drawn.
        settings: Which loss, and its scales.

    Raises:
        DataError: A document that a step will draw has no score; found before the first step.
    """
    visit = stage.run.timetable.visit(stage.name)

    def lessons(samples: Samples) -> Objective:
        with stage.run.coordinator.agreement(f"{stage.name}: a score for every pair"):
            require_scores(samples, scores)
        builder = builder_of(stage, data, models, visit.phase.model)
        score_scale = stage.run.config.models[visit.phase.model].score_scale
        objective = Distillation if visit.phase.pool == "none" else DistillationInBatch
        return objective(samples, builder, scores, settings, score_scale=score_scale)

    return train_visit(stage, models, data, candidates, lessons, visit)

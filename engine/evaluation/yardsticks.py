"""What the algorithm is measured against before it begins: BM25, and the retriever as it came."""

from __future__ import annotations

from engine.data.corpus import Data
from engine.evaluation.evaluate import evaluate_system, retriever_of
from engine.evaluation.systems import yardsticks
from engine.results import Measured
from engine.retrievers.kinds import build
from engine.run import Stage
from engine.training.models import Models
from engine.training.publishing import publish_start


def publish_starts(stage: Stage, models: Models, data: Data) -> None:
    """Publish models as they came, for minings that search with them and phases that begin from there again."""
    for name in stage.run.timetable.starts:
        with models.training(name) as model:
            publish_start(stage.run, model, data.texts[name])


def evaluate_yardsticks(stage: Stage, models: Models, data: Data) -> Measured:
    """Measure BM25 and the retriever before any training on the dev split."""
    run, scores = stage.run, []
    for system in yardsticks(run.config):
        if system.weights is not None:
            with models.training(system.weights.model) as model:
                publish_start(run, model, data.texts[model.name])
        build(run, data, run.folder, retriever_of(system))
        scores += evaluate_system(stage, data, run.folder, system, "dev")
    return Measured(tuple(scores))

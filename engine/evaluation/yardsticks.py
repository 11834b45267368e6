"""What the algorithm is measured against before it begins: BM25, and the retriever as it came."""

from __future__ import annotations

from engine.config.timetable import ZERO_SHOT
from engine.data.corpus import Data
from engine.evaluation.evaluate import evaluate_bm25, evaluate_retriever
from engine.refresh.refresh import build_bm25_index, make_index
from engine.run import Stage
from engine.training.models import Models
from engine.training.publishing import publish_weights


def evaluate_yardsticks(stage: Stage, models: Models, data: Data) -> dict[str, float]:
    """Measure BM25 and the retriever before any training on the dev split."""
    run = stage.run
    run.once("bm25", build_bm25_index, data, run.folder)
    measured = evaluate_bm25(stage, data, run.folder, "dev")
    if run.config.evaluation.zero_shot:
        with models.training("retriever") as retriever:
            publish_weights(run, retriever, data.texts["retriever"], ZERO_SHOT)
        make_index(run, data, run.folder, ZERO_SHOT)
        measured |= evaluate_retriever(stage, data, run.folder, "zero-shot", None, "dev")
    return measured

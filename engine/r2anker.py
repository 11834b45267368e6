"""R2ANKER: a ranker hardened by the joint negatives of several retrievers.

Source: Zhou et al. 2023, "Towards Robust Ranker for Text Retrieval". The retrievers are trained first and stay as they
are (Appendix B); each proposes negatives, and the ranker learns from all of them at once (Eq. 8 and 9). What is trained
on what and for how long stands in the timetable (`engine.config.r2anker`).
"""

from __future__ import annotations

from engine.config.r2anker import FIRST, JOINT, RANKER_STATE, SECOND, STUDENT_STATE, R2ankerConfig, R2ankerRecipe
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.data.negatives import NegativeSource
from engine.evaluation.evaluate import evaluate_iteration
from engine.evaluation.systems import measured_systems
from engine.evaluation.yardsticks import evaluate_yardsticks, publish_starts
from engine.phases import train_by_contrast, train_ranker, train_student
from engine.refresh.lessons import lessons_of, read_lessons
from engine.refresh.refresh import pool_of, prepare_search, refresh_index
from engine.run import Run
from engine.training.models import Models


def train(models: Models, data: Data, run: Run) -> None:
    """Train the retrievers, the ranker on what they find together, and measure it on what each of them finds."""
    game = run.recipe(R2ankerRecipe).r2anker
    if run.timetable.phases_of("student"):
        read_lessons(run, data, game.student, phase="student")
    run.once("starts", publish_starts, models, data)
    run.once("evaluate/yardsticks", evaluate_yardsticks, models, data)
    for model in run.timetable.encoders:
        train_retriever(model, models, data, game, run)  # sections 3.4 and 4.2
    pool = pool_of(run, data, JOINT)  # Eq. 9, Appendix B
    run.once("ranker", train_ranker, models, data, pool)  # Eq. 8, 5
    evaluate("ranker", data, run)
    if run.timetable.phases_of("student"):
        distil(models, data, pool, game, run)  # Appendix C


def train_retriever(model: str, models: Models, data: Data, game: R2ankerConfig, run: Run) -> None:
    """Train a retriever on BM25's negatives, then from its beginning again on those that it finds itself."""
    for state in (FIRST, SECOND):
        phase = run.timetable.phase(f"{model}_{state}")
        pool, penalty = pool_of(run, data, phase.candidates[0]), game.penalty(phase.name)
        run.once(phase.name, train_by_contrast, models, data, pool, penalty=penalty)
        refresh_index(run, data, model=model, iteration=state)
    evaluate(model, data, run)


def distil(models: Models, data: Data, pool: NegativeSource, game: R2ankerConfig, run: Run) -> None:
    """Train a retriever on the ranker's scores, in place of labels (Appendix C: KL replaces the contrastive loss)."""
    teacher = WeightsOf("ranker", RANKER_STATE)
    lessons = lessons_of(run, data, pool, teacher, game.student, phase="student")
    taught, candidates, scores = lessons.data, lessons.candidates, lessons.scores
    run.once("student", train_student, models, taught, candidates, scores, game.student)
    prepare_search(run, data, model="student", iteration=STUDENT_STATE)
    evaluate("student", data, run)


def evaluate(model: str, data: Data, run: Run) -> None:
    """Measure all states of a model on the dev split; a ranker over each of the retrievers."""
    run.once(f"evaluate/{model}", evaluate_iteration, data, measured_systems(run.config, run.timetable.states(model)))

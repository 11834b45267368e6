"""Lessons: what a student is trained on. Queries, the documents to draw from, and what a teacher says of them.

The teacher is the run's own ranker, which scores the candidates (`engine.refresh.scoring`), or any other whose scores
are in files (`engine.data.scored_files`); then its documents are drawn from, too, and queries that it says too little
of are left out.

Source: R2ANKER Appendix C, which scores the training data of another work by its own ranker.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from engine.config.distillation import DistillationConfig
from engine.config.timetable import WeightsOf
from engine.data import candidates as candidate_files
from engine.data import teacher_scores as score_files
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.negatives import NegativeSource
from engine.data.scored_files import choose_taught, import_scores, require_comparable, scores_stamp
from engine.data.teacher_scores import TeacherScores
from engine.errors import ArtifactError
from engine.log import get_logger
from engine.refresh.scoring import score_candidates, teacher_stamp
from engine.results import NOT_SHOWN
from engine.run import Run, Stage

log = get_logger(__name__)
FROM_FILES = "from-files"
"""Name of scores that were read from files, and of the candidates that they make."""
_PATIENCE_SECONDS = 12 * 3600.0
"""How long the ranks wait for the one that reads the files; where that one is lost, heartbeats tell it long before."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a student is trained on.

    Attributes:
        data: The data, with the training queries that are taught, and of each the positives that are scored.
        candidates: From which the negatives are drawn.
        scores: The teacher's.
    """

    data: Data
    candidates: NegativeSource
    scores: TeacherScores


@dataclass(frozen=True, slots=True)
class ReadScores:
    """Result of a stage that reads scores from files.

    Attributes:
        queries: Training queries that are taught.
        pairs: Of them and a document, with a score.
        left_out: Records, scores and queries that are not used, by reason.
    """

    queries: int
    pairs: int
    left_out: dict[str, int] = field(metadata=NOT_SHOWN)


def lessons_of(
    run: Run, data: Data, candidates: NegativeSource, teacher: WeightsOf, settings: DistillationConfig, *, phase: str
) -> Lessons:
    """Return what a student is trained on: scored by the teacher, or read from files where the recipe names some.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        candidates: What the teacher scores, besides the positives.
        teacher: A ranker of the run.
        settings: Says where the scores come from.
        phase: The student's, in the timetable.

    Raises:
        ArtifactError: The teacher's weights are missing or damaged, or scores are those of another corpus.
        DataError: Scores of a file are not usable.
    """
    visit = run.timetable.phase(phase).visits[0]
    if settings.scores is not None:
        return _from_files(run, data, settings, visit.phase.num_negatives)
    name = f"{teacher.model}-{teacher.state}"
    stage, folder, stamp = f"scores/{name}", run.folder.teacher_scores(name), teacher_stamp(run, data, teacher)
    if run.is_finished(stage) and not run.coordinator.only_rank_zero(
        f"{stage}: look", lambda: score_files.is_of(folder, stamp)
    ):
        run.forget([stage])  # they were removed
    run.once(
        stage, score_candidates, data, candidates, teacher, name, visit=visit if settings.score == "drawn" else None
    )
    return Lessons(data, candidates, TeacherScores.load(folder, stamp))


def read_lessons(run: Run, data: Data, settings: DistillationConfig, *, phase: str) -> None:
    """Read what files say before anything is trained, so that none is found to be of other data behind all training.

    Args:
        run: As of `lessons_of`.
        data: Corpus and training queries.
        settings: Says where the scores come from; where the run's ranker gives them, nothing is done.
        phase: As of `lessons_of`.

    Raises:
        ArtifactError: As of `lessons_of`.
        ConfigError: The scores are known up to a constant a query, and the loss compares the scores themselves.
        DataError: As of `lessons_of`.
    """
    if settings.scores is not None:
        read = _from_files(run, data, settings, run.timetable.phase(phase).num_negatives)
        require_comparable(read.scores, settings)


def _from_files(run: Run, data: Data, settings: DistillationConfig, num_negatives: int) -> Lessons:
    stage, folder = f"scores/{FROM_FILES}", run.folder.candidates(FROM_FILES)
    if run.is_finished(stage) and not run.coordinator.only_rank_zero(
        f"{stage}: look", lambda: _are_read(run, data, settings, num_negatives), _PATIENCE_SECONDS
    ):
        run.forget([stage])  # the files are others than then
    run.once(stage, read_scores, data, settings, num_negatives)
    scores, candidates = TeacherScores.load(_folder_of(run, settings)), Candidates.load(folder)
    if scores.stamp != candidates.stamp:
        raise ArtifactError(
            f"the candidates in {folder} are not of the scores in {_folder_of(run, settings)}",
            remedy="delete both and start again",
        )
    return Lessons(replace(data, train=taught_queries(data, candidates.qids, scores)), candidates, scores)


def read_scores(stage: Stage, data: Data, settings: DistillationConfig, num_negatives: int) -> ReadScores:
    """Read scores from files on rank 0, choose the queries that they are enough for, and publish both.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        settings: Names the files, or the folder of another run's scores.
        num_negatives: That a step draws for a query.

    Raises:
        ArtifactError: The scores of another run are damaged, or of another corpus.
        DataError: A file is not usable.
    """
    run = stage.run

    def read() -> list[object]:
        scores = _scores_in(run, data, settings)
        rows, negatives, left_out = choose_taught(data, scores, num_negatives)
        depth = max(map(len, negatives))
        documents_QK = np.full((len(rows), depth), -1, dtype=np.int64)
        scores_QK = np.full((len(rows), depth), -np.inf, dtype=np.float32)
        qids = [data.train.queries[row].id for row in rows]
        for place, (qid, own) in enumerate(zip(qids, negatives, strict=True)):
            documents_QK[place, : len(own)], scores_QK[place, : len(own)] = own, scores.of(qid, own)
        candidates = Candidates(scores.source, scores.stamp, qids, documents_QK, scores_QK, left_out)
        candidates.save(run.folder.candidates(FROM_FILES), search=str(num_negatives))
        counts = scores.counts + left_out
        for what, count in counts.items():
            log.info("%s: %d %s", scores.source, count, what)
        return [len(rows), scores.num_pairs, dict(counts)]

    queries, pairs, left_out = run.coordinator.only_rank_zero(f"{stage.name}: read", read, _PATIENCE_SECONDS)
    return ReadScores(queries, pairs, left_out)


def taught_queries(data: Data, qids: list[str], scores: TeacherScores) -> TrainingQueries:
    """Return the training queries that are taught, each with the positives that are scored.

    Args:
        data: All training queries.
        qids: Ids of those that are taught, in their order.
        scores: The teacher's.
    """
    train, chosen = data.train, set(qids)
    rows = [row for row, query in enumerate(train.queries) if query.id in chosen]
    return replace(
        train,
        queries=[train.queries[row] for row in rows],
        positives=[
            own[~np.isnan(scores.of(train.queries[row].id, own))] for row in rows for own in [train.positives[row]]
        ],
        tokens={stream: [tokens[row] for row in rows] for stream, tokens in train.tokens.items()},
        false_negatives=None if train.false_negatives is None else [train.false_negatives[row] for row in rows],
    )


def _folder_of(run: Run, settings: DistillationConfig) -> Path:
    """Return where the scores lie: in the run, or where another run has published them."""
    assert settings.scores is not None, "asked of scores from files alone"
    return settings.scores if score_files.is_published(settings.scores) else run.folder.teacher_scores(FROM_FILES)


def _scores_in(run: Run, data: Data, settings: DistillationConfig) -> TeacherScores:
    """Open scores of another run, or those that were read from these files, or read them."""
    folder, corpus = _folder_of(run, settings), data.shards.manifest.sha256
    if folder == settings.scores:
        scores = TeacherScores.load(folder)
        if scores.stamp.corpus_sha256 != corpus:
            raise ArtifactError(
                f"the scores in {folder} are of corpus {scores.stamp.corpus_sha256[:12]}",
                expected=f"corpus {corpus[:12]}, which the shards of this run hold",
                remedy="score this corpus: leave the path of scores out",
            )
        return scores
    stamp = scores_stamp(settings, corpus)
    if not score_files.is_saved(folder, stamp, ""):
        import_scores(data, settings, stamp).save(folder)
    return TeacherScores.load(folder, stamp)


def _are_read(run: Run, data: Data, settings: DistillationConfig, num_negatives: int) -> bool:
    """Tell whether what an earlier start has read is what would be read now."""
    folder = _folder_of(run, settings)
    if folder == settings.scores:
        stamp = TeacherScores.load(folder).stamp
    else:
        stamp = scores_stamp(settings, data.shards.manifest.sha256)
        if not score_files.is_saved(folder, stamp, ""):
            return False
    return candidate_files.is_saved(run.folder.candidates(FROM_FILES), stamp, str(num_negatives))

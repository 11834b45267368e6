"""Index refresh: encode the corpus with the current retriever, index it, and retrieve fresh candidates.

Source: AR2 section 3.3 and Algorithm 1 lines 3-4 and 11. Three stages with an artifact each, so that a run that
stopped between them goes on with what is there: embeddings, index, candidates, all stamped with the iteration and the
hash of the weights that made them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engine.config.negatives import Joint, NegativesConfig
from engine.config.timetable import ZERO_SHOT, Timetable, WeightsOf, iteration_name
from engine.data.batches import rows_drawn
from engine.data.candidates import Candidates, is_of
from engine.data.corpus import Data
from engine.data.filters import Teacher
from engine.data.negatives import NegativeSource, NoNegatives
from engine.data.teacher_scores import TeacherScores
from engine.evaluation.chosen import taken_iteration
from engine.log import get_logger
from engine.refresh.mining import MinedQueries, mine
from engine.refresh.pooling import Pooling, joint_negatives
from engine.refresh.staleness import measure_staleness
from engine.results import STALENESS
from engine.retrievers.kinds import build, choice_of, dense, open_searcher, stamp_of
from engine.run import Run, RunFolder, Stage

log = get_logger(__name__)


def refresh_index(run: Run, data: Data, *, iteration: int, model: str | None = None) -> NegativeSource:
    """Rebuild the index with the retriever of an iteration and retrieve candidates for the training queries.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        iteration: Whose retriever; 0 is the warm-up.
        model: Which model; left out, the one that searches the corpus.

    Returns:
        What the next phases draw from: candidates without positives and answers, or a pool that they are in.

    Raises:
        IndexQualityError: The index finds too little of what exact search finds.
        DataError: A query has too few documents left to draw n negatives from.
    """
    return pool_of(run, data, run.timetable.artifact(WeightsOf(model or run.timetable.encoder, iteration)))


def refresh_when_due(run: Run, data: Data, found: NegativeSource, *, iteration: int) -> NegativeSource:
    """Refresh the retriever's index in an iteration that has a refresh, and measure how stale the one before was.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        found: What the last refresh found, which is what others return.
        iteration: Whose retriever, from 1.

    Returns:
        What the next phases draw from.

    Raises:
        IndexQualityError: As of `refresh_index`.
        DataError: As of `refresh_index`.
    """
    if not run.timetable.is_refreshed(iteration):
        return found
    found = refresh_index(run, data, iteration=iteration)
    note_staleness(run, iteration)
    return found


def note_staleness(run: Run, iteration: int) -> None:
    """Measure how stale the index before a refresh was, and let the timetable know."""
    before, planned = run.timetable.refreshed_before(iteration), run.timetable.refreshes
    run.once(f"{STALENESS}/{iteration}", measure_staleness, before=before, iteration=iteration)
    run.learn_from_refreshes()
    if run.is_main and run.timetable.refreshes != planned:
        log.info("%s/%d: the index is left as it is until the last iteration", STALENESS, iteration)


def prepare_search(run: Run, data: Data, *, model: str, iteration: int) -> None:
    """Make what a dense retriever of an iteration searches with, for whoever searches with it later."""
    build(run, data, run.folder, dense(WeightsOf(model, iteration)))


def candidates_of(run: Run, data: Data, name: str) -> Candidates:
    """Build what a retriever of the timetable searches with, and retrieve its candidates.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        name: Of the candidates in the timetable.

    Returns:
        Candidates without positives and answers.

    Raises:
        IndexQualityError: As of `refresh_index`.
        DataError: As of `refresh_index`.
    """
    choice = choice_of(run.timetable.mining(name))
    build(run, data, run.folder, choice)
    stage, folder, stamp = f"candidates/{name}", run.folder.candidates(name), stamp_of(run, data, choice)
    # Of one without weights, the ledger does not tell whether it is the same as then.
    may_differ = choice.weights is None and run.is_finished(stage)
    if may_differ and not run.coordinator.only_rank_zero(f"{stage}: look", lambda: is_of(folder, stamp)):
        run.forget([stage])
    run.once(stage, retrieve_candidates, data, name)
    return Candidates.load(folder, stamp)


def pool_of(run: Run, data: Data, name: str, teacher: Teacher | None = None) -> NegativeSource:
    """Return what some phase draws its negatives from: one retriever's candidates, or a pool of several, filtered.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        name: Of candidates or of a pool in the timetable.
        teacher: A ranker's scores, for filters that ask for them; left out, those that the configuration names.
    """
    table = run.timetable
    joint = table.joint.get(name)
    visits = table.drawn_by(name)
    if joint is None or not visits:
        return candidates_of(run, data, name)
    found = {member: candidates_of(run, data, member) for member in (*joint.members, *joint.within)}
    rows = np.arange(len(data.train)) if table.mine_all else rows_drawn(visits, run.config.run.seed, len(data.train))
    sources = {member: found[member] for member in joint.members}
    return pooled(run, data, joint, name, sources, found, rows=rows, needed=table.drawn(name), teacher=teacher)


def pooled(
    run: Run,
    data: Data,
    joint: Joint,
    name: str,
    sources: Mapping[str, Candidates],
    within: Mapping[str, Candidates],
    *,
    rows: NDArray[np.int64],
    needed: int,
    teacher: Teacher | None = None,
) -> NegativeSource:
    """Lay candidates together as a pool of the timetable says, and filter them.

    Args:
        run: Whose folder has the candidates.
        data: Corpus and training queries.
        joint: What the timetable has of the pool.
        name: Of the pool in the ledger.
        sources: Candidates of its members, by their names in the run folder, in the order of the members.
        within: Candidates that filters keep to, by name; others may be among them.
        rows: Training rows, int64 [Q].
        needed: Negatives that a step draws, n.
        teacher: As for `pool_of`.
    """
    if joint.is_cut:
        return next(iter(sources.values())).top(joint.top_k)
    pooling = Pooling(
        name=name,
        sources=sources,
        top_k=joint.top_k,
        settings=joint.negatives,
        rows=rows,
        needed=needed,
        teacher=_teacher(joint.negatives) if teacher is None else teacher,
        within={member: within[member] for member in joint.within},
    )
    return joint_negatives(run, data, pooling)


def stages_beside(table: Timetable, name: str) -> tuple[str, ...]:
    """Name the stages of a refresh that run beside the ranker's phase.

    Args:
        table: The run's.
        name: Of the refresh's candidates.
    """
    joint = table.joint.get(name) if table.drawn_by(name) else None
    first = (*([f"encode/{name}"] if table.encodes_beside else []), f"index/{name}")
    if joint is None:
        return (*first, f"candidates/{name}")
    members = tuple(f"candidates/{member}" for member in dict.fromkeys((*joint.members, *joint.within)))
    return (*first, *members, *(() if joint.is_cut else (f"negatives/{name}",)))


def _teacher(negatives: NegativesConfig) -> Teacher | None:
    return None if negatives.teacher_scores is None else TeacherScores.load(negatives.teacher_scores)


def warmup_candidates(run: Run, data: Data) -> NegativeSource:
    """Return what AR2's first phase draws its hard negatives from: BM25's candidates, or others, or none at all."""
    name = run.timetable.phase("warmup_retriever").candidates[0]
    return pool_of(run, data, name) if name else NoNegatives()


def retrieve_candidates(stage: Stage, data: Data, name: str) -> MinedQueries:
    """Search the training queries, each rank its share, and take out positives and documents with an answer."""
    run, table, rows = stage.run, stage.run.timetable, np.arange(len(data.train))
    if not table.mine_all:
        rows = rows_drawn(table.drawing_from(name), stage.seed, len(data.train))
    mining = table.mining(name)
    choice = choice_of(mining)
    searcher, stamp = open_searcher(run, data, run.folder, choice), stamp_of(run, data, choice)
    counts = mine(stage, data, searcher, rows, stamp, top_k=mining.top_k, needed=table.needed(name), name=name)
    if run.is_main and mining.weights is not None and mining.weights.iteration is not None:
        drop_old_indexes(run, run.folder, mining.weights.iteration)
    return counts


def drop_old_indexes(run: Run, folder: RunFolder, iteration: int, taken: int | None = None) -> None:
    """Remove indexes beyond `run.keep_indexes`, but those that the last table needs.

    These are zero-shot's, the warm-up's, and that of the iteration which would be taken by now.

    Where the models do not go through iterations together, every index is one that the last table needs.

    Args:
        run: For the setting.
        folder: Holds the indexes: the run's own folder, or one below it for another corpus.
        iteration: The newest that counts; newer ones, of a run that is not finished, are left alone.
        taken: The iteration that is taken; None for what the run's ledger says.
    """
    if run.timetable.ends is not None:
        return
    keep = {ZERO_SHOT, iteration_name(0), iteration_name(taken_iteration(run, iteration) if taken is None else taken)}
    made = [one for one in range(iteration, -1, -1) if run.timetable.is_refreshed(one)]
    keep |= {iteration_name(one) for one in made[: run.config.run.keep_indexes]}
    indexes = folder.path / "index"
    for index in indexes.iterdir() if indexes.exists() else ():  # words alone may have been searched by
        is_newer = index.name.isdigit() and int(index.name) > iteration
        if index.is_dir() and index.name not in keep and not is_newer:
            shutil.rmtree(index)

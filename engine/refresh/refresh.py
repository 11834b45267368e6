"""Index refresh: encode the corpus with the current retriever, index it, and retrieve fresh candidates.

Source: AR2 section 3.3 and Algorithm 1 lines 3-4 and 11. Three stages with an artifact each, so that a run that
stopped between them goes on with what is there: embeddings, index, candidates, all stamped with the iteration and the
hash of the weights that made them.
"""

from __future__ import annotations

import shutil

import numpy as np

from engine.config.timetable import ZERO_SHOT, iteration_name
from engine.data.batches import rows_drawn
from engine.data.candidates import Candidates, is_of
from engine.data.corpus import Data
from engine.refresh.mining import MinedQueries, mine
from engine.retrievers.kinds import BM25, Choice, build, dense, open_searcher, stamp_of
from engine.run import Run, RunFolder, Stage


def refresh_index(run: Run, data: Data, *, iteration: int) -> Candidates:
    """Rebuild the index with the retriever of an iteration and retrieve candidates for the training queries.

    Args:
        run: Whose folder takes the artifacts.
        data: Corpus and training queries.
        iteration: Whose retriever; 0 is the warm-up.

    Returns:
        Candidates without positives and answers.

    Raises:
        IndexQualityError: The index finds too little of what exact search finds.
        DataError: A query has too few documents left to draw n negatives from.
    """
    name = iteration_name(iteration)
    build(run, data, run.folder, dense(name))
    run.once(f"candidates/{name}", retrieve_candidates, data, iteration=iteration)
    return Candidates.load(run.folder.candidates(name), stamp_of(run, data, dense(name)))


def retrieve_candidates(stage: Stage, data: Data, *, iteration: int) -> MinedQueries:
    """Search the training queries, each rank its share, and take out positives and documents with an answer."""
    run, name = stage.run, iteration_name(iteration)
    counts = _mine(stage, data, dense(name), name)
    if run.is_main:
        drop_old_indexes(run, run.folder, iteration)
    return counts


def bm25_candidates(run: Run, data: Data) -> Candidates:
    """Return BM25's candidates for the training queries that the retriever's warm-up draws."""
    build(run, data, run.folder, BM25)
    name, folder, stamp = "candidates/bm25", run.folder.candidates("bm25"), stamp_of(run, data, BM25)
    if run.is_finished(name) and not run.coordinator.only_rank_zero(f"{name}: look", lambda: is_of(folder, stamp)):
        run.forget([name])  # they were found by other settings
    run.once(name, _retrieve_bm25_candidates, data)
    return Candidates.load(folder, stamp)


def _retrieve_bm25_candidates(stage: Stage, data: Data) -> MinedQueries:
    return _mine(stage, data, BM25, "bm25")


def _mine(stage: Stage, data: Data, choice: Choice, name: str) -> MinedQueries:
    """Mine what the timetable says of these candidates with a retriever of the run."""
    table, rows = stage.run.timetable, np.arange(len(data.train))
    if not table.mine_all:
        rows = rows_drawn(table.drawing_from(name), stage.seed, len(data.train))
    searcher = open_searcher(stage.run, data, stage.run.folder, choice)
    stamp, top_k, needed = stamp_of(stage.run, data, choice), table.mining(name).top_k, table.needed(name)
    return mine(stage, data, searcher, rows, stamp, top_k=top_k, needed=needed, name=name)


def drop_old_indexes(run: Run, folder: RunFolder, iteration: int) -> None:
    """Remove indexes beyond `run.keep_indexes`; zero-shot's and the warm-up's stay for the last table.

    Args:
        run: For the setting.
        folder: Holds the indexes: the run's own folder, or one below it for another corpus.
        iteration: The newest that counts; newer ones, of a run that is not finished, are left alone.
    """
    keep = {ZERO_SHOT, iteration_name(0)}
    keep |= {iteration_name(iteration - back) for back in range(run.config.run.keep_indexes)}
    for index in (folder.path / "index").iterdir():
        is_newer = index.name.isdigit() and int(index.name) > iteration
        if index.is_dir() and index.name not in keep and not is_newer:
            shutil.rmtree(index)

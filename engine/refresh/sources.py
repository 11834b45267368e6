"""Files that negatives are drawn from or filtered by, gone through before anything is trained.

Rankings of other systems, and teachers' scores that another run has published: a phase may read them for the first
time behind the training of several models. That they are there is seen earlier (`engine.data.label_files`); here they
are brought to the corpus and to the training queries, which takes the shards.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.ar2 import DENSE
from engine.config.timetable import Mining, Visit
from engine.data.batches import rows_drawn
from engine.data.candidates import is_of
from engine.data.corpus import Data
from engine.data.teacher_scores import whose_scores
from engine.errors import ArtifactError, DataError
from engine.retrievers.kinds import choice_of, open_searcher, stamp_of
from engine.run import Run
from shards.errors import listed
from shards.records import Query

_NAMED = 3
"""Examples named in an error."""
_PATIENCE_SECONDS = 12 * 3600.0
"""How long the ranks wait for the one that reads the files; where that one is lost, heartbeats tell it long before."""


def require_sources(run: Run, data: Data) -> None:
    """Refuse files of rankings and of teachers' scores that do not fit the data, before any training.

    Rankings whose candidates have been made are not read again.

    Args:
        run: Its timetable names the files; rank 0 reads them.
        data: Corpus and training queries.

    Raises:
        ArtifactError: Teacher scores are damaged, or of another corpus.
        DataError: A file is no ranking of this corpus, or lacks a query that is searched; or a filter needs a
            teacher's scores of which margins alone are known, or that lack a query.
    """

    def read() -> None:
        for mining in run.timetable.minings:
            if mining.path:
                _require_ranking(run, data, mining)
        _require_teachers(run, data)

    run.coordinator.only_rank_zero("files of rankings and scores", read, _PATIENCE_SECONDS)


def _require_ranking(run: Run, data: Data, mining: Mining) -> None:
    """Refuse a run file that does not answer the queries which `retrieve_candidates` is going to ask it."""
    table, choice = run.timetable, choice_of(mining)
    visits = table.drawing_from(mining.name)
    is_mined = run.is_finished(f"candidates/{mining.name}")
    if not visits or (is_mined and is_of(run.folder.candidates(mining.name), stamp_of(run, data, choice))):
        return
    open_searcher(run, data, run.folder, choice).search(_asked(run, data, visits), 1)


def _asked(run: Run, data: Data, visits: Sequence[Visit]) -> list[Query]:
    """Return the training queries that are mined for some visits."""
    if run.timetable.mine_all:
        return data.train.queries
    return [data.train.queries[row] for row in rows_drawn(visits, run.config.run.seed, len(data.train)).tolist()]


def _require_teachers(run: Run, data: Data) -> None:
    """Refuse teachers' scores by which the pools that are drawn from cannot be filtered."""
    table, corpus = run.timetable, data.shards.manifest.sha256
    for name, joint in table.joint.items():
        folder, visits = joint.negatives.teacher_scores, table.drawn_by(name)
        if folder is None or joint.is_cut or not visits:
            continue
        stamp, margins_only, qids = whose_scores(folder)
        if stamp.corpus_sha256 != corpus:
            raise ArtifactError(
                f"the teacher scores in {folder} are of corpus {stamp.corpus_sha256[:12]}",
                expected=f"corpus {corpus[:12]}, which the shards of this run hold",
                remedy="score this corpus, or name the folder of a run on it",
            )
        if margins_only and joint.negatives.needs_teacher:
            raise DataError(
                f"a filter needs a teacher's scores, and of {stamp.iteration} in {folder} margins alone are known",
                expected="raw logits of single documents",
                remedy="score the candidates with a ranker, or take the filter out",
            )
        finds_any = any(table.mining(member).retriever == DENSE for member in joint.members)
        if joint.negatives.asks_teacher_first and finds_any:
            known = set(qids)
            if lacking := [repr(query.id) for query in _asked(run, data, visits) if query.id not in known]:
                raise DataError(
                    f"the teacher scores in {folder} lack {len(lacking)} training queries, of which a filter is to "
                    f"judge documents: {listed(lacking, _NAMED)}",
                    expected="a score of every document that the filter judges",
                    remedy="let the teacher score these queries, too, or take the filter out",
                )

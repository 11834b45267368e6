"""Files of rankings and scores are gone through before anything is trained, as the phases will read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.data.batches import rows_drawn
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.teacher_scores import scores_of_queries
from engine.errors import ArtifactError, DataError
from engine.refresh.sources import require_sources
from engine.retrievers.kinds import Choice, stamp_of
from engine.run import Run
from shards.embeddings import Stamp
from shards.records import Query

Open = Callable[..., Run]
CORPUS = "c" * 64
QUIET = ("ar2.iterations=1", "evaluation.zero_shot=false")


class Docids(list[str]):
    def index_of(self, docid: str) -> int | None:
        return self.index(docid) if docid in self else None


def data_of(num_queries: int) -> Data:
    queries = [Query(f"q{row}", f"question {row}") for row in range(num_queries)]
    shards: Any = SimpleNamespace(docids=Docids(f"d{index}" for index in range(9)))
    shards.manifest = SimpleNamespace(sha256=CORPUS)
    train = TrainingQueries(queries, [np.array([0])] * num_queries, {"retriever": [[1]] * num_queries})
    return Data(None, shards, {}, train)  # type: ignore[arg-type]


def ranking(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "given.trec"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_ranking_that_a_later_phase_draws_from_is_read_before_any_training(open_run: Open, tmp_path: Path) -> None:
    """Symptom: G0 was trained and the corpus encoded, and then the run file was found to be of other queries."""
    path = ranking(tmp_path, "q0 Q0 d1 1 2 t", "q1 Q0 d2 1 2 t")
    run = open_run(*QUIET, f"ar2.further_retrievers=[{path}]", "ar2.mine=all")
    require_sources(run, data_of(2))
    with pytest.raises(DataError, match=r"given\.trec lacks 1 of 3 queries: 'q2'"):
        require_sources(run, data_of(3))
    ranking(tmp_path, "q0 Q0 d1 1 2 t", "q1 Q0 d10 1 2 t")
    with pytest.raises(DataError, match=r"1 documents that the corpus does not have: 'd10' in line 2"):
        require_sources(run, data_of(2))


def test_queries_that_no_phase_draws_need_no_ranking(open_run: Open, tmp_path: Path) -> None:
    path = ranking(tmp_path, "q0 Q0 d1 1 2 t")
    words = ("warmup_ranker.steps=1", "warmup_ranker.batch_size=2", "ar2.ranker.steps=0", "ar2.retriever.steps=0")
    run = open_run(*QUIET, *words, f"ar2.further_retrievers=[{path}]", "ar2.mine=sampled")
    drawn = rows_drawn(run.timetable.drawing_from("run-file-0"), run.config.run.seed, 200).tolist()
    assert len(drawn) == 2
    with pytest.raises(DataError, match="lacks 2 of 2 queries"):
        require_sources(run, data_of(200))
    ranking(tmp_path, *(f"q{row} Q0 d1 1 2 t" for row in drawn))
    require_sources(run, data_of(200))


def test_a_ranking_whose_candidates_are_there_is_not_read_again(open_run: Open, tmp_path: Path) -> None:
    path = ranking(tmp_path, "q0 Q0 d1 1 2 t")
    run, data = open_run(*QUIET, f"ar2.further_retrievers=[{path}]"), data_of(2)
    with pytest.raises(DataError, match="lacks"):
        require_sources(run, data)
    stamp = stamp_of(run, data, Choice("run_file", path=str(path)))
    found = Candidates("run_file", stamp, ["q0"], np.array([[1]]), np.zeros((1, 1), np.float32), Counter())
    found.save(run.folder.candidates("run-file-0"))
    run.once("candidates/run-file-0", lambda stage: None)
    require_sources(run, data)
    path.write_text("q1 Q0 d1 1 2 t\n")
    with pytest.raises(DataError, match="lacks 1 of 2 queries: 'q0'"):
        require_sources(run, data)


@pytest.mark.parametrize(
    ("corpus", "margins_only", "error", "told"),
    [
        ("f" * 64, False, ArtifactError, r"are of corpus ffffffffffff.*corpus cccccccccccc"),
        (CORPUS, True, DataError, r"of 001 in .* margins alone are known"),
        (CORPUS, False, DataError, r"lack 1 training queries, .*: 'q1'\. Expected"),
    ],
)
def test_teacher_scores_that_no_filter_can_go_by_are_refused(
    open_run: Open, tmp_path: Path, corpus: str, margins_only: bool, error: type[Exception], told: str
) -> None:
    """Symptom: scores of another corpus were refused at the first pool, behind a warm-up and an index."""
    pairs = [("q0", np.array([1]), np.array([2.0], dtype=np.float32))]
    scores = scores_of_queries("ranker", Stamp("001", "a" * 64, corpus), pairs, margins_only=margins_only)
    scores.save(tmp_path / "scores")
    filters = "ar2.negatives.filters=[{name: ranker_thresholds}]"
    run = open_run(*QUIET, filters, f"ar2.negatives.teacher_scores={tmp_path / 'scores'}")
    with pytest.raises(error, match=told):
        require_sources(run, data_of(2))
    if "lack" in told:
        require_sources(run, data_of(1))

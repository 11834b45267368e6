"""A ranking in a file answers for its queries, in its order, and is refused where it is of something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.errors import DataError
from engine.refresh.mining import mine
from engine.retrievers.kinds import Choice, build, open_searcher, stamp_of
from engine.retrievers.run_file import RunFileSearcher
from engine.run import Run, Stage
from engine.search import Searcher
from shards.files import sha256_file
from shards.records import Document, Query

Open = Callable[..., Run]
N = 8


@dataclass
class FakeDocids:
    """Document i is called di."""

    def index_of(self, docid: str) -> int | None:
        number = docid.removeprefix("d")
        return int(number) if number.isdigit() and int(number) < N else None


def data_of(positives: list[list[int]]) -> Data:
    queries = [Query(f"q{row}", f"question {row}") for row in range(len(positives))]
    known = [np.array(one, dtype=np.int64) for one in positives]
    shards: Any = SimpleNamespace(
        num_documents=N,
        docids=FakeDocids(),
        document=lambda index: Document(f"d{index}", "", f"text {index}"),
        manifest=SimpleNamespace(sha256="c" * 64),
    )
    return Data(None, shards, {}, TrainingQueries(queries, known, {"retriever": [[1]] * len(queries)}))  # type: ignore[arg-type]


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "given.trec"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def opened(path: Path) -> RunFileSearcher:
    return RunFileSearcher.open(path, FakeDocids().index_of)


def asked(searcher: RunFileSearcher, top_k: int, *qids: str) -> tuple[list[list[int]], list[list[float]]]:
    hits = searcher.search([Query(qid, "any text") for qid in qids], top_k)
    return hits.documents_QK.tolist(), hits.scores_QK.tolist()


def test_queries_are_answered_by_their_ids_in_the_order_of_the_scores(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        *("q1 Q0 d3 2 0.5 other", "q2 Q0 d0 1 7 other", "q1 Q0 d7 1 2.5 other", "q1 Q0 d1 3 0.5 other"),
        "q1 Q0 d5 4 -1e3 other",
    )
    searcher = opened(path)
    assert isinstance(searcher, Searcher)
    assert searcher.source == "run_file"
    documents, scores = asked(searcher, 3, "q2", "q1")
    assert documents == [[0, -1, -1], [7, 1, 3]], "in the order of the scores; equal ones go by index"
    assert scores == [[7.0, -np.inf, -np.inf], [2.5, 0.5, 0.5]]
    assert asked(searcher, 1, "q1") == ([[7]], [[2.5]])


def test_scores_that_differ_in_their_last_digits_keep_their_order(tmp_path: Path) -> None:
    """Symptom guarded against: rounded to single precision they tie, and the documents come in another order."""
    searcher = opened(written(tmp_path, "q Q0 d1 2 20.00000001 tag", "q Q0 d6 1 20.00000002 tag"))
    assert asked(searcher, 2, "q")[0] == [[6, 1]]


def test_a_file_with_ranks_alone_is_taken_in_their_order(tmp_path: Path) -> None:
    searcher = opened(written(tmp_path, "q1\td4\t2", "q1\td6\t1", "q2\td0\t1"))
    assert asked(searcher, 3, "q1", "q2") == (
        [[6, 4, -1], [0, -1, -1]],
        [[-1.0, -2.0, -np.inf], [-1.0] + [-np.inf] * 2],
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("q Q0 d1 1 3 t", *(f"q Q0 x{row} {row + 2} 2 t" for row in range(5))),
            r"has 5 documents that the corpus does not have: 'x0' in line 2, 'x1' in line 3, 'x2' in line 4 and 2 more",
        ),
        (("q Q0 d1 1 nan t", "q Q0 d2 2 1 t"), "has 1 scores that are no finite numbers: nan in line 1"),
        (("q Q0 d1 1 -inf t",), "scores that are no finite numbers: -inf in line 1"),
        (("q Q0 d1 1 high t",), "line 1 reads 'q Q0 d1 1 high t'"),
        (("q Q0 d1 1 2 t", "q Q0 d2 2"), "line 2 reads"),
        (("q Q0 d1 1 2 t", "r Q0 d1 1 2 t", "q Q0 d1 2 1 t"), "has 1 queries with a document twice: 'q'"),
        ((), "is empty"),
    ],
)
def test_what_is_no_ranking_of_the_corpus_is_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(written(tmp_path, *lines))


def test_a_missing_file_is_refused_before_it_is_stamped_or_read(tmp_path: Path, open_run: Open) -> None:
    run, data, choice = open_run(), data_of([[0]]), Choice("run_file", path=str(tmp_path / "none.trec"))
    for function in (lambda: stamp_of(run, data, choice), lambda: open_searcher(run, data, run.folder, choice)):
        with pytest.raises(DataError, match=r"none\.trec does not exist"):
            function()


def test_queries_that_the_file_lacks_are_counted_and_named(tmp_path: Path) -> None:
    """Symptom guarded against: queries of another split have no negatives, and train on the positive alone."""
    searcher = opened(written(tmp_path, "q0 Q0 d1 1 2 t"))
    with pytest.raises(DataError, match=r"lacks 4 of 5 queries: 'q1', 'q2', 'q3' and 1 more"):
        asked(searcher, 2, "q0", "q1", "q2", "q3", "q4")


def test_the_stamp_is_that_of_the_bytes_and_of_the_corpus(tmp_path: Path, open_run: Open) -> None:
    run, data, path = open_run(), data_of([[0]]), written(tmp_path, "q0 Q0 d1 1 2 t")
    choice = Choice("run_file", path=str(path))
    before = stamp_of(run, data, choice)
    assert (before.iteration, before.weights_sha256, before.corpus_sha256) == (path.name, sha256_file(path), "c" * 64)
    written(tmp_path, "q0 Q0 d2 1 2 t")
    assert stamp_of(run, data, choice) != before


def test_candidates_are_mined_from_a_file(tmp_path: Path, open_run: Open) -> None:
    """Positives are taken out and the rest moves up, as with any retriever; a file of other queries stops it."""
    run, data = open_run(), data_of([[3], [0, 1]])
    lines = [f"q0 Q0 d{document} 1 {9 - place} t" for place, document in enumerate((3, 2, 5, 1))]
    lines += [f"q1 Q0 d{document} 1 {9 - place} t" for place, document in enumerate((6, 0, 4))]
    choice = Choice("run_file", path=str(written(tmp_path, *lines)))
    build(run, data, run.folder, choice)
    searcher, stamp = open_searcher(run, data, run.folder, choice), stamp_of(run, data, choice)
    stage = Stage(run, "candidates/given")
    counts = mine(stage, data, searcher, np.arange(2), stamp, top_k=3, needed=2, name="given")
    found = Candidates.load(run.folder.candidates("given"), stamp)
    assert (found.source, found.qids) == ("run_file", ["q0", "q1"])
    assert found.documents_QK.tolist() == [[2, 5, 1], [6, 4, -1]]
    assert found.scores_QK.tolist() == [[8.0, 7.0, 6.0], [9.0, 7.0, -np.inf]]
    assert (counts.queries, counts.removed_positives, counts.removed_answers) == (2, 2, 0)
    counts = mine(stage, data, searcher, np.arange(2), stamp, top_k=3, needed=3, name="given")
    assert counts.drawn_at_random == 1, "the file has no third one for q1"
    with pytest.raises(DataError, match="lacks 1 of 3 queries: 'q2'"):
        mine(stage, data_of([[3], [0], [1]]), searcher, np.arange(3), stamp, top_k=3, needed=1, name="given")


# --- ranks and scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["q1 Q0 d1 1 9 t", "q1 Q0 d2 2 8 t", "q2 Q0 d1 1 0.25 t", "q2 Q0 d2 2 0.5 t"],
            "1 queries whose ranks contradict their scores: 'q2' has score 0.25 at rank 1 and 0.5 at rank 2",
        ),
        (["q1 Q0 d1 1 9 t", "q1 Q0 d2 2 8 t", "q1 Q0 d3 2 7 t"], "1 queries with a rank twice: 'q1'"),
        (["q1 d1 1", "q1 d2 1", "q1 d3 2"], "1 queries with a rank twice: 'q1'"),
        (["q1 d1 1", "q1 d2 1"], "1 queries with a rank twice: 'q1'"),
        (["q1 Q0 d1 first 9 t"], "line 1 reads 'q1 Q0 d1 first 9 t'"),
    ],
)
def test_ranks_that_say_something_else_than_the_scores_are_refused(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    """Symptom: a file of distances, best first, was read from its end, and measured as a very bad retriever."""
    with pytest.raises(DataError, match=message):
        opened(written(tmp_path, *lines))


@pytest.mark.parametrize(
    "lines",
    [
        ["q1 Q0 d1 0 9 t", "q1 Q0 d2 0 8 t", "q2 Q0 d3 0 7 t"],
        ["q1 Q0 d2 3 8 t", "q1 Q0 d1 1 9 t", "q2 Q0 d3 1 7 t"],
        ["q1 Q0 d1 0 9 t", "q1 Q0 d2 1 9 t", "q2 Q0 d3 0 7 t"],
    ],
)
def test_ranks_that_say_nothing_or_the_same_are_taken(tmp_path: Path, lines: list[str]) -> None:
    """One number everywhere, as trec_eval ignores ranks; gaps and another order of lines; ranks of equal scores."""
    assert asked(opened(written(tmp_path, *lines)), 3, "q1", "q2")[0] == [[1, 2, -1], [3, -1, -1]]

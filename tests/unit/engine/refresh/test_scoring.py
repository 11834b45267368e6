"""Scoring: a teacher is asked once for each pair, whatever was interrupted, and says nothing of other pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config.timetable import Phase, Visit, WeightsOf
from engine.config.training import OptimConfig
from engine.data.batches import Samples
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.teacher_scores import TeacherScores
from engine.errors import ArtifactError
from engine.refresh import scoring
from engine.refresh.scoring import Pairs, ScoredPairs, score_candidates
from engine.run import Run, Stage
from shards.embeddings import Stamp
from shards.records import Query

Open = Callable[..., Run]
STAMP = Stamp("000", "a" * 64, "b" * 64)


class Teacher:
    """Scores document d of query q with 100 q + d / 8; notes what it is asked, and may die."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[list[str]] = []
        self._dies_after = dies_after

    def open(self, run: Run, data: Data, model: str, state: str) -> Teacher:
        return self

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        if len(self.asked) == self._dies_after:
            raise KeyboardInterrupt
        self.asked.append([query.id for query in queries])
        return [
            [100 * int(query.id[1:]) + document / 8 for document in own]
            for query, own in zip(queries, documents, strict=True)
        ]


def data_of(positives: Sequence[Sequence[int]]) -> Data:
    queries = [Query(f"q{row}", f"question {row}") for row in range(len(positives))]
    train = TrainingQueries(queries, [np.array(known, dtype=np.int64) for known in positives], {})
    shards = SimpleNamespace(manifest=SimpleNamespace(sha256=STAMP.corpus_sha256), num_documents=50)
    return Data(None, shards, {}, train)  # type: ignore[arg-type]


def candidates_of(*rows: Sequence[int], first: int = 0) -> Candidates:
    depth = max(map(len, rows))
    documents_QK = np.array([[*row, *[-1] * (depth - len(row))] for row in rows], dtype=np.int64)
    qids = [f"q{first + row}" for row in range(len(rows))]
    return Candidates("bm25", STAMP, qids, documents_QK, np.zeros(documents_QK.shape, np.float32), Counter())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """About two queries a block."""
    monkeypatch.setattr(scoring, "_PAIRS_A_BLOCK", 6)
    monkeypatch.setattr(scoring, "weights_sha256", lambda folder: STAMP.weights_sha256)


pytestmark = pytest.mark.usefixtures("small_blocks")


def scored(
    run: Run,
    pool: Candidates,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
    data: Data | None = None,
    visit: Visit | None = None,
) -> ScoredPairs:
    monkeypatch.setattr(scoring, "PairScorer", teacher)
    stage, weights = Stage(run, "scores"), WeightsOf("ranker", 0)
    return score_candidates(stage, data or DATA, pool, weights, "ranker-000", visit=visit)


def load(run: Run) -> TeacherScores:
    return TeacherScores.load(run.folder.teacher_scores("ranker-000"), STAMP)


def files_of(run: Run) -> dict[str, bytes]:
    folder = run.folder.teacher_scores("ranker-000")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


DATA = data_of([[7], [2, 40], [3], [4], [5]])
POOL = candidates_of([9, 1, 9], [8, 30], [1, 2], [2, 1], [3, 1])


def test_positives_and_candidates_are_scored_each_document_once(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run()
    counts = scored(run, POOL, Teacher(), monkeypatch)
    scores = load(run)
    assert {qid: scores.documents(qid).tolist() for qid in scores.qids} == {
        "q0": [1, 7, 9],
        "q1": [2, 8, 30, 40],
        "q2": [1, 2, 3],
        "q3": [1, 2, 4],
        "q4": [1, 3, 5],
    }
    assert counts == ScoredPairs(queries=5, pairs=16, positives=6)
    np.testing.assert_array_equal(scores.of("q3", np.array([4, 1, 9])), np.array([300.5, 300.125, np.nan], np.float32))
    assert (scores.source, scores.stamp) == ("ranker", STAMP)
    assert [path.name for path in run.folder.path.joinpath("teacher_scores").iterdir()] == ["ranker-000"]
    line = json.loads((run.folder.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["scores/pairs"] == 16.0


def test_an_interrupted_pass_goes_on_with_the_blocks_that_are_missing(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: hours of scoring that were killed near their end began anew."""
    first = Teacher()
    run = open_run()
    scored(run, POOL, first, monkeypatch)
    whole = files_of(run)
    assert first.asked == [["q0"], ["q1"], ["q2", "q3"], ["q4"]]
    run = open_run()
    for path in run.folder.teacher_scores("ranker-000").iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        scored(run, POOL, Teacher(dies_after=2), monkeypatch)
    with pytest.raises(ArtifactError, match="no finished teacher scores"):
        load(run)
    again = Teacher()
    scored(run, POOL, again, monkeypatch)
    assert again.asked == [["q2", "q3"], ["q4"]]
    assert files_of(run) == whole
    done = Teacher()
    scored(run, POOL, done, monkeypatch)
    assert done.asked == [], "what is there is not scored again"


def test_parts_and_scores_of_other_pairs_are_not_taken(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: after mining deeper, the new candidates had no scores, and the old ones passed for them."""
    run = open_run()
    with pytest.raises(KeyboardInterrupt):
        scored(run, POOL, Teacher(dies_after=2), monkeypatch)
    other = candidates_of([9, 1, 9], [8, 30], [1, 2], [2, 1], [3, 2])
    teacher = Teacher()
    scored(run, other, teacher, monkeypatch)
    assert sum(map(len, teacher.asked)) == 5
    assert load(run).documents("q4").tolist() == [2, 3, 5]
    scored(run, POOL, Teacher(), monkeypatch)
    assert load(run).documents("q4").tolist() == [1, 3, 5], "a finished one of other pairs is replaced"


def test_scores_of_other_weights_are_not_taken(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run()
    scored(run, POOL, Teacher(), monkeypatch)
    monkeypatch.setattr(scoring, "weights_sha256", lambda folder: "f" * 64)
    teacher = Teacher()
    scored(run, POOL, teacher, monkeypatch)
    assert sum(map(len, teacher.asked)) == 5
    with pytest.raises(ArtifactError, match="stale"):
        load(run)


def test_a_diverged_teacher_is_found_before_anything_is_published(
    open_run: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Diverged(Teacher):
        def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
            return [[float("nan")] * len(own) for own in documents]

    run = open_run()
    with pytest.raises(ArtifactError, match=r"document 1 for query 'q0' by ranker is nan, as are 2 more"):
        scored(run, POOL, Diverged(), monkeypatch)
    assert not run.folder.teacher_scores("ranker-000").exists()


def test_queries_that_were_not_searched_for_are_not_scored(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: where only the queries that are drawn were mined, scoring stopped at the first of the others."""
    run = open_run()
    scored(run, candidates_of([9], [8], first=2), Teacher(), monkeypatch)
    assert {qid: load(run).documents(qid).tolist() for qid in load(run).qids} == {"q2": [3, 9], "q3": [4, 8]}


def test_no_query_gives_scores_of_nothing(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run()
    scored(run, POOL, Teacher(), monkeypatch, data_of([]))
    assert (len(load(run)), load(run).num_pairs) == (0, 0)


def test_what_a_visit_draws_is_what_is_scored_for_it(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the steps draw has a score, and nothing else has."""
    phase = Phase("student", "", "retriever", 3, 2, 8, 1, OptimConfig(), ("joint",))
    run = open_run()
    samples = Samples(Visit(phase, 0), run.config.run.seed, DATA, POOL, 0, 1)
    drawn = {
        (group.query, document) for step in range(3) for group in samples.groups(step) for document in group.documents
    }
    run = open_run()
    scored(run, POOL, Teacher(), monkeypatch, visit=samples.visit)
    scores = load(run)
    assert {(int(qid[1:]), document) for qid in scores.qids for document in scores.documents(qid)} == drawn
    assert len(drawn) < 16


def test_pairs_are_told_apart_by_query_and_document() -> None:
    base = Pairs.of_pool(DATA, POOL)
    assert Pairs.of_pool(DATA, POOL).sha256 == base.sha256
    renamed = replace(DATA.train, queries=[replace(DATA.train.queries[0], id="x"), *DATA.train.queries[1:]])
    pool = replace(POOL, qids=["x", *POOL.qids[1:]])
    assert Pairs.of_pool(replace(DATA, train=renamed), pool).sha256 != base.sha256
    # The same numbers in a row, cut elsewhere.
    one, other = (
        Pairs.of_pool(data_of([[1], [3]]), candidates_of(*rows)) for rows in (([2, 1], [4, 5]), ([2, 3], [4, 5]))
    )
    assert one.sha256 != other.sha256

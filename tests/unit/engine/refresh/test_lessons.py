"""What a student is trained on: scores of the run's ranker, or of files that somebody else wrote."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config.distillation import DistillationConfig
from engine.config.timetable import Phase, WeightsOf
from engine.config.training import OptimConfig
from engine.data import scored_files
from engine.data.batches import Samples
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.scored_files import import_scores, require_readable, scores_stamp
from engine.data.teacher_scores import TeacherScores, scores_of_queries
from engine.errors import ArtifactError, ConfigError, DataError
from engine.objectives.distillation import require_scores
from engine.refresh import lessons, scoring
from engine.refresh.lessons import Lessons, lessons_of, read_lessons
from engine.run import Run
from shards.embeddings import Stamp
from shards.records import Document, Query

Open = Callable[..., Run]
CORPUS = "b" * 64
TITLES = ["One", "", "Three", "", "", ""]
TEXTS = ["first", "second", "third", "same", "same", "last"]
PHASE = Phase("student", "", "student", 4, 2, 2, 2, OptimConfig(), ("joint",))
TEACHER = WeightsOf("ranker", 1)


class Docids(list[str]):
    def index_of(self, docid: str) -> int | None:
        return self.index(docid) if docid in self else None


def data_of(num_queries: int = 3) -> Data:
    """Query i asks for document i; documents 3 and 4 have one text."""
    queries = [Query(f"q{row}", f"question {row}") for row in range(num_queries)]
    positives = [np.array([row], dtype=np.int64) for row in range(num_queries)]
    train = TrainingQueries(queries, positives, {"student": [[row] for row in range(num_queries)]})
    shards = SimpleNamespace(
        manifest=SimpleNamespace(sha256=CORPUS),
        num_documents=len(TEXTS),
        docids=Docids(f"d{index}" for index in range(len(TEXTS))),
        document=lambda index: Document(f"d{index}", TITLES[index], TEXTS[index]),
    )
    return Data(None, shards, {}, train)  # type: ignore[arg-type]


def written(path: Path, records: Sequence[dict[str, Any]], name: str = "scores.jsonl") -> DistillationConfig:
    (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return DistillationConfig(scores=path / name)


def imported(settings: DistillationConfig, data: Data | None = None) -> TeacherScores:
    return import_scores(data or data_of(), settings, scores_stamp(settings, CORPUS))


def found_in(scores: TeacherScores) -> dict[str, dict[int, float]]:
    return {
        qid: {document: round(float(scores.of(qid, np.array([document]))[0]), 5) for document in own.tolist()}
        for qid in scores.qids
        for own in [scores.documents(qid)]
    }


def by_id(qid: str, **scores: float) -> dict[str, Any]:
    return {"query_id": qid, "document_ids": list(scores), "scores": list(scores.values())}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_scores_by_id_are_those_of_the_file(tmp_path: Path) -> None:
    scores = imported(written(tmp_path, [by_id("q2", d2=8.5, d0=-3.0), by_id("q0", d5=1.25, d0=9.0)]))
    assert found_in(scores) == {"q0": {0: 9.0, 5: 1.25}, "q2": {0: -3.0, 2: 8.5}}
    assert (scores.source, scores.counts, scores.margins_only) == ("scores.jsonl", Counter(), False)
    assert scores.scores_P.dtype == np.float32


def test_what_does_not_belong_to_the_data_is_left_out_and_counted(tmp_path: Path) -> None:
    records = [
        by_id("q0", d0=9.0, d9=2.0, x=3.0),
        by_id("other", d0=9.0),
        by_id("q0", d0=9.0, d1=4.0),
        by_id("q0", d1=5.0, d2=-1.0),
    ]
    scores = imported(written(tmp_path, records))
    assert found_in(scores) == {"q0": {0: 9.0, 1: 4.0, 2: -1.0}}, "the first score of a pair stays"
    assert scores.counts == {
        "records of queries that are not trained on": 1,
        "scores of documents that the corpus lacks": 2,
        "pairs scored again": 1,
        "pairs scored again with another score": 1,
    }


def test_texts_are_looked_up_exactly_with_or_without_title(tmp_path: Path) -> None:
    record = {
        "query": "question 0",
        "pos": ["One first"],
        "neg": ["third", "Second", "same"],
        "pos_scores": [7.0],
        "neg_scores": [1.5, 0.0, -2.0],
    }
    scores = imported(written(tmp_path, [record, record | {"query": "Question 0"}]))
    assert found_in(scores) == {"q0": {0: 7.0, 2: 1.5, 3: -2.0, 4: -2.0}}, "a text of two documents stands for both"
    assert scores.counts == {
        "records of queries that are not trained on": 1,
        "scores of documents that the corpus lacks": 1,
    }


def test_a_text_with_the_hash_of_another_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_files, "_hash", lambda text: 7)
    record = {"query": "question 0", "documents": ["first", "last", "none"], "scores": [7.0, -1.0, 3.0]}
    assert found_in(imported(written(tmp_path, [record]))) == {"q0": {0: 7.0, 5: -1.0}}


def test_ids_of_tables_of_texts_are_not_taken_for_the_corpus_ids(tmp_path: Path) -> None:
    """Symptom: the ids of a published data set count from 0 as the corpus's do, and name other documents."""
    for name, rows in {
        "train": [{"query_id": "q1", "document_ids": ["d0", "d1", "d2"], "scores": [6.0, -4.0, 2.0]}],
        "queries": [{"query_id": "q1", "text": "question 2"}],
        "documents": [
            {"document_id": "d0", "text": "third"},
            {"document_id": "d1", "text": "unknown"},
            {"document_id": "d2", "text": "last"},
        ],
    }.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "0.parquet")
    scores = imported(DistillationConfig(scores=tmp_path))
    assert found_in(scores) == {"q2": {2: 6.0, 5: 2.0}}
    assert scores.counts == {"scores of documents that the corpus lacks": 1}


def test_margins_are_known_up_to_a_constant_and_against_one_positive(tmp_path: Path) -> None:
    base = {"query": "question 0", "positive": "first"}
    records = [
        base | {"negative": "third", "label": 5.5},
        base | {"negative": "last", "label": -1.5},
        base | {"negative": "second", "positive": "third", "label": 9.0},
        base | {"negative": "second", "positive": "unknown", "label": 9.0},
    ]
    scores = imported(written(tmp_path, records))
    assert scores.margins_only
    assert found_in(scores) == {"q0": {0: 0.0, 2: -5.5, 5: 1.5}}
    assert scores.counts == {
        "margins whose positive the corpus lacks": 1,
        "margins against another positive of the query": 1,
        "pairs scored again": 1,
    }
    with pytest.raises(DataError, match="line 2 has scores, the records before it margins"):
        imported(written(tmp_path, [records[0], base | {"negatives": [], "scores": [3.0]}]))


def test_a_file_of_other_data_is_refused_with_what_was_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no score of .* belongs to the 3 .* \(1 records of queries that are not"):
        imported(written(tmp_path, [by_id("7", d0=9.0)]))


# --- sigmoids --------------------------------------------------------------------------------------------------------


PROBABILITIES = [by_id("q0", d0=0.98, d1=0.0, d2=0.5), by_id("q1", d1=1.0)]


def test_scores_of_a_sigmoid_are_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    """Symptom: a teacher behind a sigmoid, whose softmax over ten documents is flat: the student learns nothing."""
    settings = written(tmp_path, PROBABILITIES)
    with pytest.raises(DataError, match=r"scores.jsonl lie within 0 and 1, as those of a sigmoid.*scores_are to prob"):
        imported(settings)
    assert found_in(imported(written(tmp_path, [*PROBABILITIES, by_id("q1", d2=1.01)])))["q0"][0] == 0.98
    assert found_in(imported(written(tmp_path, [*PROBABILITIES, by_id("q1", d2=-0.01)])))["q0"][0] == 0.98
    as_they_are = imported(replace_settings(settings, scores_are="logits"))
    assert found_in(as_they_are)["q0"] == {0: 0.98, 1: 0.0, 2: 0.5}


def test_probabilities_are_turned_back_and_the_clipped_ones_counted(tmp_path: Path) -> None:
    settings = replace_settings(written(tmp_path, PROBABILITIES), scores_are="probabilities")
    scores = imported(settings)
    largest = round(float(np.log((1 - 1e-6) / 1e-6)), 5)
    assert found_in(scores) == {
        "q0": {0: round(float(np.log(0.98 / 0.02)), 5), 1: -largest, 2: 0.0},
        "q1": {1: largest},
    }
    assert scores.counts == {"probabilities clipped to 1e-06 from 0 or 1": 2}
    with pytest.raises(DataError, match=r"has scores from 0 to 1.5; scores_are says probabilities"):
        imported(replace_settings(written(tmp_path, [by_id("q0", d0=1.5, d1=0.0)]), scores_are="probabilities"))


def test_margins_of_a_sigmoid_are_refused_and_cannot_be_turned_back(tmp_path: Path) -> None:
    record = {"query": "question 0", "positive": "first", "negative": "third", "label": 0.97}
    settings = written(tmp_path, [record])
    with pytest.raises(DataError, match=r"all margins of .* lie within -0.97 and 0") as caught:
        imported(settings)
    assert "probabilities" not in str(caught.value)
    with pytest.raises(DataError, match="score the pairs by the ranker itself"):
        imported(replace_settings(settings, scores_are="probabilities"))
    assert imported(written(tmp_path, [record | {"label": 1.5}])).margins_only


def replace_settings(settings: DistillationConfig, **values: Any) -> DistillationConfig:
    return DistillationConfig(**(settings.model_dump() | values))


# --- lessons ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> Run:
    found: Run = open_run()
    monkeypatch.setattr(type(found), "timetable", SimpleNamespace(phase=lambda name: PHASE))
    return found


def lessons_from(run: Run, settings: DistillationConfig, data: Data | None = None) -> Lessons:
    return lessons_of(run, data or data_of(), None, TEACHER, settings, phase="student")  # type: ignore[arg-type]


ENOUGH = [by_id("q0", d0=9.0, d1=4.0, d2=-1.0, d5=6.0), by_id("q2", d2=5.0, d3=1.5, d4=2.5)]


def test_a_file_gives_queries_positives_negatives_and_scores(run: Run, tmp_path: Path) -> None:
    """What is drawn is what is scored: no step finds a document without a score."""
    settings = written(tmp_path, [*ENOUGH, by_id("q1", d1=2.0, d2=1.0)])
    found = lessons_from(run, settings)
    assert [query.id for query in found.data.train.queries] == ["q0", "q2"]
    assert found.data.train.tokens == {"student": [[0], [2]]}
    assert {qid: found.candidates.row(qid).tolist() for qid in ("q0", "q2")} == {"q0": [5, 1, 2], "q2": [4, 3]}
    samples = Samples(PHASE.visits[0], 1, found.data, found.candidates, 0, 1)
    require_scores(samples, found.scores)
    result = run.result_of("scores/from-files", lessons.ReadScores)
    assert result is not None
    assert (result.queries, result.pairs) == (2, 9)
    assert result.left_out == {"queries with fewer than 2 scored negatives": 1}


def test_positives_without_a_score_are_not_trained_on(run: Run, tmp_path: Path) -> None:
    data = data_of()
    positives = [np.array([0, 3]), np.array([1]), np.array([4])]
    data = replace(data, train=replace(data.train, positives=positives))
    found = lessons_from(run, written(tmp_path, ENOUGH), data)
    assert [query.id for query in found.data.train.queries] == ["q0", "q2"]
    assert [own.tolist() for own in found.data.train.positives] == [[0], [4]]
    assert found.candidates.row("q2").tolist() == [2, 3]
    left = run.result_of("scores/from-files", lessons.ReadScores)
    assert left is not None
    assert left.left_out == {"queries without any score": 1}


def test_a_file_that_teaches_no_query_is_refused(run: Run, tmp_path: Path) -> None:
    settings = written(tmp_path, [by_id("q0", d1=4.0, d2=-1.0), by_id("q1", d1=3.0, d2=9.0)])
    with pytest.raises(DataError, match=r"teach none of the 3 training queries.*lower num_negatives") as caught:
        lessons_from(run, settings)
    for count in ("1 queries without any", "1 queries without a scored positive", "1 queries with fewer than 2"):
        assert count in str(caught.value)


def test_files_are_read_before_anything_is_trained(run: Run, tmp_path: Path) -> None:
    """Symptom: retrievers and ranker were trained, and then the file was found to teach the student nothing."""
    read_lessons(run, data_of(), DistillationConfig(), phase="student")  # the ranker's scores are not known yet
    settings = written(tmp_path, ENOUGH)
    read_lessons(run, data_of(), settings, phase="student")
    assert run.is_finished("scores/from-files")
    assert lessons_from(run, settings).scores.num_pairs == 7
    with pytest.raises(DataError, match="teach none of the 3 training queries"):
        read_lessons(run, data_of(), written(tmp_path, [by_id("q0", d1=4.0, d2=-1.0)]), phase="student")
    margins = {"query": "question 0", "positive": "One first", "negatives": ["third", "same"], "score": [9.0, 12.0]}
    told = written(tmp_path, [margins]).model_copy(update={"loss": "mse"})
    with pytest.raises(ConfigError, match=r"are margins .* loss mse"):
        read_lessons(run, data_of(), told, phase="student")


def test_paths_without_scores_are_refused_before_any_work(tmp_path: Path) -> None:
    require_readable(DistillationConfig())
    require_readable(written(tmp_path, ENOUGH))
    (tmp_path / "scores.pkl").write_bytes(b"")
    written(tmp_path, [{"question": "who?"}], "other.jsonl")
    for name, told in (
        ("none.jsonl", "there is no file"),
        ("scores.pkl", "is a pickle"),
        ("other.jsonl", "the fields"),
    ):
        with pytest.raises(DataError, match=told):
            require_readable(DistillationConfig(scores=tmp_path / name))


def test_files_that_changed_are_read_again_and_others_are_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: a corrected file of scores, and the student still trained on the old one."""
    settings, reads = written(tmp_path, ENOUGH), []
    read = lessons.import_scores
    monkeypatch.setattr(lessons, "import_scores", lambda *given: reads.append(1) or read(*given))
    assert lessons_from(run, settings).scores.of("q0", np.array([1])) == 4.0
    lessons_from(run, settings)
    assert len(reads) == 1
    written(tmp_path, [by_id("q0", d0=9.0, d1=-8.0, d2=-1.0), ENOUGH[1]])
    assert lessons_from(run, settings).scores.of("q0", np.array([1])) == -8.0
    assert len(reads) == 2


def test_scores_of_another_run_are_read_where_they_lie(run: Run, tmp_path: Path) -> None:
    pairs = [("q1", np.array([1, 2, 3]), np.array([5.0, 2.0, -2.0], dtype=np.float32))]
    folder = tmp_path / "other" / "ranker-001"
    for corpus in ("f" * 64, CORPUS):
        scores_of_queries("ranker", Stamp("001", "a" * 64, corpus), pairs).save(folder)
        settings = DistillationConfig(scores=folder)
        if corpus != CORPUS:
            with pytest.raises(ArtifactError, match=r"are of corpus ffffffffffff.*leave the path of scores out"):
                lessons_from(run, settings)
    found = lessons_from(run, settings)
    assert [query.id for query in found.data.train.queries] == ["q1"]
    assert found.candidates.row("q1").tolist() == [2, 3]
    assert found.scores.stamp == Stamp("001", "a" * 64, CORPUS)
    assert not run.folder.teacher_scores("from-files").exists()


def test_without_a_file_the_runs_ranker_is_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    documents_QK = np.array([[1, 2, 5], [0, 2, 3], [0, 1, 5]])
    pool = Candidates(
        "joint", Stamp("", "", ""), ["q0", "q1", "q2"], documents_QK, np.zeros((3, 3), np.float32), Counter()
    )

    def score(queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[float(document) for document in own] for own in documents]

    monkeypatch.setattr(scoring, "weights_sha256", lambda folder: folder.name * 10)
    monkeypatch.setattr(scoring, "PairScorer", SimpleNamespace(open=lambda *_: SimpleNamespace(score=score)))
    data = data_of()
    found = lessons_of(run, data, pool, TEACHER, DistillationConfig(), phase="student")
    assert (found.data, found.candidates) == (data, pool)
    assert (found.scores.num_pairs, found.scores.stamp.weights_sha256) == (12, "001" * 10)
    assert run.is_finished("scores/ranker-001")
    shutil.rmtree(run.folder.teacher_scores("ranker-001"))
    assert lessons_of(run, data, pool, TEACHER, DistillationConfig(), phase="student").scores.num_pairs == 12
    one_step = replace(PHASE, steps=1, batch_size=1)
    monkeypatch.setattr(type(run), "timetable", SimpleNamespace(phase=lambda name: one_step))
    run.forget(["scores/ranker-001"])
    drawn = lessons_of(run, data, pool, TEACHER, DistillationConfig(score="drawn"), phase="student")
    assert drawn.scores.num_pairs == 3, "a positive and two negatives"
    require_scores(Samples(one_step.visits[0], run.config.run.seed, data, pool, 0, 1), drawn.scores)

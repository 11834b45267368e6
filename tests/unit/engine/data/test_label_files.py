"""Files of labels are read whole, and refused with the line where they do not fit the data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.ar2 import Ar2Config, WarmupRankerConfig, WarmupRetrieverConfig, ar2_timetable
from engine.config.timetable import Timetable
from engine.data.corpus import Data, TrainingQueries
from engine.data.label_files import (
    LabelFiles,
    Labels,
    read_additions,
    read_relabels,
    require_label_files,
    require_same_labels,
    with_labels,
)
from engine.errors import ArtifactError, DataError
from engine.run import Run
from shards.records import Dataset, Query

INDEX = {f"d{number}": number for number in range(20)}
DATASET = Dataset(
    path=Path("data"),
    format="beir",
    queries={qid: Query(qid, "text") for qid in ("q0", "q1", "dev0")},
    qrels={"train": {"q0": {"d1": 1}, "q1": {"d2": 1, "d3": 1}}, "dev": {"dev0": {"d4": 1}}},
    dropped=Counter(),
    fingerprint="f",
    num_documents=20,
    read_documents=lambda: iter(()),
)


def file_of(tmp_path: Path, text: str) -> Path:
    (tmp_path / "labels.tsv").write_text(text, encoding="utf-8")
    return tmp_path / "labels.tsv"


@pytest.mark.parametrize(
    "text", ["q0\td5\nq0\td6\nq1\td5\n", "q0 0 d5 1\nq0 0 d9 0\nq0 0 d6 3\nq1 Q0 d5 1\nq0 0 d5 1\n"]
)
def test_additions_have_two_columns_or_those_of_qrels(tmp_path: Path, text: str) -> None:
    found = read_additions(file_of(tmp_path, text), DATASET, INDEX.get)
    assert found == Labels({}, {"q0": [5, 6], "q1": [5]}), "a grade of 0 says nothing"


def test_relabels_say_what_a_document_becomes(tmp_path: Path) -> None:
    path = file_of(tmp_path, "q0\td5\tpositive\n\nq1\td2\tout\nq0\td5\tpositive\ndev0 d1 out\n")
    assert read_relabels(path, DATASET, INDEX.get) == Labels({"q0": [5]}, {"q1": [2]}, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q0\td5\nq7\td6\n", r"names 1 queries that the data do not have: 'q7' in line 2"),
        ("q0\td5\nq0\tx\nq1\ty\n", r"names 2 documents that the data do not have: 'x' in line 2, 'y' in line 3"),
        ("q0\td5\td6\n", r"line 1 reads .*Expected: two columns \(query, document\) or four"),
        ("q0 0 d5 relevant\n", r"line 1 reads 'q0 0 d5 relevant'"),
    ],
)
def test_additions_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """Symptom guarded against: the file of another corpus filters nothing, and nobody notices."""
    with pytest.raises(DataError, match=message + r".*Remedy: "):
        read_additions(file_of(tmp_path, text), DATASET, INDEX.get)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q0\td5\tnegative\n", "line 1 reads .*one of positive, out"),
        ("q0\td5\n", "line 1 reads"),
        ("q0\td5\tout\nq0\td5\tpositive\n", "document 'd5' of query 'q0' 'out' in line 1 and 'positive' in line 2"),
        ("q9\td5\tout\n", "'q9' in line 1"),
    ],
)
def test_relabels_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message + r".*Remedy: "):
        read_relabels(file_of(tmp_path, text), DATASET, INDEX.get)
    with pytest.raises(DataError, match="missing"):
        read_relabels(tmp_path / "missing.tsv", DATASET, INDEX.get)


def table_of(tmp_path: Path, *filters: dict[str, str], **game: Any) -> Timetable:
    negatives = {"filters": list(filters)}
    return ar2_timetable(
        Ar2Config.model_validate({"negatives": negatives, "iterations": 1} | game),
        WarmupRetrieverConfig(),
        WarmupRankerConfig(),
    )


def test_files_are_looked_for_before_any_work(tmp_path: Path) -> None:
    """Symptom guarded against: a run trains for hours, and then finds that a file is missing or of other queries."""
    additions = {"name": "additions", "file": str(file_of(tmp_path, "q0\td5\n"))}
    require_label_files(table_of(tmp_path, additions), DATASET)
    for missing in (
        table_of(tmp_path, {"name": "relabels", "file": str(tmp_path / "none.tsv")}),
        table_of(tmp_path, further_retrievers=["none.trec"]),
        table_of(tmp_path, negatives={"filters": [{"name": "redistributed"}], "teacher_scores": str(tmp_path)}),
    ):
        with pytest.raises(DataError, match=r"none\.tsv|none\.trec does not exist|holds no teacher scores"):
            require_label_files(missing, DATASET)
    file_of(tmp_path, "q8\td5\n")
    with pytest.raises(DataError, match="'q8' in line 1"):
        require_label_files(table_of(tmp_path, additions), DATASET)


def test_relabels_that_leave_no_positive_are_refused_before_any_work(tmp_path: Path) -> None:
    """Symptom: the corpus was tokenised, and then a query could not be trained on."""
    out, more = tmp_path / "out.tsv", tmp_path / "more.tsv"
    out.write_text("q1\td2\tout\nq1\td3\tout\ndev0\td4\tout\n")
    more.write_text("q1\td9\tpositive\n")
    first, second = ({"name": "relabels", "file": str(path)} for path in (more, out))
    with pytest.raises(DataError, match=r"query 'q1' has no positive left after 2 of its documents are taken out"):
        require_label_files(table_of(tmp_path, second), DATASET)
    require_label_files(table_of(tmp_path, first, second), DATASET)


def test_labels_of_a_recipe_change_what_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards: Any = SimpleNamespace(docids=SimpleNamespace(index_of=INDEX.get))
    train = TrainingQueries([DATASET.queries["q0"], DATASET.queries["q1"]], [np.array([1]), np.array([2, 3])], {})
    data = Data(DATASET, shards, {}, train)
    relabels = {"name": "relabels", "file": str(file_of(tmp_path, "q0\td5\tpositive\nq1\td2\tout\ndev0\td1\tout\n"))}
    with caplog.at_level(logging.INFO):
        changed = with_labels(data, table_of(tmp_path, relabels))
    assert [row.tolist() for row in changed.train.positives] == [[1, 5], [3]]
    assert (
        "1 documents become positives, 1 are taken out, 1 lines are about queries that are not trained on"
        in caplog.text
    )
    assert with_labels(data, table_of(tmp_path)) is data
    file_of(tmp_path, "q0\tx\tout\n")
    with pytest.raises(DataError, match="names 1 documents that the data do not have: 'x' in line 1"):
        with_labels(data, table_of(tmp_path, relabels))


def test_a_run_goes_on_with_the_labels_it_began_with(open_run: Callable[..., Run], tmp_path: Path) -> None:
    path = file_of(tmp_path, "q0\td5\tpositive\n")
    words = f"ar2.negatives.filters=[{{name: relabels, file: {path}}}]"
    require_same_labels(open_run(words))
    run = open_run(words)
    require_same_labels(run)
    assert list(run.result_of("labels", LabelFiles).sha256) == [str(path)]  # type: ignore[union-attr]
    file_of(tmp_path, "q0\td6\tpositive\n")
    with pytest.raises(ArtifactError, match=r"labels\.tsv changed since the run began"):
        require_same_labels(open_run(words))


def test_a_run_without_files_of_labels_records_none(open_run: Callable[..., Run]) -> None:
    run = open_run()
    require_same_labels(run)
    assert not run.is_finished("labels"), "the plain recipe has the stages that it always had"


def test_relabelled_documents_are_trained_on_or_left_alone() -> None:
    queries = [Query("q0", "a"), Query("q1", "b"), Query("q2", "c")]
    positives = [np.array([1]), np.array([2, 3]), np.array([4])]
    train = TrainingQueries(queries, positives, {}, [np.array([9]), np.array([9]), np.array([], dtype=np.int64)])
    changed = train.relabelled({"q0": [5, 1]}, {"q1": [3, 8]})
    assert [row.tolist() for row in changed.positives] == [[1, 5], [2], [4]]
    assert changed.known(0) == {9: "false_negatives", 1: "positives", 5: "positives"}
    assert changed.known(1) == {3: "false_negatives", 8: "false_negatives", 9: "false_negatives", 2: "positives"}
    assert train.positives[1].tolist() == [2, 3]
    with pytest.raises(DataError, match="query 'q2' has no positive left after 1 of its documents"):
        train.relabelled({}, {"q2": [4]})
    swapped = TrainingQueries(queries, positives, {}).relabelled({"q2": [6]}, {"q2": [4]})
    assert swapped.positives[2].tolist() == [6]

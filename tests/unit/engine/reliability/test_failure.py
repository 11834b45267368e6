"""The first failure of a start is recorded once; all others learn which it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.reliability.failure import Failure, last_failure, read_failure, record_failure


def record(folder: Path, rank: int, attempt: str = "a", code: int = 1) -> Failure | None:
    message = f"rank {rank} has failed"
    return record_failure(
        folder, attempt=attempt, rank=rank, stage="ranker/1", step=3, kind="E", message=message, code=code
    )


def test_the_first_is_recorded_and_the_others_get_it(tmp_path: Path) -> None:
    assert record(tmp_path, 2, code=75) is None
    first = record(tmp_path, 0)
    assert first is not None
    assert (first.rank, first.code, first.stage, first.step) == (2, 75, "ranker/1", 3)
    assert read_failure(tmp_path, "a") == first == last_failure(tmp_path)


def test_of_many_at_once_one_is_the_first(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda rank: record(tmp_path, rank), range(32)))
    assert answers.count(None) == 1
    winner = answers.index(None)
    assert {answer.rank for answer in answers if answer is not None} == {winner}
    assert [path.name for path in (tmp_path / "errors").iterdir()] == ["a.json"]


def test_the_newest_start_that_failed_is_the_last_error(tmp_path: Path) -> None:
    record(tmp_path, 1, "first")
    record(tmp_path, 0, "second")
    assert read_failure(tmp_path, "first") is not None
    found = last_failure(tmp_path)
    assert found is not None
    assert (found.attempt, found.rank) == ("second", 0)


def test_a_start_without_a_failure_has_none(tmp_path: Path) -> None:
    assert read_failure(tmp_path, "a") is None
    (tmp_path / "last_error.json").write_text("{")
    assert last_failure(tmp_path) is None

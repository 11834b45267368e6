"""Repeated and unknown ids are found exactly, in memory that does not grow with their number."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from shards.convert import appended, ids
from shards.convert.conversion import convert
from shards.convert.ids import IdLog, first_like, flag_repeated, flag_unknown, place_of, read_flags
from shards.convert.options import Options
from shards.convert.regroup import RawTraining, regroup


def log_of(path: Path, identifiers: list[str]) -> Path:
    log = IdLog(path)
    for line, identifier in enumerate(identifiers, 1):
        log.add(identifier, 3, line)
    log.file.flush()
    log.file.close()
    return path


@pytest.fixture(params=[(1 << 16, 1 << 16), (8, 5), (1, 1)])
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real sizes, and such that every id lies in another bucket and block than its like."""
    monkeypatch.setattr(ids, "_BUCKET_ENTRIES", request.param[0])
    monkeypatch.setattr(ids, "_BLOCK_ENTRIES", request.param[1])


@pytest.mark.usefixtures("_sizes")
def test_flags_are_those_of_a_set(tmp_path: Path) -> None:
    drawn = random.Random(0)
    known = [str(drawn.randrange(300)) for _ in range(400)]
    asked = [str(drawn.randrange(600)) for _ in range(500)]
    log, other, flags = log_of(tmp_path / "known", known), log_of(tmp_path / "asked", asked), tmp_path / "flags"
    repeated = [identifier in known[:place] for place, identifier in enumerate(known)]
    assert flag_repeated(log, flags) == sum(repeated)
    assert list(read_flags(flags)) == repeated
    unknown = [identifier not in known for identifier in asked]
    assert flag_unknown(other, log, flags) == sum(unknown)
    assert list(read_flags(flags)) == unknown
    place = repeated.index(True)
    assert first_like(log, place) == known.index(known[place])
    assert place_of(log, place) == (3, place + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked", "flags", "known"]


@pytest.mark.usefixtures("_sizes")
def test_empty_logs_mark_nothing_or_everything(tmp_path: Path) -> None:
    empty, some, flags = log_of(tmp_path / "empty", []), log_of(tmp_path / "some", ["a", "b"]), tmp_path / "flags"
    assert flag_repeated(empty, flags) == 0 == flag_unknown(empty, some, flags)
    assert list(read_flags(flags)) == []
    assert flag_unknown(some, empty, flags) == 2


def peak_of(tmp_path: Path, number: int) -> int:
    log = log_of(tmp_path / f"log{number}", [str(place) for place in range(number)])
    tracemalloc.start()
    assert flag_repeated(log, tmp_path / "flags") == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_four_times_the_ids_take_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_BUCKET_ENTRIES", 1 << 11)
    monkeypatch.setattr(ids, "_BLOCK_ENTRIES", 1 << 12)
    assert peak_of(tmp_path, 80_000) < 1.2 * peak_of(tmp_path, 20_000)


def peak_of_conversion(folder: Path, number: int) -> int:
    folder.mkdir()
    with open(folder / "collection.tsv", "w") as file:
        file.writelines(f"{docid}\t{'word ' * 40}\n" for docid in range(number))
    tracemalloc.start()
    assert convert([folder], folder / "out", Options()).description.num_documents == number
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_four_times_the_documents_take_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as a set of the ids' hashes would be 1 GB for 21 million passages; here it would be 2 MB."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(ids, "_BUCKET_ENTRIES", 1 << 11)
    monkeypatch.setattr(ids, "_BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr(appended, "BUFFER_BYTES", 1 << 16)
    convert_peak = peak_of_conversion(tmp_path / "small", 8_000)
    assert peak_of_conversion(tmp_path / "large", 32_000) < convert_peak + 200_000


@pytest.mark.parametrize("size", [1, 40 << 20])
def test_records_of_a_query_are_joined_whatever_bucket_they_are_in(tmp_path: Path, size: int) -> None:
    qrels = tmp_path / "train.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\tp\t1\nq1\tz\t0\nq2\ta\t1\n")
    records = [
        RawTraining("q1", [], ["a", "p"], [2.5, 9.0], [["bm25"], ["bm25"]], had_positives=False),
        RawTraining("q2", ["b"], ["c"], [None], [[]], had_positives=True),
        RawTraining("q3", [], ["a"], [None], [["x"]], had_positives=True),
        RawTraining("q1", [], ["z", "a"], [None, 7.0], [["ance"], ["ance"]], had_positives=False),
    ]
    kept, dropped = regroup(records, qrels, tmp_path / "out.jsonl", size=size)
    lines = sorted((tmp_path / "out.jsonl").read_text().splitlines())
    assert lines == [
        '{"query_id": "q1", "positive_ids": ["p"], "negative_ids": ["a", "z"], "scores": [2.5, null], '
        '"sources": [["bm25", "ance"], ["ance"]]}',
        '{"query_id": "q2", "positive_ids": ["b"], "negative_ids": ["c"]}',
    ]
    assert kept == 2
    assert dropped == {"negative that is judged relevant": 1, "training record without a positive": 1}

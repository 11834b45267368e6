"""A corpus is gone through once: a later start, and every other rank, takes the outcome, unless a file has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import shards.formats
from shards.convert.conversion import convert
from shards.convert.options import Options
from shards.errors import DataError
from shards.formats import beir, open_dataset
from shards.formats.seen import record_check, recorded_check
from shards.records import Checked, Document, Query

DOCUMENTS = [Document("d1", "", "one"), Document("d2", "", "two"), Document("d3", "", "")]
QRELS = {"train": {"q1": {"d1": 1}}, "dev": {"q2": {"d2": 1}}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    beir.write_folder(tmp_path / "data", DOCUMENTS, [Query("q1", "one?"), Query("q2", "two?")], QRELS, {})
    return tmp_path / "data"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were gone through or hashed."""
    made: list[str] = []

    def noting(module: str, function: Callable[[Path], object]) -> None:
        monkeypatch.setattr(module, lambda path: (made.append(path.name), function(path))[1])

    noting("shards.formats.sha256_file", shards.formats.sha256_file)
    noting("shards.formats.canonical.sha256_file", shards.formats.sha256_file)
    noting("shards.formats.beir.read_corpus", beir.read_corpus)
    return made


def checked_once(data: Path, record: Path) -> Checked:
    record_check(record, open_dataset(data))
    found = recorded_check(record, data)
    assert found is not None
    return found


def test_a_later_start_does_not_read_the_corpus(data: Path, tmp_path: Path, passes: list[str]) -> None:
    """Symptom: each start of a run read and hashed 13 GB before its first step, also where it went on with one."""
    known = checked_once(data, tmp_path / "check.json")
    first = open_dataset(data)
    assert passes.count("corpus.jsonl") == 4, "read and hashed, twice"
    passes.clear()
    again = open_dataset(data, checked=known)
    assert passes == []
    assert (again.queries, again.qrels, again.fingerprint) == (first.queries, first.qrels, first.fingerprint)
    assert (again.num_documents, again.format, again.checked) == (2, "beir", known)
    assert again.dropped == {"document without text": 1}, "what the check left out is still told"
    assert list(again.documents()) == list(first.documents())


def test_of_a_converted_folder_nothing_is_hashed_again(data: Path, tmp_path: Path, passes: list[str]) -> None:
    whole = tmp_path / "whole"
    beir.write_folder(whole, DOCUMENTS[:2], [Query("q1", "one?"), Query("q2", "two?")], QRELS, {})
    report = convert([whole], tmp_path / "converted", Options())
    known = checked_once(report.path, tmp_path / "check.json")
    assert "queries.jsonl" in passes
    passes.clear()
    again = open_dataset(report.path, checked=known)
    assert passes == []
    assert (again.fingerprint, again.num_documents) == (known.fingerprint, 2)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"])
@pytest.mark.parametrize("change", ["longer", "newer", "replaced", "gone"])
def test_a_file_that_changed_is_checked_again(data: Path, tmp_path: Path, name: str, change: str) -> None:
    record, file = tmp_path / "check.json", data / name
    checked_once(data, record)
    stat = file.stat()
    if change == "longer":
        with file.open("a") as grown:
            grown.write("\n")
    elif change == "newer":
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "replaced":  # by one of the same size and the same time, as `cp -p` leaves it
        shutil.copy2(file, tmp_path / "copy")
        os.replace(tmp_path / "copy", file)
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    else:
        file.unlink()
    assert recorded_check(record, data) is None


def test_a_file_that_came_is_checked_too(data: Path, tmp_path: Path, passes: list[str]) -> None:
    known = checked_once(data, tmp_path / "check.json")
    passes.clear()
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    dataset = open_dataset(data, checked=known)
    assert "corpus.jsonl" in passes
    assert dataset.fingerprint != known.fingerprint
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tnobody\t1\n")
    with pytest.raises(DataError, match=r"test.tsv line 2 judges document 'nobody', which is not in"):
        open_dataset(data, checked=known)


@pytest.mark.parametrize("content", ["", "{", '{"fingerprint": 3}', '{"fingerprint": "a", "num_documents": 2}'])
def test_a_record_that_says_nothing_of_files_is_none(data: Path, tmp_path: Path, content: str) -> None:
    assert recorded_check(tmp_path / "check.json", data) is None
    (tmp_path / "check.json").write_text(content)
    assert recorded_check(tmp_path / "check.json", data) is None


def test_another_hosts_copy_of_another_size_is_refused(data: Path, tmp_path: Path) -> None:
    known = checked_once(data, tmp_path / "check.json")
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    assert open_dataset(copy, checked=known).num_documents == 2, "times differ, which a copy's do"
    with (copy / "corpus.jsonl").open("a") as grown:
        grown.write("\n")
    with pytest.raises(DataError, match=r"corpus.jsonl has \d+ bytes here, where it was checked \d+ bytes"):
        open_dataset(copy, checked=known)
    (copy / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"corpus.jsonl is missing here"):
        open_dataset(copy, checked=known)

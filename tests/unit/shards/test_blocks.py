"""A corpus read from its middle gives the documents that a pass from its beginning gives there."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.formats import beir, open_dataset
from shards.formats.blocks import find_blocks
from shards.records import Dataset, Document, Query

DOCUMENTS = [Document(f"d{row}", "", "\u2028 line\n" + "x" * (row * 7 % 23 + 1)) for row in range(11)]


def write(folder: Path, documents: list[Document]) -> Dataset:
    beir.write_folder(folder, documents, [Query("q", "one?")], {"train": {"q": {"d1": 1}}}, {})
    return open_dataset(folder)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 12])
@pytest.mark.parametrize("at_a_time", [1, 7, 4 << 20])
def test_each_block_is_found_and_read(
    tmp_path: Path, size: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.formats.blocks._BYTES_AT_A_TIME", at_a_time)
    dataset = write(tmp_path / "data", DOCUMENTS)
    assert dataset.find_blocks is not None
    assert dataset.read_block is not None
    starts = dataset.find_blocks(size)
    assert starts is not None
    assert len(starts) == -(-len(DOCUMENTS) // size)
    for number, start in enumerate(starts):
        found = list(islice(dataset.read_block(start, number * size), size))
        assert found == DOCUMENTS[number * size : (number + 1) * size]


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", DOCUMENTS)
    assert dataset.find_blocks is not None
    assert dataset.read_block is not None
    starts = dataset.find_blocks(4)
    assert starts is not None
    corpus = tmp_path / "data" / "corpus.jsonl"
    corpus.write_bytes(corpus.read_bytes().replace(b'"d9"', b'"d9 '))
    with pytest.raises(DataError, match=r"corpus.jsonl line 10 "):
        list(dataset.read_block(starts[2], 8))


def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"a\nb\nc")
    assert find_blocks(path, 2, 3) == [0, 4]
    path.write_bytes(b"a\nb\nc\nd")
    assert find_blocks(path, 2, 4) == [0, 4]
    path.write_bytes(b"a\nb\n")
    assert find_blocks(path, 1, 2) == [0, 2]


def test_a_file_with_lines_that_hold_no_document_is_read_in_one_go(tmp_path: Path) -> None:
    dataset = write(tmp_path / "empty", [*DOCUMENTS, Document("e", "", " ")])
    assert dataset.num_documents == len(DOCUMENTS)
    assert dataset.find_blocks is not None
    assert dataset.find_blocks(3) is None
    write(tmp_path / "blank", DOCUMENTS)
    with (tmp_path / "blank" / "corpus.jsonl").open("a") as file:
        file.write("\n")
    blank = open_dataset(tmp_path / "blank")
    assert blank.find_blocks is not None
    assert blank.find_blocks(3) is None

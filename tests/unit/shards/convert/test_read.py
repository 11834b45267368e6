"""Every reader goes on from every mark with exactly the records that are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from shards.convert.options import Options
from shards.convert.read import read_source
from shards.convert.sources import Source, find_sources
from shards.formats.items import Item
from shards.formats.stream import BadRecord, Mark
from tests.unit.shards.convert.test_conversion import DPR, TOPICS, write

FILES: dict[str, Any] = {
    "collection.tsv": "1\tone\r\nno tab\n\n2\ttwo\n3\t\xe9\n4\tlast, without a line end",
    "psgs_w100.tsv": DPR["psgs_w100.tsv"] + '4\t"never closed\tD\n5\tx\tE\n6\tonly two\n7\ty\tF\n',
    "biencoder-nq-train.json": DPR["biencoder-nq-train.json"],
    "nq-test.qa.csv": 'who\t[\'a\']\nwhat\tnot a list\n"a ""quoted"" one"\t[\'b\']\nwhere\t[]\n',
    "top1000.dev": "".join(f"{qid}\t{pid}\tx\ty\n" for qid in (5, 6, 5) for pid in range(3)) + "bad\n7\t1\tx\ty\n",
    "qidpidtriples.train.tsv": "1\t2\t3\n1\t2\t4\n\n1\t5\t4\n2\t1\n2\t1\t1\n",
    "topics.txt": TOPICS + "<top>\n<num> 303\n</top>\n<top><num> 304 <title> one line </top>\n",
    "corpus.jsonl": [{"_id": "a", "text": "A"}, {"_id": "b"}, {"_id": "c", "title": "C", "text": ""}],
    "train.jsonl": [{"qid": "q", "pos": ["a"], "neg": {"x": ["b"]}}] * 3,
    "bm25.run": "q Q0 d 1 2.5 t\nq d 2\nq d\n",
}


def outcomes(source: Source, mark: Mark) -> tuple[list[tuple[int, list[Item] | str]], list[Mark]]:
    found, marks = [], [mark.copy()]
    for line, items in read_source(source, mark, Options(on_error="drop"), lambda count: None):
        found.append((line, str(items) if isinstance(items, BadRecord) else items))
        marks.append(mark.copy())
    return found, marks


def check_every_mark(source: Source) -> None:
    found, marks = outcomes(source, Mark())
    assert len(found) > 2
    for place, mark in enumerate(marks):
        assert outcomes(source, mark)[0] == found[place:], f"from {marks[place]}"


def only_source(path: Path) -> Source:
    (source,), _ = find_sources([path], Options(), path)
    return source


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_a_reader_goes_on_from_any_mark(tmp_path: Path, name: str, suffix: str) -> None:
    check_every_mark(only_source(write(tmp_path, {name + suffix: FILES[name]})))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_titles_stay_with_their_passages_from_any_mark(tmp_path: Path, suffix: str) -> None:
    """Gone on with the titles' beginning, every passage after an interruption would lose its title."""
    passages = "".join(f"{number}\tx\n" for number in range(12))
    titles = "".join(f"{number}\ttitle {number}\n" for number in range(12) if number % 3)
    write(tmp_path, {f"para.txt{suffix}": passages, f"para.title.txt{suffix}": titles})
    check_every_mark(only_source(tmp_path))


@pytest.mark.parametrize("rows_per_group", [1, 4, 100])
def test_rows_of_a_table_go_on_from_any_mark(tmp_path: Path, rows_per_group: int) -> None:
    table = pa.table({"id": [f"r{number}" for number in range(9)], "text": ["x"] * 9})
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet", row_group_size=rows_per_group)
    check_every_mark(only_source(tmp_path))

"""A conversion that is killed anywhere goes on to the same bytes; one that is done, or is another, is told apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from shards.convert import conversion
from shards.convert.conversion import convert
from shards.convert.journal import locked
from shards.convert.options import Options
from shards.errors import ArtifactError, DataError
from shards.formats import open_dataset
from tests.unit.shards.convert.test_conversion import DPR, MSMARCO, write

DROP = Options(on_error="drop", on_unknown_docid="drop")
# What a process does to the disk at each of these calls is what a kill may come before.
_CALLS = ("fsync", "replace", "unlink", "ftruncate", "write")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint follow every other record, and cost nothing."""
    monkeypatch.setattr(conversion, "_RECORDS_PER_LOOK", 2)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """All kinds of reader, with something of everything to be dropped."""
    folder = write(
        tmp_path / "downloads",
        {
            "topics.txt": "".join(f"<top><num> Number: {n}\n<title> t{n}\n</top>\n" for n in range(30, 35)),
            **{
                f"{name}.gz" if "queries" in name else name: text
                for name, text in MSMARCO.items()
                if "coll" not in name
            },
            **DPR,
            "collection.tsv.zst": "4\tfour\nno tab\n5\t\n2\tagain\n6\tsix\n",
            "para.txt": "a\tA\nb\tB\nc\tC\nd\tD\n",
            "para.title.txt": "a\t1\nc\t3\nd\t4\n",
            "top1000.dev": "".join(f"20\t{pid}\tdev\ttext\n" for pid in (3, 0, 2, 4, 5, 6)) + "10\t2\tx\tx\n",
            "qidpidtriples.train.full.2.tsv": "".join(f"{10 + number % 2}\t1\t{number % 7}\n" for number in range(9)),
            "bm25.train.run": "10 Q0 2 1 3.5 bm25\n10 Q0 0 2 3 bm25\n11 Q0 99 1 2 bm25\n",
        },
    )
    rows = {"id": [f"r{number}" for number in range(9)], "text": ["x"] * 9}
    pyarrow.parquet.write_table(pa.table(rows), folder / "more.parquet", row_group_size=4)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def killed(step: int, job: Callable[[], Any]) -> bool:
    """Run a job in a process that is killed before its nth call of something that changes the disk."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = step

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    code = 1
    try:
        for name in _CALLS:
            setattr(os, name, counted(getattr(os, name)))
        job()
        code = 0
    finally:
        os._exit(code)
    return False


def test_killed_before_any_step_it_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert([source], tmp_path / "whole", DROP)
    whole, out = content(tmp_path / "whole"), tmp_path / "out"
    assert len(whole) == 8

    def job() -> None:
        convert([source], out, DROP, checkpoint_seconds=0)

    steps = 0
    while killed(steps, job):
        if (out / "dataset.json").exists():
            open_dataset(out)  # it is written last
        elif (out / ".partial").exists():
            with pytest.raises(DataError, match="has not finished"):
                open_dataset(out)
        convert([source], out, DROP)
        assert content(out) == whole, f"killed before call {steps}"
        shutil.rmtree(out)
        steps += 31  # 1 tries every call, which passes too, in minutes
    assert steps > 300


def test_killed_again_and_again_it_still_gets_there(source: Path, tmp_path: Path) -> None:
    """Each start must get further than the one before, or a machine that restarts every hour would never be done."""
    convert([source], tmp_path / "whole", DROP)
    out, starts = tmp_path / "out", 1
    while killed(70, lambda: convert([source], out, DROP, checkpoint_seconds=0)):
        starts += 1
        assert starts < 40
    assert starts > 3
    assert content(out) == content(tmp_path / "whole")


def test_what_a_killed_start_wrote_after_its_last_entry_is_cut_off(source: Path, tmp_path: Path) -> None:
    convert([source], tmp_path / "whole", DROP)
    out = tmp_path / "out"
    assert killed(100, lambda: convert([source], out, DROP, checkpoint_seconds=0))
    for path in [path for path in (out / ".partial").glob("*/**/*") if path.is_file()]:
        with open(path, "ab") as file:
            file.write(b"half a record" * 10_000)
    convert([source], out, DROP)
    assert content(out) == content(tmp_path / "whole")


def test_done_already_it_does_nothing(source: Path, tmp_path: Path) -> None:
    first = convert([source], tmp_path / "out", DROP)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    os.utime(source / "para.txt", (0, 0))
    again = convert([source], tmp_path / "out", DROP)
    assert again.was_there
    assert not first.was_there
    assert again.description == first.description
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before


def test_other_sources_or_options_are_refused_by_name_and_replace_by_force(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", MSMARCO), tmp_path / "out"
    convert([source], out, Options())
    with pytest.raises(DataError, match=r"max_document_characters is 50 now, 1000000 then.*--force"):
        convert([source], out, Options(max_document_characters=50))
    (source / "qrels.train.tsv").write_text("10\t0\t0\t1\n11\t0\t1\t1\n11\t0\t3\t1\n")
    with pytest.raises(DataError, match=r"qrels.train.tsv has another content"):
        convert([source], out, Options())
    write(source, {"bm25.run": "10\t0\t1\n"})
    with pytest.raises(DataError, match=r"bm25.run is new"):
        convert([source], out, Options())
    convert([source], out, Options(), force=True)
    (source / "bm25.run").unlink()
    (out / "shards").mkdir()
    convert([source], out, Options(), force=True)
    assert not (out / "runs" / "bm25.trec").exists()
    assert (out / "shards").exists()
    assert open_dataset(out).qrels["train"]["11"] == {"1": 1, "3": 1}


def test_an_unfinished_conversion_of_something_else_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killed(150, lambda: convert([source], out, DROP, checkpoint_seconds=0))
    with pytest.raises(DataError, match=r"unfinished conversion.*split is 'dev' now"):
        convert([source], out, Options(on_error="drop", on_unknown_docid="drop", split="dev"))
    raw = out / ".partial" / "raw" / "corpus.jsonl"
    raw.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"the journal beside it says.*remove the folder"):
        convert([source], out, DROP)


def test_what_is_not_ours_is_not_written_into(tmp_path: Path) -> None:
    source = write(tmp_path / "in", MSMARCO)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "mine", tmp_path / "file", source):
        with pytest.raises(DataError, match="choose another --out"):
            convert([source], out, Options(), force=True)
    assert content(tmp_path / "mine") == {"precious.txt": b"x"}


def test_two_conversions_do_not_write_one_folder(tmp_path: Path) -> None:
    source = write(tmp_path / "in", MSMARCO)
    with locked(tmp_path / "out" / ".partial"), pytest.raises(DataError, match="another conversion"):
        convert([source], tmp_path / "out", Options())


def test_a_source_that_changes_under_way_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", MSMARCO)
    read_source = conversion.read_source

    def touching(*arguments: Any) -> Any:
        os.utime(source / "qrels.train.tsv", (0, 0))
        return read_source(*arguments)

    monkeypatch.setattr(conversion, "read_source", touching)
    with pytest.raises(DataError, match=r"qrels.train.tsv changed while it was read"):
        convert([source], tmp_path / "out", Options())


@pytest.mark.parametrize(("change", "place"), [({"source": "x"}, "source"), ({"rows": {"a": "b"}}, r"rows\.a")])
def test_a_journal_of_another_form_is_refused(source: Path, tmp_path: Path, change: dict[str, Any], place: str) -> None:
    """Taken as it was, it broke the conversion in the middle, with an error that named no file."""
    out = tmp_path / "out"
    assert killed(150, lambda: convert([source], out, DROP, checkpoint_seconds=0))
    journal = out / ".partial" / "journal.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | change))
    with pytest.raises(ArtifactError, match=rf"journal.json is damaged: {place}: .*run the command again"):
        convert([source], out, DROP)

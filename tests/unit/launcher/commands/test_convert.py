"""The command says what it kept, what it dropped and what it did not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from shards.formats import open_dataset, tables


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "collection.tsv").write_text("1\tone\n2\ttwo\nbroken\n")
    (folder / "queries.train.tsv").write_text("q\tone?\n")
    (folder / "qrels.train.tsv").write_text("q\t0\t1\t1\nq\t0\t9\t1\n")
    (folder / "readme.md").write_text("x")
    return folder


def test_it_prints_what_was_kept_dropped_and_not_read(downloads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = downloads.parent / "out"
    command = ["convert", str(downloads), "--out", str(out), "--on-error", "drop", "--on-unknown-docid", "drop"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["corpus.jsonl", "2", "82"] in rows
    assert ["collection.tsv:", "wrong", "number", "of", "columns", "1"] in rows
    assert ["judgement", "of", "a", "document", "that", "the", "corpus", "lacks", "1"] in rows
    assert ["readme.md", "of", "no", "known", "name"] in rows
    assert "is done" in printed
    assert open_dataset(out).qrels == {"train": {"q": {"1": 1}}}
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_bad_record_is_one_message_and_exit_code_2(downloads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(downloads), "--out", str(downloads.parent / "out")]) == 2
    told = capsys.readouterr().err
    assert "collection.tsv line 3 has no tab" in told
    assert "Traceback" not in told


def test_a_name_on_the_hub_is_fetched_only_where_the_format_says_so(
    downloads: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"]))
        (downloads.parent / "hub" / "corpus").mkdir(parents=True)
        (downloads.parent / "hub" / "corpus" / "part.jsonl").write_text('{"_id": "1", "text": "one"}\n')
        return str(downloads.parent / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(downloads.parent)
    assert main(["convert", "owner/name", "--out", "out"]) == 2
    assert "there is no owner/name" in capsys.readouterr().err
    assert not asked
    assert main(["convert", "owner/name", "--out", "out", "--format", "hf"]) == 0
    assert asked == [("owner/name", "dataset")]
    assert (downloads.parent / "out" / "corpus.jsonl").read_text() == '{"_id": "1", "title": "", "text": "one"}\n'


def test_a_data_set_that_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(tables.DataError, match=r"no route to host.*save it with save_to_disk"):
        tables.fetch_from_hub("owner/name")

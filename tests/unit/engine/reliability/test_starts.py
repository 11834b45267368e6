"""The record of starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ArtifactError
from engine.reliability.starts import Start, newest_nonce, read_starts, record_start


def test_starts_are_read_as_they_were_recorded(tmp_path: Path) -> None:
    assert (read_starts(tmp_path), newest_nonce(tmp_path)) == ([], None)
    first = Start.now("a", 2, "mpi", [])
    second = Start.now("b", 4, "store", ["run.seed: 1 -> 2"])
    record_start(tmp_path, first)
    record_start(tmp_path, second)
    assert read_starts(tmp_path) == [first, second]
    assert newest_nonce(tmp_path) == "b"
    entries = json.loads((tmp_path / "starts.json").read_text())
    assert ["forced" in entry for entry in entries] == [False, True], "nothing is told of where nothing was forced"


def test_the_same_code_has_no_changes() -> None:
    assert Start.now("a", 1, "local", []).code_changes() == []


@pytest.mark.parametrize("text", ["{}", '[{"nonce": "a"}]', "[1", '[{"nonce": 1, "time": "", "argv": []}]'])
def test_a_damaged_record_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "starts.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"the record of starts.* is damaged"):
        newest_nonce(tmp_path)

"""The command hands its arguments on and says how much it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.__main__ import main
from shards.made import docstrings


def test_the_command_prints_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[object] = []

    def build(out: Path, *, max_documents: int, seed: int) -> dict[str, int]:
        given.extend((out, max_documents, seed))
        return {"packages": 2, "train queries": 7}

    monkeypatch.setattr(docstrings, "build_docstring_dataset", build)
    assert not main(["docstrings", "--out", str(tmp_path / "data"), "--max-documents", "30", "--seed", "5"])
    assert given == [tmp_path / "data", 30, 5]
    assert capsys.readouterr().out == f"{tmp_path / 'data'}: 2 packages, 7 train queries\n"

"""What a branch copies can be written to, whoever owns the run that it comes from."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from engine.training import branching


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_copies_are_without_the_modes_of_their_source(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where files get no further names (another disk, another owner) they are copied; copies were as read-only."""

    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below" / "a").write_text("a")
    (source / "below" / "a").chmod(0o444)
    (source / "below").chmod(0o555)
    try:
        branching._link(source, tmp_path / "target")
    finally:
        (source / "below").chmod(0o755)
    copied = list((tmp_path / "target").rglob("*"))
    assert [path.name for path in copied] == ["below", "a"]
    assert all(path.stat().st_mode & 0o200 for path in copied)

"""Somebody else's run, which may not be written to, is used as far as nothing of it changes."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.reliability.run_lock import acquire
from engine.run import RunFolder
from launcher.commands.finished import keep_others_out, place_for
from shards.errors import FileError


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """What the lock needs to know of a run."""
    (tmp_path / "run").mkdir()
    settings = SimpleNamespace(run=SimpleNamespace(heartbeat_seconds=0.1))
    folder = RunFolder(tmp_path / "run")
    return SimpleNamespace(folder=folder, config=settings, coordinator=SimpleNamespace(world_size=1))


@pytest.fixture
def read_only(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system say that the run's folder may not be written to; root may write everything."""
    really = os.access

    def access(path: str, mode: int) -> bool:
        return really(path, mode) and not (mode & os.W_OK and Path(path).is_relative_to(run.folder.path))

    monkeypatch.setattr(os, "access", access)


@pytest.mark.usefixtures("read_only")
def test_no_lock_is_taken_where_nothing_can_be_written(run: Any) -> None:
    with ExitStack() as stack:
        keep_others_out(stack, run.folder, run, reads_only=True)
        assert list(run.folder.path.iterdir()) == []


@pytest.mark.usefixtures("read_only")
def test_who_writes_is_refused_and_told_what_writes_elsewhere(run: Any) -> None:
    for folder in (run.folder, RunFolder(run.folder.path / "evaluations" / "other-1a2b3c4d")):
        with ExitStack() as stack, pytest.raises(FileError, match="may not be written to") as caught:
            keep_others_out(stack, folder, run)
        assert f"`cp -r {run.folder.path} COPY`" in caught.value.remedy
        assert "--out" in caught.value.remedy
    with pytest.raises(FileError, match="Remedy: name a place outside of the run by --out"):
        place_for(None, run.folder.path / "comparisons")
    assert list(run.folder.path.iterdir()) == []


def test_a_run_that_is_at_work_is_refused_by_its_lock_alone(run: Any, request: pytest.FixtureRequest) -> None:
    lock = acquire(run.folder.lock, num_ranks=1, patience_seconds=0.1)
    text = run.folder.lock.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {os.getppid()}')
    run.folder.lock.write_text(text)
    request.getfixturevalue("read_only")
    with ExitStack() as stack, pytest.raises(ConfigError, match="is in use"):
        keep_others_out(stack, run.folder, run, reads_only=True)
    assert [path.name for path in run.folder.path.iterdir()] == [lock.path.name]


def test_where_it_can_be_written_the_lock_is_taken(run: Any) -> None:
    with ExitStack() as stack:
        keep_others_out(stack, run.folder, run, reads_only=True)
        assert run.folder.lock.exists()
    assert not run.folder.lock.exists()

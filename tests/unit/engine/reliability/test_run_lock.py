"""One start at a time works in a run folder, and a lock outlives no start that is gone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import ConfigError, CoordinationError
from engine.reliability import run_lock
from engine.reliability.run_lock import RunLock, acquire, hold, read_holder, require_free
from tests.distributed.processes import ROOT

OTHER_PID = os.getppid()
"""A process that lives and is not this one."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


def take(path: Path, patience_seconds: float = 0.5) -> RunLock:
    return acquire(path, num_ranks=2, patience_seconds=patience_seconds)


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_lock_names_its_holder_and_goes_when_released(path: Path) -> None:
    lock = take(path)
    holder = read_holder(path)
    assert holder is not None
    assert (holder.nonce, holder.pid, holder.num_ranks) == (lock.nonce, os.getpid(), 2)
    lock.require()
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_a_second_start_is_refused_while_the_first_lives(path: Path) -> None:
    take(path)
    change(path, pid=OTHER_PID)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"in use: a start of 2 rank\(s\) on .* \(pid {OTHER_PID}, since 20"):
        take(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["run.lock"]


def test_who_only_reads_leaves_the_lock_as_it_is(path: Path) -> None:
    require_free(path, patience_seconds=0.5)
    take(path)
    change(path, pid=OTHER_PID)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="in use: a start of 2 rank"):
        require_free(path, patience_seconds=0.5)
    change(path, place="elsewhere", host="elsewhere")  # whose holder gives no sign of life
    require_free(path, patience_seconds=0.5)
    path.write_bytes(before)
    assert [entry.name for entry in path.parent.iterdir()] == ["run.lock"]


def test_the_lock_of_a_dead_process_is_taken_over_with_a_word(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    first = take(path)
    change(path, pid=ended.pid)
    second = take(path)
    assert second.nonce != first.nonce
    assert f"(pid {ended.pid}, " in caplog.text
    assert "taken over" in caplog.text
    assert [entry.name for entry in path.parent.iterdir()] == ["run.lock"]


def test_the_lock_of_another_host_is_refused_while_it_is_touched(path: Path) -> None:
    lock = take(path)
    change(path, place="elsewhere", host="elsewhere")
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.1):
            lock.touch()

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on elsewhere"):
            take(path, patience_seconds=20.0)
    finally:
        over.set()
        thread.join()


def test_the_lock_of_another_host_is_taken_over_when_it_stays_untouched(path: Path) -> None:
    """Its time of change may lie in the future or in the past: clocks of two hosts are not compared."""
    for offset in (-1e6, 1e6):
        first = take(path)
        change(path, place="elsewhere", host="elsewhere")
        os.utime(path, (time.time() + offset,) * 2)
        assert take(path, patience_seconds=0.3).nonce != first.nonce


def test_who_has_lost_the_folder_may_commit_nothing_and_frees_nothing(path: Path) -> None:
    """Symptom guarded against: a start that was stopped for long wakes up and overwrites what the next one made."""
    first = take(path)
    change(path, pid=2**22 + 1)  # no process has that number
    second = take(path)
    with pytest.raises(CoordinationError, match="no longer this start's"):
        first.require()
    first.release()
    second.require()
    path.unlink()
    with pytest.raises(CoordinationError, match="it was deleted"):
        second.require()


def test_of_starts_at_the_same_moment_one_gets_the_folder(path: Path) -> None:
    """Also when all of them find a lock that its holder has left."""
    take(path)
    change(path, pid=2**22 + 1)
    code = (
        "import sys, time; from pathlib import Path; from engine.reliability.run_lock import acquire\n"
        "from engine.errors import ConfigError\n"
        "try: acquire(Path(sys.argv[1]), num_ranks=1, patience_seconds=1)\n"
        "except ConfigError: sys.exit(2)\n"
        "print('taken', flush=True); sys.stdin.read()\n"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(start.poll() is None for start in starts) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    codes = [start.poll() for start in starts]
    for start in starts:
        start.communicate()
    assert sorted(codes, key=str) == [2, 2, 2, None]


def test_a_lock_that_is_held_is_touched_and_released(path: Path) -> None:
    with hold(path, num_ranks=1, touch_seconds=0.02, patience_seconds=1.0) as lock:
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
        lock.require()
    assert not path.exists()


def test_a_lock_of_this_process_is_no_other_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path)
    assert take(path).nonce == run_lock.read_holder(path).nonce  # type: ignore[union-attr]

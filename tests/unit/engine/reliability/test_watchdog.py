"""What ends a process that can no longer end itself; each case is a process of its own, stuck in C code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.reliability.exit_codes import EXIT_LOST
from engine.reliability.failure import record_failure
from engine.reliability.run_lock import acquire
from engine.reliability.watchdog import Watchdog
from tests.distributed.processes import ROOT
from tests.small_disk import run_on_small_disk

BEGIN = """
import ctypes, sys, time
from pathlib import Path
from engine.reliability.run_lock import acquire
from engine.reliability.watchdog import Watchdog, watch
folder = Path(sys.argv[1])
lock = acquire(folder / "run.lock", num_ranks=1, patience_seconds=1)
watchdog = Watchdog(folder, lock, 0, 1, interval_seconds=0.1, timeout_seconds=1.0)
watch(watchdog)
"""
STUCK = """
for _ in range(60):
    ctypes.CDLL(None).usleep(900000)
"""


def run(folder: Path, code: str) -> tuple[int, str]:
    command = [sys.executable, "-c", BEGIN + code + STUCK, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    return ended.returncode, ended.stderr


def test_a_file_system_that_does_not_answer_is_the_end(tmp_path: Path) -> None:
    """The thread that would notice is itself stuck in a write."""
    code, _ = run(tmp_path, "watchdog._heart.beat = lambda *_: time.sleep(1000)")
    assert code == 1
    assert "Timeout (0:00:01)" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


@pytest.mark.parametrize("how", ["lock.path.unlink()", "lock.path.write_text('{}')"])
def test_a_start_whose_folder_was_taken_over_is_the_end(tmp_path: Path, how: str) -> None:
    """Symptom guarded against: a start that slept goes on to write beside the one that took over."""
    code, told = run(tmp_path, how)
    assert code == 2, told
    assert "is no longer this start's" in told
    assert json.loads((tmp_path / "last_error.json").read_text())["kind"] == "lost lock"


def test_a_rank_that_ends_last_does_not_miss_the_lock(tmp_path: Path) -> None:
    """Symptom: a finished run ended with code 2 now and then, where rank 0 was the first to let go of the folder."""
    second = """
other = Watchdog(folder, lock, 1, 2, interval_seconds=0.1, timeout_seconds=20.0)
other.start()
watchdog.end(0)
time.sleep(1.5)
other.end(0)
sys.exit(0)
"""
    code, told = run(tmp_path, second)
    assert (code, told) == (0, "")
    assert not (tmp_path / "last_error.json").exists()


def test_a_watchdog_that_is_not_needed_leaves_no_trace(tmp_path: Path) -> None:
    code, told = run(tmp_path, "time.sleep(2); watchdog.end(0); sys.exit(0)")
    assert (code, told) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeats", "stacks"]
    assert list((tmp_path / "stacks").iterdir()) == []


def test_a_full_disk_does_not_end_a_run_by_way_of_its_heartbeats(tmp_path: Path) -> None:
    """Nor does it hide the error that is to be told: what cannot be recorded counts as the first failure."""
    fill = """
import contextlib, os
with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
    while True:
        file.write(b"0" * 1024)
before = watchdog._heart._number
time.sleep(2)
print(watchdog._heart._number > before + 3, watchdog.fail("DiskFullError", "the disk is full", 2))
os.unlink(disk / "filler")
time.sleep(0.5)
print((disk / "heartbeats" / "rank-00000.json").stat().st_size > 0)
watchdog.end(0)
"""
    told = run_on_small_disk(tmp_path / "disk", "256k", BEGIN.replace("folder = Path", "disk = folder = Path") + fill)
    assert told.splitlines() == ["True None", "True"]


def test_one_rank_of_a_host_repeats_a_loss_that_another_host_has_told(tmp_path: Path) -> None:
    """Symptom guarded against: the host that told it had lost the network, and the terminal stayed silent."""
    lock = acquire(tmp_path / "run.lock", num_ranks=2, patience_seconds=1)
    record_failure(
        tmp_path, attempt=lock.nonce, rank=3, stage="", step=0, kind="lost rank", message="rank 1 died", code=EXIT_LOST
    )
    seconds = {"interval_seconds": 1.0, "timeout_seconds": 9.0}
    first = Watchdog(tmp_path, lock, 0, 2, **seconds)
    assert first.loss_to_repeat() is None, "it was told here"
    told = tmp_path / "errors" / f"{lock.nonce}.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "host": "node-07"}))
    second = Watchdog(tmp_path, lock, 1, 2, **seconds, speaks_for_host=False)
    assert second.loss_to_repeat() is None
    assert first.loss_to_repeat() == "error, told by rank 3 on node-07: rank 1 died"
    assert first.loss_to_repeat() is None, "once is enough"

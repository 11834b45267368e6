"""What a heartbeat tells of its rank."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.reliability import heartbeat
from engine.reliability.activity import Activity
from engine.reliability.heartbeat import ENDED, RUNNING, Beat, Heart, beat_path, read_beat, read_beats
from engine.reliability.processes import process_is_alive
from engine.reliability.progress import progress_bar


def beat_of(folder: Path, activity: Activity, state: str = RUNNING) -> Beat:
    Heart(folder, 0, 1, "a", activity).beat(state)
    found = read_beat(folder, 0)
    assert found is not None
    return found


def test_a_beat_says_who_where_and_how_far(tmp_path: Path) -> None:
    activity = Activity()
    with activity.in_stage("retriever/3"), activity.counting(6, "step", 1):
        activity.done = 4
        with activity.waiting("barrier 'x'"):
            beat = beat_of(tmp_path, activity)
    assert beat.where == "in retriever/3, step 4 of 6, waiting for barrier 'x'"
    assert (beat.pid, beat.state, beat.code) == (os.getpid(), RUNNING, None)
    assert not beat.process_is_gone
    after = beat_of(tmp_path, activity)
    assert (after.where, after.last_point) == ("between stages", "barrier 'x'")


def test_stages_lie_inside_each_other() -> None:
    activity = Activity()
    with activity.in_stage("evaluate/yardsticks"):
        with activity.in_stage("bm25"):
            assert activity.stage == "bm25"
        assert activity.stage == "evaluate/yardsticks"


def test_a_stage_that_fails_stays_named() -> None:
    """Symptom guarded against: the last error was said to be between stages."""
    activity = Activity()
    with pytest.raises(ValueError, match="no luck"), activity.in_stage("shards"), activity.waiting("barrier 'x'"):
        raise ValueError("no luck")
    assert str(activity) == "in shards, waiting for barrier 'x'"


def test_the_speed_is_of_one_piece_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: float(next(clock)))
    activity = Activity()
    heart = Heart(tmp_path, 0, 1, "a", activity)
    speeds = []
    for total, done in ((0, 0), (10, 2), (10, 5), (7, 1), (7, 2)):
        if total != activity.total:
            activity._begin(done, total, "step")
        activity.done = done
        heart.beat(RUNNING)
        speeds.append(read_beat(tmp_path, 0).speed)  # type: ignore[union-attr]
    assert speeds == [None, None, 3.0, None, 1.0]


@pytest.mark.parametrize("shown", [True, False])
def test_a_progress_bar_counts_on_ranks_that_do_not_show_it(shown: bool) -> None:
    from engine.reliability.activity import ACTIVITY

    with progress_bar("encode", 10, "doc", shown=shown, initial=2) as bar:
        bar.update(3)
        bar.update(7 - bar.n)
        assert (ACTIVITY.done, ACTIVITY.total, ACTIVITY.unit, bar.n) == (7, 10, "doc", 7)


def test_only_the_newest_starts_beats_are_read(tmp_path: Path) -> None:
    """An earlier start may have had more ranks."""
    for rank in range(3):
        Heart(tmp_path, rank, 3, "old", Activity()).beat(ENDED, 0)
    time.sleep(0.002)
    Heart(tmp_path, 0, 1, "new", Activity()).beat(RUNNING)
    assert [(beat.rank, beat.attempt) for beat in read_beats(tmp_path)] == [(0, "new")]


def test_a_beat_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_beat(tmp_path, 0) is None
    for text in ("", "{", '{"rank": 0}', "[]"):
        beat_path(tmp_path, 0).write_text(text)
        assert read_beat(tmp_path, 0) is None
    assert read_beats(tmp_path) == []


def test_a_process_that_has_ended_is_gone_even_before_it_is_waited_for() -> None:
    """Symptom guarded against: a killed rank whose starter has not looked yet counts as alive."""
    process = subprocess.Popen(["true"])
    deadline = time.monotonic() + 20
    while process_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process_is_alive(process.pid)
    process.wait()
    assert not process_is_alive(process.pid)
    assert process_is_alive(os.getpid())


def test_a_beat_says_in_which_function_the_main_thread_is(tmp_path: Path) -> None:
    found: list[tuple[str, bool]] = []

    def look() -> None:
        found.append(heartbeat.main_thread_at())

    def somewhere() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    somewhere()
    (at, in_collective) = found[0]
    assert at.startswith("join (threading.py:") or "wait" in at or "somewhere" in at
    assert not in_collective


def test_a_main_thread_inside_a_collective_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, bool]] = []

    class Group:
        """Called by torch from inside its collective operation."""

        def __getattr__(self, name: str) -> object:
            thread = threading.Thread(target=lambda: found.append(heartbeat.main_thread_at()))
            thread.start()
            thread.join()
            raise NotImplementedError

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises((NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError)):
        dist.all_reduce(torch.ones(1), group=Group())  # type: ignore[arg-type]
    assert found
    assert all(in_collective for _, in_collective in found)

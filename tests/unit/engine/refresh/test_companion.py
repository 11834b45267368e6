"""Companions: what their ranks learn of their ends, with small programs in their place."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.coordination.coordinator import PeerError
from engine.errors import CoordinationError, SparringError
from engine.refresh.companion import FAILED, FINISHED, STOPPED, Companion, CompanionCrash, Ended, Order, ended_path
from engine.reliability.preemption import PREEMPTION, Preempted
from engine.reliability.processes import process_is_alive
from engine.run import Run

WORDS = """
import json, os, sys, time
order = json.loads(sys.argv[-1])
def end(outcome, **more):
    path = f"{order['folder']}/ended-{order['rank']:05d}.json"
    words = {"token": order["token"], "rank": order["rank"], "outcome": outcome, **more}
    open(path + "~", "w").write(json.dumps(words))
    os.replace(path + "~", path)
"""
FINISHES = WORDS + "end('finished')"
OBEYS = WORDS + "line = sys.stdin.readline()\nend('stopped' if line == 'stop\\n' else 'finished')"
HANGS = WORDS + "time.sleep(60)"
DIES = WORDS + "os._exit(9)"
CRASHES = WORDS + "end('failed', message='ValueError: x', traceback='Traceback: line 7', code=1)\nsys.exit(1)"
REFUSES = WORDS + "end('failed', message='the index finds too little', code=2)\nsys.exit(2)"
OF_ANOTHER = WORDS + "order['token'] = 'other'\nend('finished')\nsys.exit(3)"


@pytest.fixture
def start(open_run: Callable[..., Run], tmp_path: Path) -> Iterator[Callable[..., Companion]]:
    run, started = open_run(), list[Companion]()

    def start_(program: str, *, world_size: int = 1) -> Companion:
        run.companion_command = (sys.executable, "-S", "-c", program)
        order = Order(str(run.folder.path), "001", str(tmp_path), 0, world_size, "cpu", "", "n", "t", 5.0, 1.0)
        started.append(Companion(run, order, "the refresh beside it"))
        return started[-1]

    try:
        yield start_
    finally:
        for one in started:
            one.kill()
        PREEMPTION.requested, PREEMPTION.reason = False, ""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_one_that_finishes_is_timed(start: Callable[..., Companion]) -> None:
    companion = start(FINISHES)
    companion.join()
    assert companion.seconds is not None
    assert companion.seconds > 0
    assert not PREEMPTION.requested


@pytest.mark.parametrize(
    ("program", "kind", "told"),
    [
        (CRASHES, CompanionCrash, "Traceback: line 7"),
        (REFUSES, SparringError, "the refresh beside it: the index finds too little"),
        (DIES, CoordinationError, r"\(pid \d+\) ended with 9 and without a word.*ar2.overlap=none"),
        (OF_ANOTHER, CoordinationError, "ended with 3 and without a word"),
    ],
)
def test_one_that_fails_stops_the_training_and_is_told_in_its_place(
    program: str, kind: type[Exception], told: str, start: Callable[..., Companion]
) -> None:
    """Symptom: what was told would be that the run was asked to stop."""
    companion = start(program)
    wait_for(lambda: PREEMPTION.requested)
    with pytest.raises(kind, match=f"(?s){told}"):
        companion.end_with(PREEMPTION.stop_here("ranker/1, step 3"))
    with pytest.raises(kind, match=f"(?s){told}"):
        companion.join()


def test_one_that_fails_on_another_rank_is_that_ranks(start: Callable[..., Companion], tmp_path: Path) -> None:
    companion = start(HANGS, world_size=2)
    words = {"token": "t", "rank": 1, "outcome": "failed", "message": "no space", "code": 2}
    ended_path(tmp_path, 1).write_text(json.dumps(words))
    wait_for(lambda: PREEMPTION.requested)
    companion.kill()
    with pytest.raises(PeerError, match="failed on rank 1: no space"):
        companion._judge([companion._last_words(), *companion._known()[1:]])


def test_one_that_lost_another_which_was_told_to_stop_has_not_failed(start: Callable[..., Companion]) -> None:
    """Symptom: a run that was asked to stop would end with the code of a lost rank, on some ranks."""
    companion = start(HANGS, world_size=2)
    follows = Ended("t", 0, FAILED, message="rank 1 stopped", code=75, follows=True)
    companion._judge([follows, Ended("t", 1, STOPPED)])
    with pytest.raises(CoordinationError, match="rank 1 stopped"):
        companion._judge([follows, Ended("t", 1, FINISHED)])


def test_a_request_stops_both(start: Callable[..., Companion]) -> None:
    companion = start(OBEYS)
    PREEMPTION.interrupt("SIGTERM")
    with pytest.raises(Preempted, match=r"stopped at the refresh beside it \(SIGTERM\)"):
        companion.join()
    assert companion._last_words().outcome == "stopped"


def test_one_that_does_not_stop_is_killed_and_an_error_of_the_training_ends_it(
    start: Callable[..., Companion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.refresh.companion._GRACE_SECONDS", 0.1)
    stubborn, other = start(HANGS), start(HANGS)
    pids = [one._process.pid for one in (stubborn, other)]
    stubborn.end_with(PREEMPTION.stop_here("ranker/1, step 3"))
    other.end_with(ValueError("a loss that is not finite"))
    assert not any(process_is_alive(pid) for pid in pids)
    assert stubborn._last_words().outcome == "stopped", "it was told to, whatever it says"

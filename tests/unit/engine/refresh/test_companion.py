"""Companions: what their ranks learn of their ends, with small programs in their place."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.coordination.coordinator import PeerError
from engine.errors import CoordinationError, SparringError
from engine.refresh.companion import FAILED, FINISHED, STOPPED, CompanionCrash, Companions, Ended, Order, ended_path
from engine.reliability.preemption import PREEMPTION, Preempted
from engine.reliability.processes import process_is_alive
from engine.run import Refresher, Run

WORDS = """
import json, os, sys, time
order = json.loads(sys.argv[-1])
def end(outcome, **more):
    path = f"{order['folder']}/ended-{order['number']:05d}.json"
    words = {"token": order["token"], "number": order["number"], "rank": order["rank"], "outcome": outcome, **more}
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
def start(open_run: Callable[..., Run], tmp_path: Path) -> Iterator[Callable[..., Companions]]:
    run, started = open_run(), list[Companions]()

    def start_(program: str, *, own: int = 1, num_companions: int = 1) -> Companions:
        """Start this rank's companions, the first ones of all."""
        run.companion_command = (sys.executable, "-S", "-c", program)
        folder = str(tmp_path)
        orders = [
            Order(str(run.folder.path), "001", folder, number, num_companions, 0, "cpu", "", "n", "t", 5.0, 1.0)
            for number in range(own)
        ]
        some = (min(os.sched_getaffinity(0)),)
        told = [(order, Refresher("cpu", {"OF_ITS_OWN": str(order.number)}, some)) for order in orders]
        shared = {"folder": tmp_path, "token": "t", "num_companions": num_companions}
        started.append(Companions(run, told, "the refresh beside it", **shared))  # type: ignore[arg-type]
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


def test_one_has_the_cores_that_its_place_names(start: Callable[..., Companions]) -> None:
    """Symptom: all that a starter binds the first rank to would be had by all companions of a host."""
    (process,) = start(HANGS)._own
    assert os.sched_getaffinity(process._process.pid) == {min(os.sched_getaffinity(0))}


def test_one_that_finishes_is_timed(start: Callable[..., Companions]) -> None:
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
    program: str, kind: type[Exception], told: str, start: Callable[..., Companions]
) -> None:
    """Symptom: what was told would be that the run was asked to stop."""
    companion = start(program)
    wait_for(lambda: PREEMPTION.requested)
    with pytest.raises(kind, match=f"(?s){told}"):
        companion.end_with(PREEMPTION.stop_here("ranker/1, step 3"))
    with pytest.raises(kind, match=f"(?s){told}"):
        companion.join()


def test_one_that_fails_on_another_rank_is_that_ranks(start: Callable[..., Companions], tmp_path: Path) -> None:
    companion = start(HANGS, num_companions=2)
    words = {"token": "t", "number": 1, "rank": 1, "outcome": "failed", "message": "no space", "code": 2}
    ended_path(tmp_path, 1).write_text(json.dumps(words))
    wait_for(lambda: PREEMPTION.requested)
    companion.kill()
    with pytest.raises(PeerError, match="failed on rank 1: no space"):
        companion._judge(companion._known())


def test_one_that_lost_another_which_was_told_to_stop_has_not_failed(start: Callable[..., Companions]) -> None:
    """Symptom: a run that was asked to stop would end with the code of a lost rank, on some ranks."""
    companion = start(HANGS, num_companions=2)
    follows = Ended("t", 0, 0, FAILED, message="rank 1 stopped", code=75, follows=True)
    companion._judge([follows, Ended("t", 1, 1, STOPPED)])
    with pytest.raises(CoordinationError, match="rank 1 stopped"):
        companion._judge([follows, Ended("t", 1, 1, FINISHED)])


def test_a_rank_without_companions_waits_for_those_of_others(start: Callable[..., Companions], tmp_path: Path) -> None:
    """Symptom: it would wait in a collective, whose timeout is minutes, for a refresh that takes hours."""
    companions = start(HANGS, own=0, num_companions=2)
    waiting = threading.Thread(target=companions.join)
    waiting.start()
    for number in (0, 1):
        assert not companions._all_have_ended()
        words = {"token": "t", "number": number, "rank": 1, "outcome": "finished"}
        ended_path(tmp_path, number).write_text(json.dumps(words))
    waiting.join(30)
    assert not waiting.is_alive()
    assert companions.seconds is None


def test_a_rank_that_is_asked_to_stop_stops_those_of_all_ranks(start: Callable[..., Companions]) -> None:
    """Symptom: the others' would go on, while it waits for their ends until its timeout."""
    first, without = start(OBEYS, own=2, num_companions=2), start(HANGS, own=0, num_companions=2)
    PREEMPTION.interrupt("SIGTERM")
    waiting = threading.Thread(target=without.join)
    waiting.start()
    wait_for(without._asked.exists)
    PREEMPTION.requested = False  # of another process
    with pytest.raises(Preempted):
        first.join()
    waiting.join(30)
    assert [words.outcome for words in without._known()] == ["stopped"] * 2


def test_one_of_several_that_dies_has_its_words_said_for_all_ranks_to_read(
    start: Callable[..., Companions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.refresh.companion._GRACE_SECONDS", 0.1)
    program = WORDS + "time.sleep(60) if order['number'] == 0 else os._exit(int(os.environ['OF_ITS_OWN']) + 8)"
    companions, without = start(program, own=2, num_companions=2), start(HANGS, own=0, num_companions=2)
    wait_for(lambda: PREEMPTION.requested)
    with pytest.raises(CoordinationError, match=r"ended with 9 and without a word"):
        companions.join()
    told = [(words.number, words.outcome) for words in without._known()]
    assert told == [(0, STOPPED), (1, FAILED)]


def test_a_request_stops_both(start: Callable[..., Companions]) -> None:
    companion = start(OBEYS)
    PREEMPTION.interrupt("SIGTERM")
    with pytest.raises(Preempted, match=r"stopped at the refresh beside it \(SIGTERM\)"):
        companion.join()
    assert [words.outcome for words in companion._known()] == ["stopped"]


def test_one_that_does_not_stop_is_killed_and_an_error_of_the_training_ends_it(
    start: Callable[..., Companions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.refresh.companion._GRACE_SECONDS", 0.1)
    stubborn, other = start(HANGS), start(HANGS)
    pids = [process._process.pid for one in (stubborn, other) for process in one._own]
    stubborn.end_with(PREEMPTION.stop_here("ranker/1, step 3"))
    other.end_with(ValueError("a loss that is not finite"))
    assert not any(process_is_alive(pid) for pid in pids)
    assert [words.outcome for words in stubborn._known()] == ["stopped"], "it was told to, whatever it says"

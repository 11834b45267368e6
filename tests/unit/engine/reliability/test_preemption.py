"""A request to stop is a flag and a deadline, whatever the process is doing; each case is a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.distributed.processes import ROOT

BEGIN = """
import ctypes, os, signal, sys, time
from engine.reliability.preemption import PREEMPTION
def wait():
    deadline = time.monotonic() + 60
    while not PREEMPTION.requested and time.monotonic() < deadline:
        time.sleep(0.01)
"""
CASES = {
    "flag": """
PREEMPTION.listen(60)
print(PREEMPTION.requested)
os.kill(os.getpid(), signal.{signal})
wait()
print(PREEMPTION.requested, PREEMPTION.stop_here("ranker/1, step 3"))
""",
    "deadline": """
PREEMPTION.at_deadline(lambda: print("last words", flush=True))
PREEMPTION.listen(0.2)
os.kill(os.getpid(), signal.{signal})
begin = time.monotonic()
while time.monotonic() < begin + 60:
    ctypes.CDLL(None).usleep(900000)  # C code, to which no Python handler comes
print("never")
""",
    "child": """
PREEMPTION.listen(60)
reading, writing = os.pipe()
child = os.fork()
if not child:
    os.write(writing, b"ready")
    time.sleep(60)
    os._exit(0)
os.read(reading, 5)
os.kill(child, signal.{signal})
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0, PREEMPTION.requested)
time.sleep(0.2)
print(PREEMPTION.requested)
""",
    "other signals": """
PREEMPTION.listen(60)
signal.signal(signal.SIGUSR2, lambda *_: print("usr2", flush=True))
os.kill(os.getpid(), signal.SIGUSR2)
time.sleep(0.2)
print(PREEMPTION.requested)
""",
}


def run(case: str, number: str = "SIGTERM") -> tuple[int, list[str], float]:
    begin = time.monotonic()
    code = BEGIN + CASES[case].replace("{signal}", number)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert ended.stderr == ""
    return ended.returncode, ended.stdout.splitlines(), time.monotonic() - begin


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_a_request(number: str) -> None:
    message = f"stopped at ranker/1, step 3 ({number}); the same command goes on from there."
    assert run("flag", number)[:2] == (0, ["False", f"True {message}"])


def test_a_process_that_does_not_come_to_an_end_is_ended() -> None:
    """Symptom guarded against: a rank inside a collective operation hears of no signal and is killed."""
    code, told, seconds = run("deadline")
    assert (code, told) == (85, ["last words"])
    assert seconds < 50


def test_the_end_of_a_forked_child_is_no_request() -> None:
    """Symptom guarded against: a worker that is ended tells its parent, through the pipe they share, to stop."""
    assert run("child")[:2] == (0, ["True False", "False"])


def test_other_signals_are_no_request() -> None:
    assert run("other signals")[:2] == (0, ["usr2", "False"])

"""Real worlds in which one rank is stopped, killed, stuck or wrong, or is asked to stop: all end, and one says why.

The worlds mostly wait, so they are started side by side; each test then looks at one of them.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.status import STOPPED, read_state
from tests.distributed.processes import RankResult, report, run_ranks
from tests.faults.small_run import FAULT_STEP, STEPS, STOPPED_SECONDS, UNITS

TARGET = "tests.faults.small_run:main"
HOST = socket.gethostname()
AT_ONCE = 6
PATIENCE = 240.0
"""Of a test, on a busy machine; the ranks' own timeouts are seconds, so that a hang fails the test."""
TIMEOUT = {"TEST_TIMEOUT": "5"}
IN_COLLECTIVE = {**TIMEOUT, "TEST_COLLECTIVE_SECONDS": "5"}
AT_MEETING = {**TIMEOUT, "TEST_FAULT_AT": "meeting"}

WORLDS: dict[str, tuple[str, int, dict[str, str]]] = {
    "stopped under mpirun": ("mpirun", 3, {"TEST_FAULT": "SIGSTOP", **TIMEOUT}),
    "killed under deepspeed": ("deepspeed", 2, {"TEST_FAULT": "SIGKILL", **TIMEOUT}),
    "rank 0 is stopped": ("store", 3, {"TEST_FAULT": "stopped for a time", "TEST_FAULT_RANK": "0", **AT_MEETING}),
    "stuck in a collective": ("store", 2, {"TEST_FAULT": "hang", **IN_COLLECTIVE}),
    "stuck before a barrier": ("store", 2, {"TEST_FAULT": "hang", **AT_MEETING}),
    "raises under mpirun": ("mpirun", 2, {"TEST_FAULT": "raise"}),
    "raises under deepspeed": ("deepspeed", 3, {"TEST_FAULT": "raise"}),
    "all raise": ("store", 2, {"TEST_FAULT": "raise", "TEST_FAULT_RANK": "all"}),
    "mpirun is asked": ("mpirun", 2, {"TEST_FAULT": "tell the starter", "TEST_SIGNAL": "SIGUSR1"}),
    "one rank is asked": ("store", 2, {"TEST_FAULT": "SIGUSR1"}),
    "deepspeed's launcher is ended": ("deepspeed", 2, {"TEST_FAULT": "tell the starter", "TEST_SIGNAL": "SIGTERM"}),
    "asked in a pass": ("store", 2, {"TEST_FAULT": "SIGUSR1", "TEST_FAULT_AT": "units"}),
    "asked but stuck": ("store", 2, {"TEST_FAULT": "SIGUSR1, then hang", "TEST_PREEMPTION_SECONDS": "2"}),
}


@dataclass(frozen=True)
class Ended:
    """A world that is over."""

    folder: Path
    results: list[RankResult]

    @property
    def codes(self) -> set[int]:
        return {result.returncode for result in self.results}

    @property
    def told(self) -> str:
        """What the ranks told the person at the terminal."""
        lines = [line for result in self.results for line in result.stderr.splitlines() if line.startswith("[rank")]
        return "\n".join(lines)

    @property
    def last_error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "last_error.json").read_text())
        return found

    def stacks(self, rank: int) -> str:
        return (self.folder / "stacks" / f"rank-{rank:05d}.txt").read_text()

    def __str__(self) -> str:
        return report(self.results)


Worlds = dict[str, Future[Ended]]


def end_of(name: str, folder: Path) -> Ended:
    launcher, world_size, env = WORLDS[name]
    results = run_ranks(TARGET, world_size, launcher, PATIENCE, {"TEST_FOLDER": str(folder), **env})
    return Ended(folder, results)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Worlds]:
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(end_of, name, tmp_path_factory.mktemp("world") / "run")
            for name in WORLDS
            if name in asked
        }


@pytest.fixture
def ended(worlds: Worlds, name: str) -> Ended:
    return worlds[name].result()


def world(name: str) -> pytest.MarkDecorator:
    assert name in WORLDS
    return pytest.mark.parametrize("name", [name])


# --- nobody waits for ever -------------------------------------------------------------------------------------------


@world("stopped under mpirun")
def test_a_stopped_rank_ends_those_that_wait_for_it_in_a_collective(ended: Ended) -> None:
    """Symptom: two ranks waited in C code for a third that had got SIGSTOP, until gloo's own timeout or for ever."""
    assert ended.codes == {75}, ended
    assert ended.told.count("has given no sign for") == 1, ended
    assert f"rank 1 (host {HOST}, pid " in ended.told
    assert f"it was last seen in steps, step {FAULT_STEP} of {STEPS}" in ended.told
    assert "all_reduce" in ended.stacks(ended.last_error["rank"])
    assert ended.last_error["stage"] == "steps"


@world("killed under deepspeed")
def test_a_killed_rank_is_named_by_one_that_lost_it(ended: Ended) -> None:
    assert 0 not in ended.codes, ended
    assert ended.told.count("has died without a word") == 1, ended
    assert f"rank 1 (host {HOST}, pid " in ended.told
    assert f"This rank was in steps, step {FAULT_STEP} of {STEPS}" in ended.told
    assert "Traceback" not in str(ended), "a lost connection is no error of the program"
    assert ended.last_error["code"] == 75


@world("rank 0 is stopped")
def test_a_stopped_rank_0_is_named_and_ends_itself_when_it_wakes(ended: Ended) -> None:
    """Rank 0 hosts the store, so no message of the coordinator's can say that it is gone."""
    assert 0 not in ended.codes, ended
    assert [result.returncode for result in ended.results[1:]] == [75, 75], ended
    told = [line for line in ended.told.splitlines() if "no sign" in line or "did not come" in line]
    assert len(told) == 1, ended
    assert f"rank 0 (host {HOST}" in told[0]
    assert "barrier 'the meeting'" in told[0], "what was waited for"
    assert float(WORLDS["rank 0 is stopped"][2]["TEST_TIMEOUT"]) < STOPPED_SECONDS


@world("stuck in a collective")
def test_a_rank_that_does_not_come_to_a_collective_is_named_with_where_it_is(ended: Ended) -> None:
    """It lives and beats, so only the collective's own timeout shows that it is stuck."""
    assert ended.codes == {75}, ended
    assert ended.told.count("a collective operation failed in steps, step") == 1, ended
    assert f"Not in it: rank 1 (host {HOST}, pid " in ended.told
    assert "in hurt (small_run.py:" in ended.told
    assert "hurt" in ended.stacks(1)


@world("stuck before a barrier")
def test_a_rank_that_does_not_come_to_a_barrier_is_named_with_where_it_is(ended: Ended) -> None:
    assert ended.codes == {75}, ended
    assert ended.told.count("barrier 'the meeting' waited 5 s") == 1, ended
    assert f"rank 1 (host {HOST}) did not come" in ended.told
    assert f"rank 1 (host {HOST}, pid " in ended.told
    assert "in meeting; in hurt (small_run.py:" in ended.told


@pytest.mark.parametrize("name", ["raises under mpirun", "raises under deepspeed"])
def test_one_ranks_traceback_is_told_once(ended: Ended) -> None:
    """Symptom: the others, inside a collective operation, told of lost connections with tracebacks of their own."""
    assert ended.codes == {1}, ended
    assert str(ended).count("Traceback") == 1, ended
    assert ended.told.count("ZeroDivisionError: an error of the program") == 1
    assert {line.split("]")[0] for line in ended.told.splitlines()} == {f"[rank 1 on {HOST}"}
    assert (ended.last_error["rank"], ended.last_error["step"]) == (1, FAULT_STEP)
    assert "Traceback" in ended.last_error["traceback"]


@world("all raise")
def test_an_error_that_all_ranks_have_is_told_once(ended: Ended) -> None:
    assert ended.codes == {1}, ended
    assert str(ended).count("Traceback") == 1, ended


# --- asked to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mpirun is asked", "one rank is asked"])
def test_all_ranks_stop_at_the_same_step(ended: Ended) -> None:
    assert ended.codes == {85}, ended
    assert ended.told.count("stopped at steps, step") == 1, ended
    done = int((ended.folder / "done").read_text())
    assert FAULT_STEP < done <= FAULT_STEP + 20, "the step was finished, and not many more"
    assert read_state(ended.folder).code == STOPPED


@world("mpirun is asked")
def test_the_same_command_goes_on(ended: Ended, name: str) -> None:
    done = int((ended.folder / "done").read_text())
    again = end_of(name, ended.folder)
    assert again.codes == {0}, again
    stages = json.loads((ended.folder / "ledger.json").read_text())["stages"]
    assert stages["steps"]["result"] == {"from": done}


@world("asked in a pass")
def test_a_pass_over_the_corpus_stops_with_what_is_finished(ended: Ended, name: str) -> None:
    assert ended.codes == {85}, ended
    assert ended.told.count("stopped at ") == 1, ended
    finished = len(list(ended.folder.glob("unit-*")))
    assert 2 <= finished < UNITS
    again = end_of(name, ended.folder)
    assert again.codes == {0}, again
    stages = json.loads((ended.folder / "ledger.json").read_text())["stages"]
    assert stages["units"]["result"] == {"missing": UNITS - finished}


@world("deepspeed's launcher is ended")
def test_ranks_finish_their_step_when_deepspeeds_launcher_gets_sigterm(ended: Ended) -> None:
    """It passes the signal on and waits for half a minute; what it returns is 1, whatever the ranks return."""
    assert ended.codes == {1}, ended
    assert (ended.last_error["kind"], ended.last_error["code"]) == ("preempted", 85)
    assert (ended.folder / "done").exists()


@world("asked but stuck")
def test_a_run_that_cannot_come_to_a_stop_is_ended_in_time(ended: Ended) -> None:
    assert ended.codes == {85}, ended
    assert "not at a place to stop in time" in ended.told
    assert ended.last_error["code"] == 85
    assert "hurt" in ended.stacks(1)


def test_the_worlds_of_this_file_are_all_looked_at(request: pytest.FixtureRequest) -> None:
    """A world that no test names would be no test."""
    source = Path(__file__).read_text()
    assert [name for name in WORLDS if source.count(f'"{name}"') < 2] == []

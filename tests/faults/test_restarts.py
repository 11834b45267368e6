"""`python -m launcher supervise` starts a run again after a failure, says why and how often, and knows when not to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.e2e.starts import TINY, Ended, Started, Zygote

ONE_RANK = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from tests.faults.small_run import main
sys.exit(main())
"""
"""A start of the small run in a world of one."""

WORDS: dict[str, tuple[list[str], list[str], str]] = {
    # name -> options, environment of the run (or none, for a start that ends with this code), what starts it
    "fails once": (["--max-restarts", "2"], ["TEST_FAULT=raise"], ""),
    "fails each time": (["--max-restarts", "5"], ["TEST_FAULT=raise", "TEST_FAULT_EACH_TIME=1"], ""),
    "loses its starter": ([], ["TEST_FAULT=tell the starter, then hang", "TEST_SIGNAL=SIGKILL"], "a shell"),
    "is asked to stop": ([], ["TEST_FAULT=tell the supervisor"], ""),
    "refuses": ([], [], "2"),
    "is preempted": ([], [], "85"),
    "crashes early": (["--max-restarts", "5"], [], "1"),
    "may not be started again": (["--max-restarts", "0"], [], "1"),
}


@dataclass(frozen=True)
class Supervised:
    """A supervisor that has ended."""

    folder: Path
    ended: Ended

    @property
    def num_starts(self) -> int:
        """How often a rank opened the run folder."""
        path = self.folder / "starts.json"
        return len(json.loads(path.read_text())) if path.exists() else 0

    @property
    def num_calls(self) -> int:
        """How often the command was called at all."""
        return len((self.folder.parent / "calls").read_text().splitlines())


def launch(zygote: Zygote, name: str, folder: Path) -> Started:
    options, env, starter = WORDS[name]
    script = folder.parent / "run.py"
    calls = f"open({str(folder.parent / 'calls')!r}, 'a').write('called\\n')\n"
    script.write_text(calls + (f"raise SystemExit({starter})" if starter.isdigit() else ONE_RANK))
    run = [sys.executable, str(script), "--config", str(TINY), f"run.path={folder}"]
    if starter == "a shell":  # that is the parent of the rank, and does not pass on its end
        run = ["bash", "-c", '"$0" "$@" & wait', *run]
    command = ["env", f"TEST_FOLDER={folder}", "TEST_FAULT_RANK=0", *env, *run]
    return Started([zygote._fork(["launcher", "supervise", *options, "--", *command], "launcher", {})])


@pytest.fixture(scope="module")
def started(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Started]]:
    """All of them at once: they mostly wait for processes to begin."""
    folders = {name: tmp_path_factory.mktemp("supervised") / "run" for name in WORDS}
    return {name: (folder, launch(zygote, name, folder)) for name, folder in folders.items()}


@pytest.fixture
def supervised(started: dict[str, tuple[Path, Started]], name: str) -> Supervised:
    folder, running = started[name]
    return Supervised(folder, running.wait())


def case(name: str) -> pytest.MarkDecorator:
    assert name in WORDS
    return pytest.mark.parametrize("name", [name])


@case("fails once")
def test_a_failure_is_started_again_with_reason_and_count(supervised: Supervised) -> None:
    assert supervised.ended.code == 0, supervised.ended.err
    assert supervised.num_starts == 2
    assert "restart 1 of 2" in supervised.ended.err
    assert "restart 2 of 2" not in supervised.ended.err
    assert "the start failed in steps, after step 4 (exit code 1): ZeroDivisionError on rank 0" in supervised.ended.err


@case("fails each time")
def test_a_failure_that_repeats_at_the_same_step_is_the_end(supervised: Supervised) -> None:
    assert supervised.ended.code == 1, supervised.ended.err
    assert supervised.num_starts == 2
    assert "failed twice at the same place, in steps, after step 4" in supervised.ended.err


@case("loses its starter")
def test_ranks_that_a_dead_starter_leaves_behind_are_ended_first(supervised: Supervised) -> None:
    """Symptom: with its launcher killed, `deepspeed` said 0 and the ranks went on beside the ones started anew."""
    assert supervised.ended.code == 0, supervised.ended.err
    assert supervised.num_starts == 2
    assert "which its starter left behind" in supervised.ended.err
    assert "ended without a word" in supervised.ended.err


@case("is asked to stop")
def test_a_request_to_the_supervisor_reaches_the_ranks(supervised: Supervised) -> None:
    assert supervised.ended.code == 85, supervised.ended.err
    assert supervised.num_starts == 1
    assert f"(the file {supervised.folder / 'stop'})" in supervised.ended.err
    assert not (supervised.folder / "stop").exists()


@pytest.mark.parametrize(("name", "code"), [("refuses", 2), ("is preempted", 85)])
def test_what_a_restart_would_not_mend_is_not_started_again(supervised: Supervised, code: int) -> None:
    assert supervised.ended.code == code, supervised.ended.err
    assert supervised.num_calls == 1


@case("crashes early")
def test_two_failures_before_the_run_began_are_the_end(supervised: Supervised) -> None:
    assert supervised.ended.code == 1, supervised.ended.err
    assert supervised.num_calls == 2
    assert "no rank came as far as opening the run folder" in supervised.ended.err


@case("may not be started again")
def test_no_more_restarts_than_allowed(supervised: Supervised) -> None:
    assert supervised.ended.code == 1, supervised.ended.err
    assert supervised.num_calls == 1
    assert "which is all that --max-restarts allows" in supervised.ended.err


def test_a_command_that_starts_no_run_is_refused(zygote: Zygote) -> None:
    ended = zygote.launcher("supervise", "--", "echo", "hello")
    assert ended.code == 2
    assert "the command starts no run: echo hello" in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("own", [None, "-p 2222"])
def test_starters_are_told_to_notice_hosts_that_vanish(tmp_path: Path, own: str | None) -> None:
    """Symptom: the ranks have ended, and `deepspeed` waits for the ssh of a host that has lost its power."""
    told = tmp_path / "told"
    script = f"""
import sys
from pathlib import Path
from engine.run import RunFolder
from launcher.commands import supervise as restarts
script = "import os, sys; open(sys.argv[1], 'w').write(os.environ['PDSH_SSH_ARGS_APPEND'])"
restarts._start([sys.executable, "-c", script, {str(told)!r}], RunFolder(Path({str(tmp_path)!r})), [])
"""
    name = "PDSH_SSH_ARGS_APPEND"
    env = {key: value for key, value in os.environ.items() if key != name} | ({name: own} if own else {})
    subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, check=True)
    assert told.read_text() == (own or "-o ServerAliveInterval=15 -o ServerAliveCountMax=4")

"""Hosts asked over ssh, by srun and here: what refuses, hangs or babbles is told, and no word is ever executed.

`ssh` is a stand-in on PATH that does to its command what sshd does: it hands the text to a shell.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.reliability.exit_codes import EXIT_REFUSED
from launcher.preflight import command, hosts
from launcher.preflight.facts import ROOT
from launcher.preflight.hosts import Conversations, local_words, srun_words, ssh_words
from launcher.preflight.records import Judgement, Listening, Mark
from launcher.preflight.trial import changed_by_a_shell, trial_words, try_world, words_read_by_shells
from shards.errors import DataError

RUN_IT = 'while [ "$1" != -- ]; do shift; done; exec sh -c "$3"'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def refusal(folder: Path, script: str, hello_seconds: float = 20.0) -> tuple[str, str]:
    """Return fact and remedy of a host behind such an ssh."""
    stand_in(folder, "ssh", script)
    with Conversations(["node-1"], ssh_words, hello_seconds) as conversations:
        assert conversations.reached == []
        told = conversations.unreachable["node-1"]
        return told.fact, told.remedy


REFUSALS = [
    ("ssh: Could not resolve hostname node-1: Name or service not known", 255, "its name is not known", "/etc/hosts"),
    ("ssh: connect to host node-1 port 22: Connection refused", 255, "nothing listens on its ssh port", "start sshd"),
    ("ssh: connect to host node-1 port 22: Connection timed out", 255, "it does not answer", "firewall"),
    ("ssh: connect to host node-1 port 22: No route to host", 255, "there is no route", "up and on the network"),
    ("root@node-1: Permission denied (publickey).", 255, "it refuses the login", "ssh-copy-id node-1"),
    ("Host key verification failed.", 255, "its host key is not known here", "log in once by hand (ssh node-1)"),
    (
        "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
        255,
        "not the one that is known",
        "ssh-keygen -R node-1",
    ),
    ("Connection closed by 10.0.0.1 port 22", 255, "it closed the connection", "MaxStartups"),
    (
        "env: '/env/bin/python': No such file or directory",
        127,
        f"the Python of this environment ({sys.executable})",
        "share the environment",
    ),
    (
        f"env: cannot change directory to '{ROOT}': No such file or directory",
        125,
        f"the project's folder {ROOT} is not there",
        "share the folder",
    ),
    (
        "python: Error while finding module specification (ModuleNotFoundError: No module named 'launcher')",
        1,
        "Python there lacks a module",
        "install the same environment",
    ),
]


@pytest.mark.parametrize(("printed", "code", "fact", "remedy"), REFUSALS, ids=[r[2][:30] for r in REFUSALS])
def test_each_refusal_has_its_remedy(programs: Path, printed: str, code: int, fact: str, remedy: str) -> None:
    told = refusal(programs, f'cat >&2 <<"END"\n{printed}\nEND\nexit {code}')
    assert fact in told[0]
    assert printed.splitlines()[0].strip("@ ")[:60] in told[0] or printed.splitlines()[-1][:60] in told[0]
    assert remedy in told[1]


def test_ssh_that_hangs_is_ended(programs: Path) -> None:
    fact, remedy = refusal(programs, f"echo $$ > {programs}/pid; exec sleep 600", hello_seconds=0.5)
    assert fact == "it did not answer within 0.5 s"
    assert "log in by hand" in remedy
    with pytest.raises(ProcessLookupError):
        os.kill(int((programs / "pid").read_text()), 0)


def test_ssh_that_babbles_is_quoted(programs: Path) -> None:
    fact, remedy = refusal(programs, "echo 'This account is currently not available.'; exit 1")
    assert "printed 'This account is currently not available.' and ended with code 1" in fact
    assert "`ssh node-1 true`" in remedy
    assert "ended with code 3 without a word" in refusal(programs, "exit 3")[0]


def test_absent_ssh_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with Conversations(["node-1"], ssh_words) as conversations:
        assert "ssh cannot be started" in conversations.unreachable["node-1"].fact


def test_greeting_of_a_login_shell_does_not_disturb(programs: Path) -> None:
    """Symptom: a line that ~/.bashrc printed was taken for the answer."""
    stand_in(programs, "ssh", f"echo 'Welcome {{to}} the cluster'; {RUN_IT}")
    with Conversations(["node-1", "node-2"], ssh_words) as conversations:
        assert conversations.reached == ["node-1", "node-2"]
        offsets = conversations.clock_offsets()
        assert all(abs(clock.offset_seconds) < 1 for clock in offsets.values())
        assert conversations.ask("programs", dict[str, str | None], names=["ssh"])["node-2"] == {
            "ssh": str(programs / "ssh")
        }


def test_host_answers_before_it_loads_a_large_library() -> None:
    """A host that cannot be reached was told after six seconds, in which all others imported torch."""
    script = """
import sys
import launcher.preflight.probe
print(sorted({"torch", "scipy", "transformers", "deepspeed", "faiss"} & set(sys.modules)))
"""
    words = [sys.executable, "-c", script]
    assert subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"


def test_port_of_one_host_is_reached_by_the_others(programs: Path) -> None:
    stand_in(programs, "ssh", RUN_IT)
    with Conversations(["node-1", "node-2"], ssh_words) as conversations:
        listening = conversations.ask("listen", Listening, ["node-1"], token="a1b2")["node-1"]
        tried = {"addresses": ["127.0.0.1", "no-such-host.invalid"], "port": listening.port}
        reached = conversations.ask("reach", dict[str, str | None], ["node-2"], token="a1b2", **tried)["node-2"]
        assert reached["127.0.0.1"] is None
        assert reached["no-such-host.invalid"]
        namesake = conversations.ask("reach", dict[str, str | None], ["node-2"], token="ffff", **tried)["node-2"]
        assert namesake["127.0.0.1"] == "another process answers there"


def test_host_that_goes_away_in_the_middle_is_told(programs: Path) -> None:
    stand_in(programs, "ssh", f"echo $$ > {programs}/pid; {RUN_IT}")
    with Conversations(["node-1"], ssh_words) as conversations:
        os.killpg(int((programs / "pid").read_text()), 9)
        assert conversations.ask("time", dict[str, float]) == {}
        assert "ended with code -9" in conversations.unreachable["node-1"].fact


def test_question_that_fails_there_is_told() -> None:
    with Conversations(["here"], local_words) as conversations:
        assert conversations.ask("no such function", Mark) == {}
        assert "it could not answer" in conversations.unreachable["here"].fact


def test_answer_of_another_form_is_told() -> None:
    """Symptom guarded against: a host with other code answers, and the preflight ends in a traceback."""
    with Conversations(["here"], local_words) as conversations:
        assert conversations.ask("time", Mark) == {}
        assert "the answer (time) is damaged: nonce: Field required" in conversations.unreachable["here"].fact
        assert "same code" in conversations.unreachable["here"].remedy


EVIL = "a b'\"; touch executed; $(touch executed) `touch executed` &"


def test_nothing_that_a_user_wrote_is_executed(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, Python and values with blanks, quotes, `$(...)` and `;` in them, over a shell as ssh has it."""
    stand_in(programs, "ssh", RUN_IT)
    project, environment = tmp_path / f"project {EVIL}", tmp_path / f"python {EVIL}"
    project.symlink_to(ROOT)
    environment.mkdir()
    (environment / "python").symlink_to(Path(sys.executable).resolve())
    monkeypatch.setattr(hosts, "ROOT", project)
    monkeypatch.setattr(hosts.sys, "executable", str(environment / "python"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    before = set(ROOT.iterdir())
    with Conversations(["node-1"], ssh_words) as conversations:
        path = str(tmp_path / f"run {EVIL}")
        mark = conversations.ask("mark", Mark, path=path).get("node-1")
        assert mark is not None, conversations.unreachable
        assert Path(path).is_dir()
        conversations.ask("unmark", dict[str, float], path=path, mark=asdict(mark))
    assert set(ROOT.iterdir()) == before
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize("name", ["-oProxyCommand=touch", "$(touch", "a;touch", "a'b"])
def test_host_name_that_is_none_is_refused_before_anything(programs: Path, tmp_path: Path, name: str) -> None:
    stand_in(programs, "ssh", f"touch {tmp_path}/started")
    (tmp_path / "hostfile").write_text(f"{name} slots=1\n")
    with pytest.raises(DataError, match="cannot be a host name"):
        run(tmp_path, "--hostfile", str(tmp_path / "hostfile"))
    assert not (tmp_path / "started").exists()


# --- the command -----------------------------------------------------------------------------------------------------


def run(tmp_path: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    config = str(ROOT / "configs" / "tiny.yaml")
    return command.run_command(parser.parse_args(["--config", config, *words, f"run.path={tmp_path}/run $(x)"]))


def test_command_tells_all_hosts_in_one_table(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(
        programs, "ssh", f'case "$*" in *bad*) echo "Permission denied (publickey)." >&2; exit 255;; esac; {RUN_IT}'
    )
    stand_in(programs, "pdsh", "exit 0")
    (tmp_path / "hostfile").write_text("good slots=1\nbad slots=1\n")
    words = ["--hostfile", str(tmp_path / "hostfile"), "--no-world", f"data.path={tmp_path}/none"]
    assert run(tmp_path, *words) == EXIT_REFUSED
    told = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in told.splitlines()}
    assert rows["reach"].split()[1:3] == ["ok", "PROBLEM"]
    assert rows["software"].split()[1:3] == ["ok", "-"]
    assert "1. bad: reach: it refuses the login (Permission denied (publickey).)." in told
    assert "remedy: make a key without passphrase (or start ssh-agent) and bring it there: ssh-copy-id bad." in told
    text = " ".join(told.split())
    assert f"2. good: data: {tmp_path}/none cannot be read: No such file or directory." in text
    assert "preflight: 2 problems, " in told
    assert not (tmp_path / "run $(x)").exists(), "what was made to look is taken away"


def test_command_opens_a_world_where_nothing_speaks_against_it(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def start(words: list[str]) -> Judgement:
        started.append(words)
        return Judgement("failed", [("a small world ended with code 1", "see there", "error")])

    monkeypatch.setattr("launcher.preflight.trial.try_world", start)
    assert run(tmp_path) == EXIT_REFUSED
    assert "world: a small world ended with code 1" in capsys.readouterr().out
    assert "--preflight-only" in started[0]


def test_nodes_of_an_allocation_are_asked_by_srun(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(programs, "srun", f'echo "$@" >> {tmp_path}/started; exec {sys.executable} -m launcher.preflight.probe')
    stand_in(programs, "scontrol", '[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"')
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    asked: list[list[str]] = []

    def look(conversations: Conversations, *_: object) -> list[object]:
        asked.append(conversations.reached)
        return []

    monkeypatch.setattr(command, "_look", look)
    monkeypatch.setattr(command, "_print", lambda *_: None)
    assert run(tmp_path, "--nodes", "2") == 0
    assert asked == [["n1", "n2"]]
    lines = sorted((tmp_path / "started").read_text().splitlines())
    assert len(lines) == 2
    assert f"--chdir={ROOT} --nodelist=n1 {sys.executable} -m launcher.preflight.probe" in lines[0]
    with pytest.raises(ConfigError, match="--nodes 4 is asked for, but the allocation has 3"):
        run(tmp_path, "--nodes", "4")
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    with pytest.raises(ConfigError, match="this is no SLURM allocation"):
        run(tmp_path, "--nodes", "2")
    assert "--ntasks=1" in srun_words("n1")


# --- the trial -------------------------------------------------------------------------------------------------------


def test_trial_is_started_as_the_run_will_be() -> None:
    config, hostfile = Path("/c f.yaml"), Path("/h f")
    words = trial_words(config, launcher="openmpi", hostfile=hostfile, ranks=2, master="10.0.0.1")
    assert words[1:7] == ["--hostfile", "/h f", "--launcher", "openmpi", "--master_addr", "10.0.0.1"]
    assert words[7:11] == [str(ROOT / "launcher" / "run.py"), "--preflight-only", "--config", "/c f.yaml"]
    here = trial_words(config, launcher="none", hostfile=None, ranks=2, master=None)
    assert here[1:5] == ["-n", "2", "--oversubscribe", sys.executable]
    assert trial_words(config, launcher="none", hostfile=None, ranks=1, master=None)[0] == sys.executable
    srun = trial_words(config, launcher="srun", hostfile=None, ranks=3, master=None)
    assert srun[1:5] == ["-n", "3", "--map-by", "ppr:1:node"]


def test_trial_tells_how_it_ended() -> None:
    line = "12:00:01 preflight: 2 hosts, 2 ranks, all 15 checks passed in 0.2 s"
    assert try_world(["echo", line]) == Judgement("2 hosts, 2 ranks, all 15 checks passed in 0.2 s")
    (problem,) = try_world(["sh", "-c", "echo no way; exit 2"]).problems
    assert problem[0] == "a small world ended with code 2; it printed last:\n   | no way"
    routine = "node1: [2026-01-01 10:00:00,000] [INFO] [launch.py:170:main] dist_world_size=2"
    told = "node2: [rank 1 on node2] error: no way"
    (problem,) = try_world(
        ["sh", "-c", f"echo '{routine}'; echo '{told}'; echo 'MPI_ABORT was invoked'; exit 2"]
    ).problems
    assert problem[0].endswith(f"it printed last:\n   | {told}")
    (problem,) = try_world(["sh", "-c", f"echo '{routine}'; echo 'no way'; exit 2"]).problems
    assert problem[0].endswith("it printed last:\n   | no way")
    (problem,) = try_world(["sleep", "60"], timeout_seconds=0.3).problems
    assert "did not end within 0.3 s" in problem[0]
    (problem,) = try_world(["/nowhere/deepspeed"]).problems
    assert "cannot be started" in problem[0]


@pytest.mark.parametrize("path", ["/runs/a b", "/runs/$(touch x)", "/runs/a;b", "/runs/a'b"])
def test_words_that_a_remote_shell_would_change_are_refused(path: str) -> None:
    """Symptom: DeepSpeed's pdsh lets a shell of every host expand what a path holds."""
    words = trial_words(Path(path), launcher="pdsh", hostfile=Path("/h"), ranks=2, master=None)
    refused = changed_by_a_shell(words, [], "pdsh")
    assert refused is not None
    assert path in refused.problems[0][0]
    assert changed_by_a_shell(words, ["a=$x"], "openmpi") is None
    plain = trial_words(Path("/runs/a.yaml"), launcher="pdsh", hostfile=Path("/h"), ranks=2, master="10.0.0.1")
    assert changed_by_a_shell(plain, ["a=b c"], "pdsh") is None


def test_what_keeps_root_from_starting_mpirun_has_its_remedy() -> None:
    (problem,) = try_world(["sh", "-c", "echo 'by adding the --allow-run-as-root option'; exit 1"]).problems
    assert "starts nothing for root" in problem[0]
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in problem[1]


def test_words_that_a_remote_shell_would_read_are_found() -> None:
    """`data.path='a"b'` was `ab` on every host over pdsh, so that no rank could see the difference."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    values = [
        "a b",
        "it's b",
        'a"b"c',
        '"x"',
        "x#y",
        "#y",
        "a\tb",
        "{text}",
        "{a,b}",
        "{title} [SEP] {text}",
        "a\\b",
        "a\\b c",
    ]
    values += [
        "~/x",
        "a=~/x",
        "x~",
        "a[1]",
        "!x",
        "(y)",
        "(y) z",
        "a\nb",
        "a,b",
        "ü 中",
        "$HOME",
        "$HOME x",
        "a;b",
        "a;b c",
    ]
    values += ["`x`", "a&b", "*", "* x", "'x'", "1e-6", "50%", 'a "b" c', "[0.9,0.95]", "<", "|", "a\\"]
    runner = PDSHRunner.__new__(PDSHRunner)
    for word in (f"data.path={value}" for value in values):
        runner.args = argparse.Namespace(user_args=[word])
        (quoted,) = runner.parse_user_args()
        told = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True, check=False).stdout
        assert told == word or words_read_by_shells([word]) == [word]
    assert words_read_by_shells(["run.path=/x/%n"]), "pdsh puts the number of the host there"
    arrive = ["a=b", "data.path=/data/set #2", "data.template={title} [SEP] {text}", "x.betas=[0.9, 0.95]", "a=it's b"]
    assert words_read_by_shells(arrive) == []
    refused = changed_by_a_shell([], ["a=b", "run.path=$HOME/x"], "pdsh")
    assert refused is not None
    assert "'run.path=$HOME/x' would be read by a shell" in refused.problems[0][0]

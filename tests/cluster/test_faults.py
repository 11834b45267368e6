"""Hosts that vanish, are slow, refuse a login, have other software or a full disk: what is seen, and what goes on.

A fault ends or holds up a run; the same command on mended hosts ends with what an undisturbed run gives.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.runs import (
    Ended,
    Recorder,
    Running,
    begin_undisturbed,
    by_mpirun,
    by_openmpi,
    by_pdsh,
    home,
    left_running,
    recipe,
    results,
    undisturbed,
)
from tests.e2e.test_resume import checkpointed

IMPATIENT = {
    "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3",
    **{f"PRTE_MCA_oob_tcp_keepalive_{name}": value for name, value in (("time", "2"), ("intvl", "1"), ("probes", "3"))},
}
"""For the starters, which wait for a host that has vanished: pdsh's ssh for hours, mpirun for 8 minutes."""
HASTY = ("run.timeout_seconds=10", "run.heartbeat_seconds=0.5")


SLOWLY = "while sleep 0.1; do pkill -STOP -f '[l]auncher/run.py'; sleep 0.2; pkill -CONT -f '[l]auncher/run.py'; done"
"""Lets the ranks of a host run for a third of the time."""


# --- a node that vanishes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vanished:
    """A run from which node2 vanished, the same command afterwards, and what was left on the nodes in between."""

    folder: Path
    ended: Ended
    left: dict[str, str]
    again: Ended


@pytest.fixture(scope="module")
def vanished(lab: Lab) -> dict[str, Vanished]:
    """Under pdsh the link of node2 is cut and comes back; under mpirun node2 ends with all that ran on it."""
    place = lab.folder / "vanished"
    place.mkdir()
    hostfile, env = lab.hostfile(place / "hostfile"), home(place / "home")
    folders = {name: place / name for name in ("pdsh", "mpirun")}

    def start(name: str) -> Running:
        words = recipe(folders[name], *HASTY)
        if name == "pdsh":
            return Running(lab.login, by_pdsh(hostfile, words), {**env, **IMPATIENT})
        return Running(lab.login, by_mpirun(hostfile, words, "-x", "OMP_NUM_THREADS"), IMPATIENT)

    def until_it_vanishes(name: str, vanish: Callable[[], None]) -> Ended:
        running = start(name)
        running.wait_until(checkpointed(folders[name], "retriever", "warmup_retriever", 5))
        vanish()
        begin_undisturbed(lab)  # while this one waits
        return running.wait()

    cut = until_it_vanishes("pdsh", lab.nodes[1].cut_off)
    left_when_cut = {host.name: left_running(host, folders["pdsh"]) for host in lab.nodes}
    lab.nodes[1].connect()
    lost = until_it_vanishes("mpirun", lab.nodes[1].lose)
    left_when_lost = {"node1": left_running(lab.nodes[0], folders["mpirun"])}
    for host in (lab.login, lab.nodes[0]):  # the node comes back with another hardware address
        host.check("ip", "neigh", "flush", "dev", "eth0")
    lab.restart_node(2)
    again = {name: start(name) for name in folders}
    return {
        "pdsh": Vanished(folders["pdsh"], cut, left_when_cut, again["pdsh"].wait()),
        "mpirun": Vanished(folders["mpirun"], lost, left_when_lost, again["mpirun"].wait()),
    }


@pytest.mark.parametrize("name", ["pdsh", "mpirun"])
def test_nothing_is_left_on_the_nodes(vanished: dict[str, Vanished], name: str) -> None:
    """Symptom: ranks waited for the lost ones for ever, with their GPUs and the lock of the run folder."""
    assert vanished[name].left == dict.fromkeys(vanished[name].left, "")


@pytest.mark.parametrize("name", ["pdsh", "mpirun"])
def test_the_same_command_goes_on_to_the_same_end(lab: Lab, vanished: dict[str, Vanished], name: str) -> None:
    again = vanished[name].again
    assert again.code == 0, again
    assert "goes on" in again.text or "resume" in again.text, again
    assert results(vanished[name].folder) == results(undisturbed(lab))


def test_a_cut_link_is_told_by_the_side_that_is_seen(vanished: dict[str, Vanished]) -> None:
    """Symptom: the cut-off host was the first to tell it, to nobody, and the others ended without a word."""
    ended = vanished["pdsh"].ended
    assert ended.code != 0, ended
    told = [line for line in ended.errors if line.startswith("[rank 0 on node1] error")]
    assert len(told) == 1, ended
    assert "a collective operation failed in warmup_retriever, step " in told[0] or "rank 1 (host node2" in told[0]
    assert "rank 0 (host node1" not in told[0], "it blames the one that only waited"
    assert "Starting the same command again goes on from the last checkpoint" in told[0]
    assert "pdsh@login: node2: ssh exited with exit code 255" in ended.text
    assert "pdsh@login: node1: ssh exited with exit code 75" in ended.text


def test_a_lost_node_is_named_by_mpirun_or_a_rank(vanished: dict[str, Vanished]) -> None:
    """Mpirun itself returns 0 then, so that its code says nothing."""
    ended = vanished["mpirun"].ended
    by_mpirun_itself = "lost communication with a remote daemon" in ended.text and "on node node2" in ended.text
    by_rank_0 = any("rank 1 (host node2" in line for line in ended.errors)
    assert by_mpirun_itself or by_rank_0, ended


# --- a node that refuses logins --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """How starts over a node without sshd ended, and what was left on the other."""

    ended: dict[str, Ended]
    left: str


@pytest.fixture(scope="module")
def refused(lab: Lab) -> Refused:
    place = lab.folder / "refused"
    place.mkdir()
    hostfile = lab.hostfile(place / "hostfile")
    words = recipe(place / "run", "run.rendezvous_seconds=8")
    lab.nodes[1].stop_sshd()
    try:
        running = {
            "pdsh": Running(lab.login, by_pdsh(hostfile, words)),
            "mpirun": Running(lab.login, by_mpirun(hostfile, words)),
        }
        ended = {name: started.wait() for name, started in running.items()}
        return Refused(ended, left_running(lab.nodes[0], place / "run"))
    finally:
        lab.nodes[1].start_sshd()


def test_pdsh_and_the_ranks_say_who_has_not_come(refused: Refused) -> None:
    """Symptom: the ranks of the other hosts waited for ten minutes, and then told of a socket."""
    ended = refused.ended["pdsh"]
    assert "ssh: connect to host node2 port 22: Connection refused" in ended.text, ended
    (told,) = (line for line in ended.errors if "error: " in line)
    assert "[rank 0 on node1] error: 1 of 2 ranks have not come within 8 s: 1 (node2)" in told
    assert "look above for what ssh or these hosts said" in told
    assert "pdsh@login: node1: ssh exited with exit code 75" in ended.text
    assert ended.code != 0


def test_mpirun_says_which_host_it_did_not_reach(refused: Refused) -> None:
    ended = refused.ended["mpirun"]
    assert "ssh: connect to host node2 port 22: Connection refused" in ended.text, ended
    assert ended.code != 0
    assert not ended.errors, "no rank was started"


def test_nothing_runs_where_the_login_was_granted(refused: Refused) -> None:
    assert refused.left == ""


# --- a node with other software and too little space, then a slow one ------------------------------------------------


@dataclass(frozen=True)
class Mended:
    """Starts over an unfit node2, and the last command again when node2 is mended, but slow."""

    unlike: Ended
    folder_of_unlike: Path
    full: Ended
    folder: Path
    ended: Ended
    names: dict[str, Counter[str]]


@pytest.fixture(scope="module")
def mended(lab: Lab) -> Mended:
    """On node2 one run finds another webdataset and a small TMPDIR, the other a small disk at shards.cache."""
    place, node2 = lab.folder / "mended", lab.nodes[1]
    for folder in ("tmp", "cache", "packages", "of node2/webdataset-0.2.100.dist-info"):
        (place / folder).mkdir(parents=True)
    (place / "of node2/webdataset-0.2.100.dist-info/METADATA").write_text("Name: webdataset\nVersion: 0.2.100\n")
    hostfile, recorder = lab.hostfile(place / "hostfile"), Recorder(place)
    env = {**home(place / "home"), **recorder.env}
    command = by_openmpi(hostfile, recipe(place / "run", f"shards.cache={place / 'cache'}"))
    other = {"TMPDIR": str(place / "tmp"), "PYTHONPATH": str(place / "packages")}
    node2.check("mount", "--bind", place / "of node2", place / "packages")
    for folder in ("tmp", "cache"):
        node2.mount_small(place / folder, "8m")
    unlike = Running(
        lab.login, by_mpirun(hostfile, recipe(place / "unlike"), "-x", "TMPDIR", "-x", "PYTHONPATH"), other
    )
    full = Running(lab.login, command, env)
    ended = unlike.wait(), full.wait()
    for folder in ("packages", "tmp", "cache"):
        node2.unmount(place / folder)

    node2.mount_small(place / "cache", "200m")
    running = Running(lab.login, command, env)
    running.wait_until((place / "run" / "bm25").exists)
    slow = node2.start(["sh", "-c", SLOWLY])
    running.wait_until(checkpointed(place / "run", "retriever", "warmup_retriever", 5))
    os.killpg(slow.pid, signal.SIGKILL)
    node2.check("pkill", "-CONT", "-f", "launcher/run.py")
    last = running.wait()
    node2.unmount(place / "cache")
    return Mended(ended[0], place / "unlike", ended[1], place / "run", last, recorder.names(place / "run"))


def test_all_that_is_wrong_with_a_host_is_told_at_once_before_anything_is_computed(mended: Mended) -> None:
    """Symptom: one node's older package failed after hours, and the next start failed on its full disk."""
    ended = mended.unlike
    assert ended.code == 2, ended
    assert "[rank 0 on node1] error: the preflight found 2 problems; nothing was computed" in ended.errors
    told = ended.told
    assert f"software: webdataset is unlike: {version('webdataset')} on node1; 0.2.100 on node2" in told
    assert "install the same version on all hosts, or share one environment" in told
    assert f"node2: local disk: 8 MiB are free in {mended.folder_of_unlike.parent / 'tmp'} (temporary files)" in told
    assert "make space there, or set TMPDIR to another folder" in told
    assert re.search(r"^local disk +ok +PROBLEM", ended.text, re.MULTILINE), "one table, a column for each host"
    assert not list(mended.folder_of_unlike.glob("*")), "something was made"


def test_a_full_disk_of_one_host_is_told_with_host_path_and_bytes(mended: Mended) -> None:
    ended = mended.full
    assert ended.code == 2, ended
    (told,) = ended.errors
    assert told.startswith("[rank 1 on node2] error: the disk is too small for copies of the shards: ")
    assert re.search(rf"{mended.folder.parent / 'cache'}/\w+ needs \d+ bytes and \d+ to spare, 8388608 are free", told)
    assert "name another folder by shards.cache" in told


def test_with_more_space_and_a_slow_node_the_result_is_the_same(lab: Lab, mended: Mended) -> None:
    assert mended.ended.code == 0, mended.ended
    assert "the shards are read from" in mended.ended.text
    assert results(mended.folder) == results(undisturbed(lab))


def test_a_slow_node_is_given_less(mended: Mended) -> None:
    """Symptom: all nodes waited for the slowest, which had as many shards to encode as they."""
    unit = re.compile(r"index/zero-shot/(?!training/|labels\b).*\.(npy|lists)")  # what ranks are handed, one by one
    done = {host: sum(bool(unit.fullmatch(name)) for name in names) for host, names in mended.names.items()}
    assert sum(done.values()) == 10, done
    assert done["node2"] < done["node1"], done

"""A recipe over two hosts, by every way of starting it over a hostfile, gives what one host with two ranks gives."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.world.hostfile import parse_hostfile
from shards.errors import DataError
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

STARTERS = ("pdsh", "openmpi", "mpirun")
OF_RECIPE = ("pdsh", "mpirun")
"""That of Open MPI through `deepspeed` is in `test_faults`, on a slow node."""
TABLE = ["rank", "host", "device", "memory", "transport"]


@dataclass(frozen=True)
class Launched:
    """A recipe that has ended, and who gave which file its name."""

    folder: Path
    ended: Ended
    recorder: Recorder


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(lab: Lab) -> dict[str, Launched]:
    """The recipe over both hosts by each starter, all at once; name -> run folder, how it ended, its renames."""
    hostfile = lab.hostfile(lab.folder / "hostfile")
    begin_undisturbed(lab)
    running = {}
    for name in OF_RECIPE:
        folder = lab.folder / "launched" / name
        folder.mkdir(parents=True)
        words, recorder = recipe(folder / "run"), Recorder(folder)
        command = {
            "pdsh": by_pdsh(hostfile, words),
            "mpirun": by_mpirun(hostfile, words, "-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"),
        }[name]
        running[name] = folder / "run", Running(lab.login, command, {**recorder.env, **home(folder / "home")}), recorder
    return {name: Launched(folder, started.wait(), recorder) for name, (folder, started, recorder) in running.items()}


@pytest.mark.parametrize("name", OF_RECIPE)
def test_two_hosts_give_what_one_host_gives(lab: Lab, launched: dict[str, Launched], name: str) -> None:
    assert launched[name].ended.code == 0, launched[name].ended
    assert results(launched[name].folder) == results(undisturbed(lab))


@pytest.mark.parametrize("name", OF_RECIPE)
def test_one_table_shows_the_ranks_of_both_hosts(launched: dict[str, Launched], name: str) -> None:
    """Symptom: the ranks talked over docker0, whose address is the same on both hosts, or over 127.0.1.1."""
    lines = [line.removeprefix("node1: ") for line in launched[name].ended.text.splitlines()]
    (start,) = [number for number, line in enumerate(lines) if line.split() == TABLE]
    road = "store" if name == "pdsh" else "MPI"
    for rank, line in enumerate(lines[start + 2 : start + 4]):
        cells = re.split(r" {2,}", line.strip())
        assert cells[:3] == [str(rank), f"node{rank + 1}", "cpu, 1 thread"]
        assert re.fullmatch(r"\d+ of \d+ GiB free", cells[3])
        assert cells[4:] == [f"{road} + gloo over eth0 (10.77.0.1{rank + 1})"]


@pytest.mark.parametrize("name", OF_RECIPE)
def test_files_are_named_once_a_run_and_by_both_hosts(launched: dict[str, Launched], name: str) -> None:
    """Symptom: the index was merged, and the candidates were written, once on each node."""
    hosts = launched[name].recorder.names(launched[name].folder)
    assert hosts.keys() == {"node1", "node2"}
    for names in hosts.values():  # what ranks exchange while they train the lists is written anew by each iteration
        for file in [file for file in names if "/training/" in file]:
            del names[file]
    for part in ("shards/", "index/", "candidates/", "weights/", "export/"):
        named = {host: {file for file in names if file.startswith(part)} for host, names in hosts.items()}
        assert any(named.values()), f"nothing below {part} is recorded"
        assert not named["node1"] & named["node2"], part
    counts = sum(hosts.values(), Counter())
    twice = {file: n for file, n in counts.items() if n > 1 and file.startswith(("shards/", "index/", "candidates/"))}
    assert not twice


def test_the_folder_holds_what_that_of_one_host_holds(lab: Lab, launched: dict[str, Launched]) -> None:
    alike = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "events.out" not in path.name}
        for folder in (undisturbed(lab), *(one.folder for one in launched.values()))
    ]
    assert all(names == alike[0] for names in alike[1:])


# --- worlds without a recipe -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Met:
    """A world of `meet.py` that has ended, and what its ranks have seen, in their order."""

    ended: Ended
    ranks: list[dict[str, Any]]


def meet(folder: Path, *words: str) -> list[str]:
    folder.mkdir(parents=True)
    return ["tests/cluster/meet.py", f"folder={folder}", *words]


def met(running: dict[str, tuple[Path, Running]]) -> dict[str, Met]:
    """Wait for worlds that were started side by side."""
    ended = {}
    for name, (folder, started) in running.items():
        end = started.wait()
        ended[name] = Met(end, [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))])
    return ended


def places(one: Met) -> list[tuple[int, str, int, int, float]]:
    return [(rank["rank"], rank["host"], rank["local_rank"], rank["world_size"], rank["sum"]) for rank in one.ranks]


TWO_PLACES = [(0, "node1", 0, 2, 3.0), (1, "node2", 0, 2, 3.0)]

HANDED = {"NCCL_DEBUG": "WARN", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "3"}
AWKWARD = ["blanks=a  b", "dollar=$HOME", "host=$(hostname)", 'quotes=it\'s "quoted"', "end=a;b"]


@pytest.fixture(scope="module")
def worlds(lab: Lab) -> dict[str, Met]:
    """Worlds of hosts that have no eth0, with what users put into hostfiles, environment and words; all at once."""
    folder = lab.folder / "worlds"
    folder.mkdir()
    names, addresses = lab.hostfile(folder / "names"), lab.hostfile(folder / "addresses", by_name=False)
    addresses.write_text("# two nodes\n\n" + addresses.read_text().replace("\n", "  # the first\n", 1))
    assert [host.name for host in parse_hostfile(addresses)] == ["10.77.0.11", "10.77.0.12"]
    env, over = home(folder / "home", **HANDED), [word for name in HANDED for word in ("-x", name)]
    words = {
        name: meet(folder / name, *AWKWARD[: 1 if name == "pdsh" else None])
        for name in (*STARTERS, "one of two", "forced")
    }
    one = ["--include", "node2"]
    unlike = [*recipe(folder / "$(hostname)"), "data.path=$HOME"]
    commands = {
        "pdsh": by_pdsh(addresses, words["pdsh"]),
        "openmpi": by_openmpi(names, words["openmpi"]),
        "mpirun": by_mpirun(addresses, [*words["mpirun"], "network=10.77.0.0/24"], *over),
        "one of two": by_pdsh(names, words["one of two"][:2], *one, "--master_port", "29502"),
        "forced": by_pdsh(names, words["forced"][:2], *one, "--force_multi", "--master_port", "29503"),
        "expanded": by_pdsh(names, unlike, "--master_port", "29504"),
    }
    for host in lab.nodes:
        host.rename_interface("ib0")
    try:
        handed = {"pdsh": env, "openmpi": env}
        running = {name: Running(lab.login, command, handed.get(name, HANDED)) for name, command in commands.items()}
        return met({name: (folder / name, started) for name, started in running.items()})
    finally:
        for host in lab.nodes:
            host.rename_interface("eth0")


@pytest.mark.parametrize("name", STARTERS)
def test_each_host_has_its_rank(worlds: dict[str, Met], name: str) -> None:
    """Symptom: two worlds of one rank each, or two ranks 0 that each had local rank 0."""
    assert worlds[name].ended.code == 0, worlds[name].ended
    assert places(worlds[name]) == TWO_PLACES
    assert {rank["coordinator"] for rank in worlds[name].ranks} == {"store" if name == "pdsh" else "mpi"}
    assert {rank["environ"]["MASTER_ADDR"] for rank in worlds[name].ranks} == {"10.77.0.11"}


@pytest.mark.parametrize("name", STARTERS)
def test_variables_that_are_handed_over_reach_all_ranks(worlds: dict[str, Met], name: str) -> None:
    """By ~/.deepspeed_env for both launchers of `deepspeed`, by -x for `mpirun`."""
    for rank in worlds[name].ranks:
        assert {variable: rank["given"].get(variable) for variable in HANDED} == HANDED


def test_variables_that_are_only_set_do_not_reach_other_hosts(worlds: dict[str, Met]) -> None:
    """What the documentation warns of: a variable of the login host's shell means nothing to the ranks."""
    (rank,) = worlds["forced"].ranks
    assert {variable: rank["given"].get(variable) for variable in HANDED} == dict.fromkeys(HANDED)


@pytest.mark.parametrize("name", ["openmpi", "mpirun"])
def test_words_arrive_as_they_were_typed(worlds: dict[str, Met], name: str) -> None:
    for rank in worlds[name].ranks:
        assert [word for word in rank["argv"] if not word.startswith(("folder=", "network="))] == AWKWARD


def test_blanks_arrive_over_pdsh(worlds: dict[str, Met]) -> None:
    for rank in worlds["pdsh"].ranks:
        assert AWKWARD[0] in rank["argv"]


def test_words_that_a_remote_shell_has_made_unlike_are_refused(lab: Lab, worlds: dict[str, Met]) -> None:
    """Symptom: each node trained in a folder of its own name. It is the shell that pdsh reaches which expands words."""
    ended = worlds["expanded"].ended
    assert ended.code == 2, ended
    theirs = [str(lab.folder / "worlds" / node) for node in ("node1", "node2")]
    assert f"another configuration than rank 0's: run.path: '{theirs[0]}' -> '{theirs[1]}'" in ended.told, ended
    assert "write that value into the file" in ended.told
    assert not list((lab.folder / "worlds").glob("node*")), "something was made"


def test_one_host_of_the_hostfile_is_not_quietly_another(worlds: dict[str, Met]) -> None:
    """Symptom: `--include node2` started on the login host, and ended after minutes, in frames of C++."""
    ended = worlds["one of two"].ended
    assert ended.code == 2, ended
    assert "deepspeed was to start on node2, but has started on login" in ended.text
    assert "add --force_multi" in ended.text
    assert not worlds["one of two"].ranks
    assert worlds["forced"].ended.code == 0, worlds["forced"].ended
    assert places(worlds["forced"]) == [(0, "node2", 0, 1, 1.0)]


@pytest.mark.parametrize("name", STARTERS)
def test_the_interface_that_joins_the_hosts_is_found(worlds: dict[str, Met], name: str) -> None:
    """Symptom: Open MPI was told eth0 by `deepspeed`, and no rank of another host was ever reached."""
    for rank in worlds[name].ranks:
        assert rank["environ"]["GLOO_SOCKET_IFNAME"] == "ib0"
        assert rank["environ"]["NCCL_SOCKET_IFNAME"] == "=ib0"
        assert "over ib0 (10.77.0.12)" in rank["description"]


@pytest.mark.parametrize(
    ("line", "fact"),
    [("node2;reboot slots=1", "cannot be a host name"), ("-oProxyCommand=x slots=1", "cannot be a host name")],
)
def test_a_host_name_that_is_a_command_is_refused(tmp_path: Path, line: str, fact: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(f"node1 slots=1\n{line}\n")
    with pytest.raises(DataError, match=fact):
        parse_hostfile(path)


def test_nothing_is_left_running(lab: Lab, launched: dict[str, Launched], worlds: dict[str, Met]) -> None:
    for host in lab.nodes:
        assert left_running(host, lab.folder / "launched") + left_running(host, lab.folder / "worlds") == ""

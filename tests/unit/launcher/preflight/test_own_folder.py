"""`index.local_folder` before a run: on each host's own disk, writable, with room, and one of its own."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine.index.held.store import LocalDisk
from launcher.preflight.checks import examine
from launcher.preflight.own_folder import leave_own, take_own, with_others
from launcher.preflight.probe import ANSWER, answer_questions
from launcher.preflight.records import Facts, Mark, OwnFolder
from launcher.preflight.space import Space

GIB = 2**30


def mark_of(own: OwnFolder) -> Mark:
    assert own.mark is not None
    return own.mark


def test_one_folder_on_two_hosts_is_seen_by_both(tmp_path: Path) -> None:
    one, two, other = (leave_own(str(tmp_path / name), "/run") for name in ("shared", "shared", "own"))
    marks = {"one": mark_of(one), "two": mark_of(two), "three": mark_of(other)}

    def seen(own: OwnFolder, name: str) -> list[str]:
        return with_others(own, {host: mark for host, mark in marks.items() if host != name}).seen_of

    assert [seen(own, name) for own, name in ((one, "one"), (two, "two"), (other, "three"))] == [["two"], ["one"], []]
    for own in (two, one, other):
        take_own(own, keep_folder=False)
    assert list(tmp_path.iterdir()) == [], "a folder that was made for a mark goes with it"


def test_hosts_are_asked_for_each_others_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command asks in two steps, as each host has to have left its mark before any looks."""
    monkeypatch.setenv("DISK_OF_TEST", str(tmp_path))
    marks = {name: asdict(mark_of(leave_own("$DISK_OF_TEST/x", "/run"))) for name in ("one", "two")}
    asked = {"path": "$DISK_OF_TEST/x", "marks": marks}
    answers = io.StringIO()
    answer_questions(
        io.StringIO("".join(json.dumps({"do": do} | asked) + "\n" for do in ("others", "take own"))), answers
    )
    told = [json.loads(line.removeprefix(ANSWER)) for line in answers.getvalue().splitlines()]
    assert told[1:] == [{"of": ["one", "two"]}, {}]
    assert not any(tmp_path.rglob(".preflight-*"))


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "Not a directory" in str(leave_own(str(tmp_path / "file" / "x"), "/run").error)
    assert "index.local_folder is $NOT_SET_HERE" in str(leave_own("$NOT_SET_HERE", "/run").error)


def test_what_the_run_has_there_counts_as_written(tmp_path: Path) -> None:
    disk = LocalDisk.of(str(tmp_path), Path("/run"), "")
    disk.root.mkdir()
    (disk.root / "part").write_bytes(b"x" * 1000)
    own = leave_own(str(tmp_path), "/run")
    take_own(own, keep_folder=True)
    assert (own.present_bytes, own.error) == (1000, None)
    assert leave_own(str(tmp_path), "/another").present_bytes == 0


def told(*folders: OwnFolder, slots: tuple[int, ...] = (1, 1), space: Space | None = None) -> list[str]:
    hosts = [Facts(name, slots=number, own_folder=own) for name, number, own in zip("ab", slots, folders, strict=True)]
    found = [outcome for outcome in examine(hosts, space) if outcome.check == "local folder"]
    return [f"{problem.severity} {problem}" for problem in found[0].problems]


def test_problems_are_told_with_their_host_and_a_remedy() -> None:
    well = OwnFolder("/scratch", Mark("f", [], None), None, 100 * GIB)
    assert told(well, well) == told(well, well, space=Space({}, local_bytes=100 * GIB, local_parts=8)) == []
    (same,) = told(well, replace(well, seen_of=["a"]))
    assert same.startswith("error b: local folder: /scratch (index.local_folder) is the same folder as on a")
    assert "set index.embeddings=shared" in same
    (broken,) = told(replace(well, error="Read-only file system"), well)
    assert "error a: local folder: /scratch (index.local_folder) cannot be used: Read-only file system" in broken
    full = Space({}, local_bytes=300 * GIB, local_parts=8)
    short = told(well, replace(well, present_bytes=60 * GIB), space=full)  # each has half of 300
    assert "error a: local folder: 100 GiB are free in /scratch" in short[0]
    assert "takes about 150 GiB" in short[0]
    assert short[1:] == [] or short[1].startswith("warning b: ")
    assert len(short) == 2, "90 GiB with a fifth to spare"
    # Parts are whole on a host: of three of them, one of two hosts has two.
    assert Space({}, local_bytes=90 * GIB, local_parts=3).local_share(1, 2) == 60 * GIB
    uneven = told(well, well, slots=(3, 1), space=full)
    assert ["225 GiB" in text for text in uneven] == [True], "the host with three of four ranks has three quarters"

"""Files and folders that cannot be used end a start as everything does that its user can mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.coordination.coordinator import Coordinator
from engine.log import set_up_logging
from launcher.__main__ import main
from launcher.ending import guarded
from launcher.terminal.aside import lead_into, libraries_aside, streams_aside
from launcher.world.opening import World
from shards.files import write_json
from shards.formats.beir import write_folder
from shards.made import docstrings
from tests.threads_as_ranks import on_ranks


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    """A path below a file."""
    (tmp_path / "afile").write_text("")
    return tmp_path / "afile" / "x"


def test_the_words_are_told_without_a_traceback(in_the_way: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Symptom: most commands ended in a traceback and exit code 1, an error of the program."""
    assert guarded(None, lambda: in_the_way.mkdir()) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {in_the_way} cannot be reached: {in_the_way.parent} is a file. Expected: ")
    assert told.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(None, lambda: len((tmp_path / "x").read_text())) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_traceback_is_kept_where_there_is_a_log(
    in_the_way: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        set_up_logging(0, 1, aside=streams_aside())
        lead_into(tmp_path / "log")
        in_the_way.mkdir()

    with libraries_aside():
        assert guarded(None, fail) == 2
    assert "Traceback" not in capfd.readouterr().err
    kept = (tmp_path / "log").read_text()
    assert kept.startswith("Traceback")
    assert f"NotADirectoryError: [Errno 20] Not a directory: '{in_the_way}'\n" in kept


@pytest.mark.parametrize("where", ["work of rank 0", "agreement", "outside"])
def test_all_ranks_end_alike_and_one_of_them_tells_it(
    where: str, in_the_way: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: the others took it for an error of the program, so that the ranks had different exit codes."""

    def on_rank(c: Coordinator) -> int:
        def work() -> None:
            if where == "work of rank 0":
                c.only_rank_zero("write", lambda: write_json(in_the_way, {}))
            elif where == "agreement":
                with c.agreement("write"):
                    if c.rank == 0:
                        in_the_way.mkdir()
            elif c.rank == 0:
                in_the_way.mkdir()
            c.barrier("never met")

        return guarded(World(c.rank, 2, c.rank, torch.device("cpu"), c, "threads"), work)

    assert on_ranks(2, on_rank) == [2, 2]
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert str(in_the_way.parent) in told


@pytest.mark.parametrize("name", ["afile/data", "x" * 300])
def test_a_command_whose_folder_cannot_be_made(
    name: str, in_the_way: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(out: Path, **_: object) -> dict[str, int]:
        write_folder(out, [], [], {}, {})
        return {}

    monkeypatch.setattr(docstrings, "build_docstring_dataset", build)
    assert main(["docstrings", "--out", str(in_the_way.parents[1] / name)]) == 2
    assert capsys.readouterr().err.startswith("error: ")

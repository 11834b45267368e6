"""What the system says of files and folders that cannot be used, in words that a user can act on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards.errors import DataError, DiskFullError, FileError, SparringError
from shards.files import copy_folder, write_atomically, write_json
from shards.files.unusable import as_told, is_writable, require_writable
from shards.formats.compressed import open_bytes


def raised_by(function: Callable[[], object]) -> OSError:
    with pytest.raises(OSError, match=r"Errno") as caught:
        function()
    return caught.value


def told_of(error: OSError) -> str:
    """Return the words, which have a fact, an expectation and a remedy."""
    told = as_told(error)
    assert isinstance(told, FileError)
    assert told.__cause__ is error
    assert told.expected
    assert told.remedy
    return str(told)


def unwritable(monkeypatch: pytest.MonkeyPatch, *paths: Path, lacking: int = os.W_OK) -> None:
    """Let the system say of some paths that something may not be done with them; root may do everything."""
    really = os.access

    def access(path: os.PathLike[str] | str, mode: int) -> bool:
        return really(path, mode) and not (mode & lacking and Path(path) in paths)

    monkeypatch.setattr(os, "access", access)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    """Each was the traceback of `--out afile`, and exit code 1."""
    (tmp_path / "afile").write_text("")
    below = told_of(raised_by(lambda: (tmp_path / "afile" / "x").mkdir()))
    assert below.startswith(f"{tmp_path}/afile/x cannot be reached: {tmp_path}/afile is a file. Expected: a folder.")
    parent = told_of(raised_by(lambda: write_json(tmp_path / "afile" / "x.json", {})))
    assert parent.startswith(f"{tmp_path}/afile is there already, and is a file.")
    assert "--out" in parent


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    assert f"{tmp_path}/x.json is a folder" in told_of(raised_by(lambda: write_json(tmp_path / "x.json", {})))
    (tmp_path / "y").mkdir()
    (tmp_path / "x.json" / "full").write_text("")
    told = told_of(raised_by(lambda: os.rename(tmp_path / "y", tmp_path / "x.json")))
    assert told.startswith(f"{tmp_path}/x.json is there already, and is a folder.")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    told = told_of(raised_by(lambda: (tmp_path / ("x" * 300)).mkdir()))
    assert told.startswith(f"a name is too long for the file system: {'x' * 60}..., of 300 bytes, in a path of ")
    while_written = told_of(raised_by(lambda: write_json(tmp_path / ("y" * 250), {})))
    assert "..., of 250 bytes" in while_written, "the name that was given, not the longer one while it is written"


def test_links_in_a_circle_and_folders_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "lead in a circle" in told_of(raised_by(lambda: os.listdir(tmp_path / "a")))
    told = told_of(raised_by(lambda: (tmp_path / "gone" / "file").read_text()))
    assert f"there is no folder {tmp_path}/gone" in told


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names a file that nobody knows, under which another one would have been written."""
    (tmp_path / "ro").mkdir()
    name = str(tmp_path / "ro" / ".report.html.tmp-0123456789ab")
    unwritable(monkeypatch, tmp_path / "ro")
    for number in (errno.EACCES, errno.EROFS, errno.EPERM):
        told = told_of(OSError(number, os.strerror(number), name))
        assert told.startswith(
            f"{tmp_path}/ro/report.html may not be used: the folder {tmp_path}/ro may not be written to by this user."
        )
        assert "(a command's --out, a run's run.path)" in told
    renamed = OSError(errno.EACCES, "Permission denied", name, None, str(tmp_path / "ro" / "report.html"))
    assert told_of(renamed).startswith(f"{tmp_path}/ro/report.html may not be used: the folder {tmp_path}/ro ")


def test_a_file_and_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("")
    unwritable(monkeypatch, corpus, tmp_path, lacking=os.R_OK)
    for name in (corpus, str(corpus), os.fsencode(corpus)):
        assert told_of(OSError(errno.EACCES, "Permission denied", name)).startswith(f"{corpus} may not be read by this")
    listed = told_of(OSError(errno.EACCES, "Permission denied", str(tmp_path)))
    assert f"the folder {tmp_path} may not be listed" in listed


def test_what_the_system_refuses(tmp_path: Path) -> None:
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "ro"
    corpus.write_text("")
    corpus.chmod(0o200)
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user, such as root, may read and write everything")

    def read() -> None:
        with open_bytes(corpus) as file:
            file.read()

    assert f"{corpus} may not be read" in told_of(raised_by(read))
    assert f"{folder} may not be written to" in told_of(raised_by(lambda: write_json(folder / "x.json", {})))


def test_errors_of_the_program_stay_what_they_are(tmp_path: Path) -> None:
    def write_nothing() -> None:
        with write_atomically(tmp_path / "x"):
            pass

    kept = (
        raised_by(write_nothing),
        raised_by(lambda: (tmp_path / "x").read_text()),
        raised_by(lambda: os.write(10**6, b"")),
        OSError(errno.EACCES, "of a signal"),
        OSError(errno.EACCES, "of a descriptor", 3),
        OSError(errno.ECONNREFUSED, "of a connection", "host"),
        ValueError("x"),
        DataError("x"),
    )
    assert [as_told(error) for error in kept] == [None] * len(kept)


def test_a_full_disk_is_still_told_as_one(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
    told = as_told(error)
    assert isinstance(told, DiskFullError)
    assert told.__cause__ is error


def test_a_file_system_that_can_only_be_read_is_not_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))

    def write(number: int) -> None:
        with write_atomically(tmp_path / "x") as temporary:
            raise OSError(number, os.strerror(number), str(temporary))

    assert f"{tmp_path}/x may not be used" in told_of(raised_by(lambda: write(errno.EROFS)))
    with pytest.raises(DiskFullError):
        write(errno.EIO)


def test_a_place_is_looked_at_before_there_is_anything_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "new" / "newer"):
        assert is_writable(folder)
        require_writable(folder, remedy="x")
    (tmp_path / "afile").write_text("")
    with pytest.raises(SparringError, match=r"/afile is a file, where .*/afile/x would be made\. .*: take another"):
        require_writable(tmp_path / "afile" / "x", remedy="take another")
    unwritable(monkeypatch, tmp_path)
    assert not is_writable(tmp_path / "new")
    with pytest.raises(
        FileError, match=rf"^{tmp_path} is a folder that may not be written to by this user, where .*new"
    ):
        require_writable(tmp_path / "new", remedy="take another")
    with pytest.raises(FileError, match=rf"^{tmp_path} is a folder that may not be written to by this user\. "):
        require_writable(tmp_path, remedy="take another")


def test_a_copy_of_what_may_not_be_written_to_can_be(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    for name in ("a", "below/b", "left", "below/left"):
        (source / name).write_text(name)
        (source / name).chmod(0o444)
    (source / "below").chmod(0o555)
    source.chmod(0o555)
    copy_folder(source, tmp_path / "new" / "copy", leave_out=("left",))
    copied = [tmp_path / "new" / "copy", *(tmp_path / "new" / "copy").rglob("*")]
    assert {str(path.relative_to(tmp_path / "new")) for path in copied} == {
        "copy", "copy/a", "copy/below", "copy/below/b",
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o200 for path in copied)
    assert (tmp_path / "new" / "copy" / "below" / "b").read_text() == "below/b"
    (source / "below").chmod(0o755)  # for who removes it
    source.chmod(0o755)

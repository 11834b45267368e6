"""Files are whole or absent, whatever happens to the process that writes them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from shards.errors import ArtifactError
from shards.files import (
    OpenFiles,
    as_full_disk,
    canonical_json,
    read_json,
    read_record,
    save_array,
    sha256_file,
    write_atomically,
    write_json,
)


def test_publishes_what_the_body_wrote_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.bin"
    with write_atomically(target) as temporary:
        temporary.write_bytes(b"content")
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".file.bin.tmp-")
        assert not target.exists()
    assert target.read_bytes() == b"content"
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_target_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")

    def fail() -> None:
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")
    script = (
        "import os, pathlib; from shards.files import write_atomically\n"
        f"with write_atomically(pathlib.Path({str(target)!r})) as temporary:\n"
        "    temporary.write_text('half'); os._exit(9)\n"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 9
    assert target.read_text() == "before"
    leftovers = [path.name for path in tmp_path.iterdir() if path != target]
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".file.txt.tmp-")


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "file.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None], "b": {"c": "日本\u2028"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "a test file") == value


def test_json_refuses_nan_before_it_touches_the_target(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", [float("nan")])
    assert read_json(tmp_path / "a.json", "a test file") == [1]


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b'"\xff"'])
def test_damaged_json_names_the_file_and_what_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"(?s)the ledger is damaged.*a.json.*delete"):
        read_json(path, "the ledger")


def test_missing_json_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the ledger is missing"):
        read_json(tmp_path / "a.json", "the ledger")


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"a" * 1_000_000 * 2)
    one_piece = sha256_file(path)
    path.write_bytes(b"a" * 1_000_000 * 2 + b"b")
    assert sha256_file(path) != one_piece


def test_open_files_opens_once_and_keeps_no_more_than_its_limit() -> None:
    opened: list[int] = []

    def open_one(number: int) -> str:
        opened.append(number)
        return f"file {number}"

    files = OpenFiles(open_one, limit=2)
    assert [files[number] for number in (1, 1, 2, 1, 3)] == ["file 1", "file 1", "file 2", "file 1", "file 3"]
    assert opened == [1, 2, 3]
    assert len(files) == 2
    assert files[1] == "file 1"  # the oldest was dropped, and is opened again
    assert opened == [1, 2, 3, 1]


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from shards.errors import DiskFullError
from shards.files import save_array, write_atomically

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with write_atomically(Path(sys.argv[1]), num_bytes=80000) as temporary:
        save_array(temporary, np.zeros(10000))
except DiskFullError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_an_error_with_its_path_and_size(tmp_path: Path) -> None:
    """Symptom: `numpy.save` on a full disk says that it wrote less than asked, and not why or where."""
    target = tmp_path / "array.npy"
    command = [sys.executable, "-c", LIMITED, str(target)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f"the disk is full: {target} needs about 80000 bytes; 4096 were written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", [np.zeros((0, 4)), np.arange(6, dtype=np.int64).reshape(2, 3), np.float32([1.5])])
def test_saved_arrays_are_those_that_numpy_loads(tmp_path: Path, array: np.ndarray) -> None:
    save_array(tmp_path / "a.npy", array)
    loaded = np.load(tmp_path / "a.npy", allow_pickle=False)
    np.testing.assert_array_equal(loaded, array)
    assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)


def test_a_full_disk_is_known_in_the_words_of_libraries() -> None:
    """Symptom: weights that safetensors could not write end the run with a traceback."""
    known = as_full_disk(RuntimeError("Error while serializing: IoError(No space left on device (os error 28))"))
    assert known is not None
    assert "start the same command again" in str(known)
    named = as_full_disk(OSError(28, "No space left on device", "/tmp/some/file"))
    assert named is not None
    assert "/tmp/some/file" in str(named)
    assert as_full_disk(OSError(13, "Permission denied")) is None


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    share: float
    version: Literal[2] = 2


def test_a_record_comes_back_in_its_form(tmp_path: Path) -> None:
    record = Outer(Inner("a", (1, 2)), 1.0)
    write_json(tmp_path / "r.json", asdict(record))
    assert read_record(tmp_path / "r.json", Outer, "the record") == record


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"inner": {"name": "a", "sizes": [1]}}, "share"),
        ({"inner": {"name": "a", "sizes": ["1"]}, "share": 1.0}, "inner.sizes.0"),
        ({"inner": {"name": 3, "sizes": []}, "share": 1.0}, "inner.name"),
        ({"inner": {"name": "a", "sizes": []}, "share": 1.0, "version": 1}, "version"),
        ([], "as a whole"),
    ],
)
def test_a_record_of_another_form_is_damaged(tmp_path: Path, values: object, said: str) -> None:
    """A damaged marker ended in KeyError or AttributeError, far from where it was read."""
    write_json(tmp_path / "r.json", values)
    with pytest.raises(ArtifactError, match=rf"the record .*r\.json is damaged: {said}"):
        read_record(tmp_path / "r.json", Outer, "the record")

"""launcher.world.hostfile: what is accepted, what is refused, and what the refusal tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.world.hostfile import Host, parse_hostfile
from shards.errors import DataError

ROOT = Path(__file__).parents[4]


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_of_the_repository_is_valid() -> None:
    hosts = parse_hostfile(ROOT / "hostfile.example")
    assert hosts == [Host("node-01.cluster.local", 8), Host("node-02.cluster.local", 8), Host("10.0.0.13", 4)]


def test_comments_and_blank_lines_are_skipped_and_the_order_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "# all of them\n\n  b\tslots=2  # the big one\n#c slots=9\na   slots=1\r\n")
    assert parse_hostfile(path) == [Host("b", 2), Host("a", 1)]


@pytest.mark.parametrize(
    "line",
    [
        "node",
        "node 8",
        "node slots=",
        "node slots=two",
        "node slots=4x",
        "node slots=1.5",
        "node slots = 4",
        "slots=4",
        "node slots=4 slots=5",
        "node slots=\u0664",  # a digit, but none that other readers of the file know
    ],
)
def test_a_line_that_is_no_host_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, f"good slots=1\n# a comment counts as a line\n{line}\n")
    with pytest.raises(DataError, match=r"hosts, line 3: .* is no host\. Expected: .*slots=8.*Remedy: ") as caught:
        parse_hostfile(path)
    assert repr(line) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "-oProxyCommand=reboot",
        "--help",
        ".hidden",
        "a;reboot",
        "$(hostname)",
        "user@host",
        "host:22",
        "a_b",
        "nöde",
        "a,b",
    ],
)
def test_a_name_that_is_no_host_name_is_refused(tmp_path: Path, name: str) -> None:
    """Launchers put the name into a command line as it is, so that `-oProxyCommand=...` would run a command."""
    path = write(tmp_path, f"{name} slots=1\n")
    with pytest.raises(DataError, match=r"hosts, line 1: .* cannot be a host name.*Remedy: ") as caught:
        parse_hostfile(path)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("slots", ["0", "-1"])
def test_a_host_without_slots_is_refused(tmp_path: Path, slots: str) -> None:
    with pytest.raises(DataError, match=rf"line 1: host 'a' has {slots} slots\. Expected: 1 or more\. Remedy: "):
        parse_hostfile(write(tmp_path, f"a slots={slots}\n"))


@pytest.mark.parametrize("again", ["a", "A"])
def test_a_host_that_repeats_is_refused_with_both_lines(tmp_path: Path, again: str) -> None:
    path = write(tmp_path, f"a slots=1\n\nb slots=1\n{again} slots=2\n")
    with pytest.raises(DataError, match=rf"line 4: host '{again}' is on line 1 already.*Remedy: "):
        parse_hostfile(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# node slots=8\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="names no host"):
        parse_hostfile(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no hostfile .*nowhere.*hostfile\.example"):
        parse_hostfile(tmp_path / "nowhere")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(b"node\xff slots=1\n")
    with pytest.raises(DataError, match="no UTF-8 text"):
        parse_hostfile(path)

"""What libraries say in a run: in its log file, and not at the terminal, unless it is an error."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.log import get_logger, set_up_logging
from launcher.ending import guarded
from launcher.terminal.aside import lead_into, libraries_aside, streams_aside

LOGGERS = ("", "sparring", "DeepSpeed", "transformers")


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Leave all loggers as they were."""
    before = {name: logging.getLogger(name) for name in LOGGERS}
    states = {name: (list(one.handlers), one.level, one.propagate) for name, one in before.items()}
    yield
    for name, (handlers, level, propagate) in states.items():
        before[name].handlers[:], before[name].propagate = handlers, propagate
        before[name].setLevel(level)


def speak() -> None:
    """Say something in every way."""
    get_logger("x").info("ours")
    print("by print")
    print("by stderr", file=sys.stderr)
    logging.getLogger("some.library").warning("by a logger")
    logging.getLogger("some.library").error("an error of a library")
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.addHandler(logging.StreamHandler(sys.stdout))  # as it does when it is imported
    deepspeed.warning("by deepspeed")
    deepspeed.error("an error of deepspeed")


ASIDE = ("by print", "by stderr", "by a logger", "by deepspeed")
SHOWN = ("ours", "an error of a library", "an error of deepspeed")


@pytest.mark.parametrize("opened", ["before", "afterwards"])
def test_the_terminal_has_our_lines_alone(opened: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Between two of our lines stood dozens of DeepSpeed's, torch's and transformers'."""
    file = tmp_path / "logs" / "rank-00000.log"
    with libraries_aside():
        set_up_logging(0, 2, aside=streams_aside())
        if opened == "before":
            lead_into(file)
        speak()
        lead_into(file)
        get_logger("x").info("\x1b[1mbold\x1b[0m")
    told = capfd.readouterr()
    assert told.out == ""
    lines = [line.split(" ", 1)[1] for line in told.err.splitlines()]
    shown = ["ours", "some.library: an error of a library", "DeepSpeed: an error of deepspeed", "\x1b[1mbold\x1b[0m"]
    assert lines == shown
    kept = file.read_text()
    for text in (*ASIDE, *SHOWN):
        assert kept.count(f"{text}\n") == 1, (text, kept)
    assert kept.endswith(" bold\n")


def test_other_ranks_keep_their_log_in_full(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with libraries_aside():
        set_up_logging(1, 2, aside=streams_aside())
        lead_into(tmp_path / "log")
        get_logger("x").info("ours")
        get_logger("x").warning("beware")
    assert [line.split(" ", 1)[1] for line in capfd.readouterr().err.splitlines()] == ["[rank 1] beware"]
    assert [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text().splitlines()] == ["ours", "beware"]


def test_what_was_said_before_a_crash_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """Before there is a run folder there is no file, and the reason may be in what a library said."""

    def crash() -> None:
        set_up_logging(0, 1, aside=streams_aside())
        get_logger("x").info("ours")
        print("the reason")
        raise ZeroDivisionError("x")

    with libraries_aside():
        assert guarded(None, crash) == 1
    told = capfd.readouterr().err
    assert told.count("ours") == 1
    assert told.index("the reason") < told.index("ZeroDivisionError: x")


def test_the_error_of_a_thread_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with libraries_aside():
        lead_into(tmp_path / "log")
        thread = threading.Thread(target=lambda: 1 / 0, name="helper")
        thread.start()
        thread.join()
    told = capfd.readouterr().err
    assert "Exception in thread helper:" in told
    assert "ZeroDivisionError" in told


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    with libraries_aside():
        set_up_logging(0, 1, aside=streams_aside())
        lead_into(tmp_path / "logs" / "rank-00000.log")
        print("x")
        lead_into(Path("/dev/full"))
        print("y")
        get_logger("x").info("ours")
    assert capfd.readouterr().err.endswith(" ours\n")


def test_what_c_code_writes_is_not_touched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A library that aborts has no time for anybody's file."""
    with libraries_aside():
        lead_into(tmp_path / "log")
        os.write(2, b"terminate called\n")
    assert capfd.readouterr().err == "terminate called\n"

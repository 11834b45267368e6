"""What is seen of a piece of work while it goes on."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator

import pytest

from engine.log import set_up_logging, speak_at
from engine.reliability.progress import ProgressBar, follow, tell_outlook


class Terminal(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class Clock:
    """Goes on where it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    log, root = logging.getLogger("sparring"), logging.getLogger()
    before = list(log.handlers), log.level, log.propagate, root.level
    set_up_logging(0, 1)
    yield Clock()
    speak_at(None)
    follow(None)
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])
    root.setLevel(before[3])


def play(clock: Clock, terminal: Terminal, *, shown: bool = True) -> str:
    """Take 200 of 400 steps, one a second."""
    speak_at(terminal)
    follow(lambda per_second: f"about {1000 / per_second:g}s left")
    bar = ProgressBar("retriever/1", 400, "step", shown=shown, initial=100, clock=clock)
    for _ in range(200):
        clock.now += 1
        bar.set_postfix(loss="0.5000")
        bar.update()
    bar.close()
    return terminal.getvalue()


def test_a_pipe_gets_a_line_every_so_often(clock: Clock) -> None:
    """SLURM's log was one line of megabytes, with a carriage return for each step."""
    told = play(clock, Terminal(is_terminal=False))
    assert "\r" not in told
    assert [line.split(" ", 1)[1] for line in told.splitlines()] == [
        f"{'retriever/1':28} {share}% of 400 steps, 1 a second, {left} left, loss 0.5000, recipe about 1000s left"
        for share, left in ((28, "4m 45s"), (43, "3m 45s"), (58, "2m 45s"), (73, "1m 45s"))
    ]


def test_short_stages_tell_what_the_recipe_takes(clock: Clock) -> None:
    """A log of stages below a quarter of a minute, hours of them, never said when they would end."""
    terminal = Terminal(is_terminal=False)
    speak_at(terminal)
    follow(lambda per_second: "" if per_second else "about 3m 20s left")
    begun = time.monotonic()
    for seconds in (30, 59, 61, 90, 130):
        tell_outlook(lambda seconds=seconds: begun + seconds)
    assert [line.split(" ", 1)[1].split() for line in terminal.getvalue().splitlines()] == [
        ["recipe", "about", "3m", "20s", "left"]
    ] * 2


def test_a_terminal_has_a_live_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    told = play(clock, Terminal(is_terminal=True))
    assert told.count("\r") > 1
    assert "retriever/1:" in told
    assert "\n" not in told.strip("\n"), "and leaves nothing behind"


def test_a_terminal_that_writes_nothing_over_is_a_pipe(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in play(clock, Terminal(is_terminal=True))


def test_who_shows_nothing_writes_nothing(clock: Clock) -> None:
    assert play(clock, Terminal(is_terminal=False), shown=False) == ""

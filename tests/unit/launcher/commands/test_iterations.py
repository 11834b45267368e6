"""Iterations on the command line."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from launcher.commands.iterations import iterations_in


@pytest.mark.parametrize(
    ("words", "iterations"),
    [
        ("0", [0]),
        ("2,0, 2", [0, 2]),
        ("0..2,4", [0, 1, 2, 4]),
        ("3..last", [3, 4]),
        ("last", [4]),
        ("all", [0, 1, 2, 3, 4]),
    ],
)
def test_iterations_are_numbers_ranges_or_all(words: str, iterations: list[int]) -> None:
    assert iterations_in(words, last=4, option="--ranker") == iterations


@pytest.mark.parametrize("words", ["", "one", "-1", "0...2", "1.5", "0,,2", "all,1"])
def test_other_words_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"--ranker is .*such as 0, 0,3, 0\.\.3, last or all"):
        iterations_in(words, last=4, option="--ranker")


@pytest.mark.parametrize("words", ["5", "0..5", "3..1"])
def test_iterations_that_are_not_finished_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="newest finished iteration is 4"):
        iterations_in(words, last=4, option="--ranker")

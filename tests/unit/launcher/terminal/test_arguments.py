"""Numbers and paths on every command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from launcher.__main__ import COMMANDS, main, words_of
from launcher.run import command_line, parse_words
from launcher.terminal.arguments import (
    positive_number,
    positive_whole_number,
    share,
    typed_path,
    whole_number,
)

WHOLE = {whole_number, positive_whole_number}
NUMBERS = WHOLE | {positive_number, share}


def parsers() -> dict[str, argparse.ArgumentParser]:
    found = {"run": command_line()}
    for name in COMMANDS:
        found[name] = argparse.ArgumentParser(prog=name)
        words_of(name).add_arguments(found[name])
    return found


def options(kinds: set[object]) -> list[tuple[str, str, object]]:
    return [
        (name, action.option_strings[0], action.type)
        for name, parser in parsers().items()
        for action in parser._actions
        if action.type in kinds and action.option_strings
    ]


def test_all_commands_read_numbers_and_paths_alike() -> None:
    """`--top-k -3` cut the list from its end, `--max-queries 0` failed in the middle, `--gpu-memory nan` planned."""
    of_its_own = [
        f"{name} {action.option_strings or action.dest}: {action.type}"
        for name, parser in parsers().items()
        for action in parser._actions
        if action.type in {int, float, Path} and action.dest != "local_rank"  # which DeepSpeed writes
    ]
    assert not of_its_own, "take a type of launcher.terminal.arguments"
    numbers = {f"{name} {option}" for name, option, _ in options(NUMBERS)}
    assert {"search --top-k", "evaluate --max-queries", "export --iteration", "submit --nodes"} <= numbers
    assert {"docstrings --seed", "supervise --max-restarts", "plan --gpu-memory", "cancel --task"} <= numbers


@pytest.mark.parametrize(("command", "option", "kind"), options(NUMBERS))
def test_a_number_that_cannot_be_is_refused_by_its_option(
    command: str, option: str, kind: object, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parsers()[command]
    bad = ["-3", "nan", "inf", "1e400", "", "ten", "9" * 400, "٣", "1:30", "1,5"]
    bad += ["1.5", "-1"] if kind in WHOLE else ["0", "1e-300"]
    bad += ["0"] if kind is positive_whole_number else []
    bad += ["1.5"] if kind is share else []
    for word in bad:
        with pytest.raises(SystemExit) as end:
            parser.parse_args([f"{option}={word}"])
        assert end.value.code == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}" in told
        assert repr(word) in told
        assert "expected" in told


def test_numbers_as_people_write_them() -> None:
    assert whole_number("0") == 0
    assert positive_whole_number("1_000") == 1000
    assert positive_whole_number("21e6") == 21_000_000
    assert positive_whole_number("010") == 10
    assert positive_number("1e-6") == 1e-6
    assert positive_number(".5") == 0.5
    assert share("1") == 1.0


def test_words_may_stand_between_options() -> None:
    """`plan --config FILE data.path=DIR --nodes 2 run.seed=1` was refused for its last word."""
    parsed = parse_words(["a=1", "--config", "c.yaml", "b= 2", "--preflight-only", "c=#"])
    assert (parsed.overrides, parsed.preflight_only, parsed.config.name) == (["a=1", "b= 2", "c=#"], True, "c.yaml")
    for words in (["--config", "c.yaml", "a=1", "--no-such-option"], ["--config", "c.yaml", "--no-such-option=1"]):
        with pytest.raises(SystemExit):
            parse_words(words)
    with pytest.raises(SystemExit):
        main(["status", "run", "a=1"])


def test_a_text_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A line of `--setup` in Latin-1 ended in a traceback while the script was written."""
    with pytest.raises(SystemExit):
        main(["submit", "--config", "c.yaml", "--setup", "echo \udcff"])
    assert "argument setup: 'echo \\udcff' is no UTF-8" in capsys.readouterr().err


def test_a_path_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert typed_path("set #2") == tmp_path / "set #2"
    assert typed_path("~/x") == Path("/home/somebody/x")
    for word, message in (("", "is empty"), ("a\0", "NUL"), ("\udcff", "is no UTF-8")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            typed_path(word)

"""The table of commands behind `sparring` and `python -m launcher`."""

from __future__ import annotations

import argparse
import configparser
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from launcher.__main__ import COMMANDS, GROUPS, command_line, examples_of, main

ROOT = Path(launcher.__path__[0]).parent


def parser_of(name: str) -> argparse.ArgumentParser:
    (commands,) = (one for one in command_line([name])._actions if isinstance(one, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[name]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_tells_its_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m launcher {name}")
    assert "[-h]\n\noptions" not in told, f"{name} has no words of its own"
    assert told.count(f"\n  python -m launcher {name} ") >= 2, "two examples"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_example_can_be_typed(name: str) -> None:
    for words in examples_of(name):
        words = list(itertools.takewhile(lambda word: word not in {"<", ">"}, words))
        arguments, left = command_line(words).parse_known_args(words)
        assert arguments.command == name
        assert all("=" in word for word in left)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_says_what_it_takes(name: str) -> None:
    """`--normalisation {..}` and `--temperature T  (1)` left to the reader what is divided by what."""
    for action in parser_of(name)._actions:
        told = f"{name} {action.option_strings or action.dest}"
        assert action.help, told
        assert action.help[0] != "(", told
        if action.option_strings and action.nargs != 0:
            assert action.metavar or action.choices, told


def test_each_command_has_its_place_in_the_help() -> None:
    assert sorted(COMMANDS) == sorted(name for names in GROUPS.values() for name in names)


def loaded_by(words: list[str]) -> str:
    """Run a command in a process of its own; return what it prints, and then which libraries it has loaded."""
    script = f"""
import sys
from launcher.__main__ import main
try:
    main({words!r})
except SystemExit:
    pass
large = {{"torch", "scipy", "transformers", "deepspeed", "numpy", "pydantic", "yaml", "engine", "shards"}}
print("loaded:", sorted(large & set(sys.modules)))
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_list_of_commands_needs_no_library() -> None:
    """To be told the names of the commands took two seconds, in which torch was imported."""
    told = loaded_by(["--help"])
    assert told.endswith("loaded: []\n")
    assert all(f"\n    {name} " in told for name in COMMANDS)


def test_what_only_tells_loads_no_large_library() -> None:
    """`search --help` took five seconds, in which torch, transformers and FAISS were imported, and so did `sweep`'s."""
    told = [["--version"], ["options", "seed"], ["completion", "bash"], ["status", "nowhere"]]
    script = f"""
import sys
from launcher.__main__ import COMMANDS, main
for words in [*{told!r}, *([name, "--help"] for name in COMMANDS)]:
    try:
        main(words)
    except SystemExit:
        pass
    large = {{"torch", "scipy", "transformers", "deepspeed", "faiss"}} & set(sys.modules)
    assert not large, (words, large)
print("\\nall are told")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.endswith("\nall are told\n"), done.stderr


def test_a_word_that_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["nothing"])
    assert end.value.code == 2
    assert "there is no command 'nothing': --help lists all" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["trian", "--config", "tiny"])
    assert "there is no command 'trian' (is train meant?)" in capsys.readouterr().err
    assert main([]) == 2
    assert "\nBefore a run:\n" in capsys.readouterr().out, "whoever types the name alone wants to know what there is"


def test_the_script_is_the_program(tmp_path: Path) -> None:
    """What an installation puts on the PATH, written as pip writes it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    script = tmp_path / name
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n", encoding="utf-8")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environ)

    version = run("--version")
    assert version.returncode == 0
    told = dict(line.split(maxsplit=1) for line in version.stdout.splitlines())
    assert list(told) == ["sparring", "torch", "deepspeed", "transformers", "faiss", "python"]
    assert told["python"] == sys.version.split()[0]
    refused = run("status", str(tmp_path))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "holds no run" in refused.stderr
    assert run("status", "--help").stdout.startswith("usage: sparring status")


def test_a_part_of_an_options_name_is_none_and_the_nearest_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """`init --retriever NAME` was taken for `--retriever-shape NAME`, and errors had the usage of `sparring` alone."""
    with pytest.raises(SystemExit) as end:
        main(["init", "data", "--retriever", "bert-base-uncased", "--hour", "1"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: python -m launcher init [-h]")
    assert "--retriever bert-base-uncased --hour 1 (is --retriever-shape or --hours meant?)" in told

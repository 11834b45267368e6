"""Whether what the documentation shows would be taken: words by the real parsers, recipes by the real loader."""

from __future__ import annotations

import argparse
import ast
import configparser
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml
from deepspeed.launcher.runner import parse_args as parse_deepspeed

from engine.config.file import load_config
from engine.config.recipes import RECIPES
from engine.config.reference import options_of
from launcher.__main__ import command_line
from launcher.commands.sweep_file import read_sweep
from launcher.commands.sweep_slots import Slots
from launcher.run import parse_words
from launcher.slurm.settings import settings_of
from launcher.slurm.sweep import tasks_of
from launcher.terminal.arguments import complete
from tests.distributed.processes import ROOT

NOT_OURS = {
    "curl": "needs a server; the paths are tested in test_serve.py",
    "pip": "installs; the extras that it names are looked for",
    "scp": "needs another host",
    "source": "the shell's",
    "xdg-open": "needs a desktop",
    "pre-commit": "fetches its hooks",
}
"""Program that no test starts -> the reason."""
NOT_INSTALLED = {
    "beir": "measures exports of anybody's",
    "mteb": "likewise",
    "wandb": "an extra, which is not among those of the tests",
}
"""Library that the tests do without -> the reason."""
_MPIRUN_TAKES_ONE = {"-n", "-np", "--hostfile", "-x", "--host"}
_EXTRAS = re.compile(r"^\.\[([\w,]+)\]$")


def check(words: Sequence[str]) -> str:
    """Raise an error of any kind where a command would not be taken; return the program's name.

    Args:
        words: With the program's name.
    """
    program, *rest = words
    if program.endswith("python"):
        _check_python(rest)
        return "python"
    if program == "deepspeed":
        arguments = parse_deepspeed(rest)
        _check_script([arguments.user_script, *arguments.user_args])
    elif program == "mpirun":
        check(behind_mpirun(rest))
    elif program == "sparring":
        check_launcher(rest)
    elif program == "make":
        assert set(rest) <= make_targets(), f"make has no {rest}"
    elif program == "pip":
        named = {extra for word in rest if (found := _EXTRAS.match(word)) for extra in found[1].split(",")}
        assert named <= extras(), f"setup.cfg has no extra of {named}"
    else:
        assert program in NOT_OURS, f"{program} is neither ours nor listed in NOT_OURS"
    return program


def behind_mpirun(words: Sequence[str]) -> list[str]:
    """Return what mpirun starts."""
    left = list(words)
    while left and left[0].startswith("-"):
        option = left.pop(0)
        if option in _MPIRUN_TAKES_ONE:
            left.pop(0)
    return left


def _check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "launcher"]:
        check_launcher(words[2:])
    elif words[0] == "-m":
        assert words[1] in {"pytest", "venv"}, words
        assert all((ROOT / word).exists() for word in words[2:] if "/" in word)
    else:
        _check_script(words)


def _check_script(words: list[str]) -> None:
    """A script of the repository; of `launcher/run.py` its words and its recipe."""
    assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    if words[0] == "launcher/run.py":
        arguments = parse_words(words[1:])
        load_config(arguments.config, arguments.overrides)


def check_launcher(words: list[str]) -> argparse.Namespace:
    """Parse the words of one of our commands, and read the recipe that they name."""
    parser = command_line(words)
    arguments = complete(parser, *parser.parse_known_args(words))
    name = arguments.command
    if name in {"train", "plan", "preflight", "submit"}:
        load_config(arguments.config, arguments.overrides)
    if name == "submit":
        settings_of(arguments)
        if arguments.sweep:
            assert tasks_of(arguments.config, arguments.overrides, arguments.sweep)
    elif name == "branch":
        of_r2anker = any(word.startswith("r2anker.") for word in arguments.overrides)
        recipe = "r2anker_tiny.yaml" if of_r2anker else "tiny.yaml"
        load_config(ROOT / "configs" / recipe, arguments.overrides)
    elif name == "evaluate":
        load_config(ROOT / "configs" / "tiny.yaml", arguments.set)
    elif name == "convert" and arguments.tokenize_for:
        load_config(arguments.tokenize_for, arguments.words)
    elif name == "supervise":
        check([word for word in arguments.words if word != "--"])
    elif name == "sweep":
        read_sweep(arguments.file, arguments.overrides, arguments.out)
        slots = Slots(arguments.jobs, shlex.split(arguments.starter))
        for words in slots.each(lambda _, words: words, range(arguments.jobs)):
            check([*words, "launcher/run.py", "--config", "configs/tiny.yaml"])
        if arguments.slurm:
            check_launcher(["submit", "--config", "configs/tiny.yaml", *shlex.split(arguments.slurm)])
    return arguments


@cache
def make_targets() -> set[str]:
    """Names that `make` takes."""
    rules = re.findall(r"^([\w./ -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name for rule in rules for name in rule.split()} | {".venv/.test"}


@cache
def extras() -> set[str]:
    """Names of the extras in setup.cfg."""
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    return set(read["options.extras_require"])


@cache
def known_keys() -> frozenset[str]:
    """All keys of all recipes, and their sections."""
    keys = {re.sub(r"\[[^]]*\]", "", use.key) for option in options_of(RECIPES) for use in option.uses}
    parts = [key.split(".") for key in keys]
    return frozenset(".".join(one[:length]) for one in parts for length in range(1, len(one) + 1))


def keys_named(text: str) -> set[str]:
    """Return what looks like keys of a recipe in the sentences of a page: `ar2.top_k`, `run.seed=7`."""
    sections = "|".join(sorted(key for key in known_keys() if "." not in key))
    return set(re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text))


def check_yaml(text: str, folder: Path) -> None:
    """Read a piece of a recipe over the smallest recipe that has its sections, or a whole sweep.

    Args:
        text: YAML.
        folder: Takes a file.
    """
    tree = yaml.safe_load(text)
    if "base" in tree:
        (folder / "sweep.yaml").write_text(text)
        assert read_sweep(folder / "sweep.yaml").runs
        return
    words = {section: list(_words_of(values, section)) for section, values in tree.items()}
    if of_r2anker := words.pop("r2anker", []):
        load_config(ROOT / "configs" / "r2anker_tiny.yaml", of_r2anker)
    load_config(ROOT / "configs" / "tiny.yaml", [word for some in words.values() for word in some])


def _words_of(values: object, key: str) -> Iterator[str]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _words_of(value, f"{key}.{name}")
    else:
        yield f"{key}={values if isinstance(values, str) else json.dumps(values)}"


def compiles(code: str, name: str) -> None:
    """Compile Python and find what it imports.

    Raises:
        SyntaxError: It is no Python.
        ImportError: A module or a name in it does not exist.
    """
    tree = ast.parse(code, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not _of_another(node):
            compiled = compile(ast.Module([node], []), name, "exec")
            exec(compiled, {})


def _of_another(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether it imports from a library that is not installed."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return any(name.split(".")[0] in NOT_INSTALLED for name in names)


def placed(commands: Sequence[Sequence[str]], place: Path, run: Path, data: Path, recipe: Path) -> None:
    """Put what commands name into a folder, so that they can be typed there as they stand.

    Args:
        commands: All that are documented.
        place: The folder.
        run: What every run in them is.
        data: What every data folder is.
        recipe: What every recipe of the reader's own is.
    """
    named = {found for words in commands for word in words for found in re.findall(r"\bruns/[\w-]+", word)}
    for name in {*named, "RUN"}:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(run)
    (place / "data").mkdir()
    for name in ("DIR", "DL19", "data/mine", "downloads"):
        (place / name).symlink_to(data)
    for name in ("configs", "launcher", "benchmarks", "examples"):
        (place / name).symlink_to(ROOT / name)
    for name in ("FILE", "recipe.yaml"):
        (place / name).symlink_to(recipe)
    (place / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n")

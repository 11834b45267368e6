"""Sweeps: the same recipe with some keys changed, one task of a job array for each combination.

`--sweep ar2.num_negatives=1,5,15 --sweep run.seed=1,2` makes six runs, each in a folder of its own below `run.path`,
named after its number and values. A value is what `key=value` takes on the command line, without blanks at its ends.
A comma inside of brackets, or behind a backslash, belongs to a value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.errors import ConfigError

MAX_TASKS = 1000
"""As many as SLURM's MaxArraySize allows where a site has not changed it."""
_NO_NAME = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class Task:
    """One run of a sweep.

    Attributes:
        words: The overrides that make it different from the others.
        config: Its resolved configuration; `run.path` is its own folder.
    """

    words: tuple[str, ...]
    config: Config


def tasks_of(config_path: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Task]:
    """Resolve the configuration of every run of a sweep.

    Args:
        config_path: The recipe.
        overrides: `key=value` words for all runs.
        sweeps: `key=a,b,c` words; all combinations are made, the last word changes fastest.

    Raises:
        ConfigError: A word is not usable, or some combination is no valid configuration.
    """
    keys: list[str] = []
    choices: list[list[str]] = []
    for word in sweeps:
        key, equals, text = word.partition("=")
        choice = _values(text)
        if not equals or not key or not all(choice):
            raise ConfigError(f"--sweep {word!r} is no choice of values", expected="a word such as run.seed=1,2,3")
        if key == "run.path" or key in keys:
            raise ConfigError(f"--sweep {word!r}: {key} cannot be swept, or is there already")
        if len(set(choice)) < len(choice):
            raise ConfigError(f"--sweep {word!r} has a value twice", expected="each value once")
        keys.append(key)
        choices.append(choice)
    combinations = list(itertools.product(*choices))
    if len(combinations) > MAX_TASKS:
        raise ConfigError(
            f"the sweep has {len(combinations)} runs", expected=f"{MAX_TASKS} at most", remedy="sweep fewer values"
        )
    base = load_config(config_path, overrides).run.path
    digits = len(str(len(combinations) - 1))
    tasks = []
    for number, values in enumerate(combinations):
        words = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        name = "_".join(
            [f"{number:0{digits}d}", *(_NO_NAME.sub("-", word.split(".")[-1]).strip("-") for word in words)]
        )
        config = load_config(config_path, [*overrides, *words, f"run.path={base / name[:100]}"])
        tasks.append(Task(words, config))
    return tasks


def _values(text: str) -> list[str]:
    """Split at commas that are outside of brackets, and not behind a backslash."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and values[-1].endswith("\\"):
            values[-1] = values[-1][:-1] + letter
        elif letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]

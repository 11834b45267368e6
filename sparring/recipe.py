"""Recipes as objects: loaded by file or name, changed in Python's own values, saved as YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn

from engine.config.file import dump_config, load_config, with_overrides
from engine.config.recipe import Config
from engine.config.shipped import shipped_recipe
from engine.errors import ConfigError
from shards.files import write_atomically

_RUN_CONFIG = "config.yaml"


class Recipe:
    """A recipe: what is trained, on what, for how long. It never changes; `changed` makes another one.

    Its sections are attributes, and theirs are the options (`docs/options.md`): `recipe.run.seed`,
    `recipe.ar2.retriever.steps`.

    Args:
        config: A configuration that was found valid.
    """

    def __init__(self, config: Config) -> None:
        self.config: Config
        """The configuration, typed and frozen."""
        object.__setattr__(self, "config", config)

    @classmethod
    def load(cls, source: str | PathLike[str], **changes: Any) -> Recipe:
        """Read a recipe.

        Args:
            source: A YAML file; a run folder, for the recipe that it was made by; or, where there is no such file, the
                name of a recipe that comes along, such as `tiny` or `quickstart`.
            changes: Options as in `changed`.

        Raises:
            ConfigError: There is no such recipe, an option is unknown or its value is out of range; all problems of
                values are named at once.
        """
        path = Path(source)
        if (path / _RUN_CONFIG).is_file():
            path = path / _RUN_CONFIG
        elif not path.is_file():
            path = shipped_recipe(fspath(source)) or path
        return cls(load_config(path, list(_words(changes))))

    def changed(self, **changes: Any) -> Recipe:
        """Return a recipe with other values for some options.

        Args:
            changes: Sections, as mappings of options: `run={"seed": 7}, ar2={"retriever": {"steps": 50}}`; what is not
                named stays as it is. None leaves out what can be left out.

        Raises:
            ConfigError: As of `load`, or the values contradict each other.
        """
        return Recipe(with_overrides(self.config, list(_words(changes))))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the whole recipe as YAML, for `Recipe.load` and `sparring train --config`.

        Args:
            path: The file; one that is there is replaced.

        Returns:
            The file's path.
        """
        target = Path(path)
        with write_atomically(target) as temporary:
            temporary.write_text(dump_config(self.config), encoding="utf-8")
        return target

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in type(self.config).model_fields:
            raise AttributeError(f"the recipe {self.config.recipe} has no section {name!r}")
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise ConfigError(
            f"a recipe does not change, and {name} was to be set",
            remedy=f"take another one: recipe = recipe.changed({name}={{...}})",
        )

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *type(self.config).model_fields]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.config == other.config

    def __hash__(self) -> int:
        return hash(dump_config(self.config))

    def __repr__(self) -> str:
        return f"Recipe({self.config.recipe}, run.path={str(self.config.run.path)!r})"


def _words(changes: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write changes as the words of a command line, which the configuration reads and checks."""
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _words(value, f"{key}.")
        else:
            yield f"{key}={_written(value, key)}"


def _in_a_list(value: object) -> object:
    """Return what JSON knows for a path, or for a number of NumPy."""
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return fspath(value)  # type: ignore[call-overload]


def _written(value: object, key: str) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Real | str | PathLike):  # NumPy's numbers are real ones, too
        return str(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=_in_a_list)
    raise ConfigError(
        f"{key} is given a {type(value).__name__}",
        expected="a number, a text, a path, True, False or None, or lists and mappings of these",
    )

"""Reading and comparing configurations: defaults <- YAML file <- `key=value` words of the command line.

A word is taken as it is: what it means is decided by the field (`engine.config.values`), never by its looks. An unknown
key is an error that names the nearest known one, a wrong value names the field; all problems are reported at once,
before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from engine.config.metric_names import compared_by
from engine.config.problems import described
from engine.config.recipe import Config
from engine.config.recipes import recipe_class
from engine.config.shipped import shipped_recipes
from engine.config.text import as_typed
from engine.config.tree import Null, read_tree, read_tree_file
from engine.config.values import kind_at, sections_in, takes_structure, value_of
from engine.errors import ConfigError

_CHANGES_NO_RESULT = frozenset({"zero_stage", "deepspeed", "refresh_devices", "local_folder", "gather_embeddings"})
"""Keys of any section that say who computes what, when sums may be made in another order; and where something is
kept."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML recipe and apply `key=value` overrides.

    Args:
        path: YAML file with the sections of `Config`.
        overrides: Words such as `ranker.max_length=128`, split at the first `=`; of two for one key the last holds. A
            text or a path is all that stands behind it, blanks and quotes included. Nothing behind it, or `null`,
            leaves out what can be left out. Lists and sections are written as in YAML: `[a, b]`, `{a: b}`.

    Returns:
        The frozen configuration; its paths are absolute, from the working directory, whoever gave them.

    Raises:
        ConfigError: The file is missing or no mapping, has a key twice, a word has no `=`, a key is unknown, a value
            has the wrong type or is out of range. All problems of values are named at once.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no configuration file {path}",
            remedy=f"name a file, or one of those that come along: {', '.join(shipped_recipes())}",
        )
    tree = read_tree_file(path)
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds no mapping of sections",
            expected="sections such as run, data, retriever",
            remedy="name a recipe, or begin with one: `sparring init` drafts it",
        )
    if isinstance(tree.get("index"), str):  # `index: auto`, which a word such as index.memory_gib=4 goes below
        tree["index"] = {"factory": tree["index"]}
    _apply_overrides(tree, overrides, str(path))
    return parse_config(tree, origin=str(path))


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Validate a mapping of values as a configuration; `origin` names it in errors.

    Raises:
        ConfigError: As in `load_config`.
    """
    recipe = recipe_class(tree, origin)
    try:
        return recipe.model_validate(value_of(tree, recipe))
    except ValidationError as error:
        problems = described(error, recipe)
        raise ConfigError(
            f"{origin} has {len(problems)} problem{'s' if len(problems) > 1 else ''}: " + "; ".join(problems),
            remedy="correct the key or value in the file or on the command line; `sparring options WORD` explains keys",
        ) from error


def with_overrides(config: Config, words: Sequence[str]) -> Config:
    """Return a configuration with `key=value` overrides, validated as a whole.

    Raises:
        ConfigError: As in `load_config`.
    """
    tree: Any = read_tree(dump_config(config), "the configuration of the run")
    origin = "the configuration of the run with " + " ".join(words)
    _apply_overrides(tree, words, origin)
    return parse_config(tree, origin=origin)


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that `load_config` reads back to an equal one."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def differences(
    ours: Config, theirs: Config, *, ignore_sections: frozenset[str] = frozenset({"run", "shards"})
) -> list[str]:
    """List the fields in which two configurations differ, as `section.key: theirs -> ours`.

    Args:
        ours: The new configuration.
        theirs: The recorded one.
        ignore_sections: Sections that change no result. Of `run`, the seed is compared all the same, and the metric
            that decides between iterations; of the others, how an optimizer's state is shared by the ranks is not.
    """
    mine, recorded = flatten(ours.model_dump(mode="json")), flatten(theirs.model_dump(mode="json"))
    of_run = {"run.seed"} if _deciding(ours) == _deciding(theirs) else {"run.seed", "run.keep_best"}
    keys = [
        key
        for key in sorted(mine.keys() | recorded.keys())
        if key in of_run or (key.split(".")[0] not in ignore_sections and key.split(".")[-1] not in _CHANGES_NO_RESULT)
    ]
    return [f"{key}: {recorded.get(key)} -> {mine.get(key)}" for key in keys if mine.get(key) != recorded.get(key)]


def _deciding(config: Config) -> str | None:
    """Return the metric by which iterations are compared on dev, where it can be had there."""
    return compared_by(config.evaluation.metrics, config.run.keep_best)


def _apply_overrides(tree: dict[str, Any], words: Sequence[str], origin: str) -> None:
    """Apply words to a tree; which sections there are depends on the recipe, which a word may name."""
    typed = [as_typed(word) for word in words]
    for word in typed:
        if word.startswith("recipe="):
            tree["recipe"] = word.partition("=")[2]
    recipe = recipe_class(tree, origin)
    for word in typed:
        _apply_override(tree, word, recipe)


def _apply_override(tree: dict[str, Any], word: str, recipe: type[Config]) -> None:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"the word {word!r} is no override",
            expected="section.key=value, such as run.seed=7",
            remedy="put the value behind the key, no blanks around =; one in a value wants quotes for the shell",
        )
    node = tree
    keys = key.split(".")
    *parents, leaf = keys
    for depth, parent in enumerate(parents, 1):
        if isinstance(node.get(parent), Null):  # a section that the file leaves out by name
            node[parent] = {}
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise _below_a_value(word, keys[:depth], child, recipe)
        node = child
    if takes_structure(kind_at(recipe, keys)) and value.lstrip()[:1] in ("[", "{"):
        node[leaf] = read_tree(value, f"the value of {word!r}")
    else:
        node[leaf] = Null(value) if value in ("", "null") else value


def _below_a_value(word: str, keys: Sequence[str], value: Any, recipe: type[Config]) -> ConfigError:
    """Describe a word whose key goes on below one that holds a value."""
    above = ".".join(keys)
    if sections_in(kind_at(recipe, keys)):
        return ConfigError(
            f"{word!r} goes below {above!r}, which is given the value {str(value)!r}",
            expected=f"a section with keys of its own, written as {above}.KEY=VALUE",
            remedy=f"leave that value out; `sparring options {above}` lists the section's keys",
        )
    if isinstance(value, list):
        return ConfigError(
            f"{word!r} goes below {above!r}, which is a list",
            expected="a list as a whole, written as [a, b]",
            remedy=f"write {above}=[...] with all that it holds",
        )
    return ConfigError(
        f"{word!r} goes below {above!r}, which is a value and no section",
        expected=f"nothing between {above} and =",
        remedy=f"write {above}=..., or take the key that you mean from `sparring options {keys[0]}`",
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key, such as `run.seed`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

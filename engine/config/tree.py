"""A YAML file as a tree of texts: mappings, lists, and scalars as they are written.

YAML guesses by its looks whether a scalar is a date, a number or a truth value: `2024-01-01`, `on`, `010`, `24:00:00`
are not what they seem. Here nothing is guessed: who knows what a value is for reads it (`engine.config.values`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

_KEPT = frozenset({"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"})


class Null(str):
    """A word for nothing, such as `null`; for a text that cannot be left out it stands for its own letters."""

    __slots__ = ()


class _TextLoader(yaml.SafeLoader):
    """Reads scalars as texts, and refuses a key that stands twice in a mapping."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - an attribute of the class in PyYAML
        letter: [(tag, form) for tag, form in resolvers if tag in _KEPT]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise ConfigError(
                    f"{self.name}, line {line}: the key {key.value!r} stands there again, first in line "
                    f"{lines[key.value]}",
                    expected="each key once",
                    remedy="delete one of the two",
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return node

    def construct_null(self, node: yaml.ScalarNode) -> Null | None:
        return Null(node.value) if node.value else None


_TextLoader.add_constructor("tag:yaml.org,2002:null", _TextLoader.construct_null)


def read_tree(text: str, origin: str) -> Any:
    """Read YAML without guessing: mappings, lists, texts, and None where nothing is written.

    Args:
        text: The YAML.
        origin: Where it comes from, for errors.

    Returns:
        The tree; `null` and `~` are `Null` where they stand without quotes.

    Raises:
        ConfigError: It is not valid YAML, or a key stands twice in a mapping.
    """
    try:
        loader = _TextLoader(text)
        loader.name = origin
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}", remedy="mend it") from error


def read_tree_file(path: Path) -> Any:
    """Read a YAML file, as `read_tree`.

    Raises:
        ConfigError: It cannot be read, or is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path} is no UTF-8: line {line} has the byte {error.object[error.start]:#04x}",
            remedy="save it as UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", remedy="let this user read it") from error
    return read_tree(text, str(path))

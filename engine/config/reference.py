"""The reference of all options, read off the recipes: key, what it takes, default and the docstring under each field.

A field that stands in several places (an optimizer's `lr`) is one option with several keys. Where a section is one of
several kinds, the kind stands in brackets: `ar2.negatives.filters[margin].share` is `share` of a filter whose `name` is
`margin`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.config.recipe import Config

NO_DEFAULT = "must be given"
LEFT_OUT = "left out"
_PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


@dataclass(frozen=True)
class Use:
    """One place of an option."""

    key: str
    """Dotted, as it is typed on the command line."""
    default: str
    """As it would be typed, or in words."""
    recipes: tuple[str, ...]
    """Names of those that have it."""


@dataclass(frozen=True)
class Option:
    """A field of the configuration."""

    takes: str
    """Type and range in words."""
    text: str
    """Its docstring, in one line."""
    uses: list[Use] = field(default_factory=list)
    """All places, in the order of the recipes."""

    @property
    def name(self) -> str:
        """The key; of several, the end that they share, after dots."""
        keys = [use.key for use in self.uses]
        if len(keys) == 1:
            return keys[0]
        ends = [key.split(".")[::-1] for key in keys]
        shared: list[str] = []
        for parts in zip(*ends, strict=False):
            if len(set(parts)) > 1:
                break
            shared.insert(0, parts[0])
        return ".." + ".".join(shared)

    def has(self, words: Sequence[str]) -> bool:
        """Whether all words occur in its keys, its text or what it takes, in upper or lower case."""
        all_of_it = " ".join([self.text, self.takes, *(use.key for use in self.uses)]).lower()
        return all(word.lower() in all_of_it for word in words)


def options_of(recipes: Mapping[str, type[Config]]) -> list[Option]:
    """List the options of recipes, each once.

    Args:
        recipes: By name.
    """
    found: dict[tuple[str, str, str], dict[tuple[str, str], list[str]]] = {}
    for recipe, section in recipes.items():
        for key, takes, default, text in _walk(section, "", None):
            places = found.setdefault((key.rpartition(".")[2], takes, text), {})
            places.setdefault((key, default), []).append(recipe)
    return [
        Option(takes, text, [Use(key, default, tuple(names)) for (key, default), names in places.items()])
        for (_, takes, text), places in found.items()
    ]


def _walk(section: type[BaseModel], prefix: str, above: BaseModel | None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, what it takes, default, text) of all fields below a section.

    Args:
        section: The class.
        prefix: Of its keys, with the dot.
        above: The section's own default, whose values hold before those of its fields.
    """
    for name, info in section.model_fields.items():
        default = getattr(above, name) if above is not None else info.get_default(call_default_factory=True)
        kinds = _sections_of(info.annotation)
        text = " ".join((info.description or "").split())
        if not kinds:
            yield prefix + name, _in_words(info.annotation, list(info.metadata)), _shown(default), text
        elif len(kinds) > 1:
            many = "list, each " if get_origin(info.annotation) is tuple else ""
            yield prefix + name, f"{many}section of the kind {' or '.join(map(_kind, kinds))}", _shown(default), text
        for one in kinds:
            inside = f"{prefix}{name}[{_kind(one)}]." if len(kinds) > 1 else f"{prefix}{name}."
            own = default if isinstance(default, one) else None
            for key, takes, value, told in _walk(one, inside, own):
                is_kind = len(kinds) > 1 and takes == f"`{_kind(one)}`"
                yield key, takes, NO_DEFAULT if is_kind else value, _about(one) if is_kind else told


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold, alone, in a union or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for inner in get_args(annotation) for one in _sections_of(inner)]


def _kind(section: type[BaseModel]) -> str:
    """Return the name by which a section is told from its alternatives."""
    for info in section.model_fields.values():
        if get_origin(info.annotation) is Literal:
            return str(get_args(info.annotation)[0])
    return section.__name__


def _about(section: type[BaseModel]) -> str:
    """Return what the section's docstring says of it."""
    return " ".join((section.__doc__ or "").split())


def _in_words(kind: Any, limits: list[Any]) -> str:
    """Say what a type takes, and within which limits."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = [one for mark in inner[1:] for one in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return _in_words(inner[0], own + limits)
    if origin in (Union, types.UnionType):
        words = [_in_words(one, limits) for one in inner if one is not types.NoneType]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return " or ".join(f"`{_shown(one)}`" for one in inner)
    if origin is tuple and inner[-1:] == (...,):
        return f"list, each {_in_words(inner[0], [])}"
    if origin is tuple:
        return f"list of {len(inner)}, each {' / '.join(dict.fromkeys(_in_words(one, []) for one in inner))}"
    if origin is dict:
        return f"mapping of {_in_words(inner[0], [])} to {_in_words(inner[1], [])}"
    span = _span(limits) if kind in (int, float) else ""
    return _PLAIN.get(kind, "value") + (f" {span}" if span else "")


def _span(limits: list[Any]) -> str:
    """Say the range that limits leave."""
    found = {name: getattr(one, name) for one in limits for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
    if found.keys() == {"ge", "le"}:
        return f"from {_shown(found['ge'])} to {_shown(found['le'])}"
    words = {"ge": "of {} or more", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
    return ", ".join(words[name].format(_shown(value)) for name, value in found.items())


def _shown(value: Any) -> str:
    """Write a default as one would type it."""
    if value is None:
        return LEFT_OUT
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_shown(one) for one in value)}]"
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{name}: {_shown(one)}" for name, one in value if one is not None) + "}"
    return str(value) if isinstance(value, int | str | Path) else NO_DEFAULT

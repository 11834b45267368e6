"""What a text means is decided by the field that it is for, and not by its looks.

A text or path field takes it as it is. Numbers are decimal (`7`, `1_000`, `1e-6`, `.5`; `010` is ten), truth values are
true, yes, on and their opposites. What cannot be read is left as it is, for the field to refuse it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from engine.config.text import number_of
from engine.config.tree import Null

_TRUTH = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def value_of(value: Any, kind: Any) -> Any:
    """Read a text, or a tree of texts, as a field's type wants it.

    Args:
        value: A text, a mapping or a list of such; anything else is left as it is.
        kind: The field's type, as it is annotated: a section, a text, a path, a number, a truth value, `Literal`, a
            union, or a list, tuple or mapping of these. None for a key that nobody knows.

    Returns:
        The value; a text that cannot be read stays one.
    """
    kinds = members_of(kind)
    if isinstance(value, Mapping):
        return _mapping_of(value, kinds)
    if isinstance(value, list):
        return _list_of(value, kinds)
    if not isinstance(value, str):
        return value
    takes_none = types.NoneType in kinds
    if isinstance(value, Null) and (takes_none or not any(map(_takes_text, kinds))):
        return None
    text = str(value)
    for one in kinds:
        if get_origin(one) is Literal and text in get_args(one):
            return text
    if any(one in (str, Path) for one in kinds):
        return text
    for one in kinds:
        found = _plain_value(text.strip(), one)
        if found is not None:
            return found
    return text


def takes_structure(kind: Any) -> bool:
    """Whether a field may hold a section, a list or a mapping, which a word writes as YAML does: `[a, b]`, `{a: b}`."""
    return any(_is_section(one) or (get_origin(one) or one) in (list, tuple, dict) for one in members_of(kind))


def sections_in(kind: Any) -> list[type[BaseModel]]:
    """Return the sections that a field may hold: one, which may be one that can be left out, or none."""
    return [one for one in members_of(kind) if _is_section(one)]


def kind_at(section: type[BaseModel], keys: Sequence[str]) -> Any:
    """Return the type of the field at dotted keys below a section; None where there is none.

    Args:
        section: Where the keys begin.
        keys: Such as `("run", "seed")`.
    """
    kind: Any = section
    for key in keys:
        below = [
            one.model_fields[key].annotation for one in members_of(kind) if _is_section(one) if key in one.model_fields
        ]
        mappings = [get_args(one)[1] for one in members_of(kind) if get_origin(one) is dict]
        if not below + mappings:
            return None
        kind = (below + mappings)[0]
    return kind


def has_name(section: Any, value: Mapping[Any, Any]) -> bool:
    """Whether a mapping names a section by a field of which the section has one value alone.

    Args:
        section: The class.
        value: As it was given, such as `{"name": "margin"}`.
    """
    return any(
        get_origin(field.annotation) is Literal and get_args(field.annotation) == (value.get(key),)
        for key, field in section.model_fields.items()
    )


def members_of(kind: Any) -> list[Any]:
    """Return the members of a union, or the type alone; what annotates them taken off.

    Args:
        kind: As a field is annotated.
    """
    if get_origin(kind) is Annotated:
        return members_of(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [member for one in get_args(kind) for member in members_of(one)]
    return [kind]


def _plain_value(text: str, kind: Any) -> bool | int | float | None:
    """Read a text as one member of a union; None where it is none of its values."""
    if kind is bool:
        return _TRUTH.get(text.lower())
    if kind in (int, float):
        return number_of(text)
    if get_origin(kind) is Literal:
        choices = [one for one in get_args(kind) if not isinstance(one, str)]
        for one in choices:
            found = _plain_value(text, type(one))
            if found is not None and found == one:
                return one  # type: ignore[no-any-return]
    return None


def _mapping_of(value: Mapping[Any, Any], kinds: Sequence[Any]) -> dict[Any, Any]:
    sections = [one for one in kinds if _is_section(one)]
    named = [one for one in sections if has_name(one, value)]  # of several, the one with the name that is given
    for one in (named or sections)[:1]:
        fields = one.model_fields
        return {key: value_of(inner, fields[key].annotation if key in fields else None) for key, inner in value.items()}
    for one in kinds:
        if get_origin(one) is dict:
            of_key, of_value = get_args(one)
            return {value_of(key, of_key): value_of(inner, of_value) for key, inner in value.items()}
    return dict(value)


def _list_of(value: list[Any], kinds: Sequence[Any]) -> list[Any]:
    for one in kinds:
        inner = get_args(one)
        if get_origin(one) is list or (get_origin(one) is tuple and inner[-1:] == (...,)):
            return [value_of(element, inner[0]) for element in value]
        if get_origin(one) is tuple and len(inner) == len(value):
            return [value_of(element, kind) for element, kind in zip(value, inner, strict=True)]
    return value


def _takes_text(kind: Any) -> bool:
    return kind in (str, Path) or get_origin(kind) is Literal


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)

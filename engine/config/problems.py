"""What is wrong with the keys and values of a recipe, in its own words: the key, what is expected, what was given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from engine.config.expected import expected_of, wants_list, wants_object
from engine.config.recipe import Config
from engine.config.values import has_name, members_of, sections_in
from shards.errors import listed

_NAMED = 3
"""Keys that are suggested at most."""
_LISTED = 8
"""Keys of a section that are listed at most."""
_SHOWN_CHARACTERS = 200
_NEAR = 0.65


@dataclass(frozen=True)
class _Place:
    """Where a problem is.

    Attributes:
        key: Dotted, as it is typed; elements of lists by their number.
        kind: The type of the field there; None for a key that nobody knows.
        section: What holds the field, and
        prefix: its key.
    """

    key: str
    kind: Any
    section: type[BaseModel]
    prefix: str


def described(error: ValidationError, recipe: type[Config]) -> list[str]:
    """Say each thing that is wrong with a recipe, once.

    Args:
        error: What pydantic found; of a field that takes several kinds of value, one problem for each.
        recipe: Its class.
    """
    expected: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    told: list[str] = []
    for problem in error.errors():
        place = _place(problem["loc"], recipe)
        kind, value = problem["type"], problem["input"]
        if kind == "extra_forbidden":
            told.append(f"unknown key {place.key!r}{_hint(place, recipe)}")
        elif kind == "missing" and not isinstance(problem["loc"][-1], int):
            told.append(f"{place.key!r} is not given and has no default")
        elif kind == "value_error":
            told.append(_of_our_own(place.key, problem))
        else:
            key = place.key.rpartition(".")[0] if kind == "missing" else place.key  # a pair with one element
            expected.setdefault(key, []).append(_expected(key, problem, recipe))
            given.setdefault(key, value)
    wrong = [
        f"{key}: expected {_either(list(dict.fromkeys(words)))}, got {_shown(given[key])}"
        for key, words in expected.items()
    ]
    return wrong + told


def _either(words: Sequence[str]) -> str:
    return (", or " if any("," in one for one in words) else " or ").join(words)


def _of_our_own(key: str, problem: Mapping[str, Any]) -> str:
    message: str = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if isinstance(problem["input"], dict):
        return f"{key}: {message}"  # of values of the section that contradict each other, which it names
    return f"{key}: {message}, got {_shown(problem['input'])}"


def _expected(key: str, problem: Mapping[str, Any], recipe: type[Config]) -> str:
    kinds = [one for one in members_of(_place(problem["loc"], recipe).kind) if one is not NoneType]
    if problem["type"] == "missing":
        pair = _place(problem["loc"][:-1], recipe).kind
        return f"a list of {len(get_args(pair))}, written as [a, b]"
    if wants_list(problem):
        return f"{expected_of(problem)}, written as {_as_list(problem['input'], kinds)}"
    if wants_object(problem):
        return _section_in_words(key, [one for kind in kinds for one in sections_in(kind)])
    return expected_of(problem)


def _as_list(value: Any, kinds: Sequence[Any]) -> str:
    """Write down how a list is written: of the very value, where it is one without its brackets."""
    of_sections = any(sections_in(inner) for kind in kinds for inner in get_args(kind))
    if of_sections:
        return "[{name: ...}]"
    of_any_length = any(get_args(kind)[-1:] == (...,) for kind in kinds)
    bare = isinstance(value, str) and value.strip() and not set(value) & set("[]{}'\"")
    if not (bare and of_any_length) or len(value) > _SHOWN_CHARACTERS:
        return "[a, b]"
    return f"[{','.join(part.strip() for part in value.split(','))}]"


def _section_in_words(key: str, sections: Sequence[type[BaseModel]]) -> str:
    """Say that keys of its own stand below a key; an element of a list has no key of a word's."""
    names = [name for section in sections[:1] for name in section.model_fields]
    first = "name" if "name" in names else next(iter(names), "KEY")
    if any(part.isdigit() for part in key.split(".")):
        return f"a section, written as {{{first}: ...}}"
    return f"a section with keys of its own, written as {key}.{first}=..."


def _place(loc: Sequence[int | str], recipe: type[Config]) -> _Place:
    """Follow the way to a problem; it also names members of unions, which nobody types."""
    kind: Any = recipe
    section: type[BaseModel] = recipe
    keys: list[str] = []
    above = 0
    for part in loc:
        kinds = [one for one in members_of(kind) if one is not NoneType]
        if len(kinds) > 1:
            kind = _member(kinds, str(part))
            continue
        for one in kinds:
            if sections_in(one):
                section, above = one, len(keys)
                kind = one.model_fields[part].annotation if part in one.model_fields else None
            else:
                inner = get_args(one)
                kind = inner[0] if inner and inner[-1] is ... else inner[-1] if inner else None
        keys.append(str(part))
    return _Place(".".join(keys), kind, section, ".".join(keys[:above]))


def _member(kinds: Sequence[Any], label: str) -> Any:
    """Return the member of a union that pydantic calls so: a section by its name, a list as `tuple[...]`."""
    for one in kinds:
        if sections_in(one) and has_name(one, {"name": label}):
            return one
        if get_origin(one) is tuple and label.startswith("tuple"):
            return one
    return None


def _hint(place: _Place, recipe: type[Config]) -> str:
    """Suggest what may have been meant by an unknown key: keys that end alike, or all of its section."""
    *above, last = place.key.split(".")
    inside = f"{place.prefix}." if place.prefix else ""
    below = [inside + name for name in _keys(place.section)]
    known = [key for key in _keys(recipe) if key != place.key]  # which sections of another name may have
    for found in (_same_end(below, last), _near_end(below, last) if inside else [], _same_end(known, last)):
        found = [key for key in found if all(part in key for part in above)] or found
        if found:
            nearest = sorted(found, key=lambda key: -difflib.SequenceMatcher(None, key, place.key).ratio())
            return f", did you mean {' or '.join(map(repr, nearest[:_NAMED]))}?"
    if not inside and (near := difflib.get_close_matches(last, known, n=1, cutoff=0.5)):
        return f", did you mean {near[0]!r}?"
    own = listed(place.section.model_fields, _LISTED)
    if not inside:
        return f": the sections are {own} (`sparring options` lists all keys)"
    return f": {place.prefix} has {own} (`sparring options {place.prefix}` lists them)"


def _same_end(keys: Sequence[str], last: str) -> list[str]:
    return [key for key in keys if key.split(".")[-1] == last]


def _near_end(keys: Sequence[str], last: str) -> list[str]:
    """Return the keys of which the last part is like a word; of two letters, half would be like it."""
    if len(last) <= 2:
        return []
    ends = {key.split(".")[-1] for key in keys}
    near = difflib.get_close_matches(last, sorted(ends), n=1, cutoff=_NEAR)
    near = near or [end for end in ends if end.startswith(last)]
    return [key for key in keys if key.split(".")[-1] in near]


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        for inner in sections_in(field.annotation):
            names += _keys(inner, f"{prefix}{name}.")
    return names


def _shown(value: Any) -> str:
    """Show a value as a file has it, shortened."""
    text = _as_written(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _as_written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_as_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_written, value))}]"
    return value if isinstance(value, str) else repr(value)

"""What a value should have been, in the words of those who write recipes and requests, not in Python's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LISTS = dict.fromkeys(("tuple_type", "list_type"), "a list")
_OBJECTS = dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "an object")
_WORDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_unicode"), "a text"),
    "finite_number": "a finite number",
    "path_type": "a path",
    **_LISTS,
    **_OBJECTS,
}
_LIMITS = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_INPUT = "Input should be "


def expected_of(problem: Mapping[str, Any]) -> str:
    """Say what was expected in place of a value.

    Args:
        problem: One of `ValidationError.errors()`, with its context.

    Returns:
        Such as `a whole number`, `a number greater than 0`, `'auto' or 'cpu'`.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    message: str = problem["msg"].removeprefix(_INPUT)
    if kind in _WORDS:
        return _WORDS[kind]
    if kind in _LIMITS:
        return f"a number {message}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"a list of at most {context['max_length']}"
    if kind == "union_tag_invalid":
        return f"one of the names {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"a key {context['discriminator']}"
    return message


def wants_list(problem: Mapping[str, Any]) -> bool:
    """Whether a list was expected, of any length or of another."""
    return problem["type"] in _LISTS or problem["type"] in ("too_short", "too_long")


def wants_object(problem: Mapping[str, Any]) -> bool:
    """Whether keys with values were expected."""
    return problem["type"] in _OBJECTS

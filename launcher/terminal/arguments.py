"""What a word of a command line may be: one reading of numbers and paths for all commands.

Each function is a `type` of argparse, which tells its errors with the option's name and ends with exit code 2.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from engine.config.shipped import found_recipe
from engine.config.text import absolute_path, as_typed, is_whole, number_of

_MOST_WHOLE = 10**15
_READ_ELSEWHERE = frozenset({"overrides", "question", "words"})
"""Arguments whose readers say themselves what is no text in them, or hand it on as it is."""
_LEAST, _MOST = 1e-9, 1e15
"""Beyond these, what is computed with a number leaves the range of numbers."""


def whole_number(text: str) -> int:
    """Read a whole number of 0 or more.

    Raises:
        ArgumentTypeError: It is none, or beyond 10^15.
    """
    return _whole(text, 0)


def positive_whole_number(text: str) -> int:
    """Read a whole number of 1 or more.

    Raises:
        ArgumentTypeError: It is none, or beyond 10^15.
    """
    return _whole(text, 1)


def positive_number(text: str) -> float:
    """Read a number above 0.

    Raises:
        ArgumentTypeError: It is none, not finite, or beyond 10^-9 to 10^15.
    """
    number = number_of(text.strip())
    if number is None or not _LEAST <= number <= _MOST:  # what is not a number is not between them
        raise ArgumentTypeError(f"{text!r} is no number that can be computed with, expected one above 0, such as 2.5")
    return float(number)


def share(text: str) -> float:
    """Read a share, above 0 and at most 1.

    Raises:
        ArgumentTypeError: It is none.
    """
    number = positive_number(text)
    if number > 1:
        raise ArgumentTypeError(f"{text!r} is more than the whole, expected a share above 0 and at most 1")
    return number


def typed_path(text: str) -> Path:
    """Read the path of a file or folder, as the configuration does; it becomes absolute.

    Raises:
        ArgumentTypeError: It is empty, or no program here could use the name.
    """
    try:
        return absolute_path(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from error


def recipe_file(text: str) -> Path:
    """Read the path of a recipe; where there is no such file, the name of one that comes along (`quickstart`).

    Raises:
        ArgumentTypeError: It is empty, or no program here could use the name.
    """
    try:
        return found_recipe(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from error


def complete(parser: ArgumentParser, arguments: Namespace, left: Sequence[str]) -> Namespace:
    """Complete what argparse has parsed; end with exit code 2 where that cannot be.

    `key=value` words may stand between options, where argparse itself takes only one group of them. Texts are read as
    they were typed, and refused where they are no UTF-8.

    Args:
        parser: Tells what is wrong.
        arguments: What it has parsed; changed.
        left: What it could not place.
    """
    if left and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}{_nearest(parser, left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    for name, value in vars(arguments).items():
        if name in _READ_ELSEWHERE or not isinstance(value, str | list):
            continue
        texts = [as_typed(value)] if isinstance(value, str) else [as_typed(one) for one in value]
        if broken := next((text for text in texts if not is_whole(text)), None):
            parser.error(f"argument {name.replace('_', '-')}: {broken!r} is no UTF-8, expected a text in it")
        setattr(arguments, name, texts[0] if isinstance(value, str) else texts)
    return arguments


def _nearest(parser: ArgumentParser, words: Sequence[str]) -> str:
    """Return a question for the options that were meant, " " before it; "" where none is like them."""
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    meant = [get_close_matches(word.split("=")[0], known, n=1) for word in words if word.startswith("--")]
    names = list(dict.fromkeys(name for found in meant for name in found))
    return f" (is {' or '.join(names)} meant?)" if names else ""


def _whole(text: str, least: int) -> int:
    number = number_of(text.strip())
    if isinstance(number, float) and math.isfinite(number) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or not least <= number <= _MOST_WHOLE:
        raise ArgumentTypeError(f"{text!r} is not taken, expected a whole number of {least} or more")
    return number

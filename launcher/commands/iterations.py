"""Iterations as a command line names them: `0`, `0,3`, `0..3`, `last`, `all`."""

from __future__ import annotations

import re

from engine.errors import ConfigError

_PART = re.compile(r"(\d+|last)(?:\.\.(\d+|last))?")


def iterations_in(words: str, *, last: int, option: str) -> list[int]:
    """Read iterations.

    Args:
        words: Numbers and ranges with both ends, separated by commas, where `last` is the newest; or `all`.
        last: The newest finished iteration; 0 is the warm-up.
        option: Where the words come from, for the error.

    Returns:
        Each iteration once, ascending.

    Raises:
        ConfigError: The words are of another form, or name an iteration that is not finished.
    """
    found: set[int] = set()
    for word in ("0..last" if words.strip() == "all" else words).split(","):
        part = _PART.fullmatch(word.strip())
        if part is None:
            raise ConfigError(f"{option} is {words!r}", expected="such as 0, 0,3, 0..3, last or all")
        first, end = (last if one == "last" else int(one) for one in (part[1], part[2] or part[1]))
        if first > end or end > last:
            raise ConfigError(
                f"{option} names {word.strip()}, but the newest finished iteration is {last}",
                expected=f"iterations from 0, the warm-up, to {last}, ranges ascending",
            )
        found.update(range(first, end + 1))
    return sorted(found)

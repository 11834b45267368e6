"""The root of every error that Sparring raises on purpose.

A message states the fact with its values, what was expected, and what to do about it, so that a person at a
terminal can act on it without reading code. `engine.errors` adds the learning side's errors to these.
"""

from __future__ import annotations

from collections.abc import Iterable


def listed(words: Iterable[str], most: int, separator: str = ", ") -> str:
    """Return words as a text for a message, cut where there are many.

    Args:
        words: What to list.
        most: Number of words at most; how many more there are is said behind them.
        separator: Between two words.
    """
    found = list(words)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return separator.join(found[:most]) + more


class SparringError(Exception):
    """An error with a fact, an expectation and a remedy.

    Args:
        fact: What was found, with its values.
        expected: What should have been found; may be empty where the fact implies it.
        remedy: What the user can do; may be empty where the expectation implies it.
    """

    def __init__(self, fact: str, *, expected: str = "", remedy: str = "") -> None:
        self.fact, self.expected, self.remedy = fact, expected, remedy
        parts = [fact.rstrip(".")]
        if expected:
            parts.append(f"expected: {expected.rstrip('.')}")
        if remedy:
            parts.append(f"remedy: {remedy.rstrip('.')}")
        sentences = [part if part.endswith("?") else f"{part}." for part in parts]
        super().__init__(" ".join(one[0].upper() + one[1:] if place else one for place, one in enumerate(sentences)))


class DataError(SparringError):
    """The user's corpus, queries or judgements are not usable as they are."""


class ArtifactError(SparringError):
    """Something that a run wrote is missing, damaged, half-written or stale."""


class DiskFullError(SparringError):
    """A file could not be written for want of space; what was written before it is whole."""


class FileError(SparringError):
    """A file or folder cannot be read, written or made where it was named: the user may not, or something is there."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 rank`, `2 ranks` or `2 queries`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("query") else f"{number} {noun}s"

"""The words of a query in a passage: which are marked, and which piece of a long passage is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.config.bm25 import Bm25Config
from engine.retrievers.words import Analyzer, Words

_SHOWN, _LEAD = 320, 80
"""Characters of a passage that are shown, and how many of them at most before the first marked word."""
_RUN = re.compile(r"\w+")
Segment = tuple[str, bool]
"""A piece of a text, and whether it is marked."""


class Marker:
    """Marks what a text has in common with a query, as the run's BM25 takes words: stems, without stop words.

    Where a script has no spaces between words, two neighbouring characters count as one word there, and are marked.

    Args:
        settings: The run's.
        query: Its text.
    """

    def __init__(self, settings: Bm25Config, query: str) -> None:
        self._analyzer = Analyzer(Words.of(settings))
        self._stems = frozenset(self._analyzer.stems(query))

    def marked(self, text: str) -> tuple[Segment, ...]:
        """Cut a text into pieces that are marked and pieces that are not; together they are the text."""
        pieces, end = [], 0
        for start, stop in self._places(text):
            pieces += [(text[end:start], False), (text[start:stop], True)]
            end = stop
        return tuple(piece for piece in [*pieces, (text[end:], False)] if piece[0])

    def snippet(self, text: str) -> str:
        """Return the piece of a text in which the first marked word stands, on one line."""
        whole = " ".join(text.split())
        first = next((start for start, _ in self._places(whole)), 0)
        start = max(0, min(first - _LEAD, len(whole) - _SHOWN))
        start = 0 if start == 0 else whole.find(" ", start, first) + 1 or start
        shown = whole[start : start + _SHOWN]
        if start + _SHOWN < len(whole):
            shown = shown.rpartition(" ")[0] or shown
        return f"{'… ' if start else ''}{shown}{' …' if start + len(shown) < len(whole) else ''}"

    def _places(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where the words of the query stand, in order, none inside another."""
        for run in _RUN.finditer(text):
            stems = set(self._analyzer.stems(run.group()))
            if len(stems) == 1 and stems <= self._stems:
                yield run.span()
            elif len(stems) > 1 and (shared := stems & self._stems):
                yield from _joined(run, shared)


def _joined(run: re.Match[str], stems: set[str]) -> Iterator[tuple[int, int]]:
    """Yield the characters of a run that some of its pairs cover; neighbours as one piece."""
    text, covered = run.group(), set[int]()
    for stem in stems:
        for found in re.finditer(f"(?={re.escape(stem)})", text, re.IGNORECASE):
            covered |= set(range(found.start(), found.start() + len(stem)))
    start = None
    for place in range(len(text) + 1):
        if place in covered and start is None:
            start = place
        elif place not in covered and start is not None:
            yield run.start() + start, run.start() + place
            start = None

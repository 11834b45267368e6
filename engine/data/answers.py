"""Answer match: whether a document contains an answer, word by word, as open-domain question answering judges it.

It says which retrieved documents count as hits where only answers are known, and which must not be negatives. Two
strings match as sequences of words, not of characters: "art" is not found in "party", and case, spacing and the
encoding of accents do not matter; the accents themselves do.

Source: Karpukhin et al. 2020; the string match and the tokenisation of DPR's released code.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import TypeVar

KEPT_TEXTS = 65_536
"""Documents whose texts stay cut into tokens: some 100 MiB of Wikipedia's passages."""
Key = TypeVar("Key", bound=Hashable)


@cache
def _token_pattern() -> re.Pattern[str]:
    """A run of letters, digits and marks, or any other single character that is neither space nor control.

    `re` knows no Unicode categories; the two character classes are spelled out from the interpreter's tables. It takes
    a fraction of a second, once, and only where a text goes beyond ASCII.
    """
    word, skipped = [], []
    for point in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(point))[0]
        if category in "LNM":
            word.append(point)
        elif category in "ZC":
            skipped.append(point)
    return re.compile(f"[{_ranges(word)}]+|[^{_ranges(word)}{_ranges(skipped)}]")


def _ranges(points: list[int]) -> str:
    parts, start = [], points[0]
    for previous, point in zip(points, [*points[1:], -1], strict=True):
        if point != previous + 1:
            parts.append(f"\\U{start:08x}-\\U{previous:08x}")
            start = point
    return "".join(parts)


# The same pattern where all is ASCII.
_ASCII_PATTERN = re.compile(r"[A-Za-z0-9]+|[!-~]")


def tokenize(text: str) -> list[str]:
    """Cut a text into lower-case tokens in canonical decomposition.

    Args:
        text: Any text.

    Returns:
        Words, and each sign by itself; neither spaces nor control characters.
    """
    if text.isascii():
        return [token.lower() for token in _ASCII_PATTERN.findall(text)]
    return [token.lower() for token in _token_pattern().findall(unicodedata.normalize("NFD", text))]


class Haystack:
    """A text that is looked through for the answers of many queries: what every look needs is made once.

    Args:
        text: The document's text. Its title does not count.
    """

    __slots__ = ("_text", "_tokens", "plain")

    def __init__(self, text: str) -> None:
        self.plain = (text if text.isascii() else unicodedata.normalize("NFD", text)).lower()
        self._text, self._tokens = text, ""

    @property
    def tokens(self) -> str:
        """The text's tokens between spaces; cut when first asked for, which most texts never are."""
        if not self._tokens:
            self._tokens, self._text = _joined(tokenize(self._text)), ""
        return self._tokens


def haystacks_of(text_of: Callable[[Key], str]) -> Callable[[Key], Haystack]:
    """Return a function from a document to its text as a haystack, which keeps those that were asked for last.

    Args:
        text_of: Document -> its text.
    """

    @lru_cache(maxsize=KEPT_TEXTS)
    def haystack(document: Key) -> Haystack:
        return Haystack(text_of(document))

    return haystack


class AnswerMatcher:
    """The answers of one query, tokenised once, to be looked for in many documents.

    Args:
        answers: Strings of which any will do; one without a word or sign matches nothing.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        needles = [tokens for answer in answers if (tokens := tokenize(answer))]
        # Between spaces, since no token holds one, a sequence of tokens is a substring.
        self._needles = [_joined(tokens) for tokens in needles]
        self._rare = [_telling(tokens) for tokens in needles]

    def has(self, text: Haystack) -> bool:
        """Whether a text contains one of the answers as consecutive tokens.

        Args:
            text: The document's.
        """
        # Most documents lack even the longest word of the answer, which is seen without cutting them into tokens.
        plain = text.plain
        likely = [needle for needle, word in zip(self._needles, self._rare, strict=True) if word in plain]
        return bool(likely) and any(needle in text.tokens for needle in likely)


class AnswerFinder:
    """Finds documents that hold answers.

    Args:
        haystack_of: Docid -> the document's text; see `haystacks_of`.
    """

    def __init__(self, haystack_of: Callable[[str], Haystack]) -> None:
        self._haystack_of = haystack_of

    def holding(self, answers: Sequence[str], docids: Iterable[str]) -> Iterator[str]:
        """Yield those of some documents that hold one of the answers, in their order.

        Args:
            answers: Of one query.
            docids: The documents.
        """
        matcher = AnswerMatcher(answers)
        return (docid for docid in docids if matcher.has(self._haystack_of(docid)))


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text contains one of the answers as consecutive tokens.

    Args:
        text: The document's text. Its title does not count.
        answers: Strings of which any will do.
    """
    return AnswerMatcher(answers).has(Haystack(text))


def _joined(tokens: list[str]) -> str:
    return f" {' '.join(tokens)} "


def _telling(tokens: list[str]) -> str:
    """Return the longest token; or nothing where it holds a sigma, whose lower case depends on what follows it."""
    longest = max(tokens, key=len)
    return "" if set("\u03c3\u03c2") & set(longest) else longest

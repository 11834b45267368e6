"""From text to the words that a lexical retriever counts, the same for documents and queries, in any script.

A text is brought to one form (NFKC: full-width letters are plain ones; lower case), then cut. Where words stand between
spaces, a word is a run of two or more letters, marks and digits. Chinese, Japanese, Korean, Thai, Lao, Khmer and
Burmese have no spaces between words, or words that grow together: there every two neighbouring characters are one, and
a single character that stands alone. That is what Lucene's CJKAnalyzer does; it needs no dictionary, does not age, and
is the same for all of these scripts, where segmenters (jieba, MeCab, PyThaiNLP) serve one language each, and would have
to be chosen by it. A text that was cut into words by one of them is taken with `tokens: words`.

bm25s has a tokenizer of its own; it numbers words in the order of a set of strings, which differs between processes, so
that the same corpus would give other bytes every time.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import regex
import Stemmer  # type: ignore[import-not-found]

from engine.config.bm25 import AUTO, Bm25Config, stemmers, stop_word_lists

_ASCII_WORD = re.compile(r"\w\w+", re.ASCII)
_MARK = regex.compile(r"\p{M}")
_CHARACTER = regex.compile(r"\X")
"""What a reader takes for one: a letter with its marks."""
# The sign that lengthens a vowel belongs to both of Japan's syllabaries, and so to no script of its own.
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Bopomofo}\p{Yi}"
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}"
)
_LETTER = r"\p{L}\p{M}\p{N}_"
_RUN = regex.compile(
    rf"(?P<unspaced>(?:[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*+)++)|(?P<word>[[{_LETTER}]--[{_UNSPACED}]]{{2,}})",
    regex.VERSION1,
)
_WORD = regex.compile(rf"[{_LETTER}]{{2,}}|[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]", regex.VERSION1)
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200d\u2060\ufeff"))
"""Soft hyphens, joiners and marks of byte order, which may stand inside a word."""


@dataclass(frozen=True, slots=True)
class Words:
    """How texts become words.

    Attributes:
        stemmer: Name of a Snowball stemmer; None leaves words as they are.
        stop_words: Words that are left out.
        tokens: `auto`, `words` or `bigrams`, as `Bm25Config.tokens`.
    """

    stemmer: str | None
    stop_words: tuple[str, ...]
    tokens: str

    @classmethod
    def of(cls, settings: Bm25Config) -> Words:
        """Return what a configuration asks for."""
        stemmer = settings.language if settings.stemmer == AUTO else settings.stemmer
        words = settings.stopwords
        if isinstance(words, str):
            words = stop_word_lists().get(settings.language if words == AUTO else words, ())
        return cls(stemmer if stemmer in stemmers() else None, words, settings.tokens)


class Analyzer:
    """Text to word ids.

    Args:
        words: How texts become words.

    Attributes:
        vocabulary: Word to id, of the texts that were learnt.
    """

    def __init__(self, words: Words) -> None:
        self.vocabulary: dict[str, int] = {}
        self._tokens, self._turkish = words.tokens, words.stemmer == "turkish"
        self._stop_words = frozenset(self._plain(word) for word in words.stop_words)
        self._stemmer = Stemmer.Stemmer(words.stemmer) if words.stemmer else None
        self._stem_of: dict[str, str] = {}

    def learn(self, text: str) -> list[int]:
        """Return the ids of a document's words; a new word gets the next id."""
        return [self.vocabulary.setdefault(stem, len(self.vocabulary)) for stem in self.stems(text)]

    def count(self, text: str) -> Counter[str]:
        """Count what counts of a text: how often it has each stem."""
        return Counter(self.stems(text))

    def stems(self, text: str) -> Iterator[str]:
        """Yield what counts of a text: stems of words, and pairs of characters."""
        text = self._plain(text)
        if self._tokens == "words":
            for run in _WORD.findall(text):
                yield from self._stem(run)
        elif self._tokens == "auto" and text.isascii():
            for run in _ASCII_WORD.findall(text):
                yield from self._stem(run)
        else:
            for match in _RUN.finditer(text):
                if match.lastgroup == "unspaced" or self._tokens == "bigrams":
                    yield from _pairs(match.group())
                else:
                    yield from self._stem(match.group())

    def _stem(self, word: str) -> Iterator[str]:
        if word in self._stop_words:
            return
        stem = self._stem_of.get(word)
        if stem is None:
            stem = self._stem_of[word] = self._stemmer.stemWord(word) if self._stemmer else word
        yield stem

    def _plain(self, text: str) -> str:
        """Return a text in one form and lower case."""
        if not text.isascii():
            # Python would make two characters of the dotted capital.
            text = unicodedata.normalize("NFKC", text).translate(_INVISIBLE).replace("\u0130", "i")
        if self._turkish:
            text = text.replace("I", "\u0131")
        return text.lower()


def _pairs(run: str) -> Iterator[str]:
    """Yield every two neighbouring characters of a run, or the one that it has."""
    characters = _CHARACTER.findall(run) if _MARK.search(run) else list(run)
    if len(characters) == 1:
        yield run
    for first, second in pairwise(characters):
        yield first + second

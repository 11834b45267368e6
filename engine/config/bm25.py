"""BM25's section: how texts become words in any language, and the two numbers of the formula.

What languages there are is the libraries' knowledge: stemmers are Snowball's (PyStemmer), stop words those of bm25s.
"""

from __future__ import annotations

import difflib
import runpy
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import Stemmer  # type: ignore[import-not-found]
from pydantic import Field, field_validator

from engine.config.sections import Section

AUTO, NONE = "auto", "none"
_UNSPACED = frozenset({"burmese", "chinese", "japanese", "khmer", "korean", "lao", "thai"})
"""Languages whose words are cut by their script; there is no stemmer for them."""
_CODES = {
    **{"ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english"},
    **{"eo": "esperanto", "es": "spanish", "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish"},
    **{"fr": "french", "ga": "irish", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian"},
    **{"it": "italian", "ja": "japanese", "km": "khmer", "ko": "korean", "lo": "lao", "lt": "lithuanian"},
    **{"my": "burmese", "ne": "nepali", "nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese"},
    **{"ro": "romanian", "ru": "russian", "sr": "serbian", "st": "sesotho", "sv": "swedish", "ta": "tamil"},
    **{"th": "thai", "tr": "turkish", "yi": "yiddish", "zh": "chinese"},
}
"""ISO 639-1; what has neither stemmer nor stop words here needs no code."""
_NO_LANGUAGE = frozenset({"porter", "dutch_porter", "english_plus"})
"""Stemmers and lists that are a second one of their language."""


class Bm25Config(Section):
    """BM25, the yardstick and the source of G0's negatives: its words and its formula."""

    enabled: bool = True
    """Whether the corpus is indexed for BM25 at all. `false`: it has no row in the tables and no part in a mixture, and
    what draws from it is refused unless other candidates are named (docs/negatives.md)."""
    language: str = "english"
    """Whose stemmer and stop words are taken, by name (`german`) or ISO 639-1 code (`de`); `none` for a language that
    has neither. Scripts without spaces between words are read in every language (`tokens`)."""
    stemmer: str = AUTO
    """A Snowball stemmer such as `russian` or `porter`, `none`, or `auto`: the language's, if it has one."""
    stopwords: str | tuple[str, ...] = AUTO
    """Words that do not count: a list of them, the name of a language's list in bm25s (`english_plus` is its longer
    English one), `none`, or `auto`: the language's, if it has one."""
    tokens: Literal["auto", "words", "bigrams"] = "auto"
    """`auto`: runs of two or more letters and digits, and pairs of neighbouring characters where the script has no
    spaces between words. `words`: runs in every script, for texts that were cut into words before. `bigrams`: pairs of
    neighbouring characters of every word, without stemming."""
    k1: float = Field(0.9, gt=0)
    """How soon further occurrences of a word stop counting (Anserini's default)."""
    b: float = Field(0.4, ge=0, le=1)
    """How much long documents are marked down (Anserini's default)."""

    @field_validator("language")
    @classmethod
    def _known_language(cls, name: str) -> str:
        near = ({*stemmers()} | _UNSPACED) - _NO_LANGUAGE
        more = "; a language that is not here, such as Swahili, is `none`"
        return _known(name, "language", near, lambda: near | {*stop_word_lists()} - _NO_LANGUAGE, more)

    @field_validator("stemmer")
    @classmethod
    def _known_stemmer(cls, name: str) -> str:
        return _known(name, "stemmer", {AUTO, *stemmers()})

    @field_validator("stopwords")
    @classmethod
    def _known_stop_words(cls, words: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(words, str):
            return words
        return _known(words, "list of stop words", {AUTO}, lambda: {AUTO, *stop_word_lists()}, "; or a list of words")


def _known(
    name: str, what: str, known: set[str], all_known: Callable[[], set[str]] | None = None, more: str = ""
) -> str:
    """Return a name as it is known, where what is known at once does not have it by asking; or say which are near."""
    lowered = name.strip().lower()
    lowered = _CODES.get(lowered, lowered)
    if lowered == NONE or lowered in known:
        return lowered
    known = all_known() if all_known is not None else known
    if lowered in known:
        return lowered
    near = difflib.get_close_matches(lowered, sorted(known | {NONE}), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"there is no {what} of this name, {hint}known are {', '.join(sorted(known))}, {NONE}{more}")


@cache
def stemmers() -> tuple[str, ...]:
    """Return the names of Snowball's stemmers."""
    return tuple(Stemmer.algorithms())


@cache
def stop_word_lists() -> dict[str, tuple[str, ...]]:
    """Return bm25s's lists of stop words by their language.

    They are read from the package's file. The package itself imports JAX where there is one, which takes three quarters
    of a GPU's memory from whoever trains there.
    """
    package = find_spec("bm25s")
    assert package is not None, "setup.cfg requires it"
    assert package.origin is not None, "it is a regular package"
    lists = runpy.run_path(str(Path(package.origin).with_name("stopwords.py")))
    prefix, english = "STOPWORDS_", {"en": "english", "en_plus": "english_plus"}
    named = {name.removeprefix(prefix).lower(): name for name in lists if name.startswith(prefix)}
    return {english.get(name, name): tuple(lists[constant]) for name, constant in named.items()}

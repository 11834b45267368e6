"""Which language some texts are in: by their script, and where languages share one, by their most frequent words.

What can be told are the languages whose words BM25 knows something of (`bm25.language`): those with a list of stop
words, and scripts that one language has. What cannot be told is not guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import regex

from engine.config.bm25 import stop_word_lists

_MOST_CHARACTERS = 1_000
"""Of a text that are looked at."""
_FEWEST_WORDS = 20
_LEAST_SHARE = 0.25
"""Of all words that must be frequent ones of the language. Running text has a third to two thirds of its own, a fifth
of those of another language (counted in some sentences of thirteen). Of two that are alike, such as Danish and
Norwegian, the nearer one is taken: either is nearer than the English that BM25 would read."""
_SCRIPT_SHARE = 0.3
"""Of all letters, from which on a script tells the language: technical texts have Latin words among their own."""
_SCRIPTS = {
    # Japanese has Chinese characters, too, and Chinese none of its syllabaries.
    "japanese": r"[\p{Hiragana}\p{Katakana}]",
    "korean": r"\p{Hangul}",
    "thai": r"\p{Thai}",
    "lao": r"\p{Lao}",
    "khmer": r"\p{Khmer}",
    "burmese": r"\p{Myanmar}",
    "greek": r"\p{Greek}",
    "armenian": r"\p{Armenian}",
    "tamil": r"\p{Tamil}",
    "chinese": r"\p{Han}",
}
_WORD = regex.compile(r"[\p{L}\p{M}']+")
_LETTER = regex.compile(r"\p{L}")


def language_of(texts: Iterable[str]) -> str | None:
    """Tell the language that most of some texts are in.

    Args:
        texts: Some, of which the beginnings are looked at.

    Returns:
        A name that `bm25.language` takes; None where it cannot be told.
    """
    looked_at = "\n".join(text[:_MOST_CHARACTERS].lower() for text in texts)
    num_letters = len(_LETTER.findall(looked_at))
    for language, script in _SCRIPTS.items():
        if len(regex.findall(script, looked_at)) > _SCRIPT_SHARE * num_letters:
            return language
    words = Counter[str](_WORD.findall(looked_at))
    if (total := words.total()) < _FEWEST_WORDS:
        return None
    shares = {
        language: sum(words[word] for word in frequent) / total for language, frequent in _frequent_words().items()
    }
    best = max(shares, key=lambda language: shares[language])
    return best if shares[best] >= _LEAST_SHARE else None


def _frequent_words() -> dict[str, frozenset[str]]:
    lists = dict(stop_word_lists())
    lists["english"] = lists.pop("english_plus")  # as long as the others' lists
    return {language: frozenset(words) for language, words in lists.items()}

"""An answer is found as whole words, whatever their case, spacing and encoding."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from engine.data.answers import AnswerMatcher, Haystack, contains_answer, haystacks_of, tokenize


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It began in October 1973.", "october 1973"),
        ("It began in OCTOBER\n 1973", "October  1973"),
        ("the U.S. army", "U.S."),
        ("the U. S. army", "U.S."),  # cut into the same tokens
        ("it cost $12 (nearly)", "$12"),
        ("Wilhelm Conrad R\u00f6ntgen", "ro\u0308ntgen"),  # one accent, two encodings
        ("\u039f\u0394\u039f\u03a3.\u0391", "\u03bf\u03b4\u03cc\u03c2".replace("\u03cc", "\u03bf")),  # a final sigma
        ("\u5317\u4eac \u5e02", "\u5317\u4eac"),
        ("state-of-the-art", "art"),
        ("well_known", "known"),  # an underscore is a sign, not a letter
    ],
)
def test_an_answer_is_found(text: str, answer: str) -> None:
    assert contains_answer(text, [answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a party", "art"),  # whole words only
        ("party art", "art party"),  # in order
        ("October in 1973", "October 1973"),  # and nothing between
        ("1973", "October 1973"),
        ("Rontgen", "R\u00f6ntgen"),  # an accent matters
        ("$120", "$12"),
        ("2.5", "25"),
        ("", "x"),
        ("anything at all", ""),  # an empty answer would be found everywhere
        ("anything at all", " \n\u200b"),
    ],
)
def test_an_answer_is_not_found(text: str, answer: str) -> None:
    assert not contains_answer(text, [answer])


def test_any_of_the_answers_will_do_and_none_matches_nothing() -> None:
    matcher = AnswerMatcher(["", "missing", "Second Answer"])
    assert matcher.has(Haystack("the second answer is here"))
    assert not matcher.has(Haystack("an answer, the second"))
    assert not AnswerMatcher([]).has(Haystack("text"))
    assert not contains_answer("text", ())


def test_a_text_is_read_once_for_the_answers_of_many_queries() -> None:
    read: list[str] = []

    def text_of(docid: str) -> str:
        read.append(docid)
        return {"a": "Caf\u00e9 au lait, 1973", "b": "an art party"}[docid]

    haystack_of = haystacks_of(text_of)
    answers = [["1973"], ["party"], ["art"], ["cafe\u0301 au"], ["art party"], ["arty"]]
    found = [[docid for docid in ("a", "b") if AnswerMatcher(own).has(haystack_of(docid))] for own in answers]
    assert found == [["a"], ["b"], ["b"], ["a"], ["b"], []]
    assert read == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't  stop\t(now)!", ["don", "'", "t", "stop", "(", "now", ")", "!"]),
        ("caf\u00e9\u00a0\u2013 na\u00efve\u200b", ["cafe\u0301", "\u2013", "nai\u0308ve"]),
        ("x\u00b2 \u2167 \u0660", ["x\u00b2", "\u2167".lower(), "\u0660"]),
        ("\x00\x1f\ue000", []),
    ],
)
def test_tokens_are_runs_of_letters_digits_and_marks_or_single_signs(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


def test_tokens_follow_the_unicode_categories_throughout() -> None:
    """Against the definition, character by character, in a sample over all of Unicode."""
    for point in [*range(0x80, 0x3100), *range(0x3100, sys.maxunicode, 211)]:
        character = chr(point)
        if 0xD800 <= point < 0xE000 or unicodedata.normalize("NFD", character) != character:
            continue
        group = unicodedata.category(character)[0]
        expected = [f"a{character}a"] if group in "LNM" else ["a", "a"] if group in "ZC" else ["a", character, "a"]
        assert tokenize(f"a{character}a") == [token.lower() for token in expected], hex(point)

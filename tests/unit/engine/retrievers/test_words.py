"""Texts of any script become words that documents and queries share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from engine.config.bm25 import Bm25Config
from engine.retrievers.words import Analyzer, Words


def stems(text: str, **settings: Any) -> list[str]:
    return list(Analyzer(Words.of(Bm25Config(**settings))).stems(text))


def test_english_is_read_as_ever() -> None:
    """Lower-cased runs of two characters and more, without stop words, stemmed: what the published numbers rest on."""
    text = "The U.S. foxes' 3rd_run, naïve café-goers (1,024 of x) re-read: Straße Ångström a b"
    stem = Stemmer.Stemmer("english").stemWord
    expected = [stem(word) for word in re.findall(r"\w\w+", text.lower()) if word not in STOPWORDS_EN]
    assert stems(text) == expected
    assert "fox" in expected
    plain = "The U.S. foxes' 3rd_run, (1,024 of x) re-read: a b"
    assert stems(plain) == ["fox", "3rd_run", "024", "re", "read"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("東京大学の図書館", ["東京", "京大", "大学", "学の", "の図", "図書", "書館"]),
        ("水", ["水"]),
        ("我喜欢 北京", ["我喜", "喜欢", "北京"]),
        ("コーヒーを", ["コー", "ーヒ", "ヒー", "ーを"]),
        ("학교에서 나", ["학교", "교에", "에서", "나"]),
        ("iPhoneの価格は999円", ["iphon", "の価", "価格", "格は", "999", "円"]),
        ("「東京、大阪」。", ["東京", "大阪"]),
        ("ภาษาไทย ๒๕", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย", "๒๕"]),
        ("ກ ຂ", ["ກ", "ຂ"]),
        ("។", []),
    ],
)
def test_where_no_spaces_stand_between_words_neighbouring_characters_are_words(text: str, expected: list[str]) -> None:
    """Symptom: a sentence of Chinese, Japanese or Thai was one word, or fell apart at its vowel signs."""
    assert stems(text) == expected


def test_a_letter_keeps_its_marks() -> None:
    """Symptom: Python's word characters hold no vowel signs, so that Hindi and Thai were cut at every one of them."""
    assert stems("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert stems("ที่นี่") == ["ที่นี่"], "two characters to the reader, six to the computer"
    assert stems("বাংলা தமிழ் עִבְרִית") == ["বাংলা", "தமிழ்", "עִבְרִית"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ＢＭ２５ ﬁne", "BM25 fine"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("cafe\u0301 nai\u0308ve", "café naïve"),
        ("un\u00adbreak\u200dable", "unbreakable"),
        ("が", "か\u3099"),
        ("İstanbul", "istanbul"),
    ],
)
def test_forms_of_the_same_text_are_the_same_words(one: str, other: str) -> None:
    assert stems(one) == stems(other) != []


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("russian", "Москве", "москва"),
        ("ru", "книгами", "книга"),
        ("arabic", "المدرسة", "مدرسة"),
        ("hindi", "लड़कियों", "लड़की"),
        ("german", "Häuser", "Haus"),
        ("finnish", "taloissa", "talo"),
        ("turkish", "IŞIKLAR", "ışık"),
    ],
)
def test_words_are_stemmed_by_their_language(language: str, one: str, other: str) -> None:
    assert stems(one, language=language) == stems(other, language=language)
    assert stems(one, language="none") != stems(other, language="none")


def test_stop_words_are_the_languages_a_list_or_none() -> None:
    assert stems("the dogs und der hund") == ["dog", "und", "der", "hund"]
    assert stems("the dogs und der hund", language="german") == ["the", "dog", "hund"]
    assert stems("the dogs", stopwords="none") == ["the", "dog"]
    assert stems("The Dogs bark", stopwords=("DOGS",)) == ["the", "bark"], "in one form, too"
    assert stems("the dogs", language="none") == ["the", "dogs"]
    assert stems("the dogs", stemmer="none") == ["dogs"]


def test_texts_that_were_cut_before_and_pairs_of_any_script() -> None:
    assert stems("我 喜欢 北京 天安门 a bc", tokens="words", language="none") == ["我", "喜欢", "北京", "天安门", "bc"]
    assert stems("Foxes 東京都", tokens="bigrams") == ["fo", "ox", "xe", "es", "東京", "京都"]
    assert stems("the", tokens="bigrams") == ["th", "he"], "a pair is no stop word"


def test_new_words_get_the_next_ids() -> None:
    analyzer = Analyzer(Words.of(Bm25Config()))
    assert analyzer.learn("東京大学 foxes") == [0, 1, 2, 3]
    assert analyzer.learn("fox 大学 京都") == [3, 2, 4]
    assert list(analyzer.vocabulary) == ["東京", "京大", "大学", "fox", "京都"]

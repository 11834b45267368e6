"""Pseudo queries: what is drawn of a document, and that the rest of it does not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.pretrain.cloze import Cloze, ClozeRates, Punctuation, cloze_rng, draw_cloze, sentences_of
from engine.pretrain.documents import Reading

STOP, SEPARATOR = 1, 2
ENDS = np.arange(200) == STOP
MARKS = Punctuation(ENDS, SEPARATOR)


def ids(*sentences: int, title: int = 0) -> NDArray[np.uint32]:
    """Tokens that occur once each: sentences of so many with their full stop, behind a title of so many."""
    words, parts = iter(range(10, 200)), []
    if title:
        parts += [*(next(words) for _ in range(title)), SEPARATOR]
    for length in sentences:
        parts += [*(next(words) for _ in range(length - 1)), STOP]
    return np.array(parts, dtype=np.uint32)


def drawn(document: NDArray[np.uint32], epoch: int = 0, *, keep: float = 0.0, longest: int = 30) -> Cloze:
    rates, reading = ClozeRates(keep, 3), Reading(7, epoch)
    return draw_cloze(document, MARKS, rates, cloze_rng(42, "ict", reading), longest)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((5, 6, 4), [5, 6, 4]),
        ((5, 2, 4), [5, 6]),  # what is too short goes on into the next
        ((5, 6, 2), [5, 8]),  # and at the end belongs to the last
        ((2, 1), [3]),
        ((2,), [2]),
    ],
)
def test_sentences_cover_the_document_and_are_not_too_short(lengths: tuple[int, ...], expected: list[int]) -> None:
    document = ids(*lengths)
    found = sentences_of(document, ENDS, 3)
    assert [len(one) for one in found] == expected
    assert [place for one in found for place in one] == list(range(len(document)))


def test_several_marks_end_one_sentence_and_none_is_needed_at_the_end() -> None:
    document = np.array([10, 11, 12, STOP, STOP, STOP, 13, 14, 15], dtype=np.uint32)
    assert sentences_of(document, ENDS, 2) == [range(6), range(6, 9)]


@pytest.mark.parametrize("lengths", [(9, 7, 8), (12,), (2,), (3, 1)])
def test_the_document_does_not_hold_its_query(lengths: tuple[int, ...]) -> None:
    """Its words occur once each: one that is in both was left in."""
    document, words = ids(*lengths), set()
    for epoch in range(40):
        found = drawn(document, epoch)
        assert not found.kept
        own, left = set(found.query.tolist()) - {STOP}, set(found.document.tolist()) - {STOP}
        assert not own & left
        assert own | left == set(document.tolist()) - {STOP}
        assert len(found.query)
        assert len(found.document)
        words |= own
    assert words == set(document.tolist()) - {STOP}, "every part of it is drawn at some time"


def test_every_sentence_is_as_likely_as_any_other() -> None:
    document = ids(9, 20, 5, 8)
    lengths = [len(drawn(document, epoch).query) for epoch in range(800)]
    assert [lengths.count(length) for length in (9, 20, 5, 8)] == [pytest.approx(200, abs=45)] * 4


def test_a_share_of_the_documents_keeps_its_query() -> None:
    document = ids(9, 7, 8)
    found = [drawn(document, epoch, keep=0.1) for epoch in range(1000)]
    assert sum(one.kept for one in found) == pytest.approx(100, abs=30)
    for one in found:
        assert one.kept == (len(one.document) == len(document))
    same = [drawn(document, epoch) for epoch in range(1000)]
    assert all((one.query == other.query).all() for one, other in zip(found, same, strict=True))


def test_a_sentence_that_is_longer_than_a_query_leaves_as_a_whole() -> None:
    document = ids(20, 20)
    found = drawn(document, longest=6)
    assert len(found.query) == 6
    assert len(found.document) == 20


def test_one_sentence_gives_a_span_of_at_most_half() -> None:
    lengths = {len(drawn(ids(24), epoch).query) for epoch in range(300)}
    assert lengths == set(range(3, 13))
    assert {len(drawn(ids(24), epoch, longest=5).query) for epoch in range(100)} == {3, 4, 5}


@pytest.mark.parametrize("length", [0, 1])
def test_of_less_than_two_tokens_nothing_can_be_left(length: int) -> None:
    document = np.arange(10, 10 + length, dtype=np.uint32)
    found = drawn(document)
    assert found.kept
    assert found.query.tolist() == found.document.tolist() == document.tolist()


def test_a_title_is_never_drawn_and_stays() -> None:
    document = ids(9, 7, title=4)
    for epoch in range(20):
        found = drawn(document, epoch)
        assert found.document[:5].tolist() == document[:5].tolist()
        assert not set(found.query.tolist()) & set(document[:5].tolist())
        assert len(found.query) + len(found.document) == len(document)
    alone = drawn(ids(title=4))
    assert alone.kept
    assert not len(alone.query)


def test_a_draw_is_a_function_of_seed_epoch_and_document() -> None:
    def first(seed: int = 42, epoch: int = 1, document: int = 7, stream: str = "ict") -> float:
        return cloze_rng(seed, stream, Reading(document, epoch)).random()

    assert first() == first()
    assert len({first(), first(seed=43), first(epoch=2), first(document=8), first(stream="held_out")}) == 5


def test_marks_are_found_in_a_vocabulary(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", ["Is it so? It is so! It is. 3.5 so it is"])
    tokenizer: Any = load_tokenizer(str(folder))
    marks = Punctuation.of(tokenizer)
    tokens = {tokenizer.convert_ids_to_tokens(int(one)) for one in np.flatnonzero(marks.ends_V)}
    assert {".", "!", "?"} <= tokens
    assert all(token.lstrip("#") in {".", "!", "?"} for token in tokens)
    ids_L = np.array(tokenizer("Is it so? It is so!", add_special_tokens=False)["input_ids"], dtype=np.uint32)
    assert [len(one) for one in sentences_of(ids_L, marks.ends_V, 2)] == [4, 4]
    assert marks.title_length(np.array([5, tokenizer.sep_token_id, 6], dtype=np.uint32)) == 2
    assert marks.title_length(ids_L) == 0
    assert Punctuation(marks.ends_V, None).title_length(ids_L) == 0

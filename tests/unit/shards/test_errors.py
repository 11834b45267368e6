"""What messages are made of."""

from __future__ import annotations

import pytest

from shards.errors import SparringError, listed


@pytest.mark.parametrize(
    ("num_words", "text"), [(0, ""), (1, "0"), (3, "0; 1; 2"), (4, "0; 1; 2 and 1 more"), (9, "0; 1; 2 and 6 more")]
)
def test_a_long_list_is_cut_and_says_how_much_is_left_out(num_words: int, text: str) -> None:
    assert listed((str(number) for number in range(num_words)), 3, "; ") == text
    assert listed(["a", "b"], 2) == "a, b"


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("it is 3", "it is 3. Expected: two. Remedy: mend it."),
        ("it is 3.", "it is 3. Expected: two. Remedy: mend it."),
        ("'sed', is 'seed' meant?", "'sed', is 'seed' meant? Expected: two. Remedy: mend it."),
    ],
)
def test_a_message_is_made_of_sentences(fact: str, text: str) -> None:
    assert str(SparringError(fact, expected="two", remedy="mend it.")) == text

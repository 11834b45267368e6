"""Which words of a passage are marked, and which piece of it is shown."""

from __future__ import annotations

from engine.config.bm25 import Bm25Config
from launcher.commands.report.marking import Marker


def found(query: str, text: str, **settings: str) -> list[str]:
    pieces = Marker(Bm25Config(**settings), query).marked(text)  # type: ignore[arg-type]
    assert "".join(piece for piece, _ in pieces) == text
    return [piece for piece, is_marked in pieces if is_marked]


def test_words_of_the_query_are_marked_by_their_stems() -> None:
    assert found("who was running the city", "Cities run, the runner was") == ["Cities", "run"]
    assert found("Käse", "KÄSE und käse", language="german") == ["KÄSE", "käse"]


def test_words_without_spaces_between_them_are_marked_by_pairs() -> None:
    assert found("東京大学", "私は東京の大学にいる") == ["東京", "大学"]


def test_a_long_passage_is_shown_around_the_first_marked_word() -> None:
    marker = Marker(Bm25Config(), "needle")
    text = "hay " * 300 + "needle\n" + "straw " * 300
    shown = marker.snippet(text)
    assert shown.startswith("… hay")
    assert shown.endswith("straw …")
    assert 250 < len(shown) < 330
    assert "needle" in shown
    assert marker.snippet("a needle") == "a needle"
    assert marker.snippet("hay " * 300).startswith("hay hay"), "without one, the beginning"
    assert len(marker.snippet("x" * 5000)) < 330

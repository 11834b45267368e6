"""The records that every corpus format is read into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of the corpus, such as a passage."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Query:
    """One question, with the strings that answer it where the data has them."""

    id: str
    text: str
    answers: tuple[str, ...] = ()


Qrels = dict[str, dict[str, int]]
"""qid -> docid -> grade; a grade above 0 is a positive."""

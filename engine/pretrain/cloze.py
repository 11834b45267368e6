"""Pseudo queries: a sentence of a document is the query, what is left of the document is what it asks for.

Sentences end in token space, at the tokens of full stops, question and exclamation marks, so nothing but the shards'
tokens is read. What is drawn of a document is a function of (seed, stream, epoch, document): any number of ranks draws
alike, and a resumed run goes on as an undisturbed one would.

Shapes: L tokens of a document, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.corpus import Data
from engine.data.negatives import step_rng
from engine.models.template import Batch, Collator
from engine.models.tokenizer_checks import require_parts
from engine.pretrain.documents import Reading
from shards.reader import CorpusShards

_ENDS = frozenset((".", "!", "?", "\u3002", "\uff01", "\uff1f"))
"""What a sentence ends with: the last three as Chinese and Japanese write them."""
_WORD_MARKS = "\u2581\u0120#"
"""What vocabularies put before a token, to tell whether a word begins there."""


@dataclass(frozen=True, slots=True)
class ClozeRates:
    """How pseudo queries are drawn.

    Attributes:
        keep: Share of the documents that keep their query, in [0, 1].
        shortest: Tokens of a sentence at least; what ends earlier goes on into the next one.
    """

    keep: float
    shortest: int


@dataclass(frozen=True, slots=True, eq=False)
class Cloze:
    """A pseudo query and its document, as token ids without special tokens.

    Attributes:
        query: A sentence or a span.
        document: What is left, or all of it.
        kept: Whether the query is still in the document.
    """

    query: NDArray[np.uint32]
    document: NDArray[np.uint32]
    kept: bool


@dataclass(frozen=True, slots=True, eq=False)
class Punctuation:
    """By which token ids a document falls into a title and sentences.

    Attributes:
        ends_V: Which end a sentence, bool [V]: those of . ! ? and of what Chinese and Japanese have for them.
        separator: What stands between title and text where the template puts it there, as `{title} [SEP] {text}` does;
            None where the tokenizer has none.
    """

    ends_V: NDArray[np.bool_]
    separator: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Punctuation:
        """Find them in a Hugging Face tokenizer's vocabulary."""
        vocabulary = tokenizer.get_vocab()
        ends_V = np.zeros(1 + max(vocabulary.values()), dtype=np.bool_)
        ends_V[[number for token, number in vocabulary.items() if token.lstrip(_WORD_MARKS) in _ENDS]] = True
        return cls(ends_V, tokenizer.sep_token_id)

    def title_length(self, ids_L: NDArray[np.uint32]) -> int:
        """Return how many tokens of a document are its title and the separator behind it; 0 without a separator."""
        if self.separator is None:
            return 0
        places = np.flatnonzero(ids_L == self.separator)
        return int(places[0]) + 1 if len(places) else 0


def sentences_of(ids_L: NDArray[np.uint32], ends_V: NDArray[np.bool_], shortest: int) -> list[range]:
    """Cut a document into sentences.

    Args:
        ids_L: Its tokens.
        ends_V: Which end a sentence; several in a row end one.
        shortest: Tokens of a sentence at least: so abbreviations and numbers end none. What is left at the end and is
            shorter belongs to the last one.

    Returns:
        Places of each sentence, in order; they cover the document.
    """
    is_end_L = ends_V[ids_L]
    last_L = is_end_L & ~np.append(is_end_L[1:], False)
    sentences, start = [], 0
    for stop in (np.flatnonzero(last_L) + 1).tolist():
        if stop - start >= shortest:
            sentences.append(range(start, stop))
            start = stop
    if len(ids_L) - start >= shortest or not sentences:
        return [*sentences, range(start, len(ids_L))]
    return [*sentences[:-1], range(sentences[-1].start, len(ids_L))]


def draw_cloze(
    ids_L: NDArray[np.uint32], marks: Punctuation, rates: ClozeRates, rng: np.random.Generator, longest: int
) -> Cloze:
    """Draw a document's pseudo query: one of its sentences, each as likely as any other.

    A title that a separator sets apart is never drawn, and stays. A document of one sentence gives a span in its place,
    of at most half of its tokens. One of less than two tokens has nothing to be left: all of it is its query, and kept.

    Args:
        ids_L: The document's tokens, those that its input has room for.
        marks: What ends a title and a sentence.
        rates: How long a sentence is at least, and how often the document keeps it.
        rng: From `cloze_rng`.
        longest: Tokens of a query at most. Of a longer sentence these are read; all of it leaves the document.

    Source: Lee et al. 2019 (arXiv 1906.00300), section 4; that the sentence is kept in 10 % of the documents, so that
        words in common are learnt from as well, is theirs. The least length and the span are ours.
    """
    first = marks.title_length(ids_L)
    text_L = ids_L[first:]
    kept = bool(rng.random() < rates.keep) or len(text_L) < 2
    sentences = sentences_of(text_L, marks.ends_V, rates.shortest)
    if len(sentences) > 1:
        drawn = sentences[int(rng.integers(len(sentences)))]
    elif len(text_L) < 2:
        drawn = range(len(text_L))
    else:
        most = max(1, min(len(text_L) // 2, longest))
        length = int(rng.integers(min(rates.shortest, most), most + 1))
        start = int(rng.integers(len(text_L) - length + 1))
        drawn = range(start, start + length)
    query = text_L[drawn.start : drawn.stop][:longest]
    left = ids_L if kept else np.concatenate([ids_L[: first + drawn.start], text_L[drawn.stop :]])
    return Cloze(query, left, kept)


def cloze_rng(seed: int, stream: str, reading: Reading) -> np.random.Generator:
    """Return the random numbers by which an epoch draws a document's pseudo query.

    Args:
        seed: Of the run.
        stream: Names the phase.
        reading: The document and the epoch.
    """
    return step_rng(seed, f"cloze/{stream}", reading.epoch, reading.document)


class ClozeBuilder:
    """Makes a retriever's inputs of documents: pseudo queries, and what is left.

    Args:
        shards: The corpus.
        stream: Its token stream that fits the model.
        tokenizer: The model's, for what ends a sentence.
        collate: Makes batches in the form that the model takes.
        rates: How queries are drawn.
        max_length: Tokens of a document, special tokens included.
        query_max_length: Tokens of a query, special tokens included.
        seed: Of the run.
    """

    def __init__(
        self,
        shards: CorpusShards,
        stream: str,
        tokenizer: Any,
        collate: Collator,
        rates: ClozeRates,
        *,
        max_length: int,
        query_max_length: int,
        seed: int,
    ) -> None:
        self._shards, self._stream, self._collate, self._rates, self._seed = shards, stream, collate, rates, seed
        self._query, self._document = collate.template.for_queries(), collate.template.for_documents()
        self._max_length, self._query_max_length = max_length, query_max_length
        self._marks = Punctuation.of(tokenizer)

    @classmethod
    def of(
        cls, data: Data, name: str, collate: Collator, rates: ClozeRates, *, lengths: tuple[int, int], seed: int
    ) -> ClozeBuilder:
        """Build for a model of a recipe.

        Args:
            data: The corpus, and how the models read it.
            name: The model.
            collate: As in the class.
            rates: As in the class.
            lengths: `max_length` and `query_max_length`.
            seed: As in the class.

        Raises:
            ModelError: The tokenizer joins a prompt with the text behind it, of which a part is to be read alone.
        """
        text = data.texts[name]
        require_parts(collate.template, name)
        return cls(
            data.shards,
            text.stream,
            text.tokenizer,
            collate,
            rates,
            max_length=lengths[0],
            query_max_length=lengths[1],
            seed=seed,
        )

    def draw(self, reading: Reading, stream: str) -> Cloze:
        """Draw the pseudo query of one document.

        Args:
            reading: The document and the epoch.
            stream: Of the random numbers, such as the phase's name.
        """
        room = self._max_length - self._document.num_special_single
        longest = self._query_max_length - self._query.num_special_single
        ids_L = self._shards.tokens(reading.document, self._stream)[:room]
        return draw_cloze(ids_L, self._marks, self._rates, cloze_rng(self._seed, stream, reading), longest)

    def __call__(self, readings: Sequence[Reading], stream: str) -> dict[str, Batch]:
        """Draw pseudo queries and join them: `queries` and `documents`, one of each for every reading.

        Args:
            readings: Documents and epochs, at least one.
            stream: As in `draw`.
        """
        drawn = [self.draw(one, stream) for one in readings]
        return {
            "queries": self._collate([self._query.single(one.query, self._query_max_length) for one in drawn]),
            "documents": self._collate([self._document.single(one.document, self._max_length) for one in drawn]),
        }

    def num_tokens(self, reading: Reading) -> int:
        """Count the tokens of a document's two inputs at most; how many the query takes is not drawn for it."""
        length = self._shards.num_tokens(reading.document, self._stream)
        query = min(length + self._query.num_special_single, self._query_max_length)
        return query + min(length + self._document.num_special_single, self._max_length)

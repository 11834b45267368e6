"""What BM25 takes: its index on disk, and the memory of a rank while it builds and searches a part.

How many different words so many words are is Heaps' law, as counted on 8,600 passages of Wikipedia (docs/plan.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.pools import BM25, GIVEN
from engine.config.recipe import Config
from engine.retrievers.bm25_files import cut_documents
from launcher.plan.corpus import Corpus

_INDEXED, _DIFFERENT = 0.66, 0.55
"""Of a text's words: those that are no stop words, and the different ones of a text among them (counted: 0.48)."""
_HEAPS, _HEAPS_EXPONENT = 7.0, 0.64
_POSTING_BYTES, _PART_WORD_BYTES, _WORD_BYTES = 6, 24, 24
"""Of a weight and a document's place; of a word of a part, where its postings begin and its hash; of a word of all."""
_COUNTED_BYTES, _LEARNT_BYTES = 40, 350
"""Of a word in a part, and of a different one, while it is counted."""
_MERGED_BYTES = 128 * 2**20
"""While a bucket of words is merged, where there are several."""
_MARKER_BYTES = 600
"""Of a part, and of all of them together at most: markers, and a line of the manifest."""


@dataclass(frozen=True, slots=True)
class Bm25Use:
    """What BM25 takes; nothing where there is none."""

    num_parts: int = 0
    disk_bytes: int = 0
    """When all parts are counted, and none is weighted: the fullest moment. What is counted goes part by part."""
    rank_bytes: int = 0
    """Memory of a rank that builds a part; of any number of ranks each."""


def bm25_use(config: Config, corpus: Corpus, sizes: Sequence[int]) -> Bm25Use:
    """Estimate what BM25 takes.

    Args:
        config: The recipe.
        corpus: Sizes of the data.
        sizes: Documents of each shard.
    """
    if not needs_bm25(config):
        return Bm25Use()
    parts = cut_documents(sizes)
    largest, num_parts = max(sum(sizes[part.start : part.stop]) for part in parts), len(parts)
    tokens = largest * corpus.words * _INDEXED
    words, all_words = (_different_words(number) for number in (tokens, corpus.documents * corpus.words * _INDEXED))
    postings = corpus.documents * corpus.words * _DIFFERENT
    disk = postings * _POSTING_BYTES + num_parts * (words * _PART_WORD_BYTES + _MARKER_BYTES) + all_words * _WORD_BYTES
    counting = tokens * _COUNTED_BYTES + words * _LEARNT_BYTES
    return Bm25Use(num_parts, int(disk + _MARKER_BYTES), int(max(counting, _MERGED_BYTES if num_parts > 16 else 0)))


def needs_bm25(config: Config) -> bool:
    """Tell whether a run of a recipe indexes its corpus for BM25: unless it is left out, for a row of the tables."""
    return config.learns_from_queries and config.bm25.enabled


def searches_bm25(config: Config, retriever: str) -> bool:
    """Tell whether BM25 answers training queries for candidates of a kind of retriever."""
    return retriever == BM25 or (retriever == GIVEN and config.data.without_given == BM25)


def _different_words(num_words: float) -> float:
    return min(num_words, _HEAPS * math.pow(num_words, _HEAPS_EXPONENT))

"""Made-up data for drills and tests: text that means nothing, but in which a query does find its document.

Each document tells of one topic, whose words it shares with many others, and of a few names that hardly any other
document has. A query holds some of both, so that topics make hard negatives and names tell them apart.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from shards.errors import DataError
from shards.formats.beir import write_folder
from shards.records import Document, Qrels, Query

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_FILLERS = ("the", "of", "and", "with", "near", "from", "under")
_DOCUMENTS_PER_TOPIC = 20
_WORDS_PER_TOPIC = 12
# So many syllables have words until there are so many words: a fraction of those that there can be.
_SHORT_WORDS = ((2, 1000), (3, 100_000), (4, 5_000_000), (5, sys.maxsize))
# Of every 20 documents, the queries of these go to dev and to test.
_CYCLE, _DEV, _TEST = 20, (3, 10, 17), (5, 12, 19)


def generate_dataset(
    out: Path, *, num_documents: int = 300, num_queries: int | None = None, seed: int = 0
) -> dict[str, int]:
    """Write a made-up data folder in the BEIR layout; the same arguments give the same bytes.

    Every other query has an answer: a pair of names of its document, which one document in four shares with the next.

    Args:
        out: The folder to make, or to replace where an earlier call made it.
        num_documents: Size of the corpus, >= 20.
        num_queries: Number of queries, >= 20, spread evenly over the documents; left out, two a document.
        seed: Draws all words.

    Returns:
        Counts of documents, and of queries of each split. All queries of a document are in one split.

    Raises:
        DataError: Too few documents or queries for three splits.
    """
    num_queries = 2 * num_documents if num_queries is None else num_queries
    if min(num_documents, num_queries) < _CYCLE:
        raise DataError(
            f"{num_documents} documents and {num_queries} queries are asked for",
            expected=f"at least {_CYCLE} of each, or a split would stay empty",
        )
    rng = random.Random(seed)
    words = _new_words(rng, num_documents)
    documents, names = _documents(rng, words, num_documents)
    queries: list[Query] = []
    qrels: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
    for number in range(num_queries):
        place = number % num_documents
        own, topic = names[place], words[place // _DOCUMENTS_PER_TOPIC]
        told = sorted(set(topic) & set(documents[place].text.strip(".").split()))
        # One of the names is never part of an answer, so that no other document has both.
        text = [rng.choice(own[:2]), rng.choice(own[2:]), *rng.sample(told, 2)]
        rng.shuffle(text)
        answers = (f"{own[0]} {own[1]}",) if number % 2 == 0 else ()
        query = Query(f"q{number}", " ".join(["where is", *text]), answers)
        queries.append(query)
        turn = place % _CYCLE
        split = "dev" if turn in _DEV else "test" if turn in _TEST else "train"
        qrels[split][query.id] = {documents[place].id: 1}
    provenance = {"made of": "random words", "seed": seed, "documents": num_documents, "queries": num_queries}
    write_folder(out, documents, queries, qrels, provenance)
    return {"documents": num_documents} | {f"{split} queries": len(judged) for split, judged in qrels.items()}


def _new_words(rng: random.Random, num_documents: int) -> list[list[str]]:
    """Return the words of each topic, no word in two of them."""
    num_topics = -(-num_documents // _DOCUMENTS_PER_TOPIC)
    made: dict[str, None] = {}
    while len(made) < num_topics * _WORDS_PER_TOPIC:
        made.setdefault(_word(rng, next(syllables for syllables, many in _SHORT_WORDS if len(made) < many)))
    every = list(made)
    return [every[first : first + _WORDS_PER_TOPIC] for first in range(0, len(every), _WORDS_PER_TOPIC)]


def _documents(
    rng: random.Random, words: list[list[str]], num_documents: int
) -> tuple[list[Document], list[list[str]]]:
    documents: list[Document] = []
    names: list[list[str]] = []
    for number in range(num_documents):
        topic = words[number // _DOCUMENTS_PER_TOPIC]
        own = [_word(rng, 4) for _ in range(4)]
        names.append(own)
        parts = [f"{own[0]} {own[1]}", own[2], own[3], *own[2:], *rng.sample(topic, 8), *rng.choices(_FILLERS, k=6)]
        if number % 4 == 1:  # an answer to the previous document's queries, though not judged to be one
            parts.append(" ".join(names[number - 1][:2]))
        rng.shuffle(parts)
        documents.append(Document(f"d{number}", f"{topic[0]} {own[2]}", " ".join(parts) + "."))
    return documents, names


def _word(rng: random.Random, num_syllables: int) -> str:
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(num_syllables))

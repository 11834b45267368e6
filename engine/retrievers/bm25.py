"""BM25: the yardstick every dense retriever is measured against, and the negatives that G0 is warmed up with.

What a word is, `engine.retrievers.words` says. A document's weights are computed when the index is built
(`engine.retrievers.bm25_build`), so that a search only adds up the postings of a query's words, as often as it has
them: the same search as of a learned sparse retriever (`engine.index.postings`). Whoever asks BM25 (mining, re-ranking,
a mixture, a filter, a command) asks this class; small indexes are searched as one, larger ones part by part.

    hits = BM25Searcher.open(folder).search(queries, top_k=100)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse  # type: ignore[import-untyped]

from engine.index.plan import cut_parts
from engine.index.postings import PostingsIndex
from engine.index.scan import FewTermsScan, fastest_scan
from engine.retrievers.bm25_files import hash_words
from engine.retrievers.bm25_store import Bm25Store
from engine.retrievers.words import Analyzer
from engine.search import Hits
from shards.records import Query

DOCUMENTS_SEARCHED_AS_ONE = 2_000_000
"""Of a corpus up to which each rank searches all parts for its own queries: their postings, some 400 MB, stay in memory
as pages of the files. A larger one's parts are searched by one rank each."""


class BM25Searcher:
    """Answers queries from an index that `build_bm25` published; use `BM25Searcher.open`.

    Args:
        store: The index.

    Attributes:
        source: `bm25`.
        block_size: Queries best searched in one call.
        num_documents: Documents in the index.
    """

    source: str
    block_size = 512

    def __init__(self, store: Bm25Store) -> None:
        self.source, self.num_documents = "bm25", store.num_documents
        self._store, self._analyzer = store, Analyzer(store.manifest.plan.words)
        # A query is asked about more than once: for its documents' scores and for what its words are worth.
        self._counted = lru_cache(maxsize=2 * self.block_size)(self._analyzer.count)
        whole = store.num_documents <= DOCUMENTS_SEARCHED_AS_ONE
        parts = [range(len(store.sizes))] if whole else cut_parts(store.sizes)
        self._index = PostingsIndex(store, parts=parts, scan=fastest_scan(without=FewTermsScan))

    @classmethod
    def open(cls, folder: Path, *, metadata: Mapping[str, Any] | None = None, verify: bool = False) -> BM25Searcher:
        """Open a published index; its arrays stay on disk and are mapped part by part.

        Args:
            folder: What `build_bm25` wrote.
            metadata: What the index must have been made of; None takes any.
            verify: Hash every file too; sizes are always compared.

        Returns:
            A searcher.

        Raises:
            ArtifactError: The index is missing, damaged, or made of something else.
        """
        return cls(Bm25Store.open(folder, metadata=metadata, verify=verify))

    @property
    def num_parts(self) -> int:
        """Parts of the index that ranks can search one by one; 1 where it is searched as one."""
        return self._index.num_parts

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Find the documents that share the rarest and most words with each query; others are no hits.

        Args:
            queries: Q queries.
            top_k: Documents per query, at least 1.

        Returns:
            Hits [Q, top_k]; sorted by score descending, then by document index ascending.

        Raises:
            ArtifactError: A part is damaged.
        """
        return self._index.search(self.encode(queries), top_k)

    def encode(self, queries: Sequence[Query]) -> sparse.csr_array:
        """Count the words of queries that the corpus has: sparse float32 [Q, V], V the words of the corpus."""
        counted = [self._counted(query.text) for query in queries]
        stems = list(dict.fromkeys(stem for one in counted for stem in one))
        ids_V, _ = self._store.vocabulary.find(hash_words(stems))
        id_of = {stem: number for stem, number in zip(stems, ids_V.tolist(), strict=True) if number >= 0}
        known = [{id_of[stem]: times for stem, times in one.items() if stem in id_of} for one in counted]
        ids, times = ([one for own in known for one in pick(own)] for pick in (dict.keys, dict.values))
        bounds_Q = np.cumsum([0, *map(len, known)])
        encoded_QV = sparse.csr_array(
            (np.array(times, dtype=np.float32), np.array(ids, dtype=np.int64), bounds_Q),
            shape=(len(queries), self._store.num_terms),
        )
        encoded_QV.sort_indices()
        return encoded_QV

    def search_parts(self, queries_QV: sparse.csr_array, top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts; see `PostingsIndex.search_parts`."""
        return self._index.search_parts(queries_QV, top_k, parts)

    def finish(self, queries_QV: sparse.csr_array, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what was found in all parts; see `PostingsIndex.finish`."""
        return self._index.finish(found, top_k)

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents that somebody else found; those that share no word with their query have 0.

        Args:
            queries: Any queries.
            documents: Global document indices for each of them.

        Returns:
            Scores for each query, in the order of its documents, as a search has them.

        Raises:
            ArtifactError: A part is damaged.
        """
        return self._index.score(self.encode(queries), documents)

    def worth(self, queries: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return what no document's score can reach: the worth of all words that the corpus has of each query.

        Args:
            queries: Q texts.

        Returns:
            float64 [Q]; 0 for a query of which the corpus has no word.
        """
        counted = [self._counted(query) for query in queries]
        worth_of = self._worth_of(counted)
        return np.array([sum(times * worth_of[stem] for stem, times in one.items()) for one in counted])

    def score_texts(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[list[float]]:
        """Score texts that are in no corpus, by the corpus's frequencies and mean length.

        Args:
            queries: Any texts.
            documents: Texts for each of them, rendered as those of the corpus are.

        Returns:
            Scores for each query, in the order of its documents; a text of the corpus has the score that it has there.
        """
        counted, formula = [self._counted(query) for query in queries], self._store.formula
        worth_of, scores = self._worth_of(counted), []
        for query, own in zip(counted, documents, strict=True):
            words, has_N = list(query), [self._analyzer.count(text) for text in own]
            counts_NT = np.array([[has[word] for word in words] for has in has_N]).reshape(len(own), len(words))
            saturation_N = formula.saturation(np.array([has.total() for has in has_N], dtype=np.float64))
            worth_T = np.array([query[word] * worth_of[word] for word in words])
            scores.append((counts_NT / (counts_NT + saturation_N[:, None]) @ worth_T).astype(np.float32).tolist())
        return scores

    def _worth_of(self, counted: Sequence[Counter[str]]) -> dict[str, float]:
        """Return what each word of some queries is worth; 0 for one that the corpus does not have."""
        stems = list(dict.fromkeys(stem for one in counted for stem in one))
        _, num_documents_V = self._store.vocabulary.find(hash_words(stems))
        worth_V = np.where(num_documents_V > 0, self._store.formula.idf(num_documents_V), 0.0)
        return dict(zip(stems, worth_V.tolist(), strict=True))

"""The data's own negatives as a retriever: what whoever made the data has proposed for each training query.

DPR's files give each question passages that BM25 found and that hold no answer (`hard_negative_ctxs`); others give what
several systems found, by name. Documents stand in the order of the data. Scores, where the data have any, are those of
whoever searched, or of several who did; nobody gives one for the positive, so nothing could be measured against them.
The order alone is kept: rank r has the score -r.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from engine.config.pools import GIVEN
from engine.data.corpus import Data
from engine.data.given import lacking_given, read_given_documents
from engine.retrievers.bm25_index import bm25_stamp, build_bm25_index, open_bm25
from engine.retrievers.choice import Choice
from engine.run import Run, RunFolder
from engine.search import Hits, Searcher
from shards.embeddings import Stamp
from shards.files import canonical_json
from shards.records import Query


class GivenSearcher:
    """Answers training queries with the negatives that the data give them.

    Attributes:
        source: `given`.
        block_size: Queries best searched in one call.

    Args:
        found: Query id -> global document indices.
        proposed_by: Who proposed them, for messages; empty for all.
        stands_in: Searches for queries that have none; None where they find nothing.
        may_lack: Whether a query may have none.
    """

    source: str
    block_size = 4096

    def __init__(
        self, found: Mapping[str, array[int]], proposed_by: str, stands_in: Searcher | None, *, may_lack: bool
    ) -> None:
        self.source, self._found, self._proposed_by = GIVEN, found, proposed_by
        self._stands_in, self._may_lack = stands_in, may_lack
        if stands_in is not None:
            self.block_size = stands_in.block_size

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return what the data give each query, in their order.

        Args:
            queries: Q queries; their ids are looked up.
            top_k: Documents per query, at least 1.

        Returns:
            Hits [Q, top_k], padded where fewer are given.

        Raises:
            DataError: A query has none, and nothing stands in for them.
        """
        documents_QK = np.full((len(queries), top_k), -1, dtype=np.int64)
        scores_QK = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
        lacking = [row for row, query in enumerate(queries) if query.id not in self._found]
        if lacking and not self._may_lack:
            raise lacking_given([queries[row].id for row in lacking], len(queries), self._proposed_by)
        if lacking and self._stands_in is not None:
            hits = self._stands_in.search([queries[row] for row in lacking], top_k)
            documents_QK[lacking], scores_QK[lacking] = hits.documents_QK, hits.scores_QK
        for row, query in enumerate(queries):
            documents = self._found.get(query.id, ())[:top_k]
            if len(documents):
                documents_QK[row, : len(documents)] = documents
                scores_QK[row, : len(documents)] = -np.arange(1, len(documents) + 1)
        return Hits(documents_QK, scores_QK)


def build_given(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Index the corpus for BM25, where that stands in for what the data do not give."""
    if run.config.data.without_given == "bm25":
        build_bm25_index(run, data, folder, choice, prefix)


def open_given(run: Run, data: Data, folder: RunFolder, choice: Choice) -> GivenSearcher:
    """Read the given negatives."""
    policy = run.config.data.without_given
    found = read_given_documents(data.dataset, choice.proposed_by, data.shards.docids.index_of)
    stands_in = open_bm25(run, data, folder) if policy == "bm25" else None
    return GivenSearcher(found, choice.proposed_by, stands_in, may_lack=policy != "error")


def given_stamp(run: Run, data: Data, choice: Choice) -> Stamp:
    """Return a stamp with a hash of the data, and of what stands in for what they lack, in the place of weights."""
    policy = run.config.data.without_given
    made_of = [data.dataset.fingerprint, choice.proposed_by, policy]
    if policy == "bm25":
        made_of.append(bm25_stamp(run, data).weights_sha256)
    digest = hashlib.sha256(canonical_json(made_of).encode()).hexdigest()
    return Stamp(GIVEN, digest, data.shards.manifest.sha256)

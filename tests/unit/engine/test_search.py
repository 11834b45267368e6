"""What is a hit, for every retriever: no document without a shared word, and not the query itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.search import Hits, finds_too_little, search_others
from shards.records import Query


class Counting:
    """Finds document 0, 1, 2 and so on, `num_found` of them."""

    source, block_size = "counting", 8

    def __init__(self, num_found: int) -> None:
        self.num_found, self.depths = num_found, list[int]()

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        self.depths.append(top_k)
        row_K = np.arange(top_k)
        documents_QK = np.tile(np.where(row_K < self.num_found, row_K, -1), (len(queries), 1))
        return Hits(documents_QK, np.where(documents_QK >= 0, -documents_QK, -np.inf).astype(np.float32))


QUERIES = [Query("a", ""), Query("b", ""), Query("c", "")]


def test_one_document_is_left_out_and_the_others_move_up() -> None:
    hits = Counting(3).search(QUERIES, 4).without(np.array([1, -1, 9]), 3)
    assert hits.documents_QK.tolist() == [[0, 2, -1], [0, 1, 2], [0, 1, 2]]
    assert hits.scores_QK.tolist() == [[0, -2, -np.inf], [0, -1, -2], [0, -1, -2]]
    assert (hits.documents_QK.dtype, hits.scores_QK.dtype) == (np.int64, np.float32)
    assert hits.num_found_Q.tolist() == [2, 3, 3]


@pytest.mark.parametrize(("top_k", "num_documents", "depth"), [(2, 10, 3), (10, 10, 10), (20, 10, 10), (9, 10, 10)])
def test_a_search_is_one_deeper_where_queries_are_documents(top_k: int, num_documents: int, depth: int) -> None:
    """Symptom: leaving the query itself out of its hits left one fewer."""
    searcher = Counting(num_documents)
    hits = search_others(searcher, QUERIES, top_k, {"a": 0, "b": 5}, num_documents=num_documents)
    assert searcher.depths == [depth]
    kept = min(top_k, num_documents)
    for row, own in enumerate([0, 5, None]):
        expected = [document for document in range(num_documents) if document != own][:kept]
        assert hits.documents_QK[row].tolist() == expected + [-1] * (kept - len(expected))


def test_elsewhere_it_is_searched_as_ever() -> None:
    searcher = Counting(10)
    assert search_others(searcher, QUERIES, 4, {}, num_documents=10).documents_QK.shape == (3, 4)
    assert searcher.depths == [4]


def test_a_query_that_finds_itself_alone_finds_nothing() -> None:
    hits = search_others(Counting(1), QUERIES, 2, {"a": 0}, num_documents=10)
    assert hits.documents_QK.tolist() == [[-1, -1], [0, -1], [0, -1]]


def test_more_than_half_without_a_hit_is_told() -> None:
    assert finds_too_little("bm25", 0, 0) is None
    assert finds_too_little("bm25", 2, 4) is None
    assert "bm25 finds nothing for 3 of 4 queries" in (finds_too_little("bm25", 3, 4) or "")

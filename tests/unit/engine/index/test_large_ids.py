"""Documents beyond the range of 32 bits: a corpus of billions of which all but the last shard is not there.

Each format and each search is given indices beyond 2**32. Nothing large is written: of a made-up manifest only the last
shard has files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse

from engine.data.candidates import Candidates
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.data.negatives import draw_from_corpus, step_rng
from engine.index.exact import exact_search, rescore
from engine.index.files import TRAINED, MappedLists, parse_index, part_path, write_index
from engine.index.plan import empty_index
from engine.index.postings import PostingsIndex
from engine.index.probe import ProbedIndex
from engine.index.train import fill_part
from shards.embeddings import EmbeddingStore, Stamp, part_paths, write_part
from shards.errors import DataError
from shards.files import read_record
from shards.manifest import MAX_DOCUMENTS, TokenStream
from shards.postings import PostingsMarker, PostingsStore, write_postings
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import Tokenization, tokenize_shard, write_shard
from tests.embedding_stores import clustered, corpus_of

FIRST, COUNT = 5_000_000_000, 40
MANIFEST = corpus_of([FIRST, COUNT])
LAST = MANIFEST.shards[1]
STAMP = Stamp("3", "b" * 64, MANIFEST.sha256)
VECTORS_ND = clustered(COUNT, 16, seed=1)
BEST_Q4 = np.argsort(-(VECTORS_ND[:5] @ VECTORS_ND.T), axis=1, kind="stable")[:, :4]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    write_part(tmp_path / "embeddings", LAST, VECTORS_ND, STAMP)
    return EmbeddingStore(tmp_path / "embeddings", MANIFEST, STAMP, 16, "float32")


def test_token_shards(tmp_path: Path) -> None:
    documents = [Document(f"d{number}", "", "x" * (number + 1)) for number in range(3)]
    stream = TokenStream("r", "1" * 64, 9)
    tokenizations = [Tokenization(stream, lambda texts: [[ord(letter) for letter in text] for text in texts])]
    entry = write_shard(documents, tmp_path, 1, FIRST, tokenizations, "{text}")
    corpus = CorpusShards(tmp_path, replace(MANIFEST, shards=(MANIFEST.shards[0], entry), num_documents=FIRST + 3))
    assert [(index, len(ids)) for index, ids in corpus.iterate(1, "r")] == [(FIRST + row, row + 1) for row in range(3)]
    assert [len(corpus.tokens(FIRST + row, "r")) for row in range(3)] == [1, 2, 3]
    assert corpus.document(FIRST + 2) == documents[2]
    with pytest.raises(DataError, match=f"at most {MAX_DOCUMENTS} documents in a corpus"):
        tokenize_shard(documents, 1, MAX_DOCUMENTS - 2, tokenizations, "{text}")


def test_embeddings(store: EmbeddingStore) -> None:
    wanted = np.array([FIRST + 7, FIRST, FIRST + COUNT - 1])
    assert np.array_equal(store.rows(wanted), VECTORS_ND[wanted - FIRST])
    with pytest.raises(IndexError):
        store.rows(np.array([FIRST + COUNT]))


def test_an_index_part_and_its_search(store: EmbeddingStore, tmp_path: Path) -> None:
    index = empty_index("IVF2,Flat", 16)
    index.train(VECTORS_ND)
    trained = write_index(index, tmp_path / TRAINED).sha256
    fill_part(tmp_path, trained, store, 0, LAST.documents)
    probe = ProbedIndex(parse_index(tmp_path / TRAINED), [MappedLists(part_path(tmp_path, 0))])
    hits = probe.search(VECTORS_ND[:5], 4, nprobe=2, needed=4)
    assert np.array_equal(hits.documents_QK, FIRST + BEST_Q4)


def test_exact_search(store: EmbeddingStore) -> None:
    hits = exact_search(store, VECTORS_ND[:5], 4, documents=LAST.documents)
    assert np.array_equal(hits.documents_QK, FIRST + BEST_Q4)
    again = rescore(store, VECTORS_ND[:5], hits.documents_QK[:, ::-1].copy(), 4)
    assert np.array_equal(again.documents_QK, FIRST + BEST_Q4)


def test_postings(tmp_path: Path) -> None:
    weights_NV = np.triu(np.ones((COUNT, COUNT), dtype=np.float32)) * np.arange(1, COUNT + 1, dtype=np.float32)[:, None]
    write_postings(tmp_path, LAST, sparse.csr_array(weights_NV), STAMP, dtype="float32")
    marker = read_record(part_paths(tmp_path, LAST)[1], PostingsMarker, "the marker")
    index = PostingsIndex(PostingsStore(tmp_path, replace(MANIFEST, shards=(LAST,)), STAMP, [marker]))
    query_1V = sparse.csr_array(np.eye(1, COUNT, 9, dtype=np.float32))  # a term that the documents 0 to 9 have
    hits = index.search(query_1V, 3)
    assert hits.documents_QK.tolist() == [[FIRST + 9, FIRST + 8, FIRST + 7]]
    assert index.score(query_1V, [[FIRST + 9, FIRST + 10]]) == [[10.0, 0.0]]


def test_candidates(tmp_path: Path) -> None:
    documents_QK = np.array([[FIRST + 3, FIRST]])
    positives = FoundPositives.of([[FoundPositive(FIRST + 1, 2, 0.5)]])
    made = Candidates("dense", STAMP, ["q"], documents_QK, np.ones((1, 2), np.float32), Counter(), positives)
    made.save(tmp_path / "candidates", search="s")
    found = Candidates.load(tmp_path / "candidates", STAMP)
    assert found.row("q").tolist() == [FIRST + 3, FIRST]
    assert found.positives.rows_P["document"].tolist() == [FIRST + 1]


def test_documents_drawn_at_random_reach_the_end() -> None:
    rng = step_rng(1, "x", 0, "q")
    drawn = draw_from_corpus(FIRST, 200, rng, taken=(), contains_answer=None)
    assert max(drawn) > 2**32
    assert len(set(drawn)) == 200

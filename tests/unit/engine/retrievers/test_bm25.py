"""BM25 scores are the formula's, ties are settled, and an index that is not the right one is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import bm25s
import numpy as np
import pytest

from engine.config.bm25 import Bm25Config
from engine.errors import ArtifactError, DataError
from engine.retrievers.bm25 import BM25Searcher, build_bm25
from engine.retrievers.words import Words
from engine.search import Hits, Rescorer, Searcher, top_of_row
from shards.records import Query

TEXTS = [
    "the red fox jumps over the lazy dogs",
    "a fox, a fox and another FOX in the red woods",
    "dogs sleep",
    "",
    "red dogs chase red foxes",
]
# The words that count in each text, by hand: no stop words, no single letters, stemmed.
WORDS = [
    ["red", "fox", "jump", "over", "lazi", "dog"],
    ["fox", "fox", "anoth", "fox", "red", "wood"],
    ["dog", "sleep"],
    [],
    ["red", "dog", "chase", "red", "fox"],
]


def by_hand(words: list[str], k1: float, b: float) -> list[float]:
    mean_length = sum(len(text) for text in WORDS) / len(WORDS)
    scores = []
    for text in WORDS:
        score = 0.0
        for word in words:
            df, tf = sum(word in other for other in WORDS), text.count(word)
            idf = math.log(1 + (len(WORDS) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(text) / mean_length))
        scores.append(score)
    return scores


@pytest.fixture
def searcher(tmp_path: Path) -> BM25Searcher:
    build_bm25(iter(TEXTS), tmp_path / "bm25", metadata={"corpus_sha256": "c"})
    return BM25Searcher.open(tmp_path / "bm25")


def search(searcher: Searcher, text: str, top_k: int) -> tuple[list[int], list[float]]:
    hits = searcher.search([Query("q", text)], top_k)
    return hits.documents_QK[0].tolist(), hits.scores_QK[0].tolist()


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75)])
def test_scores_are_the_formula(tmp_path: Path, k1: float, b: float) -> None:
    build_bm25(TEXTS, tmp_path / "bm25", k1=k1, b=b)
    documents, scores = search(BM25Searcher.open(tmp_path / "bm25"), "Is a FOXES' dog red, red?", 4)
    expected = by_hand(["fox", "dog", "red", "red"], k1, b)
    assert expected[3] == 0, "the document without a word is no hit"
    assert documents == sorted({0, 1, 2, 4}, key=lambda document: (-expected[document], document))
    assert scores == pytest.approx([expected[document] for document in documents], rel=1e-5)


def test_documents_without_a_shared_word_are_no_hits(searcher: BM25Searcher) -> None:
    """Symptom: the first documents of the corpus were hits of every query, with a score of 0, and its negatives."""
    documents, scores = search(searcher, "sleeping", 4)
    assert documents == [2, -1, -1, -1]
    assert scores[0] > 0
    assert scores[1:] == [-math.inf] * 3


def test_fewer_asked_for_than_share_a_word_gives_the_head_of_the_same_order(searcher: BM25Searcher) -> None:
    documents, scores = search(searcher, "red dogs", 5)
    for top_k in range(1, 5):
        assert search(searcher, "red dogs", top_k) == (documents[:top_k], scores[:top_k])


@pytest.mark.parametrize("text", ["", "the of a", "zebra", "?!"])
def test_a_query_without_a_known_word_is_answered(searcher: BM25Searcher, text: str) -> None:
    """Symptom: one odd query stops the search of all."""
    assert search(searcher, text, 2) == ([-1, -1], [-math.inf, -math.inf])


def test_padding_where_the_corpus_is_smaller(searcher: BM25Searcher) -> None:
    documents, scores = search(searcher, "red dogs sleep with a fox", 7)
    assert sorted(documents[:4]) == [0, 1, 2, 4]
    assert documents[4:] == [-1, -1, -1]
    assert scores[4:] == [-math.inf] * 3


def test_a_text_without_spaces_gets_the_scores_of_bm25s_for_its_pairs_of_characters(tmp_path: Path) -> None:
    """Symptom: a Chinese or Japanese sentence was one word, and no query shared one with any document."""
    texts = ["東京大学の図書館", "京都大学で数学を学ぶ", "東京の天気は雨", "ＴＯＫＹＯ 東京"]
    pairs = [[text[place : place + 2] for place in range(len(text) - 1)] for text in texts[:3]] + [["tokyo", "東京"]]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(chain(*pairs)))}
    theirs = bm25s.BM25(k1=0.9, b=0.4, method="lucene", backend="numpy")
    ids = [[vocabulary[word] for word in words] for words in pairs]
    theirs.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    expected = theirs.get_scores_from_ids([vocabulary[word] for word in ("tokyo", "東京", "京大", "大学")])
    build_bm25(texts, tmp_path / "bm25")
    documents, scores = search(BM25Searcher.open(tmp_path / "bm25"), "Tokyo 東京大学", 4)
    assert documents == np.argsort(-expected, kind="stable").tolist()
    assert scores == pytest.approx(np.sort(expected)[::-1].tolist())


def test_queries_are_read_as_the_documents_were(tmp_path: Path) -> None:
    words = Words.of(Bm25Config(language="german"))
    build_bm25(["Die Häuser der Stadt", "der Hund"], tmp_path / "bm25", words=words)
    searcher = BM25Searcher.open(tmp_path / "bm25")
    assert search(searcher, "haus", 2)[0] == [0, -1]
    assert search(searcher, "der", 2)[0] == [-1, -1], "a German stop word"


def test_it_is_a_searcher_and_answers_in_the_order_asked(searcher: BM25Searcher) -> None:
    assert isinstance(searcher, Searcher)
    assert (searcher.source, searcher.num_documents) == ("bm25", 5)
    hits = searcher.search([Query("1", "sleep"), Query("2", "wood"), Query("3", "jumping")], 1)
    assert hits.documents_QK.tolist() == [[2], [1], [0]]
    assert (hits.documents_QK.dtype, hits.scores_QK.dtype) == (np.int64, np.float32)
    assert len(searcher.search([], 3)) == 0


# ---- ties --------------------------------------------------------------------------------------------------------


def test_ties_go_by_index_also_across_the_cut() -> None:
    """Symptom: two ranks mine different negatives from equal scores."""
    scores_N = np.array([1, 3, 2, 2, 3, 2, 2, 0], dtype=np.float32)
    for top_k in range(1, 11):
        expected = sorted(range(8), key=lambda document: (-scores_N[document], document))[:top_k]
        documents_K, scores_K = top_of_row(scores_N, top_k)
        assert documents_K.tolist() == expected + [-1] * (top_k - len(expected))
        assert scores_K.tolist() == [scores_N[d] for d in expected] + [-math.inf] * (top_k - len(expected))
    documents_K, _ = top_of_row(scores_N[:0], 2)
    assert documents_K.tolist() == [-1, -1]


def test_copies_of_a_text_are_ranked_by_index(tmp_path: Path) -> None:
    build_bm25(["owl hoots"] * 50, tmp_path / "bm25")
    assert search(BM25Searcher.open(tmp_path / "bm25"), "owl", 6)[0] == [0, 1, 2, 3, 4, 5]


def test_hits_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[Q, K\]"):
        Hits(np.zeros((2, 3), np.int64), np.zeros((2, 2), np.float32))


# ---- the artifact ------------------------------------------------------------------------------------------------


def test_an_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    build_bm25(TEXTS, tmp_path / "bm25", metadata={"corpus_sha256": "c"})
    assert BM25Searcher.open(tmp_path / "bm25", metadata={"corpus_sha256": "c"}).num_documents == 5
    with pytest.raises(ArtifactError, match=r'was made of \{"corpus_sha256": "c"\}'):
        BM25Searcher.open(tmp_path / "bm25", metadata={"corpus_sha256": "d"})


def test_damage_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "bm25"
    build_bm25(TEXTS, folder)
    arrays = sorted(folder.glob("*.npy"))
    assert len(arrays) == 3
    whole = arrays[0].read_bytes()
    arrays[0].write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=f"{len(whole) - 1} bytes"):
        BM25Searcher.open(folder)
    arrays[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="not the file that was written"):
        BM25Searcher.open(folder, verify=True)
    arrays[0].unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        BM25Searcher.open(folder)
    (folder / "bm25.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ArtifactError, match=r"the BM25 manifest .* is damaged"):
        BM25Searcher.open(folder)
    with pytest.raises(ArtifactError, match="missing"):
        BM25Searcher.open(tmp_path / "nothing")


def test_building_again_replaces_and_failing_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "bm25"
    build_bm25(TEXTS, folder)
    with pytest.raises(DataError, match="None of 2 documents has a word"):
        build_bm25(["the of", "?"], folder)

    def broken() -> object:
        yield "owl"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        build_bm25(broken(), folder)  # type: ignore[arg-type]
    assert BM25Searcher.open(folder, verify=True).num_documents == 5
    build_bm25(["owl", "hoots"], folder)
    assert BM25Searcher.open(folder, verify=True).num_documents == 2
    assert os.listdir(tmp_path) == ["bm25"], "no leftovers"


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("engine.retrievers.bm25.write_json", full)
    with pytest.raises(OSError, match="no space"):
        build_bm25(TEXTS, tmp_path / "bm25")
    assert os.listdir(tmp_path) == []


def test_the_same_corpus_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Symptom: an index built on another node differs, because a set of words decided the order."""
    digests = set()
    for seed in ("1", "2"):
        folder = tmp_path / seed
        code = f"from engine.retrievers.bm25 import *; build_bm25({TEXTS!r}, Path({str(folder)!r}))"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4]), "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest())
    assert len(digests) == 1


def test_documents_that_others_found_have_the_scores_of_a_search(searcher: BM25Searcher) -> None:
    """BM25 as a re-ranker (R2ANKER Table 4)."""
    assert isinstance(searcher, Rescorer)
    queries = [Query("q1", "red fox"), Query("q2", "sleeping dogs"), Query("q3", "nothing")]
    found = searcher.score(queries, [[4, 2, 0], [3, 2], []])
    expected = by_hand(["red", "fox"], 0.9, 0.4)
    assert found[0] == pytest.approx([expected[4], 0.0, expected[0]], rel=1e-5)
    assert found[1] == pytest.approx([0.0, by_hand(["sleep", "dog"], 0.9, 0.4)[2]], rel=1e-5)
    assert found[2] == []
    hits = searcher.search(queries[:1], 2)
    again = searcher.score(queries[:1], hits.documents_QK.tolist())
    assert again == [pytest.approx(hits.scores_QK[0].tolist(), rel=1e-6)]

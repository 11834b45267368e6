"""BM25 scores are the formula's, ties are settled, and an index that is not the right one is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest

from engine.config.bm25 import Bm25Config
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ArtifactError, DataError
from engine.retrievers import bm25, bm25_build
from engine.retrievers.bm25 import BM25Searcher
from engine.retrievers.bm25_files import buckets_of, cut_documents, hash_words, span_of_bucket
from engine.retrievers.words import Analyzer, Words
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


def build_bm25(texts: Iterable[str], folder: Path, *, part: int = 2**16, **settings: Any) -> None:
    """Index texts in parts of some size, by one rank."""
    listed = list(texts)
    starts = range(0, len(listed), part)
    bm25_build.build_bm25(
        Coordinator(LocalTransport()),
        lambda number: listed[starts[number] : starts[number] + part],
        [len(listed[start : start + part]) for start in starts],
        folder,
        **settings,
    )


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


def test_damage_is_found_and_what_is_whole_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "bm25"
    build_bm25(TEXTS, folder, part=2)
    assert sorted(path.name for path in folder.glob("*.npy")) == [
        *(f"part-{number:06d}.npy" for number in range(3)),
        "vocabulary-0000.npy",
    ]
    before = bytes_of(folder)
    for name in ("part-000001.npy", "vocabulary-0000.npy"):
        array, times = folder / name, {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
        whole = array.read_bytes()
        array.write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=rf"{name} has {len(whole) - 1} bytes .*delete .*{name[:-4]}\.\*"):
            BM25Searcher.open(folder)
        array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        BM25Searcher.open(folder)
        with pytest.raises(ArtifactError, match="not the file that was written"):
            BM25Searcher.open(folder, verify=True)
        build_bm25(TEXTS, folder, part=2)
        assert f"{name} is not the file that was written: its bytes do not have the recorded hash" in caplog.text
        assert bytes_of(folder) == before
        kept = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
        assert len(kept) == 3
        assert array not in kept
        array.unlink()
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            BM25Searcher.open(folder)
        array.write_bytes(whole)
    (folder / "bm25.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ArtifactError, match=r"the BM25 manifest .* is damaged"):
        BM25Searcher.open(folder)
    with pytest.raises(ArtifactError, match="missing"):
        BM25Searcher.open(tmp_path / "nothing")


def test_postings_beyond_their_block_are_not_followed(tmp_path: Path) -> None:
    """Symptom guarded against: a flipped bit that leaves the size as it is, and compiled code writes anywhere."""
    build_bm25(TEXTS, tmp_path / "bm25")
    array = tmp_path / "bm25" / "part-000000.npy"
    array.write_bytes(array.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(ArtifactError, match="beyond its 5 documents"):
        BM25Searcher.open(tmp_path / "bm25").search([Query("q", "fox")], 3)


def test_another_index_replaces_the_old_one_and_texts_without_words_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bm25"
    build_bm25(TEXTS, folder, part=2)
    build_bm25(["owl", "hoots"], folder)
    assert BM25Searcher.open(folder, verify=True).num_documents == 2
    assert sorted(os.listdir(folder)) == [
        *("bm25.json", "part-000000.json", "part-000000.npy", "plan.json"),
        *("vocabulary-0000.json", "vocabulary-0000.npy", "vocabulary.json"),
    ], "no leftovers"
    with pytest.raises(DataError, match="None of 2 documents has a word"):
        build_bm25(["the of", "?"], folder, metadata={"corpus_sha256": "of others"})
    with pytest.raises(ArtifactError, match="missing"):
        BM25Searcher.open(folder)


def test_a_shard_that_gives_too_few_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gives 5 documents to BM25.*6, by its manifest"):
        bm25_build.build_bm25(Coordinator(LocalTransport()), lambda _: TEXTS, [6], tmp_path / "bm25")


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_corpus_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Symptom: an index built on another node differs, because a set of words decided the order."""
    code = (
        "import sys; from pathlib import Path\n"
        "from engine.coordination.coordinator import Coordinator, LocalTransport\n"
        "from engine.retrievers.bm25_build import build_bm25\n"
        f"build_bm25(Coordinator(LocalTransport()), lambda _: {TEXTS!r}, [{len(TEXTS)}], Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4]), "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], env=environment, check=True)
    build_bm25(TEXTS, tmp_path / "here")
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")


# ---- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "block"), [(4, 2**16), (30, 7), (2**16, 2**16), (2**16, 7)])
def test_parts_rank_as_one_index_of_bm25s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, block: int
) -> None:
    """Symptom guarded against: a part's own document frequencies, lengths or ids of words come into its scores."""
    for module in ("engine.retrievers.bm25_build", "engine.retrievers.bm25_files"):
        monkeypatch.setattr(f"{module}.DOCUMENTS_PER_BLOCK", block)
    monkeypatch.setattr(bm25_build, "_WORDS_PER_BUCKET", 50)
    monkeypatch.setattr(bm25, "DOCUMENTS_SEARCHED_AS_ONE", 0)
    rng = np.random.default_rng(part * block)
    known = [f"w{number}" for number in range(60)]
    texts = [" ".join(rng.choice(known, size=rng.integers(0, 12) * rng.integers(0, 2))) for _ in range(75)]
    texts += ["", "w3", texts[0], "w3 w3 w3 w3", texts[0]]
    queries = [Query(str(number), " ".join(rng.choice(known, size=rng.integers(0, 5)))) for number in range(40)]
    queries += [Query("unknown", "zebra"), Query("none", ""), Query("both", "zebra w3 w3 w5")]
    build_bm25(texts, tmp_path / "bm25", part=part, k1=1.2, b=0.75)
    searcher = BM25Searcher.open(tmp_path / "bm25", verify=True)
    assert searcher.num_parts == min(8, -(-len(texts) // part))
    analyzer = Analyzer(Words.of(Bm25Config()))
    theirs = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy")
    ids = [analyzer.learn(text) for text in texts]

    def known_words(text: str) -> list[int]:
        return [analyzer.vocabulary[stem] for stem in analyzer.stems(text) if stem in analyzer.vocabulary]

    theirs.index((ids, analyzer.vocabulary), create_empty_token=False, show_progress=False)
    hits, encoded = searcher.search(queries, 20), searcher.encode(queries)
    for row, query in enumerate(queries):
        scores_N = theirs.get_scores_from_ids(known_words(query.text))
        found = hits.documents_QK[row][hits.documents_QK[row] >= 0]
        assert len(found) == min(20, (scores_N > 0).sum())
        assert hits.scores_QK[row][: len(found)] == pytest.approx(scores_N[found].tolist(), rel=1e-5)
        # Their sums are rounded at each word, ours once: what is as good as equal there may be in another order here.
        assert scores_N[found].tolist() == pytest.approx(np.sort(scores_N)[::-1][: len(found)].tolist(), rel=1e-5)
        ties = np.diff(hits.scores_QK[row][: len(found)]) == 0
        assert (np.diff(found)[ties] > 0).all(), "equal scores go by document"
    parts = [searcher.search_parts(encoded, 20, [number]) for number in range(searcher.num_parts)]
    merged = searcher.finish(encoded, parts, 20)
    assert (merged.documents_QK == hits.documents_QK).all()
    assert (merged.scores_QK == hits.scores_QK).all(), "bit by bit"
    asked = [rng.integers(0, len(texts), 9).tolist() for _ in queries]
    for query, own, scores in zip(queries, asked, searcher.score(queries, asked), strict=True):
        expected_N = theirs.get_scores_from_ids(known_words(query.text))
        assert scores == pytest.approx(expected_N[own].tolist(), rel=1e-5, abs=0)


def test_parts_and_buckets_cover_all_and_overlap_none() -> None:
    assert cut_documents([3, 3, 3, 9, 1, 1], most=6) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut_documents([70_000, 5]) == [range(1), range(1, 2)], "a shard is never cut"
    assert cut_documents([250] * 100) == [range(100)], "one part is the ordinary case"
    words_V = np.sort(hash_words(f"w{number}" for number in range(1000)))
    for num_buckets in (1, 2, 16, 4096):
        buckets_V = buckets_of(words_V, num_buckets)
        assert (np.diff(buckets_V) >= 0).all()
        assert 0 <= buckets_V.min() <= buckets_V.max() < num_buckets
        spans = [span_of_bucket(words_V, number, num_buckets) for number in range(num_buckets)]
        assert [span.stop - span.start for span in spans] == np.bincount(buckets_V, minlength=num_buckets).tolist()
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert len(np.unique(buckets_of(words_V, 16))) == 16


@pytest.mark.parametrize("killed_at", ["count_part", "merge_bucket", "weight_part", "_publish"])
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str) -> None:
    monkeypatch.setattr(bm25_build, "_WORDS_PER_BUCKET", 4)
    build_bm25(TEXTS, tmp_path / "whole", part=1)
    done: dict[str, list[int]] = {}

    def counting(name: str, dies_after: int | None) -> None:
        function = getattr(bm25_build, name)

        def counted(files: Any, number: Any, *rest: Any) -> None:
            if len(done.setdefault(name, [])) == dies_after:
                raise KeyboardInterrupt
            done[name].append(number)
            function(files, number, *rest)

        monkeypatch.setattr(bm25_build, name, counted)

    with monkeypatch.context() as patched:
        monkeypatch = patched
        counting(killed_at, 0 if killed_at == "_publish" else 2)
        with pytest.raises(KeyboardInterrupt):
            build_bm25(TEXTS, tmp_path / "killed", part=1)
    left = tmp_path / "killed" / ".part-000004.npy.tmp-0a"
    left.write_text("half")
    before, done = dict(done), {}
    steps = ["count_part", "merge_bucket", "weight_part"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in steps:
            counting(name, None)
        build_bm25(TEXTS, tmp_path / "killed", part=1)
    for name in steps:
        again = set(before.get(name, ())) & set(done.get(name, ()))
        assert not again, f"{name}: {again} were done already"
    earlier = steps[: steps.index(killed_at)] if killed_at in steps else steps
    assert not set(earlier) & set(done), "what was finished before is not done again"
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole"), "bit by bit, and no leftovers"


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


QUERIES = ["red fox", "fox red fox", "the dogs sleep", "unheard words", ""]


@pytest.mark.parametrize("part", [2, 2**16])
def test_a_text_of_the_corpus_scores_as_it_does_there(tmp_path: Path, part: int) -> None:
    build_bm25(TEXTS, tmp_path, part=part)
    searcher, everywhere = BM25Searcher.open(tmp_path), list(range(len(TEXTS)))
    stored = searcher.score(
        [Query(str(number), text) for number, text in enumerate(QUERIES)], [everywhere] * len(QUERIES)
    )
    assert max(map(max, stored)) > 0.5
    np.testing.assert_allclose(searcher.score_texts(QUERIES, [TEXTS] * len(QUERIES)), stored, rtol=1e-6)
    assert searcher.score_texts(["red fox", "dogs"], [[], ["a dog that nobody knows"]])[0] == []


def test_what_a_query_is_worth_is_what_no_score_reaches(searcher: BM25Searcher) -> None:
    def idf(word: str) -> float:
        df = sum(word in text for text in WORDS)
        return math.log(1 + (len(WORDS) - df + 0.5) / (df + 0.5))

    worth = searcher.worth(QUERIES).tolist()
    assert worth == pytest.approx(
        [idf("red") + idf("fox"), idf("red") + 2 * idf("fox"), idf("dog") + idf("sleep"), 0, 0]
    )
    for query, most in zip(QUERIES, worth, strict=True):
        for text in (*TEXTS, " ".join(["red fox dogs sleep"] * 1000)):
            assert searcher.score_texts([query], [[text]])[0][0] < most or most == 0


def test_scoring_reads_the_parts_of_the_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_bm25(TEXTS, tmp_path, part=2)
    searcher = BM25Searcher.open(tmp_path)
    whole = searcher.score([Query("q", "red dogs")], [[4, 0, 2]])
    read, blocks = [], searcher._store.blocks
    monkeypatch.setattr(searcher._store, "blocks", lambda parts=None: read.append(parts) or blocks(parts))
    assert searcher.score([Query("q", "red dogs"), Query("r", "fox")], [[4, 0], [1]])[0] == whole[0][:2]
    assert read == [range(1), range(2, 3)]
    assert searcher.score([Query("q", "red dogs")], [[]]) == [[]]

"""Texts without spaces whose queries are documents: what BM25 finds, is measured on and trains with, by other hands."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import bm25s
import numpy as np
import pytest
import pytrec_eval

from engine.data.trec import read_trec
from tests.e2e.made import ledger_of, summary_of
from tests.e2e.starts import Zygote

SHORT = (
    *("ar2.iterations=1", "evaluation.zero_shot=false", "evaluation.depth=15", "evaluation.rerank_depth=5"),
    "evaluation.metrics=[nDCG@10, R@5, R@20, MRR@10]",
    *("warmup_retriever.steps=2", "warmup_ranker.steps=2", "ar2.retriever.steps=2", "ar2.ranker.steps=2"),
)
WORDS = re.findall("..", "大学学生科学銀行東京京都天気電車電話音楽映画数学歴史地図図書経済病院植物動物海岸")
MEASURES = {"ndcg_cut_10": "nDCG@10", "recall_5": "R@5", "recall_20": "R@20", "recip_rank": "MRR@10"}
"""trec_eval's names and ours; the reciprocal rank is that of the top ten."""
UNLIKE = ("q-unlike-1", "q-unlike-2")
"""Queries that share nothing with any document, one for training and one of the test split."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, str]]:
    """Pairs of texts that share half of their words: the first of a pair is the query that must find the second."""
    rng, folder = random.Random(5), tmp_path_factory.mktemp("texts") / "data"
    documents: dict[str, str] = {}
    for pair in range(40):
        shared = [rng.choice(WORDS) for _ in range(4)]
        for side in "ab":
            documents[f"{pair}{side}"] = "の".join(rng.sample([*shared, *(rng.choice(WORDS) for _ in range(3))], 7))
    queries = {f"{pair}a": documents[f"{pair}a"] for pair in range(40)} | dict.fromkeys(UNLIKE, "ラーメンをたべる")
    splits = {"train": range(24), "dev": range(24, 30), "test": range(30, 40)}
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": key, "title": "", "text": text}, ensure_ascii=False) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, pairs in splits.items():
        judged = [f"{pair}a\t{pair}b\t1" for pair in pairs]
        judged += [f"{qid}\t{number}b\t1" for number, qid in enumerate(UNLIKE) if split == ("train", "test")[number]]
        # A query that is judged relevant to itself: left out of its hits all the same.
        judged += ["30a\t30a\t1"] if split == "test" else []
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder, documents, queries


@pytest.fixture(scope="module")
def finished(
    zygote: Zygote, data: tuple[Path, dict[str, str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run") / "run"
    ended = zygote.recipe(f"run.path={folder}", f"data.path={data[0]}", "evaluation.fuse=false", *SHORT).wait()
    assert ended.code == 0, ended.err[-6000:]
    return folder, ended.err


def by_bm25s(documents: dict[str, str], text: str) -> dict[str, float]:
    """What bm25s gives for pairs of neighbouring characters; the document that is the query is still among it."""
    pairs = {docid: ["".join(two) for two in pairwise(one)] for docid, one in documents.items()}
    ids = {word: number for number, word in enumerate(sorted({word for words in pairs.values() for word in words}))}
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene", backend="numpy")
    index.index(([[ids[word] for word in words] for words in pairs.values()], ids), show_progress=False)
    asked = ["".join(two) for two in pairwise(text)]
    scores = index.get_scores_from_ids([ids[word] for word in asked if word in ids])
    return {docid: float(score) for docid, score in zip(documents, scores, strict=True) if score > 0}


def test_bm25_finds_what_bm25s_finds_less_the_query_itself(
    finished: tuple[Path, str], data: tuple[Path, dict[str, str], dict[str, str]]
) -> None:
    """Symptom: all documents scored 0, in the order of the corpus; and each query was the first hit of itself."""
    (folder, _), (_, documents, queries) = finished, data
    found = read_trec(folder / "results" / "test-BM25.trec")
    assert found.keys() == {f"{pair}a" for pair in range(30, 40)}, "a query without hits has no line"
    for qid, scores in found.items():
        theirs = by_bm25s(documents, queries[qid])
        assert max(theirs, key=lambda docid: theirs[docid]) == qid
        expected = sorted((score for docid, score in theirs.items() if docid != qid), reverse=True)[:20]
        assert len(scores) == len(expected), "leaving the query out leaves none fewer"
        assert list(scores.values()) == pytest.approx(expected, rel=1e-5)
        assert all(score == pytest.approx(theirs[docid], rel=1e-5) for docid, score in scores.items())


def test_every_row_is_that_of_trec_eval_with_identical_ids_removed(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    qrels = {f"{pair}a": {f"{pair}b": 1} for pair in range(30, 40)} | {UNLIKE[1]: {"1b": 1}}
    qrels["30a"]["30a"] = 1
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.5,20", "recip_rank"})
    rows = [row for row in summary_of(folder) if row["split"] == "test"]
    assert [row["system"] for row in rows] == ["BM25", "G0", "D0", "G", "D"]
    for row in rows:
        suffix = "" if row["iteration"] is None else f"-{row['iteration']:03d}"
        found = read_trec(folder / "results" / f"test-{row['system']}{suffix}.trec")
        assert not any(qid in scores for qid, scores in found.items())
        ranked = {qid: {docid: -float(rank) for rank, docid in enumerate(scores)} for qid, scores in found.items()}
        top = {qid: dict(list(scores.items())[:10]) for qid, scores in ranked.items()}
        by_query, in_top = evaluator.evaluate(ranked), evaluator.evaluate(top)
        for theirs, ours in MEASURES.items():
            of_queries = in_top if "@10" in ours else by_query
            mean = sum(of_queries.get(qid, {}).get(theirs, 0.0) for qid in qrels) / len(qrels)
            assert row["metrics"][ours] == pytest.approx(mean, abs=1e-6), (row["system"], ours)
    assert rows[0]["metrics"]["R@20"] < 1, "a judged query is not found, nor is the one that shares no word"


def test_neither_a_query_nor_a_document_it_shares_nothing_with_is_a_negative(
    finished: tuple[Path, str], data: tuple[Path, dict[str, str], dict[str, str]]
) -> None:
    (folder, log), (_, documents, queries) = finished, data
    docids = list(documents)
    for name in ("bm25", "000", "001"):
        place = folder / "candidates" / name
        qids = json.loads((place / "candidates.json").read_text())["qids"]
        for qid, row in zip(qids, np.load(place / "documents.npy"), strict=True):
            negatives = {docids[document] for document in row[row >= 0].tolist()}
            assert not negatives & {qid, qid.replace("a", "b")}, (name, qid)
            if name == "bm25" and qid != UNLIKE[0]:
                assert negatives <= by_bm25s(documents, queries[qid]).keys()
    mined = ledger_of(folder)["candidates/bm25"]["result"]
    assert (mined["removed_identical_ids"], mined["queries_without_hits"], mined["drawn_at_random"]) == (24, 1, 1)
    assert "40 of 42 queries have the id of a document, which is left out" in log
    assert "1 queries have the document with their own id as a positive: as in BEIR" in log

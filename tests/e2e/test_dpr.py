"""DPR's files as AR2's released code takes them: given hard negatives, found positives, dev by its answers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.data.answers import contains_answer
from shards.convert.conversion import convert
from shards.convert.options import Options
from tests.e2e.made import ledger_of, summary_of
from tests.e2e.starts import Zygote

NUM_JUDGED, NUM_UNJUDGED = 30, 12
WORDS = (
    *("data.fallback_positive=answer", "data.without_given=bm25", "warmup_retriever.candidates=given@bm25"),
    *("ar2.further_retrievers=[given]", "ar2.search_deeper=3", "ar2.iterations=1", "run.keep_best=A@20"),
    *("warmup_retriever.steps=2", "warmup_ranker.steps=2", "ar2.retriever.steps=2", "ar2.ranker.steps=2"),
    *("evaluation.zero_shot=false", "evaluation.test_at_end=false", "evaluation.fuse=false"),
)


def write_dpr(beir: Path, folder: Path) -> None:
    """Write a folder in BEIR's layout as DPR's files; of some questions only the answer is known, a word of a text."""
    folder.mkdir()
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    number = {document["_id"]: str(row) for row, document in enumerate(corpus, 1)}
    texts = {document["_id"]: document["text"] for document in corpus}
    rows = [f"{number[document['_id']]}\t{document['text']}\t{document['title']}\n" for document in corpus]
    (folder / "psgs_w100.tsv").write_text("id\ttext\ttitle\n" + "".join(rows))
    questions = {record["_id"]: record["text"] for record in map(json.loads, (beir / "queries.jsonl").open())}
    asked = {}
    for split in ("train", "dev"):
        lines = (beir / "qrels" / f"{split}.tsv").read_text().splitlines()[1 : 1 + NUM_JUDGED + NUM_UNJUDGED]
        judged = {qid: docid for qid, docid, _ in (line.split("\t") for line in lines)}
        asked[split] = [(questions[qid], texts[docid].split()[0].strip("."), docid) for qid, docid in judged.items()]
        pairs = [f"{question}\t{[answer]}\n" for question, answer, _ in asked[split]]
        (folder / f"nq-{split}.qa.csv").write_text("".join(pairs))
    given = [[str(1 + (row + place) % len(corpus)) for place in range(row % 3 * 4)] for row in range(NUM_JUDGED)]
    records = [
        {
            "question": question,
            "answers": [answer],
            "positive_ctxs": [{"passage_id": number[docid]}],
            "hard_negative_ctxs": [{"passage_id": passage} for passage in negatives],
        }
        for (question, answer, docid), negatives in zip(asked["train"], given, strict=False)
    ]
    (folder / "biencoder-nq-train.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def data(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpr")
    write_dpr(small_data, folder / "downloads")
    return convert([folder / "downloads"], folder / "data", Options(questions="all")).path


def test_the_data_are_taken_as_the_released_code_takes_them(zygote: Zygote, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = zygote.recipe(f"run.path={folder}", f"data.path={data}", *WORDS, num_ranks=2).wait()
    assert ended.code == 0, ended.err[-6000:]
    num_given = NUM_JUDGED * 2 // 3
    assert f"of {num_given} training queries; {NUM_JUDGED + NUM_UNJUDGED - num_given} have none: what BM25" in ended.err
    ledger = ledger_of(folder)
    found = ledger["positives"]["result"]
    assert (found["questions"], found["with_positive"]) == (NUM_UNJUDGED, NUM_UNJUDGED)
    assert list(ledger).index("positives") < list(ledger).index("candidates/given-bm25")
    queries = {record["_id"]: record for record in map(json.loads, (data / "queries.jsonl").open())}
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").open()]
    qids = json.loads((folder / "positives" / "bm25" / "candidates.json").read_text())["qids"]
    positives = np.load(folder / "positives" / "bm25" / "documents.npy")[:, 0].tolist()
    for qid, document in zip(qids, positives, strict=True):
        assert contains_answer(texts[document], queries[qid]["answers"])
    for name in ("given-bm25", "given", "000", "001"):
        place = folder / "candidates" / name
        names = json.loads((place / "candidates.json").read_text())["qids"]
        mined = dict(zip(names, np.load(place / "documents.npy"), strict=True))
        assert len(mined) == NUM_JUDGED + NUM_UNJUDGED, "those that got a positive are trained on"
        assert not any(document in mined[qid] for qid, document in zip(qids, positives, strict=True)), name
    assert {tuple(row["metrics"]) for row in summary_of(folder)} == {("A@1", "A@5", "A@20", "A@100")}

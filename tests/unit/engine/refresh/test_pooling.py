"""Pooling: filters in their order, counted; what is missing is drawn from the corpus; a pool is of its own parts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config.negatives import NegativesConfig
from engine.data.candidates import Candidates
from engine.data.corpus import Data, TrainingQueries
from engine.data.filtered import Filtered
from engine.data.joint import JointPool
from engine.data.negatives import step_rng
from engine.data.teacher_scores import TeacherScores
from engine.errors import ArtifactError, ConfigError, DataError
from engine.refresh import pooling as pooling_module
from engine.refresh.pooling import PooledQueries, Pooling, joint_negatives
from engine.run import Run
from shards.embeddings import Stamp
from shards.records import Dataset, Document, Query

Open = Callable[..., Run]
CORPUS = "c" * 64
N = 40
LISTS = {
    "bm25": [[10, 11, 12, 13], [20, 21], []],
    "dense": [[12, 14, 10, 15], [21, 22, 23, 24], [30, 31]],
}

SCORES = {"teacher_scores": "/scores"}


class Docids:
    def index_of(self, docid: str) -> int | None:
        return int(docid[1:]) if docid[1:].isdigit() and int(docid[1:]) < N else None


class FakeShards:
    """Document i has its number as its text."""

    num_documents, docids, manifest = N, Docids(), SimpleNamespace(sha256=CORPUS)

    def document(self, index: int) -> Document:
        return Document(f"d{index}", "", f"text {index}")


def data_of(answers: Sequence[tuple[str, ...]] = ((), (), ())) -> Data:
    queries = [Query(f"q{row}", "question", answers[row]) for row in range(3)]
    positives = [np.array([row + 1]) for row in range(3)]
    qrels = {query.id: {f"d{row + 1}": 1} for row, query in enumerate(queries)}
    dataset = Dataset(
        Path("x"), "beir", {one.id: one for one in queries}, {"train": qrels}, Counter(), "f", N, lambda: iter(())
    )
    train = TrainingQueries(queries, positives, {})
    return Data(dataset, FakeShards(), {}, train)  # type: ignore[arg-type]


def mined(run: Run, lists: dict[str, list[list[int]]] | None = None, *, qids: int = 3) -> dict[str, Candidates]:
    """Publish candidates; the document at rank r scores 10 - r."""
    sources = {}
    for name, rows in (lists or LISTS).items():
        documents_QK = np.full((qids, 4), -1, dtype=np.int64)
        scores_QK = np.full((qids, 4), -np.inf, dtype=np.float32)
        for row, documents in enumerate(rows[:qids]):
            documents_QK[row, : len(documents)] = documents
            scores_QK[row, : len(documents)] = 9 - np.arange(len(documents))
        stamp = Stamp(name, name * 4, CORPUS)
        counts = Counter(positives=2, answers=1)
        candidates = Candidates(name, stamp, [f"q{row}" for row in range(qids)], documents_QK, scores_QK, counts)
        candidates.save(run.folder.candidates(name))
        sources[name] = Candidates.load(run.folder.candidates(name), stamp)
    return sources


def pooled(
    run: Run,
    data: Data,
    settings: dict[str, Any] | None = None,
    *,
    needed: int = 2,
    name: str = "joint",
    **others: Any,
) -> tuple[JointPool, PooledQueries]:
    sources = others.pop("sources", None) or mined(run, others.pop("lists", None))
    rows = others.pop("rows", np.arange(3))
    config = NegativesConfig.model_validate(settings or {})
    pool = joint_negatives(run, data, Pooling(name, sources, None, config, rows, needed, **others))
    result = run.result_of(f"negatives/{name}", PooledQueries)
    assert result is not None
    return pool, result


def left(pool: JointPool, qid: str) -> list[int]:
    return sorted(set(pool.entries(qid).documents_E.tolist()))


def test_without_filters_all_lists_are_there_and_counted(open_run: Open) -> None:
    run = open_run()
    pool, result = pooled(run, data_of())
    assert left(pool, "q0") == [10, 11, 12, 13, 14, 15]
    assert [(one.name, one.stamp) for one in pool.filtered.sources] == [
        (name, Stamp(name, name * 4, CORPUS)) for name in LISTS
    ]
    assert pool.entries("q0").documents_E.tolist() == [10, 11, 12, 13, 12, 14, 10, 15]
    assert result == PooledQueries(
        queries=3,
        entries=16,
        documents=13,
        taken_in_mining={"positives": 4, "false_negatives": 0, "identical_ids": 0, "answers": 2},
        rejected={"known": 0},
        without_hits={"bm25": 1, "dense": 0},
        drawn_at_random=0,
        queries_filled=0,
    )


def labels(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def teacher(scores: dict[str, dict[int, float]]) -> TeacherScores:
    qids = sorted(scores)
    pairs = [sorted(scores[qid].items()) for qid in qids]
    return TeacherScores(
        "ranker",
        Stamp("ranker", "w", CORPUS),
        qids,
        np.cumsum([0, *map(len, pairs)]),
        np.array([document for of_query in pairs for document, _ in of_query], dtype=np.int64),
        np.array([score for of_query in pairs for _, score in of_query], dtype=np.float32),
    )


def test_filters_work_in_their_order_and_count_what_each_took(open_run: Open, tmp_path: Path) -> None:
    """A document that two filters would take out is counted by the first of them alone."""
    additions = {"name": "additions", "file": labels(tmp_path, "more.tsv", "q0\td10\nq0\td14\nq1\td39\n")}
    relabels = {"name": "relabels", "file": labels(tmp_path, "other.tsv", "q0\td14\tout\nq0\td11\tpositive\n")}
    thresholds = {"name": "ranker_thresholds"}
    scored = teacher(
        {f"q{row}": {document: 5.0 if document in (10, 21, 13) else -1.0 for document in range(N)} for row in range(3)}
    )
    expected = {
        (0, 1, 2): {"known": 0, "additions": 2, "relabels": 1, "ranker_thresholds": 2},
        (2, 1, 0): {"known": 0, "ranker_thresholds": 3, "relabels": 2, "additions": 0},
        (1, 2, 0): {"known": 0, "relabels": 2, "ranker_thresholds": 3, "additions": 0},
    }
    for order, counts in expected.items():
        run = open_run()
        filters = [[additions, relabels, thresholds][place] for place in order]
        pool, result = pooled(
            run, data_of(), {"filters": filters, **SCORES}, teacher=scored, name="joint" + str(order[0])
        )
        assert result.rejected == counts
        assert list(result.rejected) == list(counts)
        assert (left(pool, "q0"), left(pool, "q1")) == ([12, 15], [20, 22, 23, 24])


def test_counts_are_in_the_metrics_and_the_log(open_run: Open, caplog: pytest.LogCaptureFixture) -> None:
    run = open_run()
    with caplog.at_level(logging.INFO):
        pooled(run, data_of(), {"filters": [{"name": "constrained", "within": "bm25", "top_k": 4}]}, within=mined(run))
    assert "constrained_rejected 7" in caplog.text
    lines = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "negatives/rejected/constrained" in line)
    assert found["negatives/rejected/constrained"] == 7.0
    assert found["negatives/without_hits/bm25"] == 1.0


def test_two_filters_of_a_kind_are_counted_apart(open_run: Open, tmp_path: Path) -> None:
    files = [labels(tmp_path, name, f"q0\t{docid}\n") for name, docid in (("a", "d10"), ("b", "d11"))]
    _, result = pooled(open_run(), data_of(), {"filters": [{"name": "additions", "file": file} for file in files]})
    assert result.rejected == {"known": 0, "additions_1": 1, "additions_2": 1}


def test_what_is_missing_is_drawn_from_the_corpus(open_run: Open, tmp_path: Path) -> None:
    """Symptom guarded against: filters that leave too little stop a run in the middle of a phase."""
    file = labels(tmp_path, "more.tsv", "".join(f"q0\td{document}\n" for document in (10, 11, 12, 13, 14, 33)))
    run = open_run()
    pool, result = pooled(run, data_of(), {"filters": [{"name": "additions", "file": file}]}, needed=4)
    assert (result.drawn_at_random, result.queries_filled) == (3 + 2, 2), "q0 keeps one, q2 has two"
    drawn = pool.draw("q0", 1, 4, step_rng(0, "x", 0, 0)).tolist()
    assert drawn[0] == 15, "what was found comes first"
    assert len(set(drawn)) == 4
    assert not set(drawn) & {1, 10, 11, 12, 13, 14, 33}, "neither positive, nor taken out, nor named in the file"
    assert pool.draw("q0", 1, 1, step_rng(0, "x", 0, 0)).tolist() == [15]
    assert set(pool.draw("q1", 2, 4, step_rng(0, "x", 0, 0)).tolist()) <= {20, 21, 22, 23, 24}


def test_filters_that_leave_hardly_anything_are_warned_of(open_run: Open, caplog: pytest.LogCaptureFixture) -> None:
    pooled(open_run(), data_of(), needed=3)
    assert "filled up at random" not in caplog.text, "one query of three"
    pooled(open_run(), data_of(), {"sampler": {"top_k": 1}}, needed=3, name="first")
    assert "negatives/first: 3 of 3 queries keep fewer than the 3 negatives" in caplog.text


def test_a_sampler_that_leaves_too_little_counts_as_a_filter_does(open_run: Open) -> None:
    window = {"sampler": {"name": "rank_window", "first_rank": 3, "last_rank": 4}}
    pool, result = pooled(open_run(), data_of(), window)
    assert pool.draw("q2", 3, 2, step_rng(0, "x", 0, 0)).tolist() == pool.filtered.fill("q2").tolist()
    assert (result.drawn_at_random, result.queries_filled) == (2, 1)
    assert set(pool.draw("q0", 1, 4, step_rng(0, "x", 0, 0)).tolist()) == {12, 13, 10, 15}


def test_documents_with_an_answer_are_neither_kept_nor_drawn(open_run: Open) -> None:
    data = data_of([("12",), (), tuple(str(document) for document in range(4, 36))])
    pool, result = pooled(open_run(), data, {"filters": [{"name": "answers"}]}, needed=3)
    assert result.rejected == {"known": 0, "answers": 3}
    assert left(pool, "q0") == [10, 11, 13, 14, 15]
    fill = pool.filtered.fill("q2").tolist()
    assert len(fill) == 3
    assert set(fill) <= {0, 1, 2, 36, 37, 38, 39}, "the others hold an answer"


def test_a_corpus_without_enough_negatives_is_refused_before_training(open_run: Open, tmp_path: Path) -> None:
    file = labels(tmp_path, "more.tsv", "".join(f"q1\td{document}\n" for document in range(37)))
    with pytest.raises(DataError, match=r"query 'q1' lacks 2 of the 5 negatives .*40 documents.*filters: additions"):
        pooled(open_run(), data_of(), {"filters": [{"name": "additions", "file": file}]}, needed=5)


def test_known_documents_are_out_whoever_found_them(open_run: Open) -> None:
    """A document that was relabelled a positive after candidates were mined stood among the negatives."""
    data = data_of()
    data = replace(data, train=data.train.relabelled({"q0": [12]}, {"q1": [21]}))
    pool, result = pooled(open_run(), data)
    assert result.rejected == {"known": 2}
    assert (left(pool, "q0"), left(pool, "q1")) == ([10, 11, 13, 14, 15], [20, 22, 23, 24])


def test_redistribution_draws_from_the_teachers_best_alike(open_run: Open) -> None:
    scored = teacher({f"q{row}": {document: float(document) for document in range(N)} for row in range(3)})
    settings = {"filters": [{"name": "redistributed", "top_k": 3}], **SCORES}
    pool, result = pooled(open_run(), data_of(), settings, teacher=scored)
    assert left(pool, "q0") == [13, 14, 15]
    assert len(pool.entries("q1")) == 3, "21 stands in both lists, and is as likely as the others all the same"
    assert result.rejected == {"known": 0, "redistributed": 3 + 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": [{"name": "redistributed"}], **SCORES}, "needs a teacher's scores, and there are none"),
        (
            {"filters": [{"name": "margin", "scores": "teacher"}], **SCORES},
            "needs a teacher's scores, and there are none",
        ),
        ({"filters": [{"name": "constrained"}]}, "within what 'bm25' finds, which has no candidates here"),
    ],
)
def test_a_filter_without_what_it_needs_is_refused(open_run: Open, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pooled(open_run(), data_of(), settings)


def test_a_retriever_that_covers_some_queries_only_is_refused(open_run: Open) -> None:
    run = open_run()
    sources = mined(run, {"dense": LISTS["dense"]}) | mined(run, {"bm25": LISTS["bm25"]}, qids=2)
    with pytest.raises(DataError, match=r"candidates of bm25 .* lack query 'q2'"):
        pooled(run, data_of(), sources=sources)
    pool, _ = pooled(run, data_of(), sources=sources, rows=np.arange(2), name="some")
    assert left(pool, "q1") == [20, 21, 22, 23, 24]


def test_candidates_of_another_corpus_are_refused(open_run: Open) -> None:
    run = open_run()
    sources = mined(run)
    foreign = replace(teacher({"q0": {1: 0.0}}), stamp=Stamp("ranker", "w", "other"))
    settings = {"filters": [{"name": "ranker_thresholds"}], **SCORES}
    with pytest.raises(ArtifactError, match="teacher scores are of another corpus"):
        pooled(run, data_of(), settings, sources=sources, teacher=foreign)


def test_blocks_are_joined_in_order_whoever_made_them(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, counted = pooled(open_run(), data_of(), needed=4)
    monkeypatch.setattr(pooling_module, "_BLOCK_SIZE", 1)
    parts, same = pooled(open_run(), data_of(), needed=4, name="joint-in-parts")
    assert counted == same
    np.testing.assert_array_equal(whole.filtered.kept_QC, parts.filtered.kept_QC)
    assert whole.filtered.filled_F["query"].tolist() == parts.filtered.filled_F["query"].tolist() == [2, 2]


def test_a_finished_pool_is_not_made_again_unless_its_parts_changed(open_run: Open) -> None:
    run = open_run()
    pooled(run, data_of())
    marker = run.folder.negatives("joint") / "filtered.json"
    first = marker.stat().st_mtime_ns
    again = open_run()
    pooled(again, data_of(), sources={name: Candidates.load(again.folder.candidates(name)) for name in LISTS})
    assert marker.stat().st_mtime_ns == first
    pool, _ = pooled(open_run(), data_of(), lists=LISTS | {"dense": [[15], [22, 23], [30, 31]]})
    assert marker.stat().st_mtime_ns > first, "candidates were mined anew by other settings"
    assert left(pool, "q0") == [10, 11, 12, 13, 15]
    assert [path.name for path in marker.parent.parent.iterdir()] == ["joint"], "no parts are left"


@pytest.mark.parametrize("name", ["kept.npy", "filled.npy", "filtered.json"])
def test_a_damaged_pool_is_refused(open_run: Open, name: str) -> None:
    pool, _ = pooled(open_run(), data_of(), needed=4)
    path = open_run().folder.negatives("joint") / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        Filtered.load(path.parent, pool.filtered.asked)
    path.unlink()
    with pytest.raises(ArtifactError):
        Filtered.load(path.parent, pool.filtered.asked)


def test_without_queries_there_is_a_pool_of_nothing(open_run: Open) -> None:
    pool, result = pooled(open_run(), data_of(), rows=np.arange(0))
    assert (len(pool.filtered), result.queries) == (0, 0)

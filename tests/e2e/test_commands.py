"""What a run is good for afterwards: search, evaluation on any data, exports of any iteration."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT
from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, summary_of, weights_of
from tests.e2e.starts import Ended, Zygote, on_the_cpu

HIT = re.compile(r"^ *(-?\d+\.\d{3}) +(-?\d+\.\d{3})  (\S.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def run(tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that what the commands add is not seen by other tests."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    shutil.copytree(tiny.folder, folder)
    return folder


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.err
    assert ended.err.count("error:") == 1
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


# --- search ----------------------------------------------------------------------------------------------------------


def test_search_prints_the_ten_best_with_both_scores_title_and_snippet(run: Path) -> None:
    query = json.loads((run / "data" / "queries.jsonl").read_text().splitlines()[0])["text"]
    ended = subprocess.run(
        [sys.executable, "-m", "launcher", "search", str(run), query],
        cwd=ROOT,
        env=on_the_cpu(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    hits = HIT.findall(ended.stdout)
    assert len(hits) == 10, ended.stdout
    by_ranker = [float(ranker) for ranker, _, _ in hits]
    assert by_ranker == sorted(by_ranker, reverse=True)
    by_retriever = [float(retriever) for _, retriever, _ in hits]
    assert by_retriever != sorted(by_retriever, reverse=True), "the ranker has its own opinion"
    documents = [json.loads(line) for line in (run / "data" / "corpus.jsonl").read_text().splitlines()]
    words_of = {document["title"]: document["text"].split()[:8] for document in documents}
    for _, _, title in hits:
        assert title in words_of
        assert " ".join(words_of[title][:4]) in " ".join(ended.stdout.split())


def test_search_agrees_with_the_ranking_of_the_evaluation(zygote: Zygote, run: Path) -> None:
    lines = [line.split() for line in (run / "results" / "test-D-002.trec").read_text().splitlines()]
    qid = lines[0][0]
    expected = [float(score) for query, _, _, rank, score, _ in lines if query == qid and int(rank) <= 5]
    queries = [json.loads(line) for line in (run / "data" / "queries.jsonl").read_text().splitlines()]
    (text,) = (query["text"] for query in queries if query["_id"] == qid)
    ended = zygote.launcher("search", str(run), text, "--top-k", "5")
    assert [float(ranker) for ranker, _, _ in HIT.findall(ended.out)] == pytest.approx(expected, abs=1e-3)


def test_search_reads_questions_until_an_empty_line(zygote: Zygote, run: Path) -> None:
    ended = zygote.launcher(
        "search", str(run), "--top-k", "3", stdin="where is the first\nand the second?\n\nnot asked\n"
    )
    assert ended.code == 0, ended.err
    assert "where is the first" in ended.out
    assert "and the second?" in ended.out
    assert "not asked" not in ended.out
    assert len(HIT.findall(ended.out)) == 6


def test_search_in_a_folder_without_a_run_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    refused(zygote.launcher("search", str(tmp_path), "a question"), "holds no run", "config.yaml")


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_on_the_runs_own_data_gives_the_runs_own_rows(zygote: Zygote, run: Path) -> None:
    before = summary_of(run)
    ended = zygote.launcher("evaluate", str(run), "--data", str(run / "data"), "--split", "test")
    assert ended.code == 0, ended.err
    after = summary_of(run)

    def key(row: dict[str, object]) -> str:
        return f"{row['split']} {row['system']} {row['iteration']}"

    assert sorted(after, key=key) == sorted(before, key=key)
    assert "zero-shot" in ended.err, "the table is printed"


def test_evaluate_on_another_corpus_keeps_its_rows_apart(zygote: Zygote, run: Path, small_data: Path) -> None:
    before, weights = summary_of(run), weights_of(run)
    words = ("evaluate", str(run), "--data", str(small_data), "--split", "dev", "--max-queries", "5")
    ended = zygote.launcher(*words)
    assert ended.code == 0, ended.err
    assert summary_of(run) == before
    assert weights_of(run) == weights
    (folder,) = (run / "evaluations").iterdir()
    assert folder.name.startswith("small-")
    rows = summary_of(folder)
    assert [row["system"] for row in rows] == ["BM25", "zero-shot", "G0", "D0", "G", "D"]
    for row in rows:
        assert row["split"] == "dev"
        assert all(0 <= value <= 1 for value in row["metrics"].values())
    assert rows[0]["metrics"]["R@20"] > 0.8, "BM25 finds the names of the other corpus"
    ranked = (folder / "results" / "dev-G-002.trec").read_text().splitlines()
    documents = {json.loads(line)["_id"] for line in (small_data / "corpus.jsonl").read_text().splitlines()}
    assert {line.split()[2] for line in ranked} <= documents
    assert len({line.split()[0] for line in ranked}) == 5
    again = zygote.launcher(*words)
    assert again.code == 0, again.err
    assert "skipped" in again.err, "the corpus was encoded before"
    assert summary_of(folder) == rows


def test_a_run_that_was_evaluated_elsewhere_is_still_finished(zygote: Zygote, run: Path, tiny: Finished) -> None:
    assert set(ledger_of(tiny.folder)) <= set(ledger_of(run))


def test_evaluate_on_a_split_that_the_data_lack_is_refused(zygote: Zygote, run: Path, small_data: Path) -> None:
    refused(
        zygote.launcher("evaluate", str(run), "--data", str(small_data), "--split", "validation"),
        "no judged queries in the split 'validation'",
        "train, dev, test",
    )


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_of_the_warm_up(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "warm-up"
    ended = zygote.launcher("export", str(run), "--iteration", "0", "--out", str(out))
    assert ended.code == 0, ended.err
    for model in ("retriever", "ranker"):
        exported = (out / model / "model.safetensors").read_bytes()
        assert exported == (run / "weights" / model / "000" / "model.safetensors").read_bytes()
        assert exported != (run / "weights" / model / "002" / "model.safetensors").read_bytes()


def test_export_takes_the_last_iteration_by_default(zygote: Zygote, run: Path) -> None:
    shutil.rmtree(run / "export")
    ended = zygote.launcher("export", str(run))
    assert ended.code == 0, ended.err
    for model in ("retriever", "ranker"):
        exported = (run / "export" / model / "model.safetensors").read_bytes()
        assert exported == (run / "weights" / model / "002" / "model.safetensors").read_bytes()


def test_export_of_an_iteration_that_is_not_there_is_refused(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    ended = zygote.launcher("export", str(run), "--iteration", "7", "--out", str(tmp_path / "out"))
    refused(ended, "iteration 7", "from 0 to 2")
    assert not (tmp_path / "out").exists()

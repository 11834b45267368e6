"""Finished runs side by side: the matrix, the analyses, and candidates that somebody else chose."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Finished
from tests.e2e.made import ranking_of, summary_of
from tests.e2e.starts import Zygote, refused

MATRIX = "matrix-dev-MRR@10-top-20-16-queries.csv"


@pytest.fixture(scope="module")
def run(tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that what the commands add is not seen by other tests."""
    folder = tmp_path_factory.mktemp("comparisons") / "run"
    shutil.copytree(tiny.folder, folder)
    return folder


def cells_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def qrels_of(run: Path, split: str) -> dict[str, set[str]]:
    positives: dict[str, set[str]] = {}
    for line in (run / "data" / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
        qid, docid, grade = line.split("\t")
        positives.setdefault(qid, set()).update([docid] if int(grade) > 0 else [])
    return positives


def reciprocal_ranks(path: Path, positives: dict[str, set[str]], num_queries: int) -> float:
    """MRR@10 by hand."""
    ranked = ranking_of(path)
    ranks = [
        next((rank for rank, (docid, _) in enumerate(ranked[qid][:10], start=1) if docid in positives[qid]), None)
        for qid in ranked
    ]
    return sum(1 / rank for rank in ranks if rank) / num_queries


@pytest.fixture(scope="module")
def compared(zygote: Zygote, run: Path) -> Path:
    """What `matrix` leaves behind, of one run and a ranking in a file, by two ranks."""
    given = [line for line in (run / "results" / "dev-BM25.trec").read_text().splitlines() if int(line.split()[3]) < 4]
    (run / "given.trec").write_text("\n".join(given))
    words = ("--depth", "20", "--max-queries", "16", "--run-file", f"three={run / 'given.trec'}")
    ended = zygote.launcher("matrix", str(run), *words, "--out", str(run / "two"), num_ranks=2)
    assert ended.code == 0, ended.err
    assert ended.out.count("MRR@10 on dev (16 of 90 queries), top 20 of each retriever re-ranked") == 1
    return run / "two"


def test_matrix_measures_every_ranker_over_every_list_with_two_ranks(run: Path, compared: Path) -> None:
    """R2ANKER Table 4: retrievers as re-rankers, then rankers; a run file is a retriever alone."""
    cells = cells_of(compared / "matrix-dev-MRR@10-top-20-16-queries.csv")
    rows, columns = ("BM25", "G@2", "D@2"), ("BM25", "G@2", "three")
    assert [(cell["re_ranker"], cell["retriever"]) for cell in cells] == [(row, own) for row in rows for own in columns]
    files = {re.sub("-[0-9a-f]{16}$", "", path.stem): path for path in (compared / "rankings").iterdir()}
    assert len(files) == 3 + 2 + 2 + 3, "three lists; who re-orders them, but for their own"
    positives = qrels_of(run, "dev")
    for cell in cells:
        row, own = (cell[side].replace("@", "_") for side in ("re_ranker", "retriever"))
        path = files[f"dev-{own}" if row == own else f"dev-{row}-over-{own}"]
        assert float(cell["MRR@10"]) == pytest.approx(reciprocal_ranks(path, positives, 16), abs=1e-9)
        assert {qid: {docid for docid, _ in one} for qid, one in ranking_of(path).items()} == {
            qid: {docid for docid, _ in one} for qid, one in ranking_of(files[f"dev-{own}"]).items()
        }
    assert {len(one) for one in ranking_of(files["dev-three"]).values()} == {3}
    own_scores, over = ranking_of(files["dev-G_2"]), ranking_of(files["dev-G_2-over-BM25"])
    both = [
        (score, dict(own_scores[qid])[docid])
        for qid, one in over.items()
        for docid, score in one
        if docid in dict(own_scores[qid])
    ]
    assert len(both) > 10
    assert all(score == pytest.approx(other, abs=1e-4) for score, other in both), "inner products, as in its search"
    assert (compared / "matrix-dev-MRR@10-top-20-16-queries.png").read_bytes()[:4] == b"\x89PNG"
    assert list((compared / "tensorboard").glob("*/events.*"))


def test_a_second_comparison_measures_nothing_again_and_one_rank_finds_the_same(
    zygote: Zygote, run: Path, compared: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (compared / "rankings").iterdir()}
    words = ("matrix", str(run), "--depth", "20", "--max-queries", "16", "--no-figure")
    again = zygote.launcher(*words, "--out", str(compared))
    assert again.code == 0, again.err
    assert {path.name: path.stat().st_mtime_ns for path in (compared / "rankings").iterdir()} == before
    alone = zygote.launcher(*words, "--ranker", "0,2", "--against", "D0")
    assert alone.code == 0, alone.err
    for name in {path.name for path in (run / "comparisons" / "rankings").iterdir()} & set(before):
        assert ranking_of(run / "comparisons" / "rankings" / name) == ranking_of(compared / "rankings" / name)
    rows = {cell["re_ranker"]: cell["p_corrected"] for cell in cells_of(run / "comparisons" / MATRIX)}
    assert list(rows) == ["BM25", "G@2", "D0", "D@2"]
    assert [row for row, p in rows.items() if not p] == ["D0"], "it is not tested against itself"
    assert "differs from D0" in alone.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "A@5"), "--metric A@5 is by answers"),
        (("--metric", "ERR@5"), "'ERR@5' is no metric"),
        (("--against", "Nobody"), "--against Nobody is no row. Expected: one of BM25, G@2, D@2"),
        (("--split", "validation"), "no judged queries in the split 'validation'"),
        (("--set", "evaluation.depth=5"), "--set evaluation.depth=5 is not for a comparison"),
        (("--ranker", "7"), "--ranker names 7, but the newest finished iteration is 2"),
        (("--run-file", "few=FEW"), "lacks 15 of 16 queries"),
        (("--run-file", "other=OTHER"), "documents that the corpus does not have: 'nowhere' in line 1"),
        (("--run-file", "BM25=FEW"), "BM25 would stand in the table more than once"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    zygote: Zygote, run: Path, compared: Path, words: tuple[str, ...], message: str
) -> None:
    (run / "few.trec").write_text((run / "given.trec").read_text().splitlines()[0] + "\n")
    (run / "other.trec").write_text("q0 Q0 nowhere 1 1.0 t\n")
    typed = [word.replace("FEW", f"{run / 'few.trec'}").replace("OTHER", f"{run / 'other.trec'}") for word in words]
    refused(zygote.launcher("matrix", str(run), "--depth", "20", "--max-queries", "16", *typed), message)


def test_runs_of_other_data_are_not_compared(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    ledger = json.loads((other / "ledger.json").read_text())
    ledger["stages"]["shards"]["result"]["dataset_sha256"] = "0" * 64
    (other / "ledger.json").write_text(json.dumps(ledger))
    refused(zygote.launcher("matrix", str(run), str(other)), "other", "was trained on other data", "--data")
    refused(zygote.launcher("matrix", str(run), str(run)), "RUN has the name 'run' twice", "NAME=PATH")
    refused(zygote.launcher("matrix", str(run), f"again={run}"), "twice", "leave one of them out")


def test_analyses_of_one_run_by_what_the_matrix_measured(zygote: Zygote, run: Path, compared: Path) -> None:
    words = ("--depth", "20", "--max-queries", "16", "--out", str(compared), "--ranker", "0,last")
    ended = zygote.launcher("analyse", "shift", str(run), *words, "--top", "10", "--epsilon", "0.1")
    assert ended.code == 0, ended.err
    rows = {row["ranker"]: row for row in cells_of(compared / "shift-dev-MRR@10-top-20-16-queries.csv")}
    assert {name: row["negatives"] for name, row in rows.items()} == {"D0": "G0", "D@2": "G@2"}
    by_matrix = {(cell["re_ranker"], cell["retriever"]): cell for cell in cells_of(compared / MATRIX)}
    assert rows["D@2"]["MRR@10"] == by_matrix["D@2", "BM25"]["MRR@10"]
    for row in rows.values():
        assert float(row["Delta"]) == pytest.approx(float(row["KL_negatives"]) - float(row["KL_ranker"]), abs=1e-9)
        assert 0 < float(row["KL_ranker"]) < float(row["KL_negatives"]), "it re-orders BM25's own list"
    assert "top 10 without positives" in ended.out

    ended = zygote.launcher("analyse", "progress", str(run), *words[:-2], "--train-queries", "8")
    assert ended.code == 0, ended.err
    rows_of_progress = cells_of(compared / "progress-dev-MRR@10-top-20-16-queries.csv")
    assert [row["iteration"] for row in rows_of_progress] == ["0", "1", "2"]
    assert {row["train_num_queries"] for row in rows_of_progress} == {"8"}
    assert rows_of_progress[0]["dev_MRR@10"] == rows["D0"]["MRR@10"]
    assert "8 of " in ended.out


def test_candidates_in_a_file_are_re_ranked(zygote: Zygote, run: Path) -> None:
    lines = (run / "results" / "dev-BM25.trec").read_text().splitlines()
    texts = {
        query["_id"]: query["text"]
        for query in map(json.loads, (run / "data" / "queries.jsonl").read_text().splitlines())
    }
    top = [(fields[0], fields[2]) for fields in map(str.split, lines) if int(fields[3]) <= 5]
    lacking = top[0][0]
    rows = [f"{qid}\t{docid}\t{texts[qid]}\tThe passage.\n" for qid, docid in top if qid != lacking]
    (run / "top5.tsv").write_text("".join(reversed(rows)))
    words = ("evaluate", str(run), "--data", str(run / "data"), "--split", "dev", "--candidates")
    ended = zygote.launcher(*words, str(run / "top5.tsv"), "--ranker", "0,last")
    assert ended.code == 0, ended.err
    assert (
        f"15 of 16 queries, 5.0 on average and 5 at most; all of them are re-ranked; the 1 that it lacks count as 0 "
        f"hits: {lacking}" in ended.err
    )
    found = {(row["system"], row["over"]): row for row in summary_of(run) if "top5.tsv" in (row["system"], row["over"])}
    assert list(found) == [("top5.tsv", None), ("D0", "top5.tsv"), ("D", "top5.tsv")]
    assert {name for name in found["top5.tsv", None]["metrics"]} == {"R@5", "R@10", "R@20", "R@50", "R@100", "R@1000"}
    for system in ("D0", "D"):
        assert found[system, "top5.tsv"]["metrics"]["R@5"] == found["top5.tsv", None]["metrics"]["R@5"]
        assert found[system, "top5.tsv"]["rerank_depth"] == 5
    assert "D0 over top5.tsv, top 5" in ended.err

    ended = zygote.launcher(*words, "bm25", "--depth", "12")
    assert ended.code == 0, ended.err
    assert "over BM25, top 12" in ended.err
    refused(zygote.launcher(*words, str(run / "top5.tsv"), "--depth", "3"), "--depth says nothing", "all of which")
    refused(zygote.launcher(*words, "bm25", "--retriever", "0"), "--retriever says nothing")
    refused(zygote.launcher(*words, str(run / "none.tsv")), "there is no file")

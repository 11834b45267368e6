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
from tests.e2e.browser import seen
from tests.e2e.conftest import Finished
from tests.e2e.made import ledger_of, ranking_of, summary_of, weights_of
from tests.e2e.starts import Zygote, on_the_cpu, refused

ALL = "evaluation.max_dev_queries=null"
ROWS = ["BM25", "zero-shot", "G0", "D0", "G", "D", "hybrid", "D", "fused"]
"""What an evaluation measures, in its order."""
FUSED_HIT = re.compile(r"^ *(-?\d+\.\d{3}) +(-?\d+\.\d{3}) +(-?\d+\.\d{3})  (\S.*)$", re.MULTILINE)
HIT = re.compile(r"^ *(-?\d+\.\d{3}) +(-?\d+\.\d{3})  (\S.*)  \[(\S+)\]$", re.MULTILINE)


@pytest.fixture(scope="module")
def run(tiny: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that what the commands add is not seen by other tests."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    shutil.copytree(tiny.folder, folder)
    return folder


# --- search ----------------------------------------------------------------------------------------------------------


def test_search_in_a_run_folder_alone_prints_the_ten_best_with_both_scores_title_and_snippet(
    run: Path, tmp_path: Path
) -> None:
    """Symptom: a finished run could only be searched while its data lay where they were, and from one directory."""
    query = json.loads((run / "data" / "queries.jsonl").read_text().splitlines()[0])["text"]
    shutil.move(run / "data", tmp_path / "data")
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "launcher", "search", run.name, query, "--no-fusion"],
            cwd=run.parent,
            env=on_the_cpu(PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    finally:
        shutil.move(tmp_path / "data", run / "data")
    hits = HIT.findall(ended.stdout)
    assert len(hits) == 10, ended.stdout
    by_ranker = [float(ranker) for ranker, _, _, _ in hits]
    assert by_ranker == sorted(by_ranker, reverse=True)
    by_retriever = [float(retriever) for _, retriever, _, _ in hits]
    assert by_retriever != sorted(by_retriever, reverse=True), "the ranker has its own opinion"
    documents = [json.loads(line) for line in (run / "data" / "corpus.jsonl").read_text().splitlines()]
    known = {document["_id"]: document for document in documents}
    for _, _, title, docid in hits:
        assert title == known[docid]["title"]
        assert " ".join(known[docid]["text"].split()[:4]) in " ".join(ended.stdout.split())


@pytest.mark.parametrize(
    ("system", "form", "words"),
    [("D-002", HIT, ["--no-fusion"]), ("fused-002", FUSED_HIT, [])],
    ids=["ranker", "fused"],
)
def test_search_agrees_with_the_ranking_of_the_evaluation(
    zygote: Zygote, run: Path, system: str, form: re.Pattern[str], words: list[str]
) -> None:
    ranking = ranking_of(run / "results" / f"test-{system}.trec")
    qid = next(iter(ranking))
    expected = [score for _, score in ranking[qid][:5]]
    queries = [json.loads(line) for line in (run / "data" / "queries.jsonl").read_text().splitlines()]
    (text,) = (query["text"] for query in queries if query["_id"] == qid)
    ended = zygote.launcher("search", str(run), text, "--top-k", "5", *words)
    assert [float(hit[0]) for hit in form.findall(ended.out)] == pytest.approx(expected, abs=1e-3)


def test_search_reads_questions_until_an_empty_line(zygote: Zygote, run: Path) -> None:
    ended = zygote.launcher(
        "search", str(run), "--top-k", "3", stdin="where is the first\nand the second?\n\nnot asked\n"
    )
    assert ended.code == 0, ended.err
    assert "where is the first" in ended.out
    assert "and the second?" in ended.out
    assert "not asked" not in ended.out
    assert len(FUSED_HIT.findall(ended.out)) == 6


def test_search_in_a_folder_without_a_run_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    refused(zygote.launcher("search", str(tmp_path), " "), "the question is empty")
    refused(zygote.launcher("search", str(tmp_path), "a question"), "holds no run", "config.yaml")


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_on_the_runs_own_data_gives_the_runs_own_rows(zygote: Zygote, run: Path) -> None:
    before = summary_of(run)
    ended = zygote.launcher("evaluate", str(run), "--split", "test")
    assert ended.code == 0, ended.err
    after = summary_of(run)

    def key(row: dict[str, object]) -> str:
        return f"{row['split']} {row['system']} {row['iteration']}"

    assert sorted(after, key=key) == sorted(before, key=key)
    assert "zero-shot" in ended.err, "the table is printed"


def test_evaluate_on_a_sample_leaves_the_other_rows_and_rankings_alone(zygote: Zygote, run: Path) -> None:
    """Symptom: after `--max-queries 3` the table of the run had rows of 3 queries alone, and did not say so."""
    before, results = summary_of(run), run / "results"
    files = {path.name: path.read_bytes() for path in results.glob("*.trec")}
    ended = zygote.launcher("evaluate", str(run), "--data", str(run / "data"), "--max-queries", "3")
    assert ended.code == 0, ended.err
    after = summary_of(run)
    assert [row for row in after if row["num_queries"] == 16] == before
    added = [(row["system"], row["split"], row["num_queries"]) for row in after if row not in before]
    assert added == [(name, "test", 3) for name in ROWS]
    assert "3 of 90" in ended.err
    assert "16 of 90" in ended.err
    assert {name: (results / name).read_bytes() for name in files} == files
    assert (results / "test-D-002-3-queries.trec").exists()


def test_all_of_dev_and_a_smaller_sample_by_set_leave_the_recipes_own_alone(zygote: Zygote, run: Path) -> None:
    """Symptom: after `--set evaluation.max_dev_queries=5` the recipe's files had 5 queries, and `compare` failed."""
    results = run / "results"
    files = {path.name: path.read_bytes() for path in results.glob("*.trec")}
    fusion, rows = (results / "fusion.json").read_bytes(), summary_of(run)
    for words in (["--set", "evaluation.max_dev_queries=5"], ["--retriever", "all", "--ranker", "none", "--set", ALL]):
        ended = zygote.launcher("evaluate", str(run), "--split", "dev", *words)
        assert ended.code == 0, ended.err
    assert {name: (results / name).read_bytes() for name in files} == files
    assert (results / "fusion.json").read_bytes() == fusion
    assert summary_of(run)[: len(rows)] == rows
    whole = max(row["num_queries"] for row in summary_of(run) if row["split"] == "dev")
    assert {"dev-fused-002-5-queries.trec", f"dev-G-002-{whole}-queries.trec"} <= {
        one.name for one in results.iterdir()
    }
    compared = zygote.launcher("compare", str(run), "--metric", "MRR@10", "--no-figure")
    assert compared.code == 0, compared.err
    assert f"(16 and {whole} queries)" in compared.out


def test_weights_of_a_mixture_that_are_lost_are_asked_for_and_fitted_on_dev_again(zygote: Zygote, run: Path) -> None:
    before, kept, rows = (
        (run / "results" / "fusion.json").read_bytes(),
        run / "results" / "fusion.json",
        summary_of(run),
    )
    kept.unlink()
    words = ("evaluate", str(run), "--data", str(run / "data"))
    refused(zygote.launcher(*words), "no weights of a mixture were fitted", "--split dev --set evaluation.fuse=true")
    ended = zygote.launcher(*words, "--split", "dev")
    assert ended.code == 0, ended.err
    assert kept.read_bytes() == before
    assert sorted(map(str, summary_of(run))) == sorted(map(str, rows))


def test_evaluate_any_retriever_under_any_ranker(zygote: Zygote, run: Path) -> None:
    """AR2 Table 3 has D over G0 and D0 over G; an index that was dropped since is built once more."""
    before = summary_of(run)
    shutil.rmtree(run / "index" / "001")
    pairs = ("--retriever", "0..1", "--ranker", "0,last", "--max-queries", "4")
    ended = zygote.launcher("evaluate", str(run), "--data", str(run / "data"), *pairs)
    assert ended.code == 0, ended.err
    after = summary_of(run)
    added = {(row["system"], row["iteration"], row["over"], row["over_iteration"]): row for row in after[len(before) :]}
    assert (after[: len(before)], list(added)) == (
        before,
        [
            *[("G0", 0, None, None), ("D0", 0, "G0", 0), ("D", 2, "G0", 0)],
            *[("G", 1, None, None), ("D0", 0, "G", 1), ("D", 2, "G", 1)],
        ],
    )
    assert "of iteration" in ended.err
    assert (run / "index" / "001" / "manifest.json").exists()
    first, over, own = (
        ranking_of(run / "results" / f"test-{name}.trec")
        for name in ("G0-000-4-queries", "D-002-over-G0-000-4-queries", "D-002")
    )
    scores = {qid: [score for _, score in ranked[:10]] for qid, ranked in over.items()}
    for qid, ranked in over.items():
        assert {docid for docid, _ in ranked[:10]} == {docid for docid, _ in first[qid][:10]}, "of G0's documents"
        assert scores[qid] == sorted(scores[qid], reverse=True)
    both = [
        (score, dict(own[qid][:10])[docid])
        for qid, ranked in over.items()
        for docid, score in ranked[:10]
        if qid in own and docid in dict(own[qid][:10])
    ]
    assert both, "G and G0 find some documents alike"
    assert all(score == pytest.approx(other, abs=1e-4) for score, other in both), "by the scores of D"
    assert ranking_of(run / "results" / "test-D-002-over-G-001-4-queries.trec") != over


def test_retrievers_are_measured_without_their_ranker(zygote: Zygote, run: Path) -> None:
    before = summary_of(run)
    words = ("--data", str(run / "data"), "--split", "dev", "--retriever", "0..1", "--ranker", "none")
    ended = zygote.launcher("evaluate", str(run), *words, "--max-queries", "7")
    assert ended.code == 0, ended.err
    added = [(row["system"], row["iteration"], row["over"]) for row in summary_of(run)[len(before) :]]
    assert added == [("G0", 0, None), ("G", 1, None)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranker", "none", "--candidates", "bm25"), "no ranker is named that could re-order"),
        (("--ranker", "3"), "--ranker names 3, but the newest finished iteration is 2"),
        (("--set", "evaluation.metrics=[bpref@5]"), "'bpref@5' is no metric"),
        (("--set", "ranker.max_length=9"), "--set ranker.max_length=9 would change what the run has computed"),
        (("--set", "index.factory=Flat"), "would replace the index of the run's own data"),
        (("--set", "evaluation.relevance_threshold=2"), "the highest grade is 1"),
    ],
)
def test_words_that_cannot_be_measured_are_refused(
    zygote: Zygote, run: Path, words: tuple[str, ...], message: str
) -> None:
    refused(zygote.launcher("evaluate", str(run), "--data", str(run / "data"), *words), message)


def test_evaluate_on_a_few_graded_documents_needs_nothing_of_the_runs_data(
    zygote: Zygote, run: Path, tmp_path: Path
) -> None:
    """Symptom: a corpus smaller than the lists of the run's index ended in an error that no word could mend."""
    few = tmp_path / "few"
    (few / "qrels").mkdir(parents=True)
    texts = ["an owl hoots at night", "a fox barks", "owls and foxes", "the moon", "a lake"]
    documents = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(texts)]
    (few / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    queries = [{"_id": "q1", "text": "owl hoots"}, {"_id": "q2", "text": "fox barks"}]
    (few / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (few / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t3\nq1\td2\t1\nq2\td1\t2\n")
    shutil.move(run / "data", tmp_path / "data")
    try:
        words = ("--set", "evaluation.relevance_threshold=2", "evaluation.metrics=[R@1,nDCG@10]")
        ended = zygote.launcher("evaluate", str(run), "--data", str(few), *words)
    finally:
        shutil.move(tmp_path / "data", run / "data")
    assert ended.code == 0, ended.err
    assert "5 documents are searched exactly, too few for the run's index.factory IVF8,PQ8x4" in ended.err
    (folder,) = (path for path in (run / "evaluations").iterdir() if path.name.startswith("few-"))
    rows = {row["system"]: row for row in summary_of(folder)}
    assert [row["system"] for row in summary_of(folder)] == ROWS
    assert {(row["num_queries"], row["relevance_threshold"], *row["metrics"]) for row in rows.values()} == {
        (2, 2, "R@1", "nDCG@10")
    }
    assert rows["BM25"]["metrics"]["R@1"] == 1.0


def test_evaluate_on_another_corpus_keeps_its_rows_apart(zygote: Zygote, run: Path, small_data: Path) -> None:
    before, weights = summary_of(run), weights_of(run)
    words = ("evaluate", str(run), "--data", str(small_data), "--split", "dev", "--max-queries", "5")
    ended = zygote.launcher(*words)
    assert ended.code == 0, ended.err
    assert summary_of(run) == before
    assert weights_of(run) == weights
    (folder,) = (path for path in (run / "evaluations").iterdir() if path.name.startswith("small-"))
    rows = summary_of(folder)
    assert [row["system"] for row in rows] == ROWS
    for row in rows:
        assert row["split"] == "dev"
        assert all(0 <= value <= 1 for value in row["metrics"].values())
    assert rows[0]["metrics"]["R@20"] > 0.8, "BM25 finds the names of the other corpus"
    ranked = (folder / "results" / "dev-G-002-5-queries.trec").read_text().splitlines()
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


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(zygote: Zygote, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run beside itself, under two names."""
    out = tmp_path_factory.mktemp("report") / "both.html"
    again = out.parent / "again"
    shutil.copytree(run, again)
    ended = zygote.launcher("report", f"one={run}", f"two={again}", "--out", str(out))
    assert ended.code == 0, ended.err
    assert ended.out == f"{out}\n"
    return out


def test_the_report_of_a_run_has_its_numbers_and_its_curves(run: Path, page: Path) -> None:
    html = page.read_text()
    for row in summary_of(run):
        iteration = "" if row["iteration"] is None else f" ({row['iteration']})"
        cells = re.search(
            rf"<th scope=\"row\">one: {row['system']}{re.escape(iteration)}[< ].*?<td>(<b.*?>)?\d\.\d+", html
        )
        assert cells is not None, row
    best = [row["metrics"]["MRR@10"] for row in summary_of(run) if row["split"] == "test"]
    assert re.search(rf">{best[-1]:.4f}(</b>)? <small>±", html), "rankings of a real run are those of its rows"
    for title in ("one: MRR@10 on dev", "warmup_retriever: loss", "retriever: reward", "ranker: loss", "recall of the"):
        assert f"<figcaption>{title}" in html
    assert "All settings are the same" in html
    assert html.count('<span class="query">') == 12
    assert ">positive</strong>" in html


@pytest.mark.parametrize(("width", "is_dark"), [(360, True), (1280, False)], ids=["phone", "desk"])
def test_the_report_fits_into_a_window(page: Path, tmp_path: Path, width: int, is_dark: bool) -> None:
    found = seen(page, tmp_path, width=width, is_dark=is_dark)
    assert found["width"] <= width
    assert not found["outside"]
    assert found["drawings"] > 30
    assert not found["flat"]
    assert found["folded"] > 5
    assert found["left_folded"] == 0, "what is folded is printed; the page's own script is the one that may run"
    assert (found["paper"] == "rgb(255, 255, 255)") is not is_dark
    assert 0.03 < found["ink"] < 0.5, "the screenshot has text on paper"
    assert found["paper_brightness"] < 0.2 if is_dark else found["paper_brightness"] == 1


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_of_the_warm_up(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "warm-up"
    ended = zygote.launcher("export", str(run), "--iteration", "0", "--out", str(out))
    assert ended.code == 0, ended.err
    for model in ("retriever", "ranker"):
        exported = (out / model / "model.safetensors").read_bytes()
        assert exported == (run / "weights" / model / "000" / "model.safetensors").read_bytes()
        assert exported != (run / "weights" / model / "002" / "model.safetensors").read_bytes()
    assert "no mixture is exported" in ended.err
    assert "was fitted for G " in ended.err
    assert not (out / "fusion").exists()


def test_export_takes_the_last_iteration_by_default(zygote: Zygote, run: Path) -> None:
    shutil.rmtree(run / "export")
    ended = zygote.launcher("export", str(run))
    assert ended.code == 0, ended.err
    for model in ("retriever", "ranker"):
        exported = (run / "export" / model / "model.safetensors").read_bytes()
        assert exported == (run / "weights" / model / "002" / "model.safetensors").read_bytes()
    assert (run / "export" / "fusion" / "fusion.json").read_bytes() == (run / "results" / "fusion.json").read_bytes()
    assert (run / "export" / "fusion" / "fuse.py").exists()


def test_export_of_an_iteration_that_is_not_there_is_refused(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    ended = zygote.launcher("export", str(run), "--iteration", "7", "--out", str(tmp_path / "out"))
    refused(ended, "iteration 7", "from 0 to 2")
    assert not (tmp_path / "out").exists()

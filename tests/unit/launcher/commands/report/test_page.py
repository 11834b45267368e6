"""The page of a report: it is whole, refers to nothing outside, escapes what is data, and says what is not there."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import pytest

from engine.errors import ArtifactError, ConfigError, DataError
from engine.evaluation.duel import Difference, Duel
from engine.evaluation.summary import read_rows
from engine.evaluation.systems import fused_system, trained_systems
from engine.reliability.activity import Activity
from engine.reliability.heartbeat import Heart
from engine.run import RunFolder
from launcher.commands.report.command import run_command
from launcher.commands.words.report import add_arguments
from shards.files import write_json
from shards.records import Dataset
from tests.unit.launcher.commands.report.made import HOSTILE, MadeRun, Page, made_data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return made_data(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def played(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = MadeRun(tmp_path_factory.mktemp("report") / "first", dataset)
    run.play()
    run.end()
    return run.folder


@pytest.fixture
def run(played: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(played, tmp_path / "first"))


def reported(*words: str) -> Page:
    """The page that the command writes; checked for what holds of every page."""
    return Page(written(*words))


def written(*words: str) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(words)
    run_command(arguments)
    first = arguments.runs[0].partition("=")[2] or arguments.runs[0]
    html = (arguments.out or Path(first) / "report.html").read_text(encoding="utf-8")
    require_whole(Page(html))
    return html


def require_whole(page: Page) -> None:
    """What holds of every page, whatever stands in it."""
    assert [inside for inside, _ in page.all("title") if "svg" not in inside] == [("html", "head")]
    ids = [attributes["id"] for _, _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands twice"
    for _, tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}, tag
        assert not attributes.keys() & {"src", "srcset", "xlink:href"}
        assert not any(name.startswith("on") for name in attributes)
        if "href" in attributes:
            assert attributes["href"] in {f"#{own}" for own in ids}
    assert "url(" not in page.text("style")
    assert "@import" not in page.text("style")
    assert len(page.all("script")) == 1
    drawn = [attributes for _, attributes in page.all("svg") if attributes.get("aria-hidden") != "true"]
    for attributes in drawn:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(ids)
    assert len([1 for inside, _ in page.all("title") if inside[-1] == "svg"]) == len(drawn)
    assert len(page.all("desc")) == len(drawn)
    num_tables = len(page.all("table"))
    assert len(page.all("caption")) == len(page.all("thead")) == num_tables > 0
    assert all(attributes.get("scope") in {"col", "row"} for _, attributes in page.all("th"))


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_a_finished_run_has_every_part(run: Path) -> None:
    page = reported(str(run))
    sections = [attributes["id"] for _, attributes in page.all("section")]
    assert sections == ["runs", "results", "iterations", "training", "time", "queries", "settings", "code"]
    titles = page.text("figcaption")
    for title in (
        "first: MRR@10 on dev",
        "first: R@5 on dev",
        "first: A@5 on dev",
        "retriever: loss",
        "retriever: reward",
    ):
        assert title in titles
    assert "recall of the index" in titles
    assert "first: time by kind of stage" in titles
    assert "finished" in page.text("table")
    assert "to be known first" not in page.text()


def test_what_came_of_the_run_stands_above_its_numbers(run: Path) -> None:
    """The terminal said whether the game paid and which row is the best of a column, and the page did not."""
    gain = Difference(2, 0.25, 0.05, 0.001)
    write_json(RunFolder(run).duel, asdict(Duel(2, "MRR@10", 12, [gain], ["G0", "G"], [], [])))
    html = written(str(run))
    text = Page(html).text("section")
    assert "The training after the warm-up paid: G of iteration 2 is above G0 by .250" in text
    assert text.index("paid") < text.index("Results on dev")
    assert "BM25 : finds by words alone" in text
    assert "G0, G : searches by dense vectors" in text
    assert "D0, D : reads query and document together" in text
    table = html.split("Results on dev")[2]
    best = re.findall(r'scope="row">([^<]+?) ?<small>[^<]*</small></th><td><b class="best">0\.\d+</b>', table)
    assert best == ["D (2)"], "by MRR@10, the first column"


def test_standard_errors_and_the_paired_test_are_of_the_values_of_the_queries(run: Path) -> None:
    """The positive stands at 7 to 9 (from 1) after the warm-up and at 3 to 5 in the end, four queries at each."""
    before, after = ([1 / rank for rank in ranks for _ in range(4)] for ranks in ((7, 8, 9), (3, 4, 5)))
    gains = [two - one for one, two in zip(before, after, strict=True)]
    text = reported(str(run)).text("table")
    for values in (before, after):
        assert f"{mean(values):.4f} ±{stdev(values) / math.sqrt(12):.4f}" in text
    # Twelve gains of one sign: two of the 4096 assignments are as large; four differences are corrected for at most 4.
    told = re.search(r"G \(2\) G0 \(0\) (\+\d\.\d+) ±(\d\.\d+) (\S+) to (\S+) (\S+) better 12", text)
    assert told is not None, text
    assert 0 < float(told[3]) < mean(gains) < float(told[4]), "an interval of the bootstrap"
    assert (told[1], told[2]) == (f"{mean(gains):+.4f}", f"{stdev(gains) / math.sqrt(12):.4f}")
    assert 2 / 4096 <= float(told[5]) <= 5 * 2 / 4096 * 1.01


def test_what_looks_deeper_than_is_read_has_no_standard_error(run: Path) -> None:
    (table,) = re.findall(r"<table class=\"numbers\">.*?Results on dev.*?</table>", written(str(run)), re.DOTALL)
    headers = re.findall(r'<th scope="col">([^<]+)</th>', table)
    assert headers == ["system", "MRR@10", "R@5", "R@1000", "A@5", "queries"]
    for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", table):
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert ["±" in cell for cell in cells] == [True, True, False, True]


def test_a_ranker_over_what_several_found_has_its_own_ranking(dataset: Dataset, tmp_path: Path) -> None:
    """Symptom: the file of the same ranker over its own retriever was looked at, whose numbers are others."""
    made = MadeRun(tmp_path / "mixed", dataset)
    made.play((0, 1))
    system = fused_system(made.config, taken=1)
    assert system.over is not None
    for place, one in ((2, system.over), (1, system.parts[1]), (0, system)):
        made.record(one, "dev", place=place)
    made.end()
    page = written(str(made.folder))
    assert "No standard errors" not in page
    (row,) = re.findall(r"<tr><th scope=\"row\">D \(1\) <small>over hybrid \(1\).*?</tr>", page)
    assert "±" in row


def test_a_ranking_that_is_not_the_row_s_gives_no_standard_errors(run: Path) -> None:
    """Values of other queries, or of judgements that changed since, would stand beside the mean as its own."""
    path = run / "results" / "dev-G-002.trec"
    shutil.copy(run / "results" / "dev-G0-000.trec", path)
    page = written(str(run))
    assert "No standard errors for G (2): their rankings are not in results/, or give other numbers" in page
    (row,) = re.findall(r"<tr><th scope=\"row\">G \(2\)</th>.*?</tr>", page)
    assert "±" not in row
    assert not re.search(r"<th scope=\"row\">G \(2\)</th><td class=\"words\">G0", page)


def test_examples_show_ranks_before_and_after_and_mark_positives_and_words(run: Path) -> None:
    html = written(str(run), "--queries", "3")
    assert html.count('<span class="query">') == 3
    first = html[html.index('<span class="query">') :]
    assert re.search(r"better: MRR@10 0\.1\d\d → 0\.3\d\d|better: MRR@10 0\.1\d\d → 0\.2\d\d", first)
    positive = first[first.index('class="positive"') :]
    ranks = re.search(r"(\d+) → (\d+) <small>(\d+) up</small>", positive)
    assert ranks is not None
    assert int(ranks[1]) - int(ranks[2]) == int(ranks[3]) == 4
    assert re.search(r"<mark>word\d+</mark>", positive)
    assert "<mark>is</mark>" not in html, "stop words say nothing"


def test_there_are_as_many_examples_as_are_asked_for(run: Path) -> None:
    """Symptom: where no query lost anything, only a third of the examples were shown."""
    assert written(str(run), "--queries", "11").count('<span class="query">') == 11


def test_no_examples_are_shown_where_none_are_asked_for(run: Path) -> None:
    assert "queries" not in [attributes["id"] for _, attributes in reported(str(run), "--queries", "0").all("section")]


# --- data are data ---------------------------------------------------------------------------------------------------


def test_markup_in_passages_queries_answers_and_names_is_text(run: Path, tmp_path: Path) -> None:
    html = written(f"{run}", "--out", str(tmp_path / "out.html"))
    page = Page(html)
    assert html.count("<script") == 1
    assert "alert('x')" not in html, "quotes are escaped, too"
    assert page.text("summary").count(f"where is word12 {HOSTILE}") == 1
    assert f"title 12 {HOSTILE}" in page.letters("b")
    assert "& more" in page.text("td")


def test_a_run_named_like_markup_is_text(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)<"
    shutil.copytree(played, folder)
    html = written(str(folder), "--out", str(tmp_path / "out.html"))
    assert html.count("<script") == 1
    assert "<script>alert(1)<" in Page(html).text("h1")
    assert "<script>alert(1)<: MRR@10 on dev" in Page(html).text("svg")


# --- several runs ----------------------------------------------------------------------------------------------------


def test_runs_stand_side_by_side_with_what_differs(played: Path, dataset: Dataset, tmp_path: Path) -> None:
    other = MadeRun(tmp_path / "other", dataset, "run.seed=7", "ranker.max_length=65", ahead=1)
    other.play()
    other.end()
    html = written(f"one={played}", f"two={other.folder}", "--out", str(tmp_path / "both.html"))
    page = Page(html)
    text = page.text("table")
    assert "ranker.max_length 64 65" in text
    assert "run.seed 42 7" in text
    assert "run.path" not in text
    assert re.search(r"two: G \(2\) one: G \(2\) \+0\.\d+ ±0\.\d+ \S+ to \S+ \S+ better 12", text)
    captions = page.text("figcaption")
    assert "one: MRR@10 on dev" in captions
    assert "two: MRR@10 on dev" in captions
    assert captions.count("retriever: loss") == 1, "one chart with a line for each run"
    assert html.count("<span>two</span></caption>") >= 3, "examples of both"


def test_runs_of_samples_by_other_seeds_are_not_tested_against_each_other(
    played: Path, dataset: Dataset, tmp_path: Path
) -> None:
    other = MadeRun(tmp_path / "other", dataset, ahead=1)
    other.play()
    rows = [row for row in json.loads((other.folder / "results" / "summary.json").read_text())]
    write_json(other.folder / "results" / "summary.json", [row | {"num_queries": 11} for row in rows])
    text = reported(f"one={played}", f"two={other.folder}", "--out", str(tmp_path / "both.html")).text("table")
    assert "one: G (2) one: G0 (0)" in text
    assert "two: G (2) one: G (2)" not in text


# --- what is not there -----------------------------------------------------------------------------------------------


def test_a_run_that_has_only_begun_says_so(dataset: Dataset, tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "begun", dataset)
    page = reported(str(run.folder))
    assert "This run is not finished, and not running" in page.text("li")
    assert "Nothing was measured yet" in page.text("li")
    assert "Nothing was trained yet." in page.text("p")
    assert {"results", "iterations", "queries"}.isdisjoint(one["id"] for _, one in page.all("section"))


def test_a_run_without_a_ledger_is_reported(dataset: Dataset, tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "begun", dataset)
    (run.folder / "ledger.json").unlink()
    assert "No stage is finished." in reported(str(run.folder)).text("p")


def test_a_run_in_its_first_iteration_shows_it(dataset: Dataset, tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "begun", dataset)
    run.play((0,))
    page = reported(str(run.folder))
    assert "begun: MRR@10 on dev" in page.text("figcaption")
    assert "rank by G0 (0)" in page.text("th")
    assert "→" not in page.text("th")


def test_without_its_data_and_shards_a_run_is_reported_with_less(run: Path, dataset: Dataset, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(dataset.path, tmp_path / "moved"))
    words = (run / "config.yaml").read_text().replace(str(dataset.path), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(words)
    page = reported(str(run))
    assert f"There is no data folder {tmp_path / 'gone'}" in page.text("li")
    assert "±0" not in page.text("table")
    shutil.rmtree(run / "shards")
    page = reported(str(run), "--data", str(moved))
    assert "There is no data folder" not in page.text("li")
    assert "There are no shards" in page.text("li")
    assert "±0" in page.text("table")
    assert re.search(r"\bd\d+\b", page.text("b")), "documents by their ids"


def test_ranks_are_told_and_folded_where_they_are_many(run: Path) -> None:
    assert "the last sign of each rank" not in written(str(run))
    for rank in range(9):
        activity = Activity()
        with activity.in_stage("retriever/2"), activity.counting(6, "step", 0):
            activity.done = 2
            Heart(run / "heartbeats", rank, 9, "nonce", activity).beat("running")
    page = reported(str(run))
    assert "first: 9 ranks" in page.text("summary")
    assert page.text("table").count("retriever/2, step 2 of 6") == 9


def test_a_cut_last_measurement_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"time": 2000.0, "stage": "retr')
    assert "retriever: loss" in reported(str(run)).text("figcaption")


def test_what_a_reader_must_know_first_is_told(run: Path) -> None:
    made = MadeRun.__new__(MadeRun)
    made.folder = run
    made.measure([(8, {"loss": math.nan, "skipped_steps": 3.0, "lr": 0.1})])
    starts = json.loads((run / "starts.json").read_text())
    again = starts[0] | {"nonce": "again", "forced": ["run.seed: 1 -> 2"], "git": "abc-dirty"}
    again["versions"] = starts[0]["versions"] | {"torch": "1.0"}
    write_json(run / "starts.json", [*starts, again])
    text = reported(str(run)).text("li")
    for told in (
        "retriever: 3 steps were skipped",
        "no finite numbers: retriever/loss (1)",
        "Start 2 was forced to go on although run.seed: 1 -> 2",
        "Start 2 ran code that differs from its commit, abc-dirty",
        "→ 1.0",
    ):
        assert told in text, text


# --- refused ---------------------------------------------------------------------------------------------------------


def damaged(path: Path, text: str) -> None:
    assert path.exists()
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "error", "told"),
    [
        ("ledger.json", "{", ArtifactError, "ledger.json is not valid JSON"),
        ("starts.json", "[1]", ArtifactError, "starts.json is damaged"),
        ("results/summary.json", '[{"system": 3}]', ArtifactError, "summary.json is damaged"),
        ("metrics.jsonl", '{"time": 1.0, "stage": "a", "step": 1}\nnonsense\n', ArtifactError, "line 2 of"),
        ("metrics.jsonl", '{"time": 1.0, "stage": "a"}\n', ArtifactError, "line 1 of"),
        ("results/dev-G-002.trec", "q12 Q0 d1 1\n", DataError, "dev-G-002.trec, line 1"),
        (
            "results/dev-G-002.trec",
            "q12 Q0 d1 1 2 G\nq13 Q0 d1 1 2 G\nq12 Q0 d2 2 1 G\n",
            DataError,
            "line 3 comes back",
        ),
        ("shards/000000.tar", "", ArtifactError, "000000.tar has 0 bytes"),
        ("config.yaml", "run: {nonsense: 1}\n", ConfigError, "nonsense"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, text: str, error: type[Exception], told: str) -> None:
    damaged(run / name, text)
    with pytest.raises(error, match=re.escape(told)):
        written(str(run))
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "page.txt"], "page.txt is no page"),
        (["--queries", "21"], "--queries 21"),
        (["--metric", "F1"], "no metric"),
        (["--metric", "R@7"], "no row of these runs has the metric R@7"),
        (["--data", "nowhere"], "is no folder"),
    ],
)
def test_words_that_mean_nothing_are_refused(run: Path, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        written(str(run), *words)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        written(str(tmp_path))


def test_the_metric_that_is_asked_for_stands_first(run: Path) -> None:
    html = written(str(run), "--metric", "A@5")
    assert re.findall(r'<th scope="col">([^<]+)</th>', html[html.index("Results on dev") :])[1] == "A@5"
    assert "Differences on dev by A@5" in html


def test_nothing_of_the_run_is_changed(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    written(str(run), "--out", str(run.parent / "page.html"))
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before


def test_the_rows_that_the_made_run_records_are_those_of_its_recipe(run: Path, dataset: Dataset) -> None:
    """The tests above are about what a run leaves; so the fixture's rows must be what a run would name them."""
    names = {(row.system, row.iteration) for row in read_rows(run / "results" / "summary.json")}
    config = MadeRun(run.parent / "like", dataset).config
    assert names == {("BM25", None), *((one.name, one.iteration) for one in trained_systems(config, [0, 1, 2]))}

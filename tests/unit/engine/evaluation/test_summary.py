"""The table of results: rows in the order of the run, whoever recorded them and whatever a system is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from engine.config.file import load_config
from engine.errors import ArtifactError
from engine.evaluation.summary import Headline, Row, add_row, read_rows, summary_table
from engine.evaluation.systems import RANKER, System, WeightsOf, trained_systems, yardsticks
from engine.run import Run
from shards.files import write_json
from tests.unit.engine.conftest import TINY

Open = Callable[..., Run]
CONFIG = load_config(TINY)
BM25, ZERO_SHOT = yardsticks(CONFIG)
G0, D0, G, D = trained_systems(CONFIG, [0, 1])
W2 = WeightsOf("retriever", 2)


def recorded(run: Run, rows: Sequence[tuple[System, str, float]], **measured_on: int) -> list[str]:
    """Record rows, on all 40 queries unless it is said, and return the lines of the tables that have them."""
    on = {"num_queries": 40, "split_queries": 40} | measured_on
    for system, split, value in rows:
        add_row(run.folder.summary, Row.of(system, split, {"MRR@10": value}, **on))
    return lines_of(summary_table(run.folder))


def lines_of(table: str) -> list[str]:
    """Return the lines of rows, which end in a number, without their stars."""
    lines = table.replace("*0", " 0").splitlines()
    return [line for line in lines if re.search(r"\d\.\d{3}$", line)]


def test_the_table_shows_the_rows_in_the_order_of_the_run(open_run: Open) -> None:
    run = open_run()
    lines = recorded(
        run,
        [
            *((D, "test", 0.9), (G, "dev", 0.5), (D0, "dev", 0.4), (G0, "dev", 0.3), (D, "dev", 0.6)),
            *((ZERO_SHOT, "dev", 0.2), (BM25, "dev", 0.12345)),
        ],
    )
    assert [line.split()[-1] for line in lines] == ["0.123", "0.200", "0.300", "0.400", "0.500", "0.600", "0.900"]
    assert lines[3].startswith("D0 over G0 ")
    assert lines[2].startswith("G0 ")
    table = summary_table(run.folder)
    assert [line.split(",")[0] for line in table.splitlines() if "iteration" in line] == ["dev", "test"]


def test_systems_of_any_name_and_kind_have_their_place(open_run: Open) -> None:
    """Symptom: a system that is called Doc2Query was shown as a ranker, one that is called RRF ended the command."""
    other, last = System("Doc2Query", "expansion", None), System("AAA", "fusion", None)
    ranker = System("monoBERT", RANKER, WeightsOf("ranker", 1), over=BM25)
    lines = recorded(open_run(), [(other, "dev", 0.1), (last, "dev", 0.2), (ranker, "dev", 0.3), (BM25, "dev", 0.4)])
    assert [line.split()[-1] for line in lines] == ["0.400", "0.100", "0.200", "0.300"], (
        "unknown kinds as they appeared"
    )
    assert [" over " in line for line in lines] == [False, False, False, True]
    assert lines[3].startswith("monoBERT over BM25 ")


def test_a_row_takes_the_place_of_its_like_alone(open_run: Open) -> None:
    run = open_run()
    over_bm25 = replace(D, over=BM25)
    recorded(run, [(D, "dev", 0.1), (over_bm25, "dev", 0.2), (D, "test", 0.3), (D, "dev", 0.4)])
    assert [(row.split, row.over, row.metrics["MRR@10"]) for row in read_rows(run.folder.summary)] == [
        ("dev", "BM25", 0.2),
        ("test", "G", 0.3),
        ("dev", "G", 0.4),
    ]


def test_a_summary_without_kinds_is_still_read(open_run: Open) -> None:
    """Summaries were written without `kind` and `over` once."""
    run = open_run()
    old = [
        {"system": system, "retriever": retriever, "iteration": iteration, "split": "dev", "metrics": {"R@1": 0.5}}
        for system, retriever, iteration in [
            *[("D", "G", 1), ("G", "G", 1), ("D0", "G0", 0), ("zero-shot", "zero-shot", None)],
            *[("G0", "G0", 0), ("BM25", "BM25", None)],
        ]
    ]
    run.folder.results.mkdir()
    write_json(run.folder.summary, old)
    lines = lines_of(summary_table(run.folder))
    assert [line.split("  ")[0] for line in lines] == ["BM25", "zero-shot", "G0", "D0 over G0", "G", "D over G"]
    add_row(run.folder.summary, Row.of(G, "dev", {"R@1": 0.75}, num_queries=4, split_queries=4))
    found = [(row.num_queries, row.metrics["R@1"]) for row in read_rows(run.folder.summary) if row.system == "G"]
    assert found == [(None, 0.5), (4, 0.75)], "nobody knows which queries the old one was measured on"


def test_rows_of_samples_stand_beside_those_of_the_whole_split(open_run: Open) -> None:
    """Symptom: a quick look at 3 queries took the place of the numbers of the whole split."""
    run = open_run()
    recorded(run, [(G, "test", 0.5), (D, "test", 0.6)])
    recorded(run, [(G, "test", 0.1), (D, "test", 0.2)], num_queries=3)
    lines = recorded(run, [(G, "test", 0.3)], num_queries=3)
    rows = [(row.system, row.num_queries, row.metrics["MRR@10"]) for row in read_rows(run.folder.summary)]
    assert rows == [("G", 40, 0.5), ("D", 40, 0.6), ("D", 3, 0.2), ("G", 3, 0.3)], "only its like is replaced"
    titles = [line.split("  ")[0] for line in summary_table(run.folder).splitlines() if "iteration" in line]
    assert titles == ["test, 40 queries", "test, 3 of 40 queries"]
    assert [line.split()[-1] for line in lines] == ["0.500", "0.600", "0.300", "0.200"]


def test_rows_of_other_grades_of_relevance_stand_side_by_side(open_run: Open) -> None:
    run = open_run()
    recorded(run, [(G, "test", 0.5)])
    assert "relevant from" not in summary_table(run.folder)
    lines = recorded(run, [(G, "test", 0.4)], relevance_threshold=2)
    assert [line.split()[-1] for line in lines] == ["0.500", "0.400"]
    assert "test, 40 queries, relevant from grade 2 " in summary_table(run.folder)


def test_the_table_says_which_iteration_is_re_ranked_where_it_is_another(open_run: Open) -> None:
    """Retrievers after the warm-up have one name, and D over G0 (AR2 Table 3) is not D over G."""
    run = open_run()
    recorded(run, [(G, "test", 0.5), (D, "test", 0.6)])
    lines = recorded(run, [(replace(D, over=G0), "test", 0.55), (replace(D, over=replace(G, weights=W2)), "test", 0.7)])
    assert [line.split("  ")[0] for line in lines] == ["G", "D over G", "D over G0 of 0", "D over G of 2"]
    assert [line.split()[-2:] for line in lines] == [["1", "0.500"], ["1", "0.600"], ["1", "0.550"], ["1", "0.700"]]


def test_the_best_of_each_column_is_seen(open_run: Open) -> None:
    """BM25 stands apart: where it is the best of all, the best of what was trained is seen as well."""
    run = open_run()
    rows = [(BM25, 0.5, 0.1), (ZERO_SHOT, 0.1, 0.1), (G0, 0.2, 0.3), (D0, 0.40001, 0.3), (G, 0.4, 0.2)]
    for system, first, second in rows:
        metrics = {"MRR@10": first, "R@1": second, "R@100": 1.0}
        add_row(run.folder.summary, Row.of(system, "dev", metrics, num_queries=40, split_queries=40))
    lines = summary_table(run.folder).splitlines()
    assert [line.split()[-3:] for line in lines if "." in line] == [
        ["*0.500", "0.100", "1.000"],
        ["0.100", "0.100", "1.000"],
        ["0.200", "*0.300", "1.000"],
        ["*0.400", "*0.300", "1.000"],
        ["*0.400", "0.200", "1.000"],
    ]
    assert lines[4] == lines[1], "a rule between what was not trained and what was"
    assert lines[-1].startswith("*: ")
    on_a_terminal = summary_table(run.folder, bold=True)
    assert "\x1b[1m0.500\x1b[0m" in on_a_terminal
    assert "*" not in on_a_terminal
    assert on_a_terminal.count("\x1b[1m") == summary_table(run.folder).count("*0")


def compared(run: Run, system: System, mean: float, headline: Headline) -> None:
    row = Row.of(system, "dev", {"MRR@10": mean, "R@1": 0.1}, num_queries=40, split_queries=40, rerank_depth=10)
    add_row(run.folder.summary, replace(row, headline=headline))


def test_a_second_table_says_how_surely_rows_differ(open_run: Open) -> None:
    """p by hand: .01 * 3, .2 * 2, .5 * 1."""
    run = open_run()
    compared(run, BM25, 0.2, Headline("MRR@10", 0.02))
    compared(run, G0, 0.3, Headline("MRR@10", 0.03, "zero-shot", None, 0.1, 0.02, 0.01))
    compared(run, G, 0.25, Headline("MRR@10", 0.03, "G0", 0, -0.05, 0.04, 0.2))
    compared(run, D, 0.26, Headline("MRR@10", None, "G", 1, 0.01, None, 0.5))
    first, second = summary_table(run.folder).split("\n\n")[-2:]
    assert "0.250" in first
    lines = second.splitlines()
    assert re.split(r" {2,}", lines[0])[3:] == ["system", "MRR@10", "compared with", "difference", "result"]
    assert max(map(len, lines)) <= 120
    cells = [re.split(r" {2,}", line.strip()) for line in lines[2:6]]
    assert cells == [
        ["dev", "40", "BM25", "0.200 ±0.020"],
        ["dev", "40", "0", "G0", "0.300 ±0.030", "zero-shot", "+0.100 ±0.020", "better, p 0.03"],
        ["dev", "40", "1", "G", "0.250 ±0.030", "G0", "-0.050 ±0.040", "within noise, p 0.4"],
        ["dev", "40", "1", "D over G", "0.260", "G", "+0.010", "within noise, p 0.5"],
    ]
    assert read_rows(run.folder.summary)[0].headline == Headline("MRR@10", 0.02)


def test_numbers_without_an_error_keep_sign_and_digits(open_run: Open) -> None:
    """Symptom: on a split with one query 0.500 and +0.500 were printed as 0.5, and 1.000 as 1."""
    run = open_run()
    compared(run, G0, 1.0, Headline("MRR@10", None, "zero-shot", None, 0.5, None, 1.0))
    compared(run, G, 0.5, Headline("MRR@10", None, "G0", 0, -0.5, None, 1.0))
    lines = summary_table(run.folder).split("\n\n")[-1].splitlines()[2:4]
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    assert [(one[4], one[6]) for one in cells] == [("1.000", "+0.500"), ("0.500", "-0.500")]


def test_rows_that_say_nothing_of_differences_have_no_second_table(open_run: Open) -> None:
    run = open_run()
    recorded(run, [(G, "test", 0.5)])
    assert "compared with" not in summary_table(run.folder)


def test_a_damaged_summary_is_refused(open_run: Open) -> None:
    run = open_run()
    write_json(run.folder.summary, [{"system": "G"}])
    with pytest.raises(ArtifactError, match="the summary of results"):
        read_rows(run.folder.summary)


def test_without_results_it_is_told(open_run: Open) -> None:
    """Symptom: `results (RUN/results/summary.json)` with nothing below, of data with a train split alone."""
    assert summary_table(open_run().folder).startswith("nothing was measured: neither dev nor test has queries")

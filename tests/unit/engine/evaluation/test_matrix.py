"""The matrix of re-rankers over lists: what is printed, what is written, and several seeds as one row."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.evaluation.matrix import Cells, matrix_tables, transposed
from engine.evaluation.pooled import Pooled
from engine.evaluation.significance import randomisation_test
from launcher.commands.matrix import pool_seeds

QIDS = [f"q{number}" for number in range(12)]
LOW, HIGH = dict.fromkeys(QIDS, 0.25), {qid: 0.5 + 0.25 * (place % 2) for place, qid in enumerate(QIDS)}


def cells_of(*columns: str, **rows: list[dict[str, float]]) -> Cells:
    return {column: {row: Pooled.of(runs) for row, runs in rows.items()} for column in columns}


def test_without_a_row_to_compare_with_each_columns_best_is_it() -> None:
    (printed,), _ = matrix_tables(
        "on dev", cells_of("BM25", "D1", R=[HIGH], S=[LOW]), metric="RR", compared=None, seed=0
    )
    lines = printed.text().splitlines()
    assert lines[0] == "on dev"
    assert lines[4].split() == ["R", "0.6250", "±0.0377", "0.6250", "±0.0377"]
    assert lines[5].split() == ["S", "0.2500", "±0.0000*", "0.2500", "±0.0000*"]
    assert "the best of its column (p < 0.05" in lines[-1]


def test_differences_to_a_row_are_paired_and_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    cells = {
        "BM25": {"R": Pooled.of([HIGH]), "S": Pooled.of([LOW])},
        "D1": {"R": Pooled.of([LOW]), "S": Pooled.of([LOW])},
    }
    printed, written = matrix_tables("on dev", cells, metric="RR", compared="S", seed=0)
    p = randomisation_test(list(HIGH.values()), list(LOW.values()), seed=0)
    assert printed[1].rows == (("R", f"+0.3750 ±0.0377, p {p:.2g}", "+0.0000 ±0.0000, p 1"),)
    written.write_csv(tmp_path / "matrix.csv")
    with (tmp_path / "matrix.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["re_ranker"], line["retriever"], line["compared_with"]) for line in lines] == [
        *[("R", "BM25", "S"), ("R", "D1", "S"), ("S", "BM25", "S"), ("S", "D1", "S")]
    ]
    assert [float(line["RR"]) for line in lines] == [0.625, 0.25, 0.25, 0.25]
    assert [line["difference"] for line in lines] == ["0.375", "0.0", "", ""]
    assert float(lines[0]["p_corrected"]) == p


def test_seeds_are_pooled_by_query_over_rows_and_columns() -> None:
    """A retriever of two seeds is one column, and a ranker of two one row: all four pairs are behind their cell."""
    values = {
        "BM25": {"a@1:R": LOW, "a@2:R": HIGH, "b:R": LOW},
        "a@1:G": {"a@1:R": LOW, "a@2:R": LOW, "b:R": LOW},
        "a@2:G": {"a@1:R": HIGH, "a@2:R": LOW, "b:R": HIGH},
    }
    names = {"BM25": "BM25", "a@1:R": "a:R", "a@2:R": "a:R", "b:R": "b:R", "a@1:G": "a:G", "a@2:G": "a:G"}
    cells = pool_seeds(values, names)
    assert {column: list(own) for column, own in cells.items()} == {"BM25": ["a:R", "b:R"], "a:G": ["a:R", "b:R"]}
    assert [len(cells[column][row].run_means) for column in cells for row in ("a:R", "b:R")] == [2, 1, 4, 2]
    assert cells["BM25"]["a:R"].values == {qid: (LOW[qid] + HIGH[qid]) / 2 for qid in QIDS}
    assert cells["a:G"]["a:R"].mean == pytest.approx((3 * 0.25 + 0.625) / 4)
    printed, _ = matrix_tables("on dev", cells, metric="RR", compared="b:R", seed=0)
    assert printed[0].notes[1:] == (
        "a:R: 4 runs, whose means deviate by 0.1875 to 0.2652",
        "b:R: 2 runs, whose means deviate by 0.2652 to 0.2652",
    )
    assert list(transposed(cells)) == ["a:R", "b:R"]


def test_rows_of_other_queries_are_not_compared() -> None:
    cells = {"BM25": {"R": Pooled.of([LOW]), "S": Pooled.of([{"other": 1.0}])}}
    with pytest.raises(ConfigError, match="R was measured on"):
        matrix_tables("on dev", cells, metric="RR", compared="R", seed=0)

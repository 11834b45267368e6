"""The matrix of re-rankers over lists: what is printed, what is written, and several seeds as one row."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.evaluation.contestants import Entrant
from engine.evaluation.matrix import Cell, Cells, matrix_tables, pairs_that_count, pool_seeds, transposed
from engine.evaluation.pooled import Seeded
from engine.evaluation.significance import bootstrap, randomisation_test
from launcher.commands.comparison import Comparison
from launcher.commands.matrix import measure_matrix

QIDS = [f"q{number}" for number in range(12)]
LOW, HIGH = dict.fromkeys(QIDS, 0.25), {qid: 0.5 + 0.25 * (place % 2) for place, qid in enumerate(QIDS)}


MIDDLE = dict.fromkeys(QIDS, 0.5)


def cell_of(values: dict[str, float]) -> Cell:
    return Cell.of_pairs({("row", "column"): values})


def cells_of(*columns: str, **rows: dict[str, float]) -> Cells:
    return {column: {row: cell_of(values) for row, values in rows.items()} for column in columns}


def test_without_a_row_to_compare_with_each_columns_best_is_it() -> None:
    (printed,), _ = matrix_tables("on dev", cells_of("BM25", "D1", R=HIGH, S=LOW), metric="RR", compared=None, seed=0)
    lines = printed.text().splitlines()
    assert lines[0] == "on dev"
    assert lines[4].split() == ["R", "0.6250", "±0.0377", "0.6250", "±0.0377"]
    assert lines[5].split() == ["S", "0.2500", "±0.0000*", "0.2500", "±0.0000*"]
    assert "the best of its column (p < 0.05" in lines[-1]


def test_differences_to_a_row_are_paired_and_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    cells = {
        "BM25": {"R": cell_of(HIGH), "S": cell_of(LOW)},
        "D1": {"R": cell_of(LOW), "S": cell_of(LOW)},
    }
    printed, written = matrix_tables("on dev", cells, metric="RR", compared="S", seed=0)
    p = randomisation_test(list(HIGH.values()), list(LOW.values()), seed=0)
    low, high = bootstrap(list(HIGH.values()), list(LOW.values()), seed=0)
    apart, level = f"+0.3750 ±0.0377 [{low:+.4f}, {high:+.4f}], p {p:.2g}", "+0.0000 ±0.0000 [+0.0000, +0.0000], p 1"
    assert printed[1].rows == (("R", apart, level),)
    written.write_csv(tmp_path / "matrix.csv")
    with (tmp_path / "matrix.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["re_ranker"], line["retriever"], line["compared_with"]) for line in lines] == [
        *[("R", "BM25", "S"), ("R", "D1", "S"), ("S", "BM25", "S"), ("S", "D1", "S")]
    ]
    assert [float(line["RR"]) for line in lines] == [0.625, 0.25, 0.25, 0.25]
    assert [line["difference"] for line in lines] == ["0.375", "0.0", "", ""]
    assert float(lines[0]["p_corrected"]) == p


def seeded(*labels: str) -> dict[str, Seeded]:
    """`a@1:R` is `a:R` with seed 1, `BM25` of no run."""
    found = {}
    for label in labels:
        run, colon, system = label.partition(":")
        setting, _, seed = run.partition("@")
        found[label] = Seeded(f"{setting}:{system}", int(seed)) if colon else Seeded(label, None)
    return found


def test_a_system_has_setting_and_seed_of_its_run() -> None:
    def entrant(name: str, seed: int, setting: str) -> Entrant:
        run: Any = SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(seed=seed)))
        return Entrant(name, run, data=run, setting=setting)

    def settings_of(labels: Sequence[str], *entrants: Entrant) -> dict[str, tuple[str, int | None]]:
        comparison: Any = SimpleNamespace(entrants=entrants)
        return {label: (one.setting, one.seed) for label, one in Comparison.settings_of(comparison, labels).items()}

    several = entrant("a@1", 1, "a"), entrant("a@2", 2, "a"), entrant("b", 2, "b")
    assert settings_of(["a@2:R", "b:R", "BM25", "given"], *several) == {
        **{"a@2:R": ("a:R", 2), "b:R": ("b:R", 2), "BM25": ("BM25", None), "given": ("given", None)}
    }
    assert settings_of(["a@1:R", "a@2:R"], *several[:2]) == {"a@1:R": ("a:R", 1), "a@2:R": ("a:R", 2)}
    assert settings_of(["R"], entrant("", 1, "")) == {"R": ("R", None)}
    with pytest.raises(ConfigError, match="--run-file has the name 'a:R', by which the seeds of a setting"):
        settings_of(["a@1:R", "a@2:R", "a:R"], *several)
    with pytest.raises(ConfigError, match="--run-file has the name 'R'"):
        settings_of(["a@1:R", "a@2:R", "R"], entrant("a@1", 1, ""), entrant("a@2", 2, ""))


def pooled(columns: Sequence[str], rows: Sequence[str], measured: Mapping[tuple[str, str], dict[str, float]]) -> Cells:
    """The cells of what counts; what is not said in `measured` is LOW, row over column."""
    of = seeded(*columns, *rows)
    pairs = pairs_that_count(columns, rows, of)
    return pool_seeds(
        {
            column: {row: measured.get((row, column), LOW) for row in rows if (column, row) in pairs}
            for column in columns
        },
        of,
    )


def test_a_seeds_ranker_is_over_the_list_of_its_own_seeds_retriever() -> None:
    """Symptom: a cell of two seeds was a mean over four pairs, two of them of a ranker and the other seed's retriever,
    and the note called these four runs; a row of one run, over two lists, had two runs."""
    columns, rows = ["BM25", "a@1:G", "a@2:G"], ["BM25", "a@1:R", "a@2:R", "b@1:R"]
    over = {("a@2:R", "BM25"): HIGH, ("b@1:R", "a@2:G"): HIGH, ("a@1:R", "a@2:G"): HIGH, ("a@2:R", "a@2:G"): MIDDLE}
    cells = pooled(columns, rows, over)
    names = ["BM25", "a:R", "b:R"]
    assert {column: list(own) for column, own in cells.items()} == {"BM25": names, "a:G": names}
    assert [[len(own[row].run_means) for row in names] for own in cells.values()] == [[1, 2, 1], [2, 2, 2]]
    assert cells["BM25"]["a:R"].values == {qid: (LOW[qid] + HIGH[qid]) / 2 for qid in QIDS}
    assert cells["a:G"]["a:R"].run_means == (0.25, 0.5), "not that of the first ranker over the second's list"
    assert cells["a:G"]["b:R"].run_means == pytest.approx((0.25, 0.625)), "it has no second seed: both lists count"
    printed, written = matrix_tables("on dev", cells, metric="RR", compared="b:R", seed=0)
    assert printed[0].notes[1:] == (
        "BM25: means over the lists of 2 runs deviate by 0.0000 to 0.0000",
        "a:R: 2 runs, whose means deviate by 0.1768 to 0.2652",
        "b:R: means over the lists of 2 runs deviate by 0.2652 to 0.2652",
    )
    counts = [written.headers.index(name) for name in ("num_runs", "num_pairs")]
    assert [tuple(row[place] for place in counts) for row in written.rows] == [
        *[(1, 1), (2, 2)],
        *[(2, 2), (2, 2)],
        *[(1, 1), (2, 2)],
    ]
    assert list(transposed(cells)) == names


def test_a_retrievers_own_cell_is_the_retriever() -> None:
    """Symptom: with two seeds, half of it was the lists of each seed in the order of the other seed's retriever."""
    labels = ["a@1:G", "a@2:G"]
    cells = pooled(labels, labels, {("a@1:G", "a@2:G"): HIGH, ("a@2:G", "a@1:G"): HIGH, ("a@2:G", "a@2:G"): MIDDLE})
    assert cells["a:G"]["a:G"].run_means == (0.25, 0.5)
    assert cells["a:G"]["a:G"].mean == pytest.approx(0.375)


def test_where_seeds_do_not_match_every_run_is_over_every_list_and_the_table_says_so() -> None:
    """Each ranker's mean over the lists is one run: two rankers over two lists tell of two seeds, not of four."""
    columns, rows = ["a@1:G", "a@2:G", "b@3:G"], ["a@1:R", "a@2:R", "b@2:R", "b@3:R"]
    over = {("b@2:R", "a@1:G"): HIGH, ("b@3:R", "a@2:G"): MIDDLE, ("b@3:R", "b@3:G"): HIGH}
    cells = pooled(columns, rows, over)
    assert cells["a:G"]["b:R"].run_means == pytest.approx(((0.625 + 0.25) / 2, (0.25 + 0.5) / 2))
    assert cells["a:G"]["b:R"].mean == pytest.approx((0.625 + 0.25 + 0.25 + 0.5) / 4)
    assert cells["b:G"]["b:R"].run_means == pytest.approx((0.25, 0.625)), "one list, of whichever seed: two runs"
    printed, written = matrix_tables("on dev", cells, metric="RR", compared=None, seed=0)
    assert printed[0].notes[1:] == (
        "a:R: 2 runs, whose means deviate by 0.0000 to 0.0000",
        "b:R: 2 runs, whose means deviate by 0.0442 to 0.2652",
        "b:R over a:G: not of the same seeds, so each run is over every list; a run's mean is that over all lists",
    )
    counts = [written.headers.index(name) for name in ("re_ranker", "retriever", "num_runs", "num_pairs")]
    assert ("b:R", "a:G", 2, 4) in [tuple(row[place] for place in counts) for row in written.rows]


def test_what_does_not_count_is_not_measured() -> None:
    """A list that one of them found is its own, and no ranker is asked for the other seed's."""
    asked: list[tuple[str, list[str]]] = []

    class Contest:
        def list_of(self, finder: Any) -> str:
            return f"{finder.label}'s list"

        def reorder(self, row: Any, finders: Sequence[Any]) -> list[str]:
            asked.append((row.label, [one.label for one in finders]))
            return [f"{row.label} over {one.label}" for one in finders]

        def values(self, _: Any, path: str) -> dict[str, float]:
            return {path: 1.0}

    def contestant(label: str) -> Any:
        return SimpleNamespace(label=label, identity=label, orders_lists=True)

    retrievers = [contestant(label) for label in ("BM25", "a@1:G", "a@2:G")]
    rows = [*retrievers, *map(contestant, ("a@1:R", "a@2:R"))]
    labels = [one.label for one in rows]
    pairs = pairs_that_count(labels[:3], labels, seeded(*labels))
    comparison: Any = SimpleNamespace(contests={"dev": Contest()})
    values = measure_matrix(comparison, "dev", retrievers, rows, pairs)
    assert asked == [
        ("BM25", ["a@1:G", "a@2:G"]),
        *[("a@1:G", ["BM25"]), ("a@2:G", ["BM25"])],
        *[("a@1:R", ["BM25", "a@1:G"]), ("a@2:R", ["BM25", "a@2:G"])],
    ]
    assert {(column, row) for column, own in values.items() for row in own} == pairs
    assert values["a@2:G"] == {
        "BM25": {"BM25 over a@2:G": 1.0},
        "a@2:G": {"a@2:G's list": 1.0},
        "a@2:R": {"a@2:R over a@2:G": 1.0},
    }


def test_rows_of_other_queries_are_not_compared() -> None:
    cells = {"BM25": {"R": cell_of(LOW), "S": cell_of({"other": 1.0})}}
    with pytest.raises(ConfigError, match="R was measured on"):
        matrix_tables("on dev", cells, metric="RR", compared="R", seed=0)

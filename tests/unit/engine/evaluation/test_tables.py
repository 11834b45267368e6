"""Comparisons of systems on the same queries, as they are printed and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.evaluation.significance import holm, randomisation_test, standard_error
from engine.evaluation.tables import LEVEL, Table, compare


def values(seed: int, shift: float = 0.0, num_queries: int = 60) -> dict[str, float]:
    own = np.random.default_rng(seed).random(num_queries) + shift
    return {f"q{number}": value for number, value in enumerate(own.tolist())}


def test_systems_are_compared_with_the_best() -> None:
    systems = {"worse": values(1), "best": values(2, 0.4), "close": values(3, 0.35)}
    found = compare(systems, None, seed=7)
    by_query = {name: np.array(list(own.values())) for name, own in systems.items()}
    assert list(found) == ["worse", "best", "close"]
    assert found["best"].p is None
    expected = holm({name: randomisation_test(by_query[name], by_query["best"], seed=7) for name in ("worse", "close")})
    for name, own in by_query.items():
        assert found[name].mean == pytest.approx(own.mean(), abs=1e-12)
        assert found[name].standard_error == standard_error(own)
        assert found[name].num_queries == 60
    assert {name: found[name].p for name in expected} == expected
    assert [name for name, one in found.items() if one.p is not None and one.p < LEVEL] == ["worse"]


def test_systems_are_compared_with_whom_one_names_and_by_the_queries_ids() -> None:
    first, second = values(1), values(2)
    found = compare({"a": first, "b": dict(reversed(second.items()))}, "a", seed=0)
    assert found["a"].p is None
    assert found["b"].p == compare({"a": first, "b": second}, "a", seed=0)["b"].p


def test_systems_on_other_queries_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different queries"):
        compare({"a": {"q1": 1.0}, "b": {"q2": 1.0}}, None, seed=0)


def test_numbers_in_a_csv_keep_their_digits(tmp_path: Path) -> None:
    Table("a title", ("x", "y"), ((1 / 3, None),)).write_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == f"x,y\n{1 / 3!r},\n"


def test_texts_that_look_like_numbers_are_printed_as_they_are() -> None:
    """Symptom: a count of 4 in a column with other texts was printed as 4.0000."""
    lines = Table("t", ("what", "a", "b"), (("n", "4", 4.0), ("seconds", "0.50", 0.5))).text().splitlines()
    assert lines[4].split() == ["n", "4", "4.0000"]
    assert lines[5].split() == ["seconds", "0.50", "0.5000"]


def test_what_is_not_known_is_no_number() -> None:
    """Symptom: the tables of `analyse` on a single query had `nan` for each standard error, and their CSVs nothing."""
    table = Table("t", ("what", "mean", "error", "p"), (("n", 0.5, float("nan"), None), ("m", 0.25, float("nan"), 1.0)))
    assert [line.split() for line in table.text().splitlines()[4:]] == [["n", "0.5000"], ["m", "0.2500", "1.0000"]]

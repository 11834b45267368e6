"""The function that users copy: normalised scores and their mixture against numpy, and what it does at the edges."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.evaluation import fuse as module
from engine.evaluation.fuse import fuse, interleave, mix, normalise


def test_mixtures_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    for num_documents in (2, 3, 10, 57):
        scores = {name: generator.normal(place, 10.0**place, num_documents) for place, name in enumerate("GDB")}
        weights = {"G": 0.5, "D": 0.3, "B": 0.2}
        expected = sum(
            weight * (scores[name] - scores[name].mean()) / scores[name].std() for name, weight in weights.items()
        )
        plain = {name: own.tolist() for name, own in scores.items()}
        np.testing.assert_allclose(mix(plain, weights), expected, rtol=1e-12, atol=1e-12)
        assert fuse(plain, weights) == np.argsort(-np.asarray(expected), kind="stable").tolist()


@pytest.mark.parametrize(
    ("lists", "most", "expected"),
    [
        ([["a", "b", "c"], ["b", "d", "e"]], None, ["a", "b", "d", "c", "e"]),
        ([["a", "b", "c"], ["b", "d", "e"]], 2, ["a", "b"]),
        ([["a", "b"], ["c", "d"], ["e", "f"]], 4, ["a", "c", "e", "b"]),
        ([["a"], [], ["b", "c", "d"]], None, ["a", "b", "c", "d"]),
        ([["a", "b", "c"]], 0, []),
        ([[], []], 3, []),
        ([], 3, []),
    ],
)
def test_lists_take_turns(lists: list[list[str]], most: int | None, expected: list[str]) -> None:
    assert interleave(lists, most) == expected


def test_the_first_of_lists_that_took_turns_do_not_depend_on_how_deep_they_are() -> None:
    """Symptom guarded against: what is served, to another depth, would not be what was measured."""
    generator = np.random.default_rng(0)
    lists = [generator.permutation(40).tolist() for _ in range(3)]
    whole = interleave(lists)
    assert sorted(whole) == list(range(40))
    for most in (1, 7, 10, 40):
        assert interleave([own[:most] for own in lists], most) == whole[:most]


@pytest.mark.parametrize("scores", [[], [3.7], [0.1] * 3, [0.1] * 7, [-2.0, -2.0], [1e308] * 2])
def test_scores_that_are_all_the_same_say_nothing(scores: list[float]) -> None:
    """Symptom guarded against: the mean of seven times .1 is not .1, and the rest divided by itself is 1."""
    assert normalise(scores) == [0.0] * len(scores)


@pytest.mark.parametrize("apart", [1e-300, 1e-200, 1e-8, 1e200])
def test_differences_of_any_size_are_told_apart(apart: float) -> None:
    assert normalise([0.0, apart]) == pytest.approx([-1.0, 1.0])


def test_shift_and_scale_of_a_system_change_nothing() -> None:
    weights = {"G": 0.6, "D": 0.4}
    scores = {"G": [1.0, 2.0, 4.0], "D": [0.0, -3.0, 5.0]}
    moved = {"G": [70.0 + one for one in scores["G"]], "D": [0.01 * one for one in scores["D"]]}
    assert mix(moved, weights) == pytest.approx(mix(scores, weights), rel=1e-9)


def test_equal_mixtures_keep_their_order() -> None:
    assert fuse({"G": [1.0, 1.0, 2.0, 1.0], "D": [5.0] * 4}, {"G": 0.5, "D": 0.5}) == [2, 0, 1, 3]
    assert fuse({"G": [1.0, 0.0], "D": [0.0, 1.0]}, {"G": 0.5, "D": 0.5}) == [0, 1], "one against the other"


def test_a_system_without_weight_may_be_left_out() -> None:
    assert fuse({"D": [0.0, 1.0]}, {"G": 0.0, "D": 1.0}) == [1, 0]


@pytest.mark.parametrize(
    ("scores", "weights", "told"),
    [
        ({"G": [1.0]}, {"G": 0.5, "D": 0.5}, "no scores of D"),
        ({"G": [1.0], "D": [1.0, 2.0]}, {"G": 0.5, "D": 0.5}, "numbers of scores differ"),
        ({"G": [1.0], "D": [1.0]}, {"G": 0.5, "D": 0.4}, "sum to 1"),
        ({"G": [1.0]}, {"G": float("nan")}, "sum to 1"),
        ({"G": [1.0], "D": [1.0]}, {"G": 1.5, "D": -0.5}, "0 or more"),
        ({"G": [1.0, math.nan]}, {"G": 1.0}, "not finite"),
        ({"G": [1.0, -math.inf]}, {"G": 1.0}, "not finite"),
    ],
)
def test_what_cannot_be_mixed_is_refused(scores: dict[str, list[float]], weights: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        mix(scores, weights)


def test_a_copy_works_without_anything_else(tmp_path: Path) -> None:
    """Isolated from this project and from all that is installed."""
    generator = np.random.default_rng(1)
    scores = {name: generator.normal(size=20).tolist() for name in "GDB"}
    parts = [{"system": name, "weight": weight} for name, weight in zip("GDB", (0.2, 0.7, 0.1), strict=True)]
    (tmp_path / "fusion.json").write_text(json.dumps({"parts": parts}))
    (tmp_path / "fuse.py").write_bytes(Path(module.__file__).read_bytes())
    script = (
        f"import sys, json; sys.path.insert(0, {str(tmp_path)!r}); import fuse\n"
        f"print(fuse.fuse(json.load(sys.stdin), fuse.read_weights({str(tmp_path / 'fusion.json')!r})))"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    ended = subprocess.run(command, input=json.dumps(scores), capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == fuse(scores, {part["system"]: part["weight"] for part in parts})

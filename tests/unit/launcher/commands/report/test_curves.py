"""The measurements of a run, thinned: means and ends of any length stay, and what is held does not grow."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from launcher.commands.report.curves import MOST_POINTS, Curve, read_curves


@pytest.mark.parametrize("length", [1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 3, 100_000])
def test_a_curve_of_any_length_keeps_its_mean_and_its_ends(length: int) -> None:
    random.seed(length)
    ys = [random.gauss(0.0, 1.0) for _ in range(length)]
    curve = Curve()
    for x, y in enumerate(ys):
        curve.add(float(x), y)
    assert MOST_POINTS / 2 <= len(curve.bins) <= MOST_POINTS or length < MOST_POINTS
    assert sum(one.count for one in curve.bins) == curve.num_points == length
    assert sum(one.y_sum for one in curve.bins) == pytest.approx(math.fsum(ys))
    assert min(one.low for one in curve.bins) == min(ys)
    assert max(one.high for one in curve.bins) == max(ys)
    assert [one.x for one in curve.bins] == sorted(one.x for one in curve.bins)
    start = 0
    for one in curve.bins:
        own = ys[start : start + one.count]
        assert one.y == pytest.approx(math.fsum(own) / len(own))
        assert (one.low, one.high) == (min(own), max(own))
        start += one.count


def test_measurements_are_read_by_phase(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"time": 5.0, "stage": "warmup", "step": 2, "warmup/loss": 1.0, "warmup/lr": 0.1},
        {"time": 7.0, "stage": "encode/000", "step": 0, "encode/slowest_rank": 0.25},
        {"time": 8.0, "stage": "encode/001", "step": 0, "encode/slowest_rank": 0.75},
        {"time": 9.0, "stage": "evaluate/0", "step": 0, "dev/loss": 0.5},
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    curves = read_curves(path)
    assert curves.phases == ["warmup"], "a held-out loss is no phase of training"
    assert curves.measures == ["loss", "lr"]
    assert curves.by_stage == {"encode/slowest_rank": {"encode/000": 0.25, "encode/001": 0.75}}
    assert (curves.num_lines, curves.seconds) == (4, 4.0)
    assert read_curves(tmp_path / "none").by_tag == {}

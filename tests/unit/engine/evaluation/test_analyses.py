"""The second paper's analyses on small cases whose numbers are known, and their figures."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    IMAGES,
    EventAccumulator,
)

from engine.errors import ConfigError
from engine.evaluation import analyses, figures
from engine.evaluation.analyses import Judged
from engine.evaluation.distributions import Divergences, Form
from engine.evaluation.figures import Point, require_matplotlib, write_figure

FORM = Form()


def judged(
    name: str, mrr: list[float], nats: list[float], own: list[float] | None = None, num_without: int = 0
) -> Judged:
    def by_query(values: list[float]) -> dict[str, float]:
        return {f"q{number}": value for number, value in enumerate(values)}

    of_ranker = None if own is None else Divergences(by_query(own), 0)
    return Judged(name, f"{name}'s", by_query(mrr), Divergences(by_query(nats), num_without), of_ranker)


RANKERS = [
    judged("joint", [1.0, 0.5, 1.0], [0.25, 0.5, 0.75], [0.25, 0.25, 0.25]),
    judged("dense", [0.5, 0.5, 0.0], [1.0, 2.0, 3.0], [2.0, 2.0, 3.5]),
    judged("bm25", [0.5, 0.25, 0.25], [0.0, 0.0], [1.0, 1.5, 9.0], num_without=1),
]


def row_of(table: Any, name: str) -> dict[str, Any]:
    (row,) = (row for row in table.rows if row[0] == name)
    return dict(zip(table.headers, row, strict=True))


def test_divergence_against_the_metric() -> None:
    table = analyses.divergence_table("t", RANKERS, "MRR@10", FORM, seed=0)
    joint, bm25 = row_of(table, "joint"), row_of(table, "bm25")
    assert (joint["negatives"], joint["KL"], joint["KL_queries"]) == ("joint's", 0.5, 3)
    assert joint["KL_standard_error"] == pytest.approx(0.25 / math.sqrt(3))
    assert (joint["MRR@10"], joint["num_queries"], joint["p_corrected"]) == (pytest.approx(2.5 / 3), 3, None)
    assert (bm25["KL"], bm25["KL_queries"], bm25["num_queries"]) == (0.0, 2, 3), "one query cannot be compared"
    assert bm25["p_corrected"] is not None
    assert "0.01 of the uniform distribution" in table.notes[0]
    # MRR orders them joint, dense = bm25; KL bm25, joint, dense.
    expected = np.corrcoef([1, 2, 0], [2, 0.5, 0.5])[0, 1]
    assert f"{expected:.2f} over 3 rankers" in table.notes[1]


def test_the_shift_is_taken_query_by_query() -> None:
    table = analyses.shift_table("t", RANKERS, "MRR@10", FORM, seed=0)
    joint, dense, bm25 = (row_of(table, name) for name in ("joint", "dense", "bm25"))
    assert (joint["KL_negatives"], joint["KL_ranker"], joint["Delta"]) == (0.5, 0.25, 0.25)
    assert dense["Delta"] == pytest.approx(2.0 - 2.5)
    assert dense["Delta_standard_error"] == pytest.approx(np.std([-1.0, 0.0, -0.5], ddof=1) / math.sqrt(3))
    assert (bm25["KL_queries"], bm25["Delta"]) == (2, -1.25), "over the queries that both sides have"


def test_too_few_rankers_have_no_correlation() -> None:
    table = analyses.divergence_table("t", RANKERS[:2], "MRR@10", FORM, seed=0)
    assert "none is told for 2 rankers" in table.notes[1]


def test_negatives_on_training_and_dev_queries() -> None:
    """R2ANKER Table 6: dev less train."""
    train = {"bm25": {"t1": 0.5, "t2": 0.25}, "joint": {"t1": 1.0, "t2": 0.5}}
    dev = {"bm25": {"q1": 0.25, "q2": 0.0, "q3": 0.5}, "joint": {"q1": 0.5, "q2": 0.25, "q3": 0.5}}
    found_by = {"bm25": "BM25", "joint": "BM25,D2"}
    table = analyses.negatives_table("t", train, dev, found_by, "MRR@10", "bm25", seed=0)
    joint, bm25 = row_of(table, "joint"), row_of(table, "bm25")
    assert (joint["negatives"], joint["train_MRR@10"], joint["dev_MRR@10"]) == (
        "BM25,D2",
        0.75,
        pytest.approx(1.25 / 3),
    )
    assert joint["dev_less_train"] == pytest.approx(1.25 / 3 - 0.75)
    assert (bm25["train_p_corrected"], bm25["dev_p_corrected"]) == (None, None)
    assert (joint["train_num_queries"], joint["dev_num_queries"]) == (2, 3)
    assert (joint["train_p_corrected"], joint["dev_p_corrected"]) == (0.5, 0.5), "2 of 4 assignments; 2 of 4"
    assert "p against bm25" in table.notes[0]


def test_progress_is_tested_against_the_last_iteration() -> None:
    train = {2: {"t": 1.0}, 0: {"t": 0.5}}
    dev = {0: {"q1": 0.5, "q2": 0.5}, 2: {"q1": 0.25, "q2": 0.5}}
    table = analyses.progress_table("t", train, dev, "MRR@10", seed=0)
    assert [row[0] for row in table.rows] == [0, 2]
    first, last = row_of(table, 0), row_of(table, 2)  # type: ignore[arg-type]
    assert (last["dev_p_corrected"], first["dev_p_corrected"]) == (None, 1.0)
    assert (first["dev_less_train"], last["dev_less_train"]) == (0.0, 0.375 - 1.0)


# --- figures ---------------------------------------------------------------------------------------------------------


def drawn() -> dict[str, Any]:
    point = Point("a", 0.0, 0.5, 0.1)
    divergence = analyses.divergence_table("t", RANKERS, "MRR@10", FORM, seed=0)
    one = {"a": {"q": 0.5}}
    negatives = analyses.negatives_table("t", one, one, {"a": "BM25"}, "MRR@10", None, seed=0)
    progress = analyses.progress_table("t", {0: {"q": 0.5}}, {0: {"q": 0.5}}, "MRR@10", seed=0)
    return {
        "heatmap": figures.heatmap("t", {"R": {"BM25": 0.4, "D": 0.5}, "S": {"BM25": 0.1, "D": 0.2}}, "MRR@10"),
        "scatter": analyses.shown_by(divergence, "KL", "MRR@10", "KL"),
        "bars": analyses.negatives_figure(negatives, "MRR@10"),
        "lines": analyses.progress_figure(progress, "MRR@10"),
        "alone": figures.lines("t", {"train": [point]}, "x", "y"),
    }


@pytest.mark.parametrize("name", ["heatmap", "scatter", "bars", "lines", "alone"])
def test_a_figure_is_a_picture_on_disk_and_the_only_one_of_its_tag_in_tensorboard(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        write_figure(drawn()[name], tmp_path / "out" / "f.png", tmp_path / "board", "f")
    with Image.open(tmp_path / "out" / "f.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 500
    assert 0.01 < (pixels != 255).any(axis=2).mean() < 0.99, "something is drawn on white"
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={IMAGES: 0}).Reload()
    (image,) = events.Images("f")
    assert (image.height, image.width) == pixels.shape[:2]


def test_the_values_of_a_matrix_stand_in_its_cells() -> None:
    texts = {text.get_text() for text in drawn()["heatmap"].axes[0].texts}
    assert texts == {"40.00", "50.00", "10.00", "20.00"}


def test_without_matplotlib_the_remedy_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib.*\[figures\].*--no-figure"):
        require_matplotlib()

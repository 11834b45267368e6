"""Measurements are combined as each was born to be, and both sinks get the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.metrics import Metric, MetricsWriter, MetricWindow

CPU = torch.device("cpu")


def test_a_window_combines_steps_by_each_metrics_own_reduction() -> None:
    window = MetricWindow()
    window.add({"loss": Metric(1.0), "tokens": Metric(10.0, "sum"), "lr": Metric(3.0, "max")})
    window.add({"loss": Metric(torch.tensor(4.0)), "tokens": Metric(5, "sum"), "lr": Metric(2.0, "max")})
    assert window.reduce(CPU) == {"loss": 2.5, "tokens": 15.0, "lr": 3.0}


def test_a_window_starts_anew_after_each_point() -> None:
    window = MetricWindow()
    window.add({"loss": Metric(1.0), "only_once": Metric(1.0)})
    window.reduce(CPU)
    window.add({"loss": Metric(7.0)})
    assert window.reduce(CPU) == {"loss": 7.0}


def test_a_metric_that_some_steps_lack_is_the_mean_of_those_that_have_it() -> None:
    window = MetricWindow()
    window.add({"grad_norm": Metric(2.0), "loss": Metric(0.0)})
    window.add({"loss": Metric(1.0)})
    assert window.reduce(CPU) == {"grad_norm": 2.0, "loss": 0.5}


def test_both_sinks_get_the_same_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, active=True)
    writer.write("retriever/1", 4, {"retriever/loss": 0.25, "retriever/lr": 1e-5})
    writer.write("retriever/1", 6, {"retriever/loss": 0.125})
    writer.write("retriever/1", 8, {})
    writer.write_text("examples/0", 1, "| a | table |")
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("time") > 1e9 for line in lines] == [True, True], "no line without a value"
    assert lines[0] == {"stage": "retriever/1", "step": 4, "retriever/loss": 0.25, "retriever/lr": 1e-5}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("retriever/loss")] == [(4, 0.25), (6, 0.125)]
    assert board.Scalars("retriever/lr")[0].value == pytest.approx(1e-5)
    (text,) = board.Tensors("examples/0/text_summary")
    assert text.tensor_proto.string_val == [b"| a | table |"]


def test_only_the_active_rank_writes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, active=False)
    writer.write("stage", 1, {"loss": 1.0})
    writer.write_text("examples/0", 1, "text")
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []

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


def test_a_window_goes_on_from_a_checkpoint_bit_by_bit() -> None:
    """Symptom: the first point after a resume was the mean of the steps since the checkpoint alone."""
    undisturbed, cut = MetricWindow(), MetricWindow()
    steps = [
        {"loss": Metric(0.1 * step), "tokens": Metric(step, "sum"), "lr": Metric(step, "max")} for step in (1, 3, 7)
    ]
    for metrics in steps:
        undisturbed.add(metrics)
    cut.add(steps[0])
    cut.settle(CPU)
    cut.add(steps[1])
    cut.settle(CPU)
    resumed = MetricWindow()
    resumed.restore(json.loads(json.dumps(cut.state())))
    resumed.add(steps[2])
    assert resumed.reduce(CPU) == undisturbed.reduce(CPU)
    assert resumed.state() == {}


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


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def points(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], value) for line in lines for key, value in line.items() if "loss" in key]


def test_a_run_that_goes_on_has_each_point_once(tmp_path: Path) -> None:
    """Symptom: points between the last checkpoint and a kill stood twice in metrics.jsonl and in TensorBoard."""
    killed = MetricsWriter(tmp_path, active=True)
    killed.write("warmup", 2, {"loss": 9.0})
    for step in (2, 4, 6):
        killed.write("retriever/1", step, {"loss": float(step)})
    killed.write("evaluate/0", 1, {"dev/loss": 7.0})
    killed.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "stage": "retr')  # cut by the kill
    going_on = MetricsWriter(tmp_path, active=True)  # from a checkpoint at step 3
    for step in (4, 6, 8):
        going_on.write("retriever/1", step, {"loss": step + 0.5})
    going_on.close()
    expected = [("warmup", 2, 9.0), ("retriever/1", 2, 2.0), ("evaluate/0", 1, 7.0)]
    expected += [("retriever/1", step, step + 0.5) for step in (4, 6, 8)]
    assert points(tmp_path) == expected
    assert shown(tmp_path, "loss") == [(2, 9.0), (2, 2.0), (4, 4.5), (6, 6.5), (8, 8.5)]
    assert shown(tmp_path, "dev/loss") == [(1, 7.0)]


def test_the_last_point_of_a_stage_survives_the_record_of_its_time(tmp_path: Path) -> None:
    """A stage that was killed after its last checkpoint writes no loss again, only how long it took."""
    killed = MetricsWriter(tmp_path, active=True)
    killed.write("retriever/1", 6, {"loss": 6.0})
    killed.close()
    going_on = MetricsWriter(tmp_path, active=True)
    going_on.write("retriever/1", 5, {"seconds/retriever": 1.0})
    going_on.close()
    assert points(tmp_path) == [("retriever/1", 6, 6.0)]


def test_what_a_killed_process_had_not_flushed_is_shown_by_the_next(tmp_path: Path) -> None:
    """Symptom: TensorBoard lacked the points of the last two minutes before a kill."""
    killed = MetricsWriter(tmp_path, active=True)
    killed.write("retriever/1", 2, {"loss": 2.0})
    killed.write_text("examples/0", 1, "before")
    for events in (tmp_path / "tensorboard").iterdir():
        events.unlink()  # as if nothing had reached the disk
    going_on = MetricsWriter(tmp_path, active=True)
    going_on.write_text("examples/0", 1, "after")
    going_on.write("retriever/1", 4, {"loss": 4.0})
    going_on.close()
    assert shown(tmp_path, "loss") == [(2, 2.0), (4, 4.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.tensor_proto.string_val for event in board.Tensors("examples/0/text_summary")] == [[b"after"]]

"""Measurements are combined as each was born to be, and both sinks get the same numbers."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from engine.errors import ConfigError
from engine.metrics import Metric, MetricsWriter, MetricWindow
from engine.metrics.board import BoardPlan
from engine.metrics.trackers import require_trackers

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


PLAN = BoardPlan(
    metrics=("R@1", "R@5", "MRR@10", "A@5"), games=("retriever", "ranker"), warmups=("warmup_ranker",), settings="a: 1"
)


def test_the_board_opens_on_the_curve_of_the_game(tmp_path: Path) -> None:
    """A reader met a hundred charts in alphabetical order, most of them with one dot."""
    writer = MetricsWriter(tmp_path, active=True, plan=PLAN)
    writer.write("evaluate/1", 1, {"dev/retriever/MRR@10": 0.5})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for group in layout.category for chart in group.chart}
    first = layout.category[0]
    assert "Figure 3" in first.title
    assert [chart.title for chart in first.chart] == ["R@1", "MRR@10"]
    last = [[chart.title for chart in group.chart] for group in layout.category[-2:]]
    assert last == [["R@5"], ["A@5"]], "charts that stay empty without answers are by themselves"
    tags = ["dev/retriever/MRR@10", "dev/ranker/MRR@10", "dev/ranker/R@1", "retriever/loss", "warmup_ranker/loss"]
    tags += ["retriever/reward", "index/recall", "seconds/retriever", "other/loss"]

    def shown_by(title: str) -> list[str]:
        return [tag for tag in tags if any(re.match(pattern, tag) for pattern in charts[title])]

    assert shown_by("MRR@10") == tags[:2]
    assert shown_by("both players") == ["retriever/loss"]
    assert shown_by("warm-ups") == ["warmup_ranker/loss"]
    assert shown_by("reward of the retriever") == ["retriever/reward"]
    assert shown_by("seconds of each stage") == ["seconds/retriever"]


def texts_of(folder: Path) -> dict[str, list[str]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag.split("/text_summary")[0]: [event.tensor_proto.string_val[0].decode() for event in board.Tensors(tag)]
        for tag in board.Tags()["tensors"]
        if "text_summary" in tag
    }


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_measured_once_is_a_table_and_no_chart(resumed: bool, tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, active=True, plan=PLAN)
    writer.write("generate", 1, {"seconds/generate": 3.0})
    writer.write("evaluate/test", 0, {"test/BM25/R@1": 0.25, "test/BM25/MRR@10": 0.5})
    writer.write("evaluate/test", 2, {"test/ranker/R@1": 0.75})
    writer.write("evaluate/test", 2, {"seconds/evaluate": 9.0})
    writer.close()
    if resumed:
        writer = MetricsWriter(tmp_path, active=True, plan=PLAN)
        writer.write("export", 3, {"seconds/export": 4.0})
        writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["seconds/evaluate"]
    texts = texts_of(tmp_path)
    assert texts["settings"] == ["    a: 1"]
    assert texts["measured once/evaluate/test"] == [
        "|  | MRR@10 | R@1 |\n| --- | --- | --- |\n| test: BM25 | 0.5 | 0.25 |\n| test: ranker |  | 0.75 |"
    ]
    (seconds,) = texts["measured once/seconds"]
    assert seconds.count("\n") == (3 if resumed else 2)
    assert "| seconds/generate | 3 |" in seconds


class StandIn:
    """A package of a tracker that keeps what it is told, or fails where it is asked to."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error, self.told = fails, error or RuntimeError("no\nnetwork"), []  # type: ignore[var-annotated]
        self.enough = threading.Event()

    def _tell(self, name: str, *told: object) -> None:
        self.told.append((name, *told))
        if self.fails == name:
            raise self.error
        if self.fails == f"{name} hangs":
            self.enough.wait(60)

    def init(self, **settings: object) -> StandIn:
        self._tell("init", settings)
        return self

    def log(self, values: dict[str, float]) -> None:
        self._tell("log", values)

    def define_metric(self, name: str, **axis: object) -> None:
        self._tell("define", name, axis)

    def finish(self) -> None:
        self._tell("finish")


def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: StandIn) -> None:
    monkeypatch.setitem(sys.modules, "wandb", package)
    plan = replace(PLAN, trackers=("wandb",), values={"run.seed": 1, "evaluation.metrics": ["MRR@10"], "a": None})
    writer = MetricsWriter(tmp_path / "mine", active=True, plan=plan)
    (tmp_path / "mine").mkdir()
    for step in (2, 4):
        writer.write("retriever/1", step, {"retriever/loss": 1 / step, "retriever/lr": 1e-5})
    writer.write("retriever/1", 7, {"seconds/retriever": 3.0})
    writer.close()
    lines = (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3, "whatever becomes of the tracker"
    assert not (tmp_path / "mine" / "tensorboard").exists(), "it is not among the trackers"


def test_a_tracker_gets_the_same_numbers_with_their_own_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = StandIn()
    tracked(tmp_path, monkeypatch, package)
    ((_, settings),) = (told for told in package.told if told[0] == "init")
    assert (settings["project"], settings["name"], settings["resume"]) == ("sparring", "mine", "allow")
    assert settings["config"] == {"run.seed": 1, "evaluation.metrics": "['MRR@10']", "a": "None"}
    assert [told[1] for told in package.told if told[0] == "log"] == [
        {"retriever/loss": 0.5, "retriever/lr": 1e-5, "retriever/step": 2},
        {"retriever/loss": 0.25, "retriever/lr": 1e-5, "retriever/step": 4},
        {"seconds/retriever": 3.0},
    ]
    axes = [told[1:] for told in package.told if told[0] == "define"]
    assert axes == [("retriever/step", {}), ("retriever/*", {"step_metric": "retriever/step"})]
    assert package.told[-1] == ("finish",)


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("init", None),
        ("define", None),
        ("log", OSError(28, "No space left on device")),
        ("finish", None),
        ("init", SystemExit(1)),
        ("init", KeyboardInterrupt()),
        ("log", MemoryError()),
        ("init hangs", None),
        ("log hangs", None),
    ],
)
def test_a_tracker_that_fails_ends_no_run(
    fails: str,
    error: BaseException | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    monkeypatch.setattr("engine.metrics.trackers._FINISH_SECONDS", 0.2 if "hangs" in fails else 60.0)
    package = StandIn(fails, error)
    tracked(tmp_path, monkeypatch, package)
    package.enough.set()
    # Once, though pytest may listen in two places: to a logger whose records other tests have kept from the root, too.
    (warning,) = {record for record in caplog.records if record.name.endswith("trackers")}
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("wandb is told nothing more, the run goes on: ")
    assert "\n" not in warning.getMessage()


def test_a_tracker_that_cannot_be_imported_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = StandIn()
    monkeypatch.setattr("importlib.import_module", lambda name: 1 / 0)
    tracked(tmp_path, monkeypatch, package)
    assert package.told == []


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"trackio.*not installed.*pip install 'trackio'"):
        require_trackers(["tensorboard", "trackio"])

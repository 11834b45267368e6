"""No step on what is not finite or has collapsed; a stop leaves its reason, and a healthy run leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine.data.batches import SampledQuery
from engine.errors import TrainingError
from engine.metrics import Metric
from engine.run import Run, Stage
from engine.training.backend import StepReport
from engine.training.guards import Guards

Open = Callable[..., Run]


@dataclass
class FakeModel:
    """Steps as it is told to: with a report, or an error."""

    reports: list[StepReport | TrainingError] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_steps: int = 0

    def step(self, lr: float) -> StepReport:
        self.num_steps += 1
        report = self.reports.pop(0) if self.reports else StepReport(1.0, True)
        if isinstance(report, TrainingError):
            raise report
        return report


def names_of(step: int) -> list[SampledQuery]:
    return [SampledQuery(0, f"q{step}", ["d1", "d2"])]


def guards_of(run: Run) -> Guards:
    return Guards(Stage(run, "retriever/2"), names_of, 10)


def take(guards: Guards, model: FakeModel, step: int, metrics: dict[str, Metric]) -> None:
    """A step as the loop takes it."""
    guards.require_health(step, metrics, model.device)
    with guards.post_mortem(step, metrics):
        report = model.step(1e-3)
    guards.count(step, report, metrics)


def measured(loss: float = 1.0, **others: float) -> dict[str, Metric]:
    return {"loss": Metric(torch.tensor(loss))} | {name: Metric(value) for name, value in others.items()}


def postmortem(run: Run, step: int) -> Any:
    return json.loads((run.folder.path / "postmortem" / f"retriever-2-{step}.json").read_text())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_loss_stops_before_the_step_and_leaves_its_batch(open_run: Open, bad: float) -> None:
    run, model = open_run(), FakeModel()
    with pytest.raises(TrainingError, match=r"loss of retriever/2 is not finite at step 3 \(rank 0: -?(nan|inf)\)"):
        take(guards_of(run), model, 3, measured(bad, accuracy=0.5))
    assert model.num_steps == 0
    found = postmortem(run, 3)
    assert found["batch"] == [{"rank": 0, "query": "q13", "documents": ["d1", "d2"]}], "step 13 of the schedule"
    assert (found["stage"], found["step"]) == ("retriever/2", 3)
    assert found["ranks"] == [{"rank": 0, "metrics": {"loss": str(bad), "accuracy": "0.5"}}]


def test_a_bad_gradient_leaves_its_batch_too(open_run: Open) -> None:
    run = open_run()
    with pytest.raises(TrainingError, match="gradient is not finite"):
        take(guards_of(run), FakeModel([TrainingError("the gradient is not finite")]), 0, measured())
    assert postmortem(run, 0)["reason"] == "the gradient is not finite."
    assert postmortem(run, 0)["batch"][0]["query"] == "q10"


def test_a_healthy_run_leaves_nothing(open_run: Open) -> None:
    run, model = open_run("run.collapse_steps=1"), FakeModel()
    for step in range(3):
        take(guards_of(run), model, step, measured(score_spread=0.1, entropy=0.5))
    assert model.num_steps == 3
    assert not (run.folder.path / "postmortem").exists()


@pytest.mark.parametrize(
    ("collapsed", "reason"),
    [
        (
            {"score_spread": 0.0, "entropy": 2.0},
            "all scores of each query were equal in the last 3 steps of retriever/2",
        ),
        ({"score_spread": 1.0, "entropy": 0.0}, "over the candidates had no entropy in the last 3 steps"),
    ],
)
def test_a_collapse_that_lasts_stops_the_run(open_run: Open, collapsed: dict[str, float], reason: str) -> None:
    """Symptom: the loss stands still at a value that looks like any other, for days."""
    run, model = open_run("run.collapse_steps=3"), FakeModel()
    guards = guards_of(run)
    for step in (0, 1):
        take(guards, model, step, measured(**collapsed))
    with pytest.raises(TrainingError, match=reason):
        take(guards, model, 2, measured(**collapsed))
    assert model.num_steps == 2
    assert "in the last 3 steps" in postmortem(run, 2)["reason"]


@pytest.mark.parametrize("setting", ["run.collapse_steps=3", "run.collapse_steps=0"])
def test_a_moment_without_spread_is_no_collapse(open_run: Open, setting: str) -> None:
    guards, model = guards_of(open_run(setting)), FakeModel()
    for step, spread in enumerate([0.0, 0.0, 0.2, 0.0, 0.0]):
        take(guards, model, step, measured(score_spread=spread))
    assert model.num_steps == 5


def test_skipped_steps_of_fp16_are_counted_and_too_many_in_a_row_stop(open_run: Open) -> None:
    """Symptom (DeepSpeed): the loss stands still because every step is skipped, and nothing says so."""
    skip, taken = StepReport(None, False), StepReport(1.0, True)
    run, model = open_run("run.max_skipped_steps=3"), FakeModel([skip, skip, taken, skip, skip, skip])
    guards = guards_of(run)
    for step in range(5):
        take(guards, model, step, measured())
    assert guards.num_skipped == 4
    with pytest.raises(TrainingError, match=r"skipped 3 steps of retriever/2 in a row, up to step 5"):
        take(guards, model, 5, measured())
    assert postmortem(run, 5)["batch"][0]["query"] == "q15"

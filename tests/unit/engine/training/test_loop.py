"""The training loop: rates over a schedule's whole life, resuming inside a stage, and no step on a loss that is NaN."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.schedule import Schedule
from engine.config.timetable import Phase, Visit
from engine.config.training import OptimConfig
from engine.data.batches import SampledQuery, dropout_seed
from engine.errors import TrainingError
from engine.metrics import Metric
from engine.run import Run, Stage
from engine.training.backend import StepReport
from engine.training.checkpoint import Position
from engine.training.loop import Progress, train

Open = Callable[..., Run]
OPTIM = OptimConfig(lr=1.0, warmup_ratio=0.2)
LINEAR = Schedule(OPTIM, 10)


# --- the loop, with an engine that only keeps count -------------------------------------------------------------------


@dataclass
class FakeModel:
    """Stands for a DeepSpeed engine."""

    name: str = "retriever"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rates: list[float] = field(default_factory=list)
    resets: int = 0
    optim: OptimConfig | None = None

    def begin_stage(self, optim: OptimConfig) -> None:
        self.optim = optim

    def train(self) -> None: ...

    def reset_optimizer(self) -> None:
        self.resets += 1

    def step(self, lr: float) -> StepReport:
        self.rates.append(lr)
        return StepReport(2.0, True)


NOTHING = {
    "window": {},
    "last": {},
    "guards": {"flat": {"score_spread": 0, "entropy": 0}, "skipped_in_a_row": 0, "num_skipped": 0},
}


@dataclass
class FakeCheckpoints:
    position: Position | None = None
    saved: list[tuple[str, int]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=lambda: NOTHING)

    def save(self, model: Any, stage: str, step: int, notes: dict[str, Any]) -> None:
        self.saved.append((stage, step))
        self.notes = notes
        self.position = Position(stage, step, len(self.saved))


class Steps:
    """An objective that notes its steps and draws a random number in each, as dropout does."""

    samples: Any = SimpleNamespace(names=lambda step: [SampledQuery(0, f"q{step}", ["d1", "d2"])])

    def __init__(self, losses: Mapping[int, float] | None = None) -> None:
        self.steps: list[int] = []
        self.drawn: dict[int, float] = {}
        self._losses = losses or {}

    def prepare(self, step: int) -> int:
        return step

    def backward(self, model: Any, batch: int) -> dict[str, Metric]:
        self.steps.append(batch)
        self.drawn[batch] = float(torch.rand(()))
        return {"loss": Metric(torch.tensor(self._losses.get(batch, float(batch)))), "tokens": Metric(8.0, "sum")}


def visit_of(iteration: int, steps: int) -> Visit:
    """A visit to a phase of ten steps in all."""
    names = tuple("x" for _ in range(10 // max(1, steps)))
    return Phase("retriever", "ar2.retriever", "retriever", steps, 4, 2, 1, OPTIM, names, 1).visits[iteration - 1]


def go(
    run: Run, model: FakeModel, checkpoints: FakeCheckpoints, objective: Steps, *, iteration: int = 1, steps: int = 5
) -> Progress:
    visit = visit_of(iteration, steps)
    return train(Stage(run, visit.stage), visit, model, checkpoints, objective)  # type: ignore[arg-type]


def points(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_taken_logged_and_saved_at_its_time(open_run: Open) -> None:
    run = open_run("run.log_every_steps=2", "run.checkpoint_every_steps=3")
    model, checkpoints, objective = FakeModel(), FakeCheckpoints(), Steps()
    result = go(run, model, checkpoints, objective)
    assert objective.steps == [0, 1, 2, 3, 4]
    assert model.rates == [LINEAR.lr(step) for step in range(5)]
    assert checkpoints.saved == [("retriever/1", 3), ("retriever/1", 5)]
    logged = points(run)
    assert [(point["step"], point["retriever/loss"]) for point in logged] == [(2, 0.5), (4, 2.5), (5, 4.0)]
    assert logged[0]["retriever/grad_norm"] == 2.0
    assert logged[0]["retriever/tokens_per_second"] > 0
    assert logged[0]["retriever/peak_gib"] > 0.1, "this process has torch in it"
    assert result == Progress(5, 4.0, 2)


def test_a_later_iteration_goes_on_in_the_schedule_with_its_optimizer(open_run: Open) -> None:
    """Optimizer and schedule carry over the iterations (AR2 Table 9 counts its steps over all of them)."""
    run, model, checkpoints = open_run(), FakeModel(), FakeCheckpoints()
    go(run, model, checkpoints, Steps())
    second = Steps()
    go(run, model, checkpoints, second, iteration=2)
    assert second.steps == [5, 6, 7, 8, 9]
    assert model.rates == [LINEAR.lr(step) for step in range(10)]
    assert model.resets == 1, "only the first stage of a schedule starts with a fresh optimizer"
    assert [point["step"] for point in points(run)][-1] == 10


def test_a_stage_goes_on_after_its_checkpoint(open_run: Open) -> None:
    run, model, objective = open_run(), FakeModel(), Steps()
    go(run, model, FakeCheckpoints(Position("retriever/1", 3, 7)), objective)
    assert objective.steps == [3, 4]
    assert model.rates == [LINEAR.lr(3), LINEAR.lr(4)]
    assert model.resets == 0, "the restored moments are kept"


def test_a_stage_that_was_cut_logs_the_points_of_an_undisturbed_one(open_run: Open) -> None:
    """Symptom: the first point after a resume is the mean over the steps since then, not since the last point."""
    cut = open_run("run.log_every_steps=4", "run.checkpoint_every_steps=3")
    checkpoints = FakeCheckpoints()
    with pytest.raises(TrainingError):
        go(cut, FakeModel(), checkpoints, Steps({4: float("nan")}), steps=8)
    assert checkpoints.saved == [("retriever/1", 3)]
    assert 0 < checkpoints.notes["last"]["seconds"] < 100
    checkpoints.notes["last"]["seconds"] = 1000.0
    resumed = Steps()
    go(cut, FakeModel(), checkpoints, resumed, steps=8)
    assert resumed.steps == [3, 4, 5, 6, 7]
    losses = [(point["step"], point["retriever/loss"]) for point in points(cut)]
    assert losses == [(4, 1.5), (4, 1.5), (8, 5.5)], "that of step 4 was logged before the cut too"
    speeds = [point["retriever/tokens_per_second"] for point in points(cut)]
    assert speeds[1] == pytest.approx(4 * 8 / 1000, rel=0.2), "three of the four steps took their time before the cut"


def test_another_stages_checkpoint_does_not_shorten_this_one(open_run: Open) -> None:
    model, objective = FakeModel(), Steps()
    go(open_run(), model, FakeCheckpoints(Position("warmup_retriever", 3, 1)), objective)
    assert objective.steps == [0, 1, 2, 3, 4]
    assert model.resets == 1, "the warm-up's moments are not the game's"


def test_a_stage_whose_last_checkpoint_is_there_takes_no_step(open_run: Open) -> None:
    run, checkpoints = open_run(), FakeCheckpoints()
    result = go(run, FakeModel(), checkpoints, Steps())
    model, objective = FakeModel(), Steps()
    assert go(run, model, checkpoints, objective) == result
    assert (objective.steps, model.rates) == ([], [])


def test_no_steps_touch_nothing(open_run: Open) -> None:
    model, checkpoints = FakeModel(), FakeCheckpoints()
    assert go(open_run(), model, checkpoints, Steps(), steps=0) == Progress(0)
    assert (model.optim, model.resets, checkpoints.saved) == (None, 0, [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(open_run: Open, bad: float) -> None:
    model, checkpoints = FakeModel(), FakeCheckpoints()
    with pytest.raises(TrainingError, match=r"loss of retriever/1 is not finite at step 2.*lower the learning rate"):
        go(open_run("run.checkpoint_every_steps=1"), model, checkpoints, Steps({2: bad}))
    assert len(model.rates) == 2
    assert checkpoints.saved[-1] == ("retriever/1", 2)


# --- random numbers --------------------------------------------------------------------------------------------------


def test_a_resumed_step_draws_what_an_undisturbed_one_draws(open_run: Open) -> None:
    whole, rest = Steps(), Steps()
    go(open_run(), FakeModel(), FakeCheckpoints(), whole)
    torch.manual_seed(1234)
    go(open_run(), FakeModel(), FakeCheckpoints(Position("retriever/1", 3, 1)), rest)
    assert rest.drawn == {step: whole.drawn[step] for step in (3, 4)}
    assert len(set(whole.drawn.values())) == 5, "each step draws its own"


def test_the_steps_leave_the_other_random_numbers_alone(open_run: Open) -> None:
    torch.manual_seed(7)
    expected = float(torch.rand(()))
    torch.manual_seed(7)
    go(open_run(), FakeModel(), FakeCheckpoints(), Steps())
    assert float(torch.rand(())) == expected


def test_seeds_differ_by_stage_step_place_and_run() -> None:
    seeds = {
        dropout_seed(42, name, step, place) for name in ("ranker/1", "ranker/2") for step in (0, 1) for place in (0, 8)
    }
    assert len(seeds) == 8
    assert dropout_seed(43, "ranker/1", 0, 0) not in seeds

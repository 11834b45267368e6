"""Where training goes on: stages whose result a damaged checkpoint took away, and what the best iteration was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.phases import Trained
from engine.results import Measured, Score
from engine.run import Run
from engine.training.resume import checkpoints_of, reopen_lost_stages

Open = Callable[..., Run]


def finish(run: Run, **results: Any) -> None:
    """Record stages as finished; a double underscore stands for the slash in their names."""
    for name, result in results.items():
        run.once(name.replace("__", "/"), lambda stage, result=result: result)


def ran_again(run: Run, name: str) -> bool:
    times: list[str] = []
    run.once(name, lambda stage: times.append(stage.name))
    return times == [name]


TRAINED = {
    "warmup_retriever": Trained(10, 0.5, 2, "a"),
    "encode__000": None,
    "warmup_ranker": Trained(8, 0.5, 9, "b"),
    "retriever__1": Trained(6, 0.5, 4, "c"),
}


def test_a_whole_newest_checkpoint_opens_no_stage_again(open_run: Open) -> None:
    run = open_run()
    finish(run, **TRAINED)
    reopen_lost_stages(run, "retriever", 4)
    assert not any(ran_again(run, name) for name in ("warmup_retriever", "retriever/1", "encode/000"))


def test_a_stage_that_the_restored_checkpoint_does_not_hold_runs_again(
    open_run: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Symptom: the ledger skips the stage, and the next one begins with the weights of some steps before its end."""
    finish(open_run(), **TRAINED)
    reopen_lost_stages(open_run(), "retriever", 3)
    assert "retriever has lost what it learnt in retriever/1" in caplog.text
    again = open_run()
    assert not any(ran_again(again, name) for name in ("warmup_retriever", "warmup_ranker", "encode/000"))
    assert ran_again(again, "retriever/1")


def test_without_any_checkpoint_all_its_stages_run_again(open_run: Open) -> None:
    """Symptom: the folder of checkpoints was cleared, and the game goes on with untrained weights."""
    run = open_run()
    finish(run, **TRAINED)
    reopen_lost_stages(run, "retriever", 0)
    assert ran_again(run, "warmup_retriever")
    assert ran_again(run, "retriever/1")
    assert not ran_again(run, "warmup_ranker")


def measured(iteration: int, retriever: float, ranker: float) -> dict[str, Any]:
    """What the ledger holds of an evaluation; names mean nothing."""
    scores = (
        Score("any name", "dense", "retriever", iteration, {"MRR@10": retriever}),
        Score("other name", "some", "ranker", iteration, {"MRR@10": ranker}),
    )
    return asdict(Measured(scores))


@pytest.mark.parametrize(("model", "stage"), [("retriever", "retriever/1"), ("ranker", "warmup_ranker")])
def test_each_model_has_its_own_best_iteration(open_run: Open, model: str, stage: str) -> None:
    run = open_run("run.keep_best=MRR@10")
    retention = checkpoints_of(run, [model])[model]._retention
    assert retention.best_stage() is None, "nothing is measured yet"
    finish(run, evaluate__0=measured(0, 0.1, 0.9), evaluate__1=measured(1, 0.5, 0.8))
    finish(run, evaluate__2=measured(2, 0.4, 0.7))
    assert retention.best_stage() == stage


def test_a_metric_that_is_not_measured_is_an_error(open_run: Open) -> None:
    run = open_run("run.keep_best=A@1")
    finish(run, evaluate__0=measured(0, 0.1, 0.2))
    with pytest.raises(
        ConfigError, match=r"keep_best is A@1, but evaluate/0 measured any name MRR@10, other name MRR@10"
    ):
        checkpoints_of(run, ["retriever"])["retriever"]._retention.best_stage()


def test_the_origin_names_code_and_configuration(open_run: Open) -> None:
    def origin(run: Run) -> Any:
        return checkpoints_of(run, ["ranker"])["ranker"]._origin

    one = origin(open_run())
    assert one["code"]["torch"]
    assert origin(open_run("run.keep_checkpoints=7")) == one, "where a run lives changes nothing"

"""A stage runs once over all starts; a folder belongs to one configuration."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine import run as run_module
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ArtifactError, ConfigError, CoordinationError
from engine.reliability import starts as starts_module
from engine.reliability.preemption import Preempted
from engine.reliability.progress import format_seconds
from engine.run import Run, RunFolder, Stage

Open = Callable[..., Run]


class Work:
    """A stage function that counts its calls."""

    def __init__(self, result: Any = None, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._result, self._error = result, error

    def __call__(self, stage: Stage, argument: Any = None) -> Any:
        self.calls.append((stage.name, argument))
        if self._error is not None:
            raise self._error
        return self._result


def ledger(run: Run) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads(run.folder.ledger.read_text())["stages"]
    return stages


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("sparring"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sparring")
    return caplog


def test_where_nothing_is_lost_nothing_is_written(open_run: Open) -> None:
    """Symptom: a comparison of a run that may not be written to wrote its ledger as it was."""
    run = open_run()
    run.once("retriever/1", Work({"loss": 0.5}))
    before = run.folder.ledger.stat()
    run.forget([])
    after = run.folder.ledger.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    run.forget(["retriever/1"])
    assert ledger(run) == {}


def test_a_stage_runs_with_its_arguments_and_is_recorded_with_result_and_time(open_run: Open) -> None:
    run, work = open_run(), Work({"loss": 0.5})
    assert run.once("retriever/1", work, "argument") == {"loss": 0.5}
    assert work.calls == [("retriever/1", "argument")]
    assert run.is_finished("retriever/1")
    assert ledger(run)["retriever/1"]["result"] == {"loss": 0.5}
    assert ledger(run)["retriever/1"]["seconds"] >= 0
    lines = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert "seconds/retriever" in lines[-1]


def test_a_stage_that_an_earlier_start_finished_is_skipped_with_its_result(
    open_run: Open, log: pytest.LogCaptureFixture
) -> None:
    open_run().once("shards", Work({"documents": 7}))
    again, work = open_run(), Work({"documents": 8})
    assert again.once("shards", work) == {"documents": 7}
    assert work.calls == []
    assert "finished earlier, skipped" in log.text


def test_a_stage_that_is_asked_for_twice_runs_once_without_a_word(
    open_run: Open, log: pytest.LogCaptureFixture
) -> None:
    run, work = open_run(), Work(3)
    assert (run.once("bm25", work), run.once("bm25", work)) == (3, 3)
    assert len(work.calls) == 1
    assert "skipped" not in log.text


def test_a_stage_that_fails_is_not_finished(open_run: Open) -> None:
    run = open_run()
    run.once("first", Work())
    with pytest.raises(ValueError, match="no luck"):
        run.once("second", Work(error=ValueError("no luck")))
    assert list(ledger(run)) == ["first"]
    retried = Work("better")
    assert open_run().once("second", retried) == "better"
    assert len(retried.calls) == 1


def test_a_stage_may_hold_stages(open_run: Open) -> None:
    inner = Work("inner")

    def outer(stage: Stage) -> str:
        return "outer of " + stage.run.once("inner", inner)

    run = open_run()
    assert run.once("outer", outer) == "outer of inner"
    assert list(ledger(run)) == ["inner", "outer"]


def test_a_result_is_what_json_gives_back_in_every_start(open_run: Open) -> None:
    """Symptom guarded against: the first start gets a tuple, the second a list, and only one of them works."""
    assert open_run().once("counts", Work({"pair": (1, 2)})) == {"pair": [1, 2]}
    assert open_run().once("counts", Work()) == {"pair": [1, 2]}


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Counts:
    """A stage's result, with what JSON has no word for."""

    documents: int
    inner: tuple[Inner, ...] = ()
    sha256: str = field(default="", metadata={"shown": False})


@dataclass(frozen=True)
class Told:
    value: float

    def shown(self) -> dict[str, float]:
        return {"in other words": self.value}


def counted(stage: Stage, documents: int) -> Counts:
    return Counts(documents, (Inner(1), Inner(2)), "abc")


def told(stage: Stage) -> Told:
    return Told(0.5)


def test_a_typed_result_comes_back_typed_in_every_start(open_run: Open, log: pytest.LogCaptureFixture) -> None:
    expected = Counts(3, (Inner(1), Inner(2)), "abc")
    run = open_run()
    assert run.once("counts", counted, 3) == expected
    assert run.once("counts", counted, 4) == expected, "skipped"
    assert open_run().once("counts", counted, 4) == expected
    assert ledger(run)["counts"]["result"] == {"documents": 3, "inner": [{"number": 1}, {"number": 2}], "sha256": "abc"}
    (line,) = [record.getMessage() for record in log.records if "documents" in record.getMessage()]
    assert line.endswith("documents 3"), "neither what is not for people nor what has no one value"


def test_a_typed_result_may_say_what_is_shown_of_it(open_run: Open, log: pytest.LogCaptureFixture) -> None:
    assert open_run().once("told", told) == Told(0.5)
    assert "in other words 0.5" in log.text


def test_a_recorded_result_of_another_form_is_refused(open_run: Open) -> None:
    """Symptom guarded against: a number that other code recorded as a text is used as if it were one."""
    open_run().once("counts", Work({"documents": "three"}))
    with pytest.raises(ArtifactError, match="the result of counts in the ledger is damaged: documents"):
        open_run().once("counts", counted, 4)


def test_a_damaged_ledger_is_an_error_and_not_a_new_beginning(open_run: Open) -> None:
    run = open_run()
    run.once("shards", Work())
    run.folder.ledger.write_text('{"stages": {"sha')
    with pytest.raises(ArtifactError, match=r"ledger\.json"):
        open_run()


# --- the folder ------------------------------------------------------------------------------------------------------


def test_opening_writes_the_whole_configuration_and_each_start(open_run: Open) -> None:
    run = open_run("ar2.iterations=3")
    open_run("ar2.iterations=3")
    recorded = yaml.safe_load(run.folder.config.read_text())
    assert recorded["ar2"]["iterations"] == 3
    assert recorded["index"]["audit_queries"] == 16
    starts = json.loads((run.folder.path / "starts.json").read_text())
    assert len(starts) == 2
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert starts[0]["num_ranks"] == 1


def test_another_configuration_is_refused_with_every_difference_named(open_run: Open) -> None:
    run = open_run()
    run.once("shards", Work())
    before = run.folder.config.read_text()
    with pytest.raises(
        ConfigError, match=r"ar2\.top_k: 20 -> 25, run\.seed: 42 -> 1.*Remedy: choose another run\.path"
    ):
        open_run("ar2.top_k=25", "run.seed=1")
    assert run.folder.config.read_text() == before


def test_what_changes_no_result_may_change(open_run: Open) -> None:
    run = open_run()
    run.once("shards", Work())
    again = open_run("run.log_every_steps=1", "run.timeout_seconds=5")
    assert again.is_finished("shards")
    assert yaml.safe_load(again.folder.config.read_text())["run"]["log_every_steps"] == 1


def test_before_the_first_finished_stage_the_configuration_may_be_corrected(open_run: Open) -> None:
    open_run("ar2.top_k=30")
    run = open_run("ar2.top_k=25")
    assert yaml.safe_load(run.folder.config.read_text())["ar2"]["top_k"] == 25


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(open_run: Open, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        open_run()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_that_holds_only_its_data_is_taken(open_run: Open, tmp_path: Path) -> None:
    (tmp_path / "run" / "data").mkdir(parents=True)
    assert open_run().folder.config.exists()


def test_reopening_changes_nothing(open_run: Open) -> None:
    made = open_run()
    made.once("shards", Work({"documents": 7}))
    made.metrics.close()

    def contents() -> dict[str, bytes]:
        files = (path for path in made.folder.path.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    before = contents()
    run = Run.reopen(made.folder.path, Coordinator(LocalTransport()), torch.device("cpu"))
    assert run.is_finished("shards")
    assert run.config == made.config
    run.metrics.write("stage", 1, {"name": 1.0})
    assert contents() == before


def test_reopening_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        Run.reopen(tmp_path, Coordinator(LocalTransport()), torch.device("cpu"))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0s"), (12.34, "12.3s"), (59.6, "59.6s"), (65.2, "1m 05s"), (3599.6, "1h 00m"), (7380, "2h 03m")],
)
def test_durations_read_as_a_person_says_them(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


# --- what changed since ----------------------------------------------------------------------------------------------


def pretend(run: Run, **entries: Any) -> None:
    """Let the last start have been made with other code."""
    starts = json.loads((run.folder.path / "starts.json").read_text())
    starts[-1] |= entries
    starts[-1]["versions"] |= entries.get("versions", {})
    (run.folder.path / "starts.json").write_text(json.dumps(starts))


def test_another_version_of_the_code_is_refused(open_run: Open) -> None:
    run = open_run()
    run.once("shards", Work())
    versions = json.loads((run.folder.path / "starts.json").read_text())[-1]["versions"]
    pretend(run, versions={**versions, "torch": "1.13.1"})
    with pytest.raises(ConfigError, match=r"other code \(torch: 1\.13\.1 -> .*run\.force_resume=true"):
        open_run()
    assert not run.folder.lock.exists(), "a refused start keeps nobody out"
    open_run("run.force_resume=true")
    forced = json.loads((run.folder.path / "starts.json").read_text())[-1]["forced"]
    assert [change.split(" ->")[0] for change in forced] == ["torch: 1.13.1"]
    open_run()  # what was forced once is the state from which the next start goes on


def test_another_patch_release_of_a_library_is_not_refused(open_run: Open) -> None:
    run = open_run()
    run.once("shards", Work())
    versions = json.loads((run.folder.path / "starts.json").read_text())[-1]["versions"]
    major, minor = versions["numpy"].split(".")[:2]
    pretend(run, versions={**versions, "numpy": f"{major}.{minor}.99"})
    open_run()


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ("aaa", "bbb", True),
        ("aaa-dirty", "bbb-dirty", True),
        ("aaa", "aaa-dirty", False),
        (None, "bbb", False),
        ("aaa", None, False),
    ],
)
def test_another_commit_is_refused_where_both_are_known(
    open_run: Open, monkeypatch: pytest.MonkeyPatch, before: str | None, now: str | None, refused: bool
) -> None:
    run = open_run()
    run.once("shards", Work())
    pretend(run, git=before)
    monkeypatch.setattr(starts_module, "_git_revision", lambda: now)
    with pytest.raises(ConfigError, match="git commit: aaa -> bbb") if refused else contextlib.nullcontext():
        open_run()


def test_a_stage_of_a_start_that_lost_the_folder_is_not_recorded(open_run: Open) -> None:
    """Symptom guarded against: a start that slept wakes up and overwrites the ledger of the one that took over."""
    first = open_run()
    first.once("shards", Work())
    open_run()
    with pytest.raises(CoordinationError, match="no longer this start's"):
        first.once("bm25", Work())
    assert list(ledger(first)) == ["shards"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("warmup_ranker", r"which .* has finished\. Expected: a stage that is to come"),
        ("retriever/9", r"a stage that this run does not have\. Expected: such as one of warmup_retriever, "),
        ("retriever/l", "a stage that this run does not have"),
    ],
)
def test_an_end_that_does_not_come_is_refused(name: str, told: str, open_run: Open) -> None:
    """Symptom: the whole game was played, and only then, or never, it was told that there had been no such end."""
    open_run().once("warmup_ranker", Work())
    with pytest.raises(ConfigError, match=rf"run\.stop_before is {name}, {told}"):
        open_run(f"run.stop_before={name}").require_end_ahead()
    for later in ("retriever/1", "evaluate/1", "export", "null"):
        open_run(f"run.stop_before={later}").require_end_ahead()


def test_a_request_to_stop_is_met_before_the_next_stage(open_run: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    run, work = open_run(), Work()
    run.once("shards", Work())
    monkeypatch.setattr(run_module.PREEMPTION, "requested", True)
    monkeypatch.setattr(run_module.PREEMPTION, "reason", "SIGTERM")
    with pytest.raises(Preempted, match=r"stopped at the start of bm25 \(SIGTERM\); the same command goes on"):
        run.once("bm25", work)
    assert work.calls == []


def test_a_ledger_elsewhere_leaves_the_runs_own_alone(open_run: Open, tmp_path: Path) -> None:
    open_run().once("shards", Work())
    run = Run.reopen(open_run().folder.path, Coordinator(LocalTransport()), torch.device("cpu"))
    before = run.folder.ledger.read_bytes()
    elsewhere = RunFolder(tmp_path / "evaluations" / "other")
    run.keep_ledger_in(elsewhere)
    assert run.once("shards", Work("of the other corpus")) == "of the other corpus"
    assert run.folder.ledger.read_bytes() == before
    assert list(json.loads(elsewhere.ledger.read_text())["stages"]) == ["shards"]


def test_another_zero_stage_goes_on(open_run: Open) -> None:
    open_run("retriever.zero_stage=1").once("shards", Work())
    open_run("retriever.zero_stage=3")

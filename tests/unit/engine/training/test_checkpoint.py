"""Checkpoints that are whole or not there: damage of every kind, what is kept, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.training.checkpoint as checkpoint
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.errors import ArtifactError, CoordinationError, DataError
from engine.training.checkpoint import Checkpoints, Position, Retention
from engine.training.fragments import Fragment
from tests.small_disk import run_on_small_disk


@dataclass
class FakeModel:
    """One parameter with its moments; its value says which step it is of."""

    name: str = "ranker"
    zero_stage: int = 1
    precision: str = "fp32"
    loss_scale_state: dict[str, float] = field(default_factory=dict)
    size: int = 6
    refreshed: int = 0

    def __post_init__(self) -> None:
        parts = {part: torch.zeros(self.size) for part in ("weights", "exp_avg", "exp_avg_sq")}
        self.state = [Fragment("w", 0, parts, torch.tensor(0.0))]

    @property
    def value(self) -> float:
        return float(self.state[0].parts_F["weights"][0])

    def fill(self, value: float) -> FakeModel:
        for part in self.state[0].parts_F.values():
            part.fill_(value)
        return self

    def own_fragments(self) -> list[Fragment]:
        return self.state

    fragments = own_fragments

    def parameter_sizes(self) -> dict[str, int]:
        return {"w": self.size}

    def restore_loss_scale(self, state: dict[str, float]) -> None:
        self.loss_scale_state = dict(state)

    def refresh_weights(self) -> None:
        self.refreshed += 1


def opened(folder: Path, retention: Retention | None = None) -> Checkpoints:
    return Checkpoints(folder, Coordinator(LocalTransport()), retention or Retention(3), {"code": {"git": "abc"}})


def saved(folder: Path, *steps: int, retention: Retention | None = None, stage: str = "ranker/1") -> Checkpoints:
    checkpoints = opened(folder, retention)
    for step in steps:
        checkpoints.save(FakeModel().fill(step), stage, step)  # type: ignore[arg-type]
    return checkpoints


def restored(folder: Path, model: FakeModel | None = None) -> tuple[Position | None, FakeModel]:
    model = model or FakeModel()
    return opened(folder).restore(model), model  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_taken_and_says_what_made_it(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    checkpoints.save(FakeModel(loss_scale_state={"cur_scale": 8.0}).fill(4), "ranker/1", 4)  # type: ignore[arg-type]
    position, model = restored(tmp_path)
    assert position == checkpoints.position == Position("ranker/1", 4, 1)
    assert (model.value, model.refreshed, model.loss_scale_state) == (4.0, 1, {"cur_scale": 8.0})
    commit = json.loads((tmp_path / "000001" / "COMMIT.json").read_text())
    assert (commit["world_size"], commit["zero_stage"], commit["precision"]) == (1, 1, "fp32")
    assert commit["code"] == {"git": "abc"}
    assert len(commit["weights_sha256"]) == 64


def test_where_there_never_was_one_the_model_stays_as_it_is(tmp_path: Path) -> None:
    position, model = restored(tmp_path / "none")
    assert (position, model.refreshed) == (None, 0)


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = next(folder.glob("optimizer-*"))
    path.write_bytes(path.read_bytes()[:-5])


def flip(folder: Path) -> None:
    path = next(folder.glob("weights-*"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    next(folder.glob("weights-*")).unlink()


def lose_the_commit(folder: Path) -> None:
    (folder / "COMMIT.json").unlink()


def halve_the_commit(folder: Path) -> None:
    path = folder / "COMMIT.json"
    path.write_bytes(path.read_bytes()[:100])


def empty_the_commit(folder: Path) -> None:
    (folder / "COMMIT.json").write_text("[]")


DAMAGES = [truncate, flip, lose_a_file, lose_the_commit, halve_the_commit, empty_the_commit]
Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_named_and_the_one_before_taken(
    damage: Damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1, 2)
    damage(tmp_path / "000002")
    position, model = restored(tmp_path)
    assert position == Position("ranker/1", 1, 1)
    assert model.value == 1.0
    assert f"{tmp_path / '000002'} is no whole checkpoint" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_nothing_starts_from_scratch(damage: Damage, tmp_path: Path) -> None:
    """Symptom (DeepSpeed): a resume that finds nothing to load goes on from scratch with a warning."""
    saved(tmp_path, 1, 2)
    for name in ("000001", "000002"):
        damage(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"none of the 2 checkpoints .* is whole: 000001, 000002"):
        restored(tmp_path)


def test_the_next_save_takes_the_damaged_ones_place(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5)
    for name in ("000004", "000005"):
        flip(tmp_path / name)
    checkpoints = opened(tmp_path)
    checkpoints.restore(FakeModel())  # type: ignore[arg-type]
    checkpoints.save(FakeModel().fill(40), "ranker/1", 40)  # type: ignore[arg-type]
    assert names(tmp_path) == ["000003", "000004"], "a damaged one is none of the newest that are kept"
    assert restored(tmp_path)[1].value == 40.0


def test_one_that_was_not_finished_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 1)
    (tmp_path / ".000002.tmp").mkdir()
    assert restored(tmp_path)[0] == Position("ranker/1", 1, 1)
    assert ".000002.tmp was not finished" in caplog.text


def test_a_save_that_fails_leaves_the_last_one_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)

    def fail(*_: Any) -> Any:
        raise DataError("no")

    monkeypatch.setattr(checkpoint, "write_state", fail)
    with pytest.raises(DataError):
        checkpoints.save(FakeModel(), "ranker/1", 2)  # type: ignore[arg-type]
    assert names(tmp_path) == ["000001"]
    assert checkpoints.position == Position("ranker/1", 1, 1)


def test_a_start_that_has_lost_its_folder_publishes_nothing(tmp_path: Path) -> None:
    """Symptom: a start that slept through the takeover of its folder adds a checkpoint to the other's."""
    saved(tmp_path, 1)

    def lost() -> None:
        raise CoordinationError("another start has the folder")

    late = Checkpoints(tmp_path, Coordinator(LocalTransport()), Retention(3), fence=lost)
    late.restore(FakeModel())  # type: ignore[arg-type]
    with pytest.raises(CoordinationError, match="another start"):
        late.save(FakeModel(), "ranker/1", 2)  # type: ignore[arg-type]
    assert names(tmp_path) == ["000001"]


ON_A_SMALL_DISK = """
from engine.errors import SparringError
from tests.unit.engine.training.test_checkpoint import FakeModel, names, opened

model = FakeModel(size=20_000)
checkpoints = opened(disk / "ranker")
checkpoints.save(model.fill(1), "ranker/1", 1)
try:
    checkpoints.save(model.fill(2), "ranker/1", 2)
    raise SystemExit("it fits")
except SparringError as error:
    print(error)
print(names(disk / "ranker"), opened(disk / "ranker").restore(model).step, model.value)
enlarge("2m")
checkpoints.save(model.fill(2), "ranker/1", 2)
print(names(disk / "ranker"), opened(disk / "ranker").restore(model).step, model.value)
"""


def test_a_full_disk_keeps_the_last_checkpoint_and_goes_on_once_there_is_space(tmp_path: Path) -> None:
    full, before, after = run_on_small_disk(tmp_path / "disk", "400k", ON_A_SMALL_DISK).splitlines()[-3:]
    assert full.startswith("the disk is full: ")
    assert "/ranker/.000002.tmp/optimizer-00000-000.safetensors needs about 160" in full
    assert before == "['000001'] 1 1.0"
    assert after == "['000001', '000002'] 2 2.0"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(ArtifactError, match=r"another model: 1 parameters differ, w for one has 6 elements, not 9"):
        restored(tmp_path, FakeModel(size=9))


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, retention=Retention(2))
    assert names(tmp_path) == ["000003", "000004"]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 15, 20, 25, retention=Retention(1, every_steps=10))
    assert names(tmp_path) == ["000002", "000004", "000005"]


def test_the_end_of_the_best_stage_is_kept(tmp_path: Path) -> None:
    best: list[str | None] = [None]
    checkpoints = opened(tmp_path, Retention(1, best_stage=lambda: best[0]))
    for stage, step in [("ranker/1", 5), ("ranker/1", 10)]:
        checkpoints.save(FakeModel(), stage, step)  # type: ignore[arg-type]
    best[0] = "ranker/1"
    for step in (5, 10):
        checkpoints.save(FakeModel(), "ranker/2", step)  # type: ignore[arg-type]
    assert names(tmp_path) == ["000002", "000004"]
    best[0] = "ranker/2"
    checkpoints.save(FakeModel(), "ranker/3", 5)  # type: ignore[arg-type]
    assert names(tmp_path) == ["000004", "000005"]

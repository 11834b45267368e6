"""Checkpoints of a model in training that are either complete or not there, and fit any number of ranks.

All ranks write their part of the state (`engine.training.state`) into a temporary folder, fsync it and read it back;
rank 0 writes COMMIT.json last, with the hash of every file, and one rename publishes the whole. A folder without a
COMMIT.json that its files agree with is no checkpoint: it is named in a warning, and the one before is taken.
DeepSpeed's own checkpoints are not used: they fit one number of ranks and one ZeRO stage, and its `latest` file
appears before all ranks have written.

What a checkpoint holds is the weights in float32, Adam's moments and step counts, fp16's loss scale, the position, and
what the loop noted: the measurements since the last logged point, and what its guards have counted. Learning rate,
dropout's random numbers and the order of the samples are functions of the position and the seed; the other
hyperparameters come from the configuration.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.coordination.coordinator import Coordinator
from engine.errors import ArtifactError
from engine.log import get_logger
from engine.training.backend import TrainedModel
from engine.training.state import parameters_in, read_state, write_state
from shards.errors import SparringError
from shards.files import canonical_json, fsync, read_json, sha256_file, write_json

log = get_logger(__name__)
_COMMIT = "COMMIT.json"
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the recipe a checkpoint was taken.

    Attributes:
        stage: Name of the stage, such as `retriever/3`.
        step: Optimizer steps of that stage that are done.
        number: Counts the model's checkpoints; the highest is the newest.
    """

    stage: str
    step: int
    number: int


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay when a new one is published; the newest, which a resume needs, always does.

    Attributes:
        last: How many of the newest, 1 or more.
        every_steps: Also those whose step in their stage is a multiple of this.
        best_stage: Also the newest of the stage that this names, where it names one.
    """

    last: int
    every_steps: int | None = None
    best_stage: Callable[[], str | None] = field(default=lambda: None)


class Checkpoints:
    """The committed checkpoints of one model.

    Args:
        folder: Where they lie.
        coordinator: Meets the ranks around each save.
        retention: What is kept.
        origin: Says in each COMMIT.json which code and configuration made it; JSON.
        fence: Called before a checkpoint is published; raises where another start has taken the folder over.
    """

    def __init__(
        self,
        folder: Path,
        coordinator: Coordinator,
        retention: Retention,
        origin: Mapping[str, Any] | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._coordinator, self._retention = folder, coordinator, retention
        self._fence = fence
        self._origin = dict(origin or {})
        self._newest: Position | None = None
        self.notes: dict[str, Any] = {}
        """What the loop noted in the checkpoint that was restored."""

    @property
    def position(self) -> Position | None:
        """The checkpoint last saved or restored; None before the first."""
        return self._newest

    def is_within(self, stage: str) -> bool:
        """Tell whether the newest checkpoint lies in a stage, so that the stage goes on from there."""
        return self.position is not None and self.position.stage == stage

    def save(self, model: TrainedModel, stage: str, step: int, notes: Mapping[str, Any] | None = None) -> None:
        """Save and publish. A collective: every rank calls it at the same step.

        Args:
            model: Whose state.
            stage: Name of the stage.
            step: Optimizer steps of it that are done.
            notes: What the loop wants to find again in `notes`; small, JSON without infinities, equal on all ranks.

        Raises:
            DiskFullError: This rank could not write its part; nothing was published.
            CoordinationError: Another rank could not.
        """
        coordinator, what = self._coordinator, f"checkpoint {stage}@{step}"
        position = Position(stage, step, 1 if self._newest is None else self._newest.number + 1)
        final = self._folder / f"{position.number:06d}"
        temporary = self._folder / f".{final.name}.tmp"
        coordinator.only_rank_zero(f"{what}: folder", lambda: _make_empty(temporary))
        try:
            with coordinator.agreement(f"{what}: write"):
                own = write_state(temporary, model.own_fragments(), coordinator.rank)
            files: dict[str, Any] = {}
            for part in coordinator.gather(f"{what}: files", own):
                files |= part
            commit = self._commit(model, position, files, notes or {})
            coordinator.only_rank_zero(f"{what}: publish", lambda: self._publish(temporary, final, commit))
        except SparringError:
            if coordinator.rank == 0:  # also gives a full disk its space back
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._newest = position

    def restore(self, model: TrainedModel) -> Position | None:
        """Load the newest checkpoint that is whole, or leave the model as it is where there never was one.

        A collective. The number of ranks and the ZeRO stage may differ from those that wrote it.

        Raises:
            ArtifactError: There are checkpoints, but none is whole; or the newest is of another model.
        """
        commit = self._newest_whole()
        if commit is None:
            return None
        position = Position(**commit["position"])
        folder = self._folder / f"{position.number:06d}"
        with self._coordinator.agreement(f"checkpoint {position.number}: read"):
            _require_same_parameters(folder, parameters_in(folder, commit["files"]), model)
            read_state(folder, commit["files"], model.fragments())
            model.restore_loss_scale(commit["loss_scale"])
        model.refresh_weights()
        self._newest, self.notes = position, commit["notes"]
        log.info("%s goes on from %s, step %d", model.name, position.stage, position.step)
        if (commit["world_size"], commit["zero_stage"]) != (self._coordinator.world_size, model.zero_stage):
            log.info(
                "  it was written by %d ranks under ZeRO-%d, and is now on %d under ZeRO-%d",
                *(commit["world_size"], commit["zero_stage"], self._coordinator.world_size, model.zero_stage),
            )
        return position

    def _commit(
        self, model: TrainedModel, position: Position, files: dict[str, Any], notes: Mapping[str, Any]
    ) -> dict[str, Any]:
        weights = {name: entry["sha256"] for name, entry in files.items() if name.startswith("weights-")}
        return {
            "format": _FORMAT,
            "position": asdict(position),
            "world_size": self._coordinator.world_size,
            "zero_stage": model.zero_stage,
            "precision": model.precision,
            "loss_scale": model.loss_scale_state,
            "weights_sha256": hashlib.sha256(canonical_json(weights).encode()).hexdigest(),
            **self._origin,
            "notes": dict(notes),
            "files": files,
        }

    def _publish(self, temporary: Path, final: Path, commit: dict[str, Any]) -> None:
        write_json(temporary / _COMMIT, commit)
        self._fence()
        if final.exists():  # damaged, else its number would not be given again
            shutil.rmtree(final)
        temporary.rename(final)
        fsync(self._folder)
        for old in self._superfluous(final.name):
            shutil.rmtree(old)

    def _superfluous(self, newest: str) -> list[Path]:
        """List what may go: all but what the retention keeps, and what lies after the newest, found damaged before."""
        folders = _folders(self._folder)
        later = [folder for folder in folders if folder.name > newest]
        positions = {
            folder: Position(**read_json(folder / _COMMIT, "a checkpoint's commit record")["position"])
            for folder in folders
            if folder not in later and (folder / _COMMIT).exists()
        }
        kept = set(list(positions)[-self._retention.last :])
        if self._retention.every_steps is not None:
            kept |= {folder for folder, at in positions.items() if at.step % self._retention.every_steps == 0}
        best = self._retention.best_stage()
        kept |= set([folder for folder, at in positions.items() if at.stage == best][-1:])
        return [folder for folder in folders if folder not in kept]

    def _newest_whole(self) -> dict[str, Any] | None:
        """Agree on the newest checkpoint that is whole, each rank hashing its share of the files."""
        coordinator = self._coordinator
        for left in sorted(self._folder.glob(".[0-9]*.tmp")) if coordinator.rank == 0 else []:
            log.warning("%s was not finished and is no checkpoint", left)
        names = coordinator.only_rank_zero(
            "checkpoints: list", lambda: [folder.name for folder in reversed(_folders(self._folder))]
        )
        for name in names:
            folder = self._folder / name
            commit, problem = _inspect(folder, coordinator.rank, coordinator.world_size)
            problems = [found for found in coordinator.gather(f"checkpoint {name}: verify", problem) if found]
            if not problems:
                return commit
            log.warning("%s is no whole checkpoint: %s. The one before it is taken", folder, "; ".join(problems))
        if names:
            raise ArtifactError(
                f"none of the {len(names)} checkpoints in {self._folder} is whole: {', '.join(reversed(names))}",
                expected="at least one whose files agree with its COMMIT.json",
                remedy="restore the folder from a copy, or start in a new run folder",
            )
        return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*"))


def _inspect(folder: Path, rank: int, world_size: int) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's commit record, and what is wrong with this rank's share of its files; empty for nothing."""
    try:
        commit: dict[str, Any] = read_json(folder / _COMMIT, "the commit record")
        if commit.get("format") != _FORMAT:
            return {}, f"its format is {commit.get('format')}, not {_FORMAT}"
        for name in sorted(commit["files"])[rank::world_size]:
            path, entry = folder / name, commit["files"][name]
            if not path.exists():
                return {}, f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return {}, f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_file(path) != entry["sha256"]:
                return {}, f"{name} is damaged: its sha256 is not {entry['sha256']}"
    except (SparringError, OSError, KeyError, AttributeError, TypeError) as error:  # no such JSON, or unreadable
        return {}, f"{type(error).__name__}: {error}"
    return commit, ""


def _require_same_parameters(folder: Path, found: dict[str, int], model: TrainedModel) -> None:
    expected = model.parameter_sizes()
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ArtifactError(
            f"the checkpoint {folder} is of another model: {len(differing)} parameters differ, {name} for one has "
            f"{found.get(name, 0)} elements, not {expected.get(name, 0)}",
            expected=f"the {len(expected)} parameters of this run's {model.name}",
            remedy="name the model that the run began with, or start in a new run folder",
        )

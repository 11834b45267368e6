"""Checkpoints of a DeepSpeed engine that are either complete or not there.

DeepSpeed writes its `latest` file before all ranks have written their parts. So it is not used: all ranks write into a
temporary folder, the files are hashed, COMMIT.json is written last, and one rename publishes the whole. A folder
without a valid COMMIT.json is no checkpoint. What random numbers a step uses follows from (seed, stage, step), and so
does the order of the queries; the state is therefore the engine's own plus the position.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.backend import TrainedModel
from engine.coordinator import Coordinator
from engine.errors import ArtifactError
from engine.log import get_logger
from shards.files import fsync, read_json, sha256_file, write_json

log = get_logger(__name__)
_ENGINE = "engine"


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


class Checkpoints:
    """The committed checkpoints of one model.

    Args:
        folder: Where they lie.
        coordinator: Meets the ranks around each save.
        keep: Number of the newest that are kept.
    """

    def __init__(self, folder: Path, coordinator: Coordinator, keep: int) -> None:
        self._folder, self._coordinator, self._keep = folder, coordinator, keep
        self._newest: Position | None = None

    @property
    def position(self) -> Position | None:
        """The checkpoint last saved or restored; None before the first."""
        return self._newest

    def save(self, model: TrainedModel, stage: str, step: int) -> None:
        """Save and publish. A collective: every rank calls it at the same step.

        Raises:
            CoordinationError: Another rank could not write its part; nothing was published.
        """
        number = 1 if self._newest is None else self._newest.number + 1
        position = Position(stage, step, number)
        final = self._folder / f"{number:06d}"
        temporary = self._folder / f".{final.name}.tmp"
        if self._coordinator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._coordinator.barrier(f"checkpoint {stage}@{step}: folder")
        with self._coordinator.agreement(f"checkpoint {stage}@{step}: write"):
            model.save_state(temporary, _ENGINE)
        self._coordinator.only_rank_zero(
            f"checkpoint {stage}@{step}: publish", lambda: self._publish(temporary, final, position)
        )
        self._newest = position

    def restore(self, model: TrainedModel) -> Position | None:
        """Load the newest checkpoint, or leave the model as it is where there is none.

        Raises:
            ArtifactError: A committed checkpoint was damaged since, or was made by another number of ranks.
        """
        found = self._coordinator.only_rank_zero("checkpoint: find the newest", self._find)
        if found is None:
            return None
        position = Position(**found)
        model.load_state(self._folder / f"{position.number:06d}", _ENGINE)
        self._newest = position
        log.info("%s goes on from %s, step %d", model.name, position.stage, position.step)
        return position

    def _publish(self, temporary: Path, final: Path, position: Position) -> None:
        files = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        for name in files:
            fsync(temporary / name)
        commit = {"position": asdict(position), "world_size": self._coordinator.world_size, "files": files}
        write_json(temporary / "COMMIT.json", commit)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        fsync(self._folder)
        for old in sorted(self._folder.glob("[0-9]*"))[: -self._keep]:
            shutil.rmtree(old)

    def _find(self) -> dict[str, object] | None:
        for folder in sorted(self._folder.glob("[0-9]*"), reverse=True):
            commit_path = folder / "COMMIT.json"
            if not commit_path.exists():
                continue
            commit = read_json(commit_path, "a checkpoint's commit record")
            self._verify(folder, commit)
            return dict(commit["position"])
        return None

    def _verify(self, folder: Path, commit: dict[str, Any]) -> None:
        if commit["world_size"] != self._coordinator.world_size:
            raise ArtifactError(
                f"the checkpoint {folder} was written by {commit['world_size']} ranks, this run has "
                f"{self._coordinator.world_size}",
                expected="as many ranks as wrote it",
                remedy=f"start with {commit['world_size']} ranks, or in a new run folder",
            )
        for name, entry in commit["files"].items():
            path = folder / name
            if not path.exists() or sha256_file(path) != entry["sha256"]:
                raise ArtifactError(
                    f"the checkpoint file {path} is {'damaged' if path.exists() else 'missing'}",
                    expected=f"{entry['bytes']} bytes with sha256 {entry['sha256']}",
                    remedy=f"delete {folder}; the run then goes on from the checkpoint before it",
                )

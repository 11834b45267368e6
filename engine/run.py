"""A run: its folder, its ledger of finished stages, and `Run.once`, which makes a recipe resumable.

A recipe is a list of named stages. `Run.once(name, function, ...)` meets all ranks at a barrier, skips what the ledger
has as finished, runs the function, meets again and records its result. What a stage computes lies in artifacts with
manifests and in checkpoints; the ledger only says which of them are complete. So the algorithm (`engine.ar2`) holds
no question about resuming, ranks or files.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import yaml

from engine.config import Config
from engine.config_file import differences, dump_config, parse_config
from engine.coordinator import Coordinator
from engine.errors import ConfigError
from engine.log import get_logger
from engine.metrics import MetricsWriter
from shards.files import read_json, write_atomically, write_json

log = get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

_PACKAGES = ("sparring", "torch", "deepspeed", "transformers", "mpi4py", "webdataset", "numpy", "bm25s", "ir_measures")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        """Which stages are finished, with their results."""
        return self.path / "ledger.json"

    @property
    def shards(self) -> Path:
        """The tokenised corpus."""
        return self.path / "shards"

    @property
    def bm25(self) -> Path:
        """The BM25 index."""
        return self.path / "bm25"

    @property
    def checkpoints(self) -> Path:
        """Engine states to resume from."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """TREC runs and the summary."""
        return self.path / "results"

    @property
    def summary(self) -> Path:
        """The table of systems and metrics."""
        return self.results / "summary.json"

    def weights(self, model: str, iteration: str) -> Path:
        """Consolidated weights of `retriever` or `ranker` after an iteration."""
        return self.path / "weights" / model / iteration

    def index(self, iteration: str) -> Path:
        """Embeddings and FAISS index made by an iteration's retriever."""
        return self.path / "index" / iteration

    def candidates(self, name: str) -> Path:
        """Negatives to sample from, by the iteration whose retriever found them, or `bm25`."""
        return self.path / "candidates" / name

    def export(self, model: str) -> Path:
        """What other libraries load."""
        return self.path / "export" / model


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage function gets to know about where it runs."""

    run: Run
    name: str

    @property
    def seed(self) -> int:
        """The run's seed; streams of random numbers are keyed by it and a name of their own."""
        return self.run.config.run.seed


@dataclass
class Run:
    """One recipe in one folder, on this rank."""

    config: Config
    folder: RunFolder
    coordinator: Coordinator
    device: torch.device
    metrics: MetricsWriter
    _finished: dict[str, Any] = field(default_factory=dict)
    checkpoints: dict[str, Any] = field(default_factory=dict)
    _of_earlier_starts: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._of_earlier_starts = frozenset(self._finished)

    @classmethod
    def open(cls, config: Config, coordinator: Coordinator, device: torch.device) -> Run:
        """Open or make the run folder, and refuse one that another configuration made.

        Args:
            config: The resolved configuration.
            coordinator: Barriers between the ranks.
            device: Where this rank's models run.

        Raises:
            ConfigError: The folder was made by a configuration that differs in what is computed.
        """
        folder = RunFolder(config.run.path.absolute())
        coordinator.only_rank_zero("open run folder", lambda: _prepare_folder(folder, config, coordinator))
        finished = read_json(folder.ledger, "the ledger of finished stages")["stages"] if folder.ledger.exists() else {}
        writer = MetricsWriter(folder.path, active=coordinator.rank == 0)
        return cls(config, folder, coordinator, device, writer, dict(finished))

    @classmethod
    def reopen(cls, path: Path, coordinator: Coordinator, device: torch.device) -> Run:
        """Open the folder of an earlier run to use what it made; nothing of it is changed.

        Raises:
            ConfigError: The folder holds no run.
        """
        folder = RunFolder(path.absolute())
        if not folder.config.exists():
            raise ConfigError(f"{path} holds no run", expected="a folder with a config.yaml that a run wrote")
        config = parse_config(yaml.safe_load(folder.config.read_text(encoding="utf-8")), origin=str(folder.config))
        finished = read_json(folder.ledger, "the ledger of finished stages")["stages"] if folder.ledger.exists() else {}
        return cls(config, folder, coordinator, device, MetricsWriter(folder.path, active=False), dict(finished))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.coordinator.rank == 0

    def iterations(self) -> range:
        """The iterations of the game, counted from 1; 0 is the warm-up."""
        return range(1, self.config.ar2.iterations + 1)

    def is_finished(self, name: str) -> bool:
        """Whether a stage is complete according to the ledger."""
        return name in self._finished

    def result_of(self, name: str) -> Any:
        """Return the recorded result of a finished stage."""
        return self._finished[name]["result"]

    def once(self, name: str, function: Callable[Concatenate[Stage, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a stage unless an earlier start finished it.

        Args:
            name: Unique name of the stage, such as `retriever/3`.
            function: Takes a `Stage` and the given arguments; its result must be JSON.

        Returns:
            The function's result on rank 0, or the recorded one.

        Raises:
            CoordinationError: A rank did not come to the barrier before or after the stage.
        """
        if name in self._finished:
            if name in self._of_earlier_starts:
                log.info("%-28s finished earlier, skipped", name)
            result: R = self._finished[name]["result"]
            return result
        self.coordinator.barrier(f"{name}: start")
        start = time.monotonic()
        result = function(Stage(self, name), *args, **kwargs)
        self.coordinator.barrier(f"{name}: end")
        seconds = time.monotonic() - start
        result = self.coordinator.broadcast(f"{name}: result", result)
        self._finished[name] = {"seconds": round(seconds, 3), "result": result}
        if self.is_main:
            write_json(self.folder.ledger, {"stages": self._finished})
        self.metrics.write(name, len(self._finished), {f"seconds/{name.split('/')[0]}": seconds})
        log.info("%-28s %s%s", name, format_seconds(seconds), f"  {summary}" if (summary := _one_line(result)) else "")
        return result


def format_seconds(seconds: float) -> str:
    """Write a duration as a person reads it, such as `1m 05s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def _one_line(result: Any) -> str:
    if not isinstance(result, dict):
        return ""
    shown = {key: value for key, value in result.items() if isinstance(value, (int, float, str)) and key[0] != "_"}
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _prepare_folder(folder: RunFolder, config: Config, coordinator: Coordinator) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    if folder.config.exists():
        recorded = parse_config(yaml.safe_load(folder.config.read_text(encoding="utf-8")), origin=str(folder.config))
        changed = differences(config, recorded)
        if changed and folder.ledger.exists():  # before the first finished stage there is nothing to protect
            raise ConfigError(
                f"the run folder {folder.path} was made by another configuration ({', '.join(changed)})",
                expected="the configuration recorded in its config.yaml",
                remedy="choose another run.path, or undo the change",
            )
    elif any(entry.name != "data" for entry in folder.path.iterdir()):
        raise ConfigError(
            f"the folder {folder.path} is not empty and holds no run",
            expected="a new or empty folder, or one that a run made",
            remedy="choose another run.path",
        )
    with write_atomically(folder.config) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")
    _record_start(folder, coordinator)


def _record_start(folder: RunFolder, coordinator: Coordinator) -> None:
    path = folder.path / "starts.json"
    starts: list[Any] = read_json(path, "the record of starts") if path.exists() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "argv": sys.argv,
            "host": platform.node(),
            "num_ranks": coordinator.world_size,
            "coordinator": coordinator.kind,
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _PACKAGES} | {"faiss": _version("faiss-cpu", "faiss-gpu")},
            "git": _git_revision(),
        }
    )
    write_json(path, starts)


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _git_revision() -> str | None:
    git, here = shutil.which("git"), Path(__file__).resolve().parent
    if git is None:
        return None
    answer = subprocess.run(
        [git, "-C", os.fspath(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None

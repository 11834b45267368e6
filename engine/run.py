"""A run: its folder, its ledger of finished stages, and `Run.once`, which makes a recipe resumable.

A recipe is a list of named stages. `Run.once(name, function, ...)` meets all ranks at a barrier, skips what the ledger
has as finished, runs the function, meets again and records its result. What a stage computes lies in artifacts with
manifests and in checkpoints; the ledger only says which of them are complete. So the algorithm (`engine.ar2`) holds
no question about resuming, ranks or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from engine.config.file import differences, dump_config, load_config
from engine.config.recipe import Config
from engine.config.remaining import Now, left_of
from engine.config.timetable import Sizes, Timetable
from engine.coordination.coordinator import Coordinator
from engine.errors import ConfigError, SparringError
from engine.log import get_logger
from engine.metrics import MetricsWriter
from engine.metrics.plan import plan_of
from engine.reliability.activity import ACTIVITY
from engine.reliability.preemption import PREEMPTION
from engine.reliability.progress import follow, format_seconds
from engine.reliability.run_lock import RunLock, acquire
from engine.reliability.starts import Start, read_starts, record_start
from engine.reliability.watchdog import Watchdog, watch
from engine.results import in_form, one_line, plain_of
from shards.files import parse_record, read_json, write_atomically, write_json

if TYPE_CHECKING:  # not needed by who only looks at a run's folder
    import torch

log = get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Config)
SIZES = "sizes"
"""The stage whose result says how much data there is, where phases are counted in epochs."""

_BEATS_OF_PATIENCE = 6
"""Heartbeats that a start on another host must miss before its folder is taken over."""
_BEFORE_A_RUN = frozenset({"data", "run.lock"})
"""What may be in a folder before its first start: made-up data and this start's lock."""


class StopReached(SparringError):
    """The run has come to the stage that `run.stop_before` names."""


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
    def lock(self) -> Path:
        """Which start works in the folder."""
        return self.path / "run.lock"

    @property
    def data_check(self) -> Path:
        """What the check of the data folder found, and the sizes and times of its files then."""
        return self.path / "data_check.json"

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
    def micro_batches(self) -> Path:
        """The largest micro-batches that fit, by phase, where trials found them."""
        return self.path / "micro_batches.json"

    @property
    def results(self) -> Path:
        """TREC runs and the summary."""
        return self.path / "results"

    @property
    def summary(self) -> Path:
        """The table of systems and metrics."""
        return self.results / "summary.json"

    @property
    def fusion(self) -> Path:
        """The weights by which scores of several systems are mixed, where they were fitted."""
        return self.results / "fusion.json"

    @property
    def duel(self) -> Path:
        """Whether the game paid on dev, where there was one."""
        return self.results / "duel.json"

    def weights(self, model: str, iteration: str) -> Path:
        """Consolidated weights of `retriever` or `ranker` after an iteration."""
        return self.path / "weights" / model / iteration

    def index(self, iteration: str) -> Path:
        """Embeddings and FAISS index made by an iteration's retriever."""
        return self.path / "index" / iteration

    def candidates(self, name: str) -> Path:
        """Negatives to sample from, by the iteration whose retriever found them, or `bm25`."""
        return self.path / "candidates" / name

    def teacher_scores(self, name: str) -> Path:
        """What a ranker says of the training queries' documents."""
        return self.path / "teacher_scores" / name

    def negatives(self, name: str) -> Path:
        """What filters left of candidates, by the name of the joint pool."""
        return self.path / "negatives" / name

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
    lock: RunLock | None = None
    """What keeps other starts out of the folder; None where an earlier run is only read."""
    _ledger: Path = field(init=False)
    _of_earlier_starts: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._of_earlier_starts = frozenset(self._finished)
        self._ledger = self.folder.ledger

    @classmethod
    def open(cls, config: Config, coordinator: Coordinator, device: torch.device, *, watched: bool = False) -> Run:
        """Open or make the run folder, and refuse one that another configuration made or another start works in.

        Args:
            config: The resolved configuration.
            coordinator: Barriers between the ranks.
            device: Where this rank's models run.
            watched: Write heartbeats, and end this process where a rank is lost; for a process that does nothing else.

        Raises:
            ConfigError: Another start works in the folder; or it was begun by a configuration or by code that differs
                in what is computed, and `run.force_resume` is not set.
        """
        folder, settings = RunFolder(config.run.path.absolute()), config.run
        nonce = coordinator.only_rank_zero("open run folder", lambda: _take_folder(folder, config, coordinator))
        lock = RunLock(folder.lock, nonce)
        if watched:
            watch(
                Watchdog(
                    folder.path,
                    lock,
                    coordinator.rank,
                    coordinator.world_size,
                    interval_seconds=settings.heartbeat_seconds,
                    timeout_seconds=settings.timeout_seconds,
                    speaks_for_host=coordinator.is_first_of_host,
                )
            )
        writer = MetricsWriter(folder.path, active=coordinator.rank == 0, plan=plan_of(config))
        run = cls(config, folder, coordinator, device, writer, _read_ledger(folder.ledger), lock=lock)
        if watched:
            follow(run.outlook)
        return run

    @classmethod
    def reopen(cls, path: Path, coordinator: Coordinator, device: torch.device) -> Run:
        """Open the folder of an earlier run to use what it made; nothing of it is changed.

        Raises:
            ConfigError: The folder holds no run.
        """
        folder = RunFolder(path.absolute())
        if not folder.config.exists():
            raise ConfigError(f"{path} holds no run", expected="a folder with a config.yaml that a run wrote")
        config = load_config(folder.config)
        silent = MetricsWriter(folder.path, active=False)
        run = cls(config, folder, coordinator, device, silent, _read_ledger(folder.ledger))
        if (sizes := run.result_of(SIZES, Sizes)) is not None:
            run.size(sizes)
        return run

    def keep_ledger_in(self, folder: RunFolder) -> None:
        """Record stages in a folder of their own from now on, such as an evaluation's: the run's ledger is its own."""
        self._ledger, self._finished = folder.ledger, _read_ledger(folder.ledger)
        self._of_earlier_starts = frozenset(self._finished)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.coordinator.rank == 0

    @property
    def timetable(self) -> Timetable:
        """What the recipe trains, on what, for how long."""
        return self.config.timetable

    def recipe(self, kind: type[C]) -> C:
        """Return the configuration as an algorithm's own, with the sections of its phases.

        Args:
            kind: The algorithm's recipe.

        Raises:
            ConfigError: The run is of another recipe.
        """
        if not isinstance(self.config, kind):
            raise ConfigError(f"the run is of the recipe {self.config.recipe}", expected=f"one for {kind.algorithm}")
        return self.config

    def size(self, sizes: Sizes) -> None:
        """Let phases that are counted in epochs know how much data there is."""
        self.config = self.config.sized(sizes)

    def outlook(self, per_second: float) -> str:
        """Tell what the recipe still takes, such as `about 3h 20m left`; empty where nothing was measured.

        Args:
            per_second: Units a second of the counter that runs.
        """
        if self.config.counts_epochs and not self.is_finished(SIZES):
            return ""
        left = left_of(self.config, self._finished, Now(ACTIVITY.stage, ACTIVITY.done, ACTIVITY.total, per_second))
        return "" if left is None else left.told(format_seconds)

    def iterations(self) -> range:
        """The iterations of the game, counted from 1; 0 is the warm-up."""
        return range(1, self.timetable.iterations + 1)

    def is_finished(self, name: str) -> bool:
        """Whether a stage is complete according to the ledger."""
        return name in self._finished

    def result_of(self, name: str, kind: type[R]) -> R | None:
        """Return the recorded result of a stage; None where it is not finished.

        Args:
            name: The stage's name.
            kind: What its function returns.

        Raises:
            ArtifactError: The ledger holds another form.
        """
        if name not in self._finished:
            return None
        return parse_record(self._finished[name]["result"], kind, f"the result of {name} in {self._ledger}")

    def forget(self, names: Sequence[str]) -> None:
        """Let finished stages run again, since what they left is lost; the same names on all ranks."""
        for name in names:
            del self._finished[name]
        if self.is_main:
            write_json(self._ledger, {"stages": self._finished})

    def once(self, name: str, function: Callable[Concatenate[Stage, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a stage unless an earlier start finished it.

        Args:
            name: Unique name of the stage, such as `retriever/3`.
            function: Takes a `Stage` and the given arguments; its result must be JSON, or a frozen dataclass that its
                annotation names. A dataclass may have a method `shown`, which returns what the log tells of it, by
                name; otherwise its numbers and texts are told, but for fields with the metadata `{"shown": False}`.

        Returns:
            The function's result on rank 0, or the recorded one.

        Raises:
            CoordinationError: A rank did not come to the barrier before or after the stage, or another start has
                taken the folder over.
            ArtifactError: The recorded result has another form than the function's.
            Preempted: The run was asked to stop.
            StopReached: It is the one before which the run ends.
        """
        if name in self._finished:
            if name in self._of_earlier_starts:
                log.info("%-28s finished earlier, skipped", name)
            return in_form(function, self._finished[name]["result"], name)
        if name == self.config.run.stop_before:
            raise StopReached(
                f"ended before {name}, as run.stop_before says; the same command without it goes on from there"
            )
        if any(self.coordinator.gather(f"{name}: start", PREEMPTION.requested)):
            raise PREEMPTION.stop_here(f"the start of {name}")
        start = time.monotonic()
        with ACTIVITY.in_stage(name):
            result = function(Stage(self, name), *args, **kwargs)
            self.coordinator.barrier(f"{name}: end")
        seconds = time.monotonic() - start
        plain = self.coordinator.broadcast(f"{name}: result", plain_of(result))
        result = in_form(function, plain, name)
        self._finished[name] = {"seconds": round(seconds, 3), "result": plain}
        if self.lock is not None:
            self.lock.require()
        if self.is_main:
            write_json(self._ledger, {"stages": self._finished})
        self.metrics.write(name, len(self._finished), {f"seconds/{name.split('/')[0]}": seconds})
        log.info("%-28s %s%s", name, format_seconds(seconds), f"  {summary}" if (summary := one_line(result)) else "")
        return result


def _read_ledger(path: Path) -> dict[str, Any]:
    return dict(read_json(path, "the ledger of finished stages")["stages"]) if path.exists() else {}


def _take_folder(folder: RunFolder, config: Config, coordinator: Coordinator) -> str:
    """Lock the folder before anything in it is touched, and return the lock's nonce."""
    folder.path.mkdir(parents=True, exist_ok=True)
    patience = _BEATS_OF_PATIENCE * config.run.heartbeat_seconds
    lock = acquire(folder.lock, num_ranks=coordinator.world_size, patience_seconds=patience)
    try:
        _prepare_folder(folder, config, coordinator, lock)
    except BaseException:
        lock.release()
        raise
    return lock.nonce


def _prepare_folder(folder: RunFolder, config: Config, coordinator: Coordinator, lock: RunLock) -> None:
    forced: list[str] = []
    starts = read_starts(folder.path)
    if folder.config.exists():
        recorded = load_config(folder.config)
        if folder.ledger.exists():  # before the first finished stage there is nothing to protect
            code = starts[-1].code_changes() if starts else []
            forced = _require_same(folder, differences(config, recorded), code, config)
    elif any(entry.name not in _BEFORE_A_RUN and entry.name[0] != "." for entry in folder.path.iterdir()):
        raise ConfigError(
            f"the folder {folder.path} is not empty and holds no run",
            expected="a new or empty folder, or one that a run made",
            remedy="choose another run.path",
        )
    with write_atomically(folder.config) as temporary:
        temporary.write_text(dump_config(config), encoding="utf-8")
    (folder.path / "stop").unlink(missing_ok=True)  # a request to an earlier start
    record_start(folder.path, Start.now(lock.nonce, coordinator.world_size, coordinator.kind, forced))


def _require_same(folder: RunFolder, changed: list[str], code: list[str], config: Config) -> list[str]:
    """Refuse to go on with what another configuration or other code began; return what was forced."""
    if config.run.force_resume:
        for change in changed + code:
            log.warning("forced to go on although %s", change)
        return changed + code
    force = "or go on all the same by run.force_resume=true, which is recorded in starts.json"
    if changed:
        raise ConfigError(
            f"the run folder {folder.path} was made by another configuration ({', '.join(changed)})",
            expected="the configuration recorded in its config.yaml",
            remedy=f"choose another run.path, or undo the change, {force}",
        )
    if code:
        raise ConfigError(
            f"the run folder {folder.path} was made by other code ({', '.join(code)})",
            expected="the versions of its last start in starts.json",
            remedy=f"go back to them, choose another run.path, {force}",
        )
    return []

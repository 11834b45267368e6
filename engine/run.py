"""A run: its folder, its ledger of finished stages, and `Run.once`, which makes a recipe resumable.

A recipe is a list of named stages. `Run.once(name, function, ...)` meets all ranks at a barrier, skips what the ledger
has as finished, runs the function, meets again and records its result. What a stage computes lies in artifacts with
manifests and in checkpoints; the ledger only says which of them are complete. So the algorithm (`engine.ar2`) holds
no question about resuming, ranks or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.config.remaining import Now, left_of
from engine.config.timetable import Sizes, Timetable
from engine.coordination.coordinator import Coordinator
from engine.errors import ConfigError, SparringError
from engine.log import get_logger
from engine.metrics import KeptMetrics, MetricsWriter, kept_lines
from engine.metrics.plan import plan_of
from engine.reliability.activity import ACTIVITY
from engine.reliability.preemption import PREEMPTION
from engine.reliability.progress import follow, format_seconds, tell_outlook
from engine.reliability.run_folder import RunFolder, take_folder
from engine.reliability.run_lock import RunLock
from engine.reliability.watchdog import Watchdog, watch
from engine.results import in_form, kept_shares, one_line, plain_of, read_ledger
from shards.errors import listed
from shards.files import parse_record, write_json

if TYPE_CHECKING:  # not needed by who only looks at a run's folder
    import torch

__all__ = ["SIZES", "Run", "RunFolder", "Stage", "StopReached"]

log = get_logger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Config)
SIZES = "sizes"
"""The stage whose result says how much data there is, where phases are counted in epochs."""


class StopReached(SparringError):
    """The run has come to the stage that `run.stop_before` names."""


@dataclass(frozen=True, slots=True)
class Refresher:
    """A device on which a process beside the ranks works.

    Attributes:
        device: As torch calls it in that process.
        environ: Variables that the process has besides its rank's, such as those that show it the device.
        cores: Of the processor, that it may use; none for its rank's own.
    """

    device: str
    environ: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


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
    companion_command: tuple[str, ...] = ()
    """Words that start a process which opens this run beside it (`engine.refresh.companion`); its order comes last."""
    refreshers: tuple[Refresher, ...] = ()
    """Devices of this host that are kept for refreshes beside training, on the first rank of each host."""
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
        nonce = coordinator.only_rank_zero(
            "open run folder",
            lambda: take_folder(folder, config, num_ranks=coordinator.world_size, kind=coordinator.kind),
        )
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
        run = cls(config, folder, coordinator, device, writer, read_ledger(folder.ledger), lock=lock)
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
        run = cls(config, folder, coordinator, device, silent, read_ledger(folder.ledger))
        if (sizes := run.result_of(SIZES, Sizes)) is not None:
            run.size(sizes)
        run.learn_from_refreshes()
        return run

    @classmethod
    def beside(cls, folder: RunFolder, ledger: Path, coordinator: Coordinator, device: torch.device, nonce: str) -> Run:
        """Open a run that a start works in a second time, for what its ranks' companions do.

        Args:
            folder: Of the run.
            ledger: Takes the stages that are done here; the run's own is its ranks'.
            coordinator: Between the companions.
            device: Of this one's rank.
            nonce: Of the start; once another has the folder, nothing is recorded any more.
        """
        metrics = KeptMetrics(ledger.with_name("metrics.jsonl"), active=coordinator.rank == 0)
        finished = read_ledger(folder.ledger) | read_ledger(ledger)
        run = cls(load_config(folder.config), folder, coordinator, device, metrics, finished)
        run.lock, run._ledger = RunLock(folder.lock, nonce), ledger
        if (sizes := run.result_of(SIZES, Sizes)) is not None:
            run.size(sizes)
        run.learn_from_refreshes()
        return run

    def adopt(self, ledger: Path) -> list[str]:
        """Record the stages that companions have finished, with what they measured; return their names.

        Args:
            ledger: Of the companions; where there is none yet, nothing is done.
        """
        read = f"stages in {ledger.parent.name}"
        found: dict[str, Any] = self.coordinator.only_rank_zero(read, lambda: read_ledger(ledger))
        new = [name for name in found if name not in self._finished]
        for name in new:
            self._finished[name] = found[name]
            log.info("%-28s %s, beside", name, format_seconds(found[name]["seconds"]))
        if new and self.is_main:
            if self.lock is not None:
                self.lock.require()
            write_json(self._ledger, {"stages": self._finished})
            for line in kept_lines(ledger.with_name("metrics.jsonl")):
                self.metrics.write(line.stage, line.step, line.values)
        return new

    def seconds_of(self, name: str) -> float:
        """Return the seconds that a finished stage took, in the start that finished it."""
        return float(self._finished[name]["seconds"])

    def keep_ledger_in(self, folder: RunFolder) -> None:
        """Record stages in a folder of their own from now on, such as an evaluation's: the run's ledger is its own."""
        self._ledger, self._finished = folder.ledger, read_ledger(folder.ledger)
        self._of_earlier_starts = frozenset(self._finished)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.coordinator.rank == 0

    @property
    def data_path(self) -> Path:
        """Where the data lie by the recipe: a user's folder, or made-up texts in the run's own."""
        return self.config.data.path or self.folder.path / "data"

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
        """Tell what the recipe still takes, such as `about 3h 20m left`; empty where nothing was measured or is left.

        Args:
            per_second: Units a second of the counter that runs; 0 where none does.
        """
        if self.config.counts_epochs and not self.is_finished(SIZES):
            return ""
        left = left_of(self.config, self._finished, Now(ACTIVITY.stage, ACTIVITY.done, ACTIVITY.total, per_second))
        return left.told(format_seconds) if left is not None and left.seconds > 0 else ""

    def learn_from_refreshes(self) -> None:
        """Let the timetable know how much refreshes have changed, where what it has depends on that."""
        self.config = self.config.with_measured(kept_shares(self._finished))

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

    def require_end_ahead(self) -> None:
        """Refuse to end before a stage that the run has behind it, or never comes to.

        Raises:
            ConfigError: `run.stop_before` is finished, or its phase has no such visit.
        """
        name, visits = self.config.run.stop_before, [visit.stage for visit in self.timetable.visits]
        if name is None:
            return
        if self.is_finished(name):
            raise ConfigError(
                f"run.stop_before is {name}, which {self.folder.path} has finished",
                expected="a stage that is to come",
                remedy="leave it out, and the run goes on to its end, or name a later one",
            )
        if name not in visits and name.partition("/")[0] in {visit.partition("/")[0] for visit in visits}:
            raise ConfigError(
                f"run.stop_before is {name}, a stage that this run does not have",
                expected=f"such as one of {listed(visits, 20)}",
                remedy="correct it, or leave it out",
            )

    def end_before(self, name: str) -> None:
        """End the run where a stage that is due is the one before which it is to end.

        Raises:
            StopReached: It is.
        """
        if name == self.config.run.stop_before and not self.is_finished(name):
            raise StopReached(
                f"ended before {name}, as run.stop_before says; the same command without it goes on from there"
            )

    def forget(self, names: Sequence[str]) -> None:
        """Let finished stages run again, since what they left is lost; the same names on all ranks."""
        for name in names:
            del self._finished[name]
        if self.is_main and names:  # where nothing is lost, nothing is written: the folder may be one to read alone
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
        self.end_before(name)
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
        if self.is_main:
            tell_outlook()
        return result

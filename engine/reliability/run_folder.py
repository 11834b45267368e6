"""The folder of a run: where everything lies in it, and how a start takes it.

A folder is taken by one start at a time, by one that computes what was begun in it and by none other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config.file import differences, dump_config, load_config
from engine.config.recipe import Config
from engine.errors import ConfigError
from engine.log import get_logger
from engine.reliability.run_lock import RunLock, acquire
from engine.reliability.starts import Start, read_starts, record_start
from shards.files import write_atomically

log = get_logger(__name__)
_BEATS_OF_PATIENCE = 6
"""Heartbeats that a start on another host must miss before its folder is taken over."""
_BEFORE_A_RUN = frozenset({"data", "run.lock"})
"""What may be in a folder before its first start: made-up data and this start's lock."""


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
    def beside(self) -> Path:
        """What runs beside a phase of training keeps here until it is over (`engine.refresh.beside`)."""
        return self.path / "beside"

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
    def encode_batches(self) -> Path:
        """The tokens that devices encode at once, by model, where trials found them."""
        return self.path / "encode_batches.json"

    @property
    def searches(self) -> Path:
        """What hosts exchange while they search together for a measurement; gone after it."""
        return self.path / "searches"

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
        """Negatives to sample from, by the iteration whose retriever found them, or `bm25`.

        Those that were scored anew, such as `000@001`, lie apart: they are not what their weights have found.
        """
        return self.path / ("rescored" if "@" in name else "candidates") / name

    def teacher_scores(self, name: str) -> Path:
        """What a ranker says of the training queries' documents."""
        return self.path / "teacher_scores" / name

    def negatives(self, name: str) -> Path:
        """What filters left of candidates, by the name of the joint pool."""
        return self.path / "negatives" / name

    def export(self, model: str) -> Path:
        """What other libraries load."""
        return self.path / "export" / model


def take_folder(folder: RunFolder, config: Config, *, num_ranks: int, kind: str) -> str:
    """Lock the folder before anything in it is touched, and return the lock's nonce; on rank 0 alone.

    Args:
        folder: Made if missing.
        config: The resolved configuration, which is written into it.
        num_ranks: Of this start.
        kind: How its ranks reach each other.

    Raises:
        ConfigError: Another start works in it; it holds something else than a run; or it was begun by a configuration
            or by code that differs in what is computed, and `run.force_resume` is not set.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    patience = _BEATS_OF_PATIENCE * config.run.heartbeat_seconds
    lock = acquire(folder.lock, num_ranks=num_ranks, patience_seconds=patience)
    try:
        _prepare_folder(folder, config, num_ranks, kind, lock)
    except BaseException:
        lock.release()
        raise
    return lock.nonce


def _prepare_folder(folder: RunFolder, config: Config, num_ranks: int, kind: str, lock: RunLock) -> None:
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
    record_start(folder.path, Start.now(lock.nonce, num_ranks, kind, forced))


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

"""A run that is reported: what its folder holds, opened without a model, an index or a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.tokenization import WrittenCorpus
from engine.errors import ConfigError
from engine.evaluation.summary import Row, read_rows
from engine.reliability.starts import Start, read_starts
from engine.run import Run
from launcher.commands.finished import open_run
from launcher.commands.report.curves import Curves, read_curves
from launcher.commands.status import FINISHED, RUNNING, SILENT, STOPPED, State, read_state
from shards.formats import open_dataset
from shards.manifest import MANIFEST_NAME
from shards.reader import CorpusShards
from shards.records import Checked, Dataset

_STATES = {
    RUNNING: "running",
    FINISHED: "finished",
    STOPPED: "not finished, and not running",
    SILENT: "running, but a rank gives no sign",
}


@dataclass(frozen=True)
class Opened:
    """One run of a report.

    Attributes:
        name: In the report.
        run: Its configuration and ledger; nothing is changed in it.
        state: What `status` knows of it.
        starts: In their order.
        rows: Of its results.
        curves: Its measurements.
        dataset: Its queries and judgements; None where they are not there.
        shards: The texts of its corpus; None where they are not there.
        lacks: What is not there, and what the report lacks for it.
    """

    name: str
    run: Run
    state: State
    starts: list[Start]
    rows: list[Row]
    curves: Curves
    dataset: Dataset | None
    shards: CorpusShards | None
    lacks: tuple[str, ...]

    @property
    def ledger(self) -> Mapping[str, Any]:
        """Finished stages with their seconds and results."""
        return self.state.ledger

    @property
    def corpus(self) -> WrittenCorpus | None:
        """What is known of the corpus; None before it is tokenised."""
        return self.run.result_of("shards", WrittenCorpus)

    @property
    def in_words(self) -> str:
        """The state."""
        return _STATES[self.state.code]

    def results_of(self, kind: str) -> dict[str, Mapping[str, Any]]:
        """Return what stages of a kind returned, such as `index`: the rest of their names -> result."""
        return {
            name.partition("/")[2]: entry["result"]
            for name, entry in self.ledger.items()
            if name.startswith(f"{kind}/") and isinstance(entry["result"], dict)
        }


class Opener:
    """Opens runs; data that several of them have are read once.

    Args:
        data: Where the data folder of the runs lies now; None for where each says.
    """

    def __init__(self, data: Path | None) -> None:
        self._data = data
        self._datasets: dict[tuple[Path, str, str], Dataset] = {}

    def open(self, name: str, path: Path) -> Opened:
        """Open a run.

        Args:
            name: In the report.
            path: Its folder.

        Raises:
            ConfigError: The folder holds no run.
            ArtifactError: A file of it is damaged.
            DataError: Its data are there and cannot be read.
        """
        state, run = read_state(path), open_run(path)
        lacks: list[str] = []
        if state.code != FINISHED:
            lacks.append(f"This run is {_STATES[state.code]}: what is here is what its folder holds by now.")
        has_rows = run.folder.summary.exists()
        dataset = self._dataset(run, lacks) if has_rows else None
        if not has_rows and run.config.learns_from_queries:
            lacks.append("Nothing was measured yet: there is no table of results.")
        return Opened(
            name,
            run,
            state,
            read_starts(run.folder.path),
            read_rows(run.folder.summary),
            read_curves(run.folder.path / "metrics.jsonl"),
            dataset,
            _shards(run, lacks) if has_rows else None,
            tuple(lacks),
        )

    def _dataset(self, run: Run, lacks: list[str]) -> Dataset | None:
        """Read queries and judgements; the corpus, which the run has found whole, is not gone through again."""
        corpus, settings = run.result_of("shards", WrittenCorpus), run.config.data
        path = self._data or run.data_path
        if self._data is not None and not path.is_dir():
            raise ConfigError(f"--data {path} is no folder", expected="the data folder of the runs")
        if corpus is None or not path.is_dir():
            lacks.append(
                f"There is no data folder {path}: without queries and judgements there are no standard errors, no "
                "tests and no examples here; --data DIR names where it lies now."
            )
            return None
        key = (path.resolve(), settings.format, corpus.dataset_sha256)
        if key not in self._datasets:
            known = Checked(fingerprint=corpus.dataset_sha256, num_documents=corpus.documents)
            needs_queries = run.config.learns_from_queries
            self._datasets[key] = open_dataset(path, settings.format, checked=known, needs_queries=needs_queries)
        return self._datasets[key]


def _shards(run: Run, lacks: list[str]) -> CorpusShards | None:
    corpus = run.result_of("shards", WrittenCorpus)
    folder = run.folder.shards if corpus is None or corpus.prepared is None else Path(corpus.prepared)
    if not (folder / MANIFEST_NAME).exists():
        lacks.append(f"There are no shards in {folder}, which hold the texts: documents are named by their ids alone.")
        return None
    return CorpusShards.open(folder)

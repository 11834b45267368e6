"""`python -m launcher evaluate RUN --data DIR --split test`: score a run's models on a data folder.

On the run's own data the rows join its summary. Another corpus is tokenised, encoded and indexed below the run folder
(`evaluations/NAME/`), where its rows and rankings go as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.config import Config
from engine.corpus import write_shards
from engine.errors import DataError
from engine.evaluate import evaluate_systems, summary_table
from engine.log import get_logger
from engine.run import Run, RunFolder, Stage
from launcher.finished import data_of, last_iteration, open_run, texts_of
from launcher.world import open_world
from shards.formats import open_dataset
from shards.records import Dataset

log = get_logger(__name__)


def evaluate_run(path: Path, data_path: Path, *, split: str, max_queries: int | None) -> None:
    """Measure BM25, zero-shot, G0, D0, G and D on a split of a data folder, and print the table.

    Args:
        path: The run folder.
        data_path: Any data folder that `data.path` could name.
        split: Split to score.
        max_queries: Size of a sample of its queries; None for all that the run's configuration allows.

    Raises:
        DataError: The data has no such split.
        ConfigError: The folder holds no run, or one without finished models.
    """
    world = open_world()
    run = open_run(path, world.coordinator, world.device)
    if max_queries is not None:
        run.config = _with_limit(run.config, max_queries)
    dataset = open_dataset(data_path)
    if not dataset.qrels.get(split):
        raise DataError(
            f"{data_path} has no judged queries in the split {split!r}",
            expected=f"one of {', '.join(dataset.qrels) or 'train, dev, test'}",
            remedy="name another split by --split",
        )
    iteration = last_iteration(run)
    own = data_of(run, iteration)
    if own.dataset.fingerprint == dataset.fingerprint:
        folder, data = run.folder, own
    else:
        folder = _folder_of(run, dataset, data_path)
        texts = texts_of(run, iteration)
        run.once(f"{folder.path.name}/shards", write_shards, dataset, texts, folder)
        data = data_of(run, iteration, dataset, folder)
    evaluate_systems(Stage(run, f"evaluate {split}"), data, folder, split, last=iteration)
    if run.is_main:
        log.info("results (%s)\n\n%s\n", folder.summary, summary_table(folder))


def _folder_of(run: Run, dataset: Dataset, data_path: Path) -> RunFolder:
    """Name a folder for another corpus by its own name and by what is in it."""
    digest = hashlib.sha256(dataset.fingerprint.encode()).hexdigest()[:8]
    return RunFolder(run.folder.path / "evaluations" / f"{data_path.absolute().name}-{digest}")


def _with_limit(config: Config, max_queries: int) -> Config:
    limits = {"max_dev_queries": max_queries, "max_test_queries": max_queries}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=limits)})

"""Opening a run that is over (or between two starts) to use what it made: search, evaluation, exports."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config.timetable import iteration_name
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.corpus import Data, ModelText, model_texts, open_data
from engine.errors import ConfigError
from engine.run import Run, RunFolder
from shards.formats import open_dataset
from shards.records import Dataset


def open_run(path: Path, coordinator: Coordinator | None = None, device: torch.device | None = None) -> Run:
    """Open a run folder without changing anything in it.

    Args:
        path: The run folder.
        coordinator: Of the processes that use it; by default a world of one.
        device: Where models are loaded; by default the GPU where there is one.

    Raises:
        ConfigError: The folder holds no run.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Run.reopen(path, coordinator or Coordinator(LocalTransport()), device)


def last_iteration(run: Run) -> int:
    """Return the newest iteration whose models are both finished.

    Raises:
        ConfigError: Not even the warm-up is.
    """
    for iteration in range(run.timetable.iterations, -1, -1):
        name = iteration_name(iteration)
        if all((run.folder.weights(model, name) / "weights.json").exists() for model in run.config.models):
            return iteration
    raise ConfigError(
        f"the run in {run.folder.path} has not finished its warm-ups",
        expected="weights of both models",
        remedy="start the run again with the same command; it goes on where it stopped",
    )


def texts_of(run: Run, iteration: int) -> dict[str, ModelText]:
    """Load the tokenizers that were saved with an iteration's weights."""
    name = iteration_name(iteration)
    return model_texts(run.config, {model: run.folder.weights(model, name) for model in run.config.models})


def data_of(run: Run, iteration: int, dataset: Dataset | None = None, folder: RunFolder | None = None) -> Data:
    """Open a run's data, or another data set whose shards lie in `folder`.

    Raises:
        DataError: The data is no longer readable.
        ArtifactError: The shards are damaged, or the data changed since.
    """
    if dataset is None:
        dataset = open_dataset(run.config.data.path or run.folder.path / "data", run.config.data.format)
    return open_data(run.config, dataset, texts_of(run, iteration), folder or run.folder)

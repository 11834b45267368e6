"""`python -m launcher evaluate RUN --data DIR --split test`: score a run's models on a data folder.

On the run's own data the rows join its summary, so it must not be running. Another corpus is tokenised, encoded and
indexed below the run folder (`evaluations/NAME/`), where its rows, its rankings and its ledger go as well: that can be
done beside a running training.
"""

from __future__ import annotations

import argparse
import hashlib
from contextlib import ExitStack
from pathlib import Path

from engine.config.recipe import Config
from engine.data.corpus import write_shards
from engine.errors import DataError
from engine.evaluation.evaluate import evaluate_systems
from engine.evaluation.summary import summary_table
from engine.evaluation.systems import every_system
from engine.log import get_logger
from engine.reliability.run_lock import hold
from engine.run import Run, RunFolder, Stage
from launcher.commands.finished import data_of, last_iteration, open_run, texts_of
from launcher.terminal.arguments import positive_whole_number, typed_path
from launcher.world.opening import open_world
from shards.formats import open_dataset
from shards.records import Dataset

log = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--data", type=typed_path, required=True, metavar="DIR", help="data folder, BEIR layout or others"
    )
    parser.add_argument("--split", default="test", help="split to score (test)")
    parser.add_argument("--max-queries", type=positive_whole_number, metavar="N", help="score a sample of the queries")


def run_command(arguments: argparse.Namespace) -> None:
    """Score the models and print the table."""
    evaluate_run(arguments.run, arguments.data, split=arguments.split, max_queries=arguments.max_queries)


def evaluate_run(path: Path, data_path: Path, *, split: str, max_queries: int | None) -> None:
    """Measure BM25, zero-shot, G0, D0, G and D on a split of a data folder, and print the table.

    Args:
        path: The run folder.
        data_path: Any data folder that `data.path` could name.
        split: Split to score.
        max_queries: Size of a sample of its queries; None for all that the run's configuration allows.

    Raises:
        DataError: The data has no such split.
        ConfigError: The folder holds no run, or one without finished models; or another start writes the same folder.
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
    is_own = own.dataset.fingerprint == dataset.fingerprint
    folder = run.folder if is_own else _folder_of(run, dataset, data_path)
    with ExitStack() as stack:
        run.coordinator.only_rank_zero(f"lock {folder.path.name}", lambda: _lock(stack, folder, run))
        data = own
        if not is_own:
            run.keep_ledger_in(folder)
            run.once(f"{folder.path.name}/shards", write_shards, dataset, texts_of(run, iteration), folder)
            data = data_of(run, iteration, dataset, folder)
        systems = every_system(run.config, last=iteration)
        evaluate_systems(Stage(run, f"evaluate {split}"), data, folder, split, systems)
    if run.is_main:
        log.info("results (%s)\n\n%s\n", folder.summary, summary_table(folder))


def _lock(stack: ExitStack, folder: RunFolder, run: Run) -> None:
    """Keep other starts out of what is written: a training run out of its own folder, or a twin of this evaluation."""
    seconds = run.config.run.heartbeat_seconds
    ranks = run.coordinator.world_size
    stack.enter_context(hold(folder.lock, num_ranks=ranks, touch_seconds=seconds, patience_seconds=6 * seconds))


def _folder_of(run: Run, dataset: Dataset, data_path: Path) -> RunFolder:
    """Name a folder for another corpus by its own name and by what is in it."""
    digest = hashlib.sha256(dataset.fingerprint.encode()).hexdigest()[:8]
    return RunFolder(run.folder.path / "evaluations" / f"{data_path.absolute().name}-{digest}")


def _with_limit(config: Config, max_queries: int) -> Config:
    limits = {"max_dev_queries": max_queries, "max_test_queries": max_queries}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=limits)})

"""`python -m launcher evaluate RUN --data DIR --split test`: score a run's models on a data folder.

On the run's own data the rows join its summary, so it must not be running. Another corpus is tokenised, encoded and
indexed below the run folder (`evaluations/NAME/`), where its rows, its rankings and its ledger go as well: that can be
done beside a running training, and needs nothing of the data that the run was trained on.

    --max-queries 100                        a sample of the split; its rows stand beside those of the whole split
    --retriever 0,3 --ranker 0..3            rankers of some iterations over retrievers of others, in one table
    --set evaluation.relevance_threshold=2   other metrics, depths and grades than the recipe's
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config.file import with_overrides
from engine.config.recipe import Config
from engine.data.corpus import write_shards
from engine.errors import ConfigError, DataError
from engine.evaluation.evaluate import evaluate_systems, require_measurable_splits, retriever_of
from engine.evaluation.summary import summary_table
from engine.evaluation.systems import System, every_system, pairs_of
from engine.log import get_logger
from engine.models.weights import MARKER
from engine.refresh.refresh import drop_old_indexes
from engine.reliability.run_lock import hold
from engine.retrievers.kinds import is_built
from engine.run import Run, RunFolder, Stage
from launcher.commands.finished import data_of, fingerprint_of, last_iteration, open_run, texts_of
from launcher.commands.iterations import iterations_in
from launcher.terminal.arguments import positive_whole_number, typed_path
from launcher.world.opening import open_world
from shards.formats import open_dataset
from shards.records import Dataset

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured, as the command's words have it."""

    data: Path
    """Any data folder that `data.path` could name."""
    format: Literal["auto", "beir", "dpr", "msmarco"] = "auto"
    """Its layout, as `data.format`."""
    split: str = "test"
    """Which of its splits."""
    max_queries: int | None = None
    """Size of a sample of its queries; None for all that the run's configuration allows."""
    retrievers: str | None = None
    """Iterations, as `iterations_in` reads them; None with `rankers` for the usual systems."""
    rankers: str | None = None
    """Iterations, each over every one of the retrievers'."""
    settings: tuple[str, ...] = ()
    """`key=value` words over the recipe's `evaluation` section, and on another corpus its `index` section."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    parser.add_argument("run", type=typed_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--data", type=typed_path, required=True, metavar="DIR", help="data folder, BEIR layout or others"
    )
    parser.add_argument("--format", default="auto", choices=("auto", "beir", "dpr", "msmarco"), help="its layout")
    parser.add_argument("--split", default="test", help="split to score (test)")
    parser.add_argument(
        "--max-queries",
        type=positive_whole_number,
        metavar="N",
        help="score a sample of the queries, beside the others",
    )
    parser.add_argument("--retriever", metavar="T", help="retrievers of these iterations: 0, 0,3, 0..3, last or all")
    parser.add_argument("--ranker", metavar="T", help="rankers of these iterations, over each of these retrievers")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the sections evaluation and, on another corpus, index: evaluation.metrics=[R@10,MRR@10]",
    )


def run_command(arguments: argparse.Namespace) -> None:
    """Score the models and print the table."""
    asked = Asked(
        *(arguments.data, arguments.format, arguments.split, arguments.max_queries),
        *(arguments.retriever, arguments.ranker, tuple(arguments.set)),
    )
    evaluate_run(arguments.run, asked)


def evaluate_run(path: Path, asked: Asked) -> None:
    """Measure a run's systems on a split of a data folder, and print the table.

    Args:
        path: The run folder.
        asked: What is measured; without iterations BM25, zero-shot, G0, D0, G and D.

    Raises:
        DataError: The data has no such split, or no judgement in it reaches the threshold of relevance.
        ConfigError: The folder holds no run, or one without finished models; a word is no setting of an evaluation; an
            iteration is not finished; or another start writes the same folder.
    """
    world = open_world()
    run = open_run(path, world.coordinator, world.device)
    last = last_iteration(run)
    run.config = _settings(run.config, asked)
    groups = _systems(run, asked, last)
    dataset = open_dataset(asked.data, asked.format)
    is_own = dataset.fingerprint == fingerprint_of(run)
    if is_own:
        _require_no_other_index(asked)
    if not dataset.qrels.get(asked.split):
        raise DataError(
            f"{asked.data} has no judged queries in the split {asked.split!r}",
            expected=f"one of {', '.join(dataset.qrels) or 'train, dev, test'}",
            remedy="name another split by --split",
        )
    require_measurable_splits(run.config, dataset, [asked.split])
    folder = run.folder if is_own else _folder_of(run, dataset, asked.data)
    with ExitStack() as stack:
        run.coordinator.only_rank_zero(f"lock {folder.path.name}", lambda: _lock(stack, folder, run))
        if not is_own:
            run.keep_ledger_in(folder)
            run.once(f"{folder.path.name}/shards", write_shards, dataset, texts_of(run, last), folder)
        data = data_of(run, last, dataset, folder)
        for systems in groups:
            _forget_what_is_lost(run, folder, systems)
            evaluate_systems(
                Stage(run, f"evaluate {asked.split}"), data, folder, asked.split, systems, asked.max_queries
            )
            run.coordinator.only_rank_zero("drop indexes", lambda: drop_old_indexes(run, folder, last))
    if run.is_main:
        log.info("results (%s)\n\n%s\n", folder.summary, summary_table(folder))


def _settings(config: Config, asked: Asked) -> Config:
    """Return the run's configuration with what the command's words change of it."""
    for word in asked.settings:
        if not word.startswith(("evaluation.", "index.")):
            raise ConfigError(
                f"--set {word} would change what the run has computed already",
                expected="settings of the section evaluation, and on another corpus of index",
                remedy="leave the word out; a recipe with it is another run",
            )
    words = list(asked.settings)
    if asked.max_queries is not None:
        words += [f"evaluation.max_{split}_queries={asked.max_queries}" for split in ("dev", "test")]
    return with_overrides(config, words)


def _require_no_other_index(asked: Asked) -> None:
    for word in asked.settings:
        if word.startswith("index."):
            raise ConfigError(
                f"--set {word} would replace the index of the run's own data",
                expected="settings of the section index only for another corpus",
                remedy="leave the word out",
            )


def _systems(run: Run, asked: Asked, last: int) -> list[list[System]]:
    """Return what is measured, in groups that each need the index of one retriever, or those that are kept."""
    if asked.retrievers is None and asked.rankers is None:
        groups = [every_system(run.config, last=last)]
    else:
        retrievers = iterations_in(asked.retrievers or "last", last=last, option="--retriever")
        rankers = iterations_in(asked.rankers or "last", last=last, option="--ranker")
        groups = pairs_of(run.config, retrievers, rankers)
    for weights in (system.weights for systems in groups for system in systems if system.weights):
        folder = run.folder.weights(weights.model, weights.state)
        if not (folder / MARKER).exists():
            raise ConfigError(
                f"there are no weights of {weights.model} {weights.state} in {folder}",
                expected="the weights of every system that is measured",
                remedy="name other iterations by --retriever and --ranker, leave zero-shot out by "
                "--set evaluation.zero_shot=false, or restore the folder",
            )
    return groups


def _forget_what_is_lost(run: Run, folder: RunFolder, systems: Sequence[System]) -> None:
    """Let indexes be built again that are older than those kept, or of other settings than now."""
    prefix = "" if folder == run.folder else f"{folder.path.name}/"
    choices = [retriever_of(system) for system in systems if system.over is None and system.weights]

    def lost() -> list[str]:
        return [run.timetable.artifact(one.trained) for one in choices if not is_built(run, folder, one)]

    gone = run.coordinator.only_rank_zero("look for indexes", lost)
    names = [f"{prefix}{stage}/{state}" for state in gone for stage in ("encode", "index")]
    run.forget([name for name in names if run.is_finished(name)])


def _lock(stack: ExitStack, folder: RunFolder, run: Run) -> None:
    """Keep other starts out of what is written: a training run out of its own folder, or a twin of this evaluation."""
    seconds = run.config.run.heartbeat_seconds
    ranks = run.coordinator.world_size
    stack.enter_context(hold(folder.lock, num_ranks=ranks, touch_seconds=seconds, patience_seconds=6 * seconds))


def _folder_of(run: Run, dataset: Dataset, data_path: Path) -> RunFolder:
    """Name a folder for another corpus by its own name and by what is in it."""
    digest = hashlib.sha256(dataset.fingerprint.encode()).hexdigest()[:8]
    return RunFolder(run.folder.path / "evaluations" / f"{data_path.absolute().name}-{digest}")

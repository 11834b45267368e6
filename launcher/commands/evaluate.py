"""`python -m launcher evaluate RUN --split test`: score a run's models on a data folder.

On the run's own data the rows join its summary, so it must not be running. Another corpus is tokenised, encoded and
indexed below the run folder (`evaluations/NAME/`), where its rows, its rankings and its ledger go as well: that can be
done beside a running training, and needs nothing of the data that the run was trained on.

    --data DIR                               another data folder, or where the run's own lies now
    --max-queries 100                        a sample of the split; its rows stand beside those of the recipe's queries
    --set evaluation.max_dev_queries=null    all of dev, where the recipe has a sample; likewise beside
    --retriever 0,3 --ranker 0..3            rankers of some iterations over retrievers of others, in one table
    --retriever all --ranker none            retrievers alone: minutes, where rankers take hours
    --candidates bm25 --depth 1000           rankers over the top 1000 of BM25
    --candidates top1000.dev                 rankers over candidates in a file (qid, docid, query, passage)
    --set evaluation.relevance_threshold=2   other metrics, depths and grades than the recipe's
    --set evaluation.fuse=true               a mixture of all systems' scores too, its weights fitted on --split dev
"""

from __future__ import annotations

import argparse
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config.recipe import Config
from engine.config.text import absolute_path
from engine.data.candidate_sets import CandidateSets, read_candidate_sets
from engine.data.corpus import Data, sample_queries, write_shards
from engine.errors import ConfigError, DataError
from engine.evaluation.candidates import evaluate_candidates
from engine.evaluation.chosen import best_iteration
from engine.evaluation.evaluate import evaluate_systems, require_measurable_splits, split_queries
from engine.evaluation.fusion import (
    DEV,
    evaluate_fused,
    fit_on_dev,
    fusable_queries,
    fusion_of,
    read_fusion,
    require_fusable,
)
from engine.evaluation.mixture import fitted_system
from engine.evaluation.summary import summary_table
from engine.evaluation.systems import BM25, CANDIDATES, System, every_system, fused_system, pairs_of, system_of
from engine.log import get_logger, is_bold
from engine.models.weights import MARKER
from engine.refresh.refresh import drop_old_indexes
from engine.run import Run, RunFolder, Stage
from launcher.commands.finished import (
    change_settings,
    data_of,
    dataset_of,
    fingerprint_of,
    keep_others_out,
    last_iteration,
    open_run,
    require_search,
    texts_of,
)
from launcher.commands.iterations import rankers_in, states_in
from launcher.world.opening import open_world
from shards.formats import open_dataset
from shards.records import Dataset

log = get_logger(__name__)
_BM25 = "bm25"
"""The word for the candidates that BM25 finds; a file of that name is `./bm25`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured, as the command's words have it."""

    data: Path | None = None
    """Any data folder that `data.path` could name; None for the run's own."""
    format: Literal["auto", "beir", "dpr", "msmarco"] = "auto"
    """Its layout, as `data.format`; the run's own has that of the recipe."""
    split: str = "test"
    """Which of its splits."""
    max_queries: int | None = None
    """Size of a sample of its queries; None for as many as the run's configuration allows."""
    retrievers: str | None = None
    """Iterations, as `iterations_in` reads them; None with `rankers` for the usual systems."""
    rankers: str | None = None
    """Iterations, each over every one of the retrievers'; or `none`, for retrievers alone."""
    candidates: str | None = None
    """What the rankers re-order in place of what retrievers find: `bm25`, or a file of candidates."""
    depth: int | None = None
    """Documents of a query that a retriever finds and rankers re-order; None for the recipe's numbers."""
    settings: tuple[str, ...] = ()
    """`key=value` words over the recipe's `evaluation` section, and on another corpus its `index` section."""


def run_command(arguments: argparse.Namespace) -> None:
    """Score the models and print the table."""
    asked = Asked(
        data=arguments.data,
        format=arguments.format,
        split=arguments.split,
        max_queries=arguments.max_queries,
        retrievers=arguments.retriever,
        rankers=arguments.ranker,
        candidates=arguments.candidates,
        depth=arguments.depth,
        settings=tuple(arguments.set),
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
    require_search(run)
    last = last_iteration(run)
    best = best_iteration(run, last)  # by the recipe's metrics, whatever is measured now
    recipe = run.config
    change_settings(run, _words(asked))
    taken = last if run.config.evaluation.iteration == "last" else best
    given = None if asked.candidates in (None, _BM25) else absolute_path(asked.candidates or "")
    groups = _over_candidates(run, asked, given, taken) if asked.candidates else _systems(run, asked, taken)
    dataset = _dataset(run, asked)
    is_own = dataset.fingerprint == fingerprint_of(run)
    if is_own:
        _require_no_other_index(asked)
    folder = run.folder if is_own else _folder_of(run, dataset)
    sample = _sample(run.config, recipe, dataset, asked.split)
    with ExitStack() as stack:
        run.coordinator.only_rank_zero(f"lock {folder.path.name}", lambda: keep_others_out(stack, folder, run))
        if not is_own:
            run.keep_ledger_in(folder)
            run.once(f"{folder.path.name}/shards", write_shards, dataset, texts_of(run, last), folder)
        data, stage = data_of(run, last, dataset, folder), Stage(run, f"evaluate {asked.split}")
        fused, fits = _fused(run, recipe, dataset, asked, taken, is_own)
        for systems in groups:
            if given is not None:
                sets = _candidates(run, data, asked.split, given)
                evaluate_candidates(stage, data, folder, asked.split, sets, systems, sample)
                continue
            evaluate_systems(stage, data, folder, asked.split, systems, sample)
            if fused is not None and fits:
                fit_on_dev(stage, data, fused, sample)
            elif fused is not None:
                evaluate_fused(stage, data, folder, asked.split, fused, sample)
            run.coordinator.only_rank_zero("drop indexes", lambda: drop_old_indexes(run, folder, last, taken))
    if run.is_main:
        log.info("results (%s)\n\n%s\n", folder.summary, summary_table(folder, bold=is_bold()))


def _dataset(run: Run, asked: Asked) -> Dataset:
    """Open the data that are measured on, the run's own where no others are named.

    Raises:
        DataError: They have no such split.
    """
    dataset = open_dataset(asked.data, asked.format) if asked.data else dataset_of(run)
    if not dataset.qrels.get(asked.split):
        raise DataError(
            f"{dataset.path} has no judged queries in the split {asked.split!r}",
            expected=f"one of {', '.join(dataset.qrels) or 'train, dev, test'}",
            remedy="name another split by --split",
        )
    require_measurable_splits(run.config, dataset, [asked.split])
    return dataset


def _words(asked: Asked) -> list[str]:
    """Return what the command's words change of the run's configuration."""
    for word in asked.settings:
        if not word.startswith(("evaluation.", "index.")):
            raise ConfigError(
                f"--set {word} would change what the run has computed already",
                expected="settings of the section evaluation, and on another corpus of index",
                remedy="leave the word out; a recipe with it is another run",
            )
    words = list(asked.settings)
    if asked.depth is not None:
        words += [f"evaluation.{key}={asked.depth}" for key in ("depth", "rerank_depth")]
    if asked.max_queries is not None:
        words += [f"evaluation.max_{split}_queries={asked.max_queries}" for split in ("dev", "test")]
    return words


def _require_no_other_index(asked: Asked) -> None:
    for word in asked.settings:
        if word.startswith("index."):
            raise ConfigError(
                f"--set {word} would replace the index of the run's own data",
                expected="settings of the section index only for another corpus",
                remedy="leave the word out",
            )


def _systems(run: Run, asked: Asked, taken: int) -> list[list[System]]:
    """Return what is measured, in groups that each need the index of one retriever, or those that are kept."""
    if asked.retrievers is None and asked.rankers is None:
        groups = [every_system(run.config, taken=taken)]
    else:
        retrievers = states_in(run, asked.retrievers, rankers=False, option="--retriever", taken=taken)
        rankers = rankers_in(run, asked.rankers, taken=taken)
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


def _sample(config: Config, recipe: Config, dataset: Dataset, split: str) -> int | None:
    """Return how many queries are measured, where they are others than the recipe measures; None for these.

    Whichever word says so, and whether they are fewer or more: their rows and rankings stand beside the recipe's.
    """
    measured, usual = (_num_queries(one, dataset, split) for one in (config, recipe))
    return None if measured == usual else measured


def _num_queries(config: Config, dataset: Dataset, split: str) -> int:
    return len(sample_queries(dataset, split, config.evaluation.most_queries(split), config.run.seed))


def _fused(
    run: Run, recipe: Config, dataset: Dataset, asked: Asked, taken: int, is_own: bool
) -> tuple[System | None, bool]:
    """Return the mixture beside the usual systems, where the settings ask for it, with what it needs looked at.

    Returns:
        It, and whether its weights are fitted here, or those are taken that were fitted before.
    """
    usual = asked.retrievers is None and asked.rankers is None and asked.candidates is None
    if not (usual and run.config.evaluation.fuse):
        return None, False
    system = fitted_system(run.folder, run.config, taken=taken)
    if is_own and asked.split == DEV and _fits(run, recipe, dataset, system):
        require_fusable(run.config, dataset)
        return fused_system(run.config, taken=taken), True
    read_fusion(run, system)
    return system, False


def _fits(run: Run, recipe: Config, dataset: Dataset, system: System) -> bool:
    """Tell whether the weights of a mixture are fitted to the dev queries that are measured.

    They are to those of the recipe, and to more; but to no fewer than the present weights of the same models were
    fitted to.
    """
    if _num_queries(run.config, dataset, DEV) < _num_queries(recipe, dataset, DEV):
        return False
    fusion, num_judged = fusion_of(run, system), len(fusable_queries(run.config, dataset))
    if fusion is None or fusion.num_queries <= num_judged:
        return True
    if run.is_main:
        log.info(
            "the mixture keeps the weights that were fitted on %d queries of dev, more than these %d; "
            "--set evaluation.max_dev_queries=null fits to all",
            *(fusion.num_queries, num_judged),
        )
    return False


def _over_candidates(run: Run, asked: Asked, given: Path | None, taken: int) -> list[list[System]]:
    """Return rankers over what BM25 finds, or over candidates in a file, which all are re-ranked."""
    if asked.retrievers is not None or (given is not None and asked.depth is not None):
        word = "--retriever" if asked.retrievers is not None else "--depth"
        raise ConfigError(
            f"{word} says nothing about the candidates in {asked.candidates}",
            expected="--candidates FILE, all of which are re-ranked, or --candidates bm25 with --depth",
            remedy=f"leave {word} out",
        )
    if given is None and not run.config.bm25.enabled:
        raise ConfigError(
            f"--candidates {_BM25}, but bm25.enabled is false in {run.folder.path}",
            expected="a run with BM25, or a file of candidates",
            remedy="name a file, or leave --candidates out: rankers then re-order what the run's own retrievers find",
        )
    first = System("BM25", BM25, None) if given is None else System(given.name, CANDIDATES, None)
    states = rankers_in(run, asked.rankers, taken=taken)
    if not states:
        raise ConfigError(
            f"no ranker is named that could re-order --candidates {asked.candidates}",
            expected="a run with a trained ranker, and --ranker without the word none",
            remedy="leave --candidates out: the run's retrievers search by themselves",
        )
    return [[first, *(system_of(run.config, weights, first, names_over=True) for weights in states)]]


def _candidates(run: Run, data: Data, split: str, path: Path) -> CandidateSets:
    """Read candidates on every rank, and let all of them be re-ranked."""
    queries = split_queries(run, data, split)
    with run.coordinator.agreement(f"read {path.name}"):
        sets = read_candidate_sets(path, queries, data.shards.docids.index_of)
    log.info("%s", sets.told(path))
    change_settings(run, [f"evaluation.{key}={max(1, sets.largest)}" for key in ("depth", "rerank_depth")])
    return sets


def _folder_of(run: Run, dataset: Dataset) -> RunFolder:
    """Name a folder for another corpus by its own name and by what is in it."""
    digest = hashlib.sha256(dataset.fingerprint.encode()).hexdigest()[:8]
    return RunFolder(run.folder.path / "evaluations" / f"{dataset.path.absolute().name}-{digest}")

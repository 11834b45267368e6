"""`sparring compare NAME=RUN,RUN... ...`: settings side by side, each of one run or of several seeds.

    python -m launcher compare ar2=runs/a,runs/a43,runs/a44 ance=runs/b,runs/b43,runs/b44 --against ance
    python -m launcher compare runs/sweep --metric R@1,R@5,entropy@15     # a folder of runs; the names are the settings
    python -m launcher compare n1=runs/n1 n15=runs/n15 --efficiency       # seconds by kind of work, a step's time

What the runs have measured and recorded themselves is read: no model is loaded. Printed are what each leaves behind
(AR2 Tables 5 and 6), the same by iteration (Figures 3 and 4), and with --efficiency what it took (Tables 4 and 8).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.config.metric_names import ANSWERED, ENTROPY, family_of
from engine.errors import ConfigError, DataError
from engine.evaluation import efficiency, variants
from engine.evaluation.figures import require_matplotlib
from engine.evaluation.pooled import Pooled
from engine.evaluation.rankings import Recorded
from engine.evaluation.recorded import (
    Recordings,
    command_that_measures,
    final_systems,
    rerank_depth_of,
    systems_by_iteration,
)
from engine.evaluation.summary import Row
from engine.evaluation.systems import System
from engine.evaluation.tables import Table
from engine.evaluation.variants import Part, Terms
from engine.log import get_logger
from engine.run import Run
from launcher.commands.comparison import publish_table, require_same_data, require_same_setting
from launcher.commands.finished import dataset_of, place_for, require_search, shards_of
from launcher.commands.run_groups import runs_in_groups
from launcher.commands.words.compare import metrics_of
from launcher.commands.words.comparison import FOLDER
from launcher.slurm.job import finished_stages, is_finished
from shards.reader import CorpusShards
from shards.records import Dataset

log = get_logger(__name__)
Groups = Mapping[str, Sequence[Run]]


def run_command(arguments: argparse.Namespace) -> None:
    """Read what was measured, and print, write and draw the comparison."""
    if not arguments.no_figure:
        require_matplotlib()
    metrics = metrics_of(arguments.metric)
    groups = runs_in_groups(arguments.runs)
    compared = arguments.against or next(iter(groups))
    if compared not in groups:
        raise ConfigError(f"--against {compared} is no name here", expected=f"one of {', '.join(groups)}")
    _require_comparable(groups, unfinished=arguments.unfinished)
    first = next(iter(groups.values()))[0]
    out = place_for(arguments.out, first.folder.path / FOLDER)
    board = out / "tensorboard" if arguments.out else first.folder.path / "tensorboard" / FOLDER
    publish = partial(_publish, out, board, draws=not arguments.no_figure)
    if arguments.efficiency:
        costs = {name: [efficiency.cost_of(run) for run in runs] for name, runs in groups.items()}
        shown, written = efficiency.efficiency_tables(costs)
        publish("efficiency", [shown], written, partial(efficiency.efficiency_figure, costs))
        if latency := efficiency.latency_of(costs):
            publish("latency", [], efficiency.rates_table(costs), partial(efficiency.latency_figure, latency))
        return
    recordings = _recordings(arguments, groups, metrics)
    terms = Terms(arguments.split, metrics, compared, first.config.run.seed)
    name = f"{arguments.split}-{metrics[0]}"
    if not arguments.unfinished:
        parts = _final_parts(recordings, groups, arguments)
        printed, written = variants.final_tables(parts, terms)
        publish(f"compare-{name}", printed, written, partial(variants.final_figure, parts, terms))
    curves = _curves(recordings, groups)
    if arguments.unfinished:
        _require_curves(curves, groups, arguments.split)
    if arguments.unfinished or len(curves) > 1:
        print()
        printed, written = variants.curve_tables(curves, terms)
        publish(f"curves-{name}", printed, written, partial(variants.curve_figure, curves, terms))


def _publish(
    out: Path,
    board: Path,
    name: str,
    printed: Sequence[Table],
    written: Table,
    draw: Callable[[], object],
    *,
    draws: bool,
) -> None:
    publish_table(out, board, name, printed, written, draw if draws else None)


def _require_comparable(groups: Groups, *, unfinished: bool) -> None:
    """Refuse runs that have no comparable numbers.

    Raises:
        ConfigError: A run answers no queries or is not finished.
    """
    by_label = {_label(name, run, runs): run for name, runs in groups.items() for run in runs}
    for label, run in by_label.items():
        require_search(run)
        if not unfinished and not is_finished(run.folder.path):
            stages = finished_stages(run.folder.path)
            raise ConfigError(
                f"{label} ({run.folder.path}) has not finished: its last stage was {stages[-1] if stages else 'none'}",
                expected="finished runs, whose last models are compared",
                remedy="let it come to its end, leave it out, or look at the curves so far by --unfinished",
            )


def _recordings(arguments: argparse.Namespace, groups: Groups, metrics: Sequence[str]) -> Recordings:
    by_label = {_label(name, run, runs): run for name, runs in groups.items() for run in runs}
    first = next(iter(by_label.values()))
    dataset = dataset_of(first, arguments.data)
    require_same_data(by_label, dataset)
    if arguments.relevance_threshold is None:
        remedy = "say from which grade a document counts as relevant by --relevance-threshold G"
        require_same_setting(by_label, "evaluation.relevance_threshold", remedy)
    if not dataset.qrels.get(arguments.split):
        raise DataError(
            f"{dataset.path} has no judged queries in the split {arguments.split!r}",
            expected=f"one of {', '.join(dataset.qrels) or 'train, dev, test'}",
            remedy="name another split by --split",
        )
    return Recordings(
        dataset,
        arguments.split,
        metrics,
        arguments.relevance_threshold or first.config.evaluation.relevance_threshold,
        num_queries=arguments.queries,
        text_of=_texts(first, dataset, arguments.split, metrics),
    )


def _texts(run: Run, dataset: Dataset, split: str, metrics: Sequence[str]) -> Callable[[str], str] | None:
    """Open the corpus for metrics by answers; none is needed for others.

    Raises:
        DataError: No query of the split has answers.
    """
    by_answers = [name for name in metrics if name != ENTROPY and family_of(name) in ANSWERED]
    if not by_answers:
        return None
    if not any(dataset.queries[qid].answers for qid in dataset.qrels[split]):
        raise DataError(
            f"no query of the split {split!r} of {dataset.path} has answers, which {', '.join(by_answers)} looks for",
            expected="queries with answers, or metrics by judgements, such as MRR@10",
            remedy="name another split by --split, or other metrics by --metric",
        )
    shards = CorpusShards.open(shards_of(run))
    return lambda docid: shards.document(shards.index_of(docid)).text


def _final_parts(recordings: Recordings, groups: Groups, arguments: argparse.Namespace) -> list[Part]:
    """Read what each setting leaves behind.

    Raises:
        ConfigError: A run has not measured its retriever, some runs of a setting have not measured what others have, or
            what plays one role has re-ordered different numbers of documents.
    """
    by_role: dict[str, list[Part]] = {}
    depths: dict[str, list[_Depth]] = {}
    for name, runs in groups.items():
        systems = [final_systems(run) for run in runs]
        for role, system in systems[0].items():
            read = [recordings.read(run, own[role]) for run, own in zip(runs, systems, strict=True)]
            if system.over is None:
                _require_all(read, runs, name, system, arguments)
            if found := [one for one in read if one is not None]:
                _require_all(read, runs, name, system, arguments)
                by_role.setdefault(role, []).append(_part(name, role, system, found, recordings.metrics))
                depths.setdefault(role, []).extend(_depths(name, runs, found))
    for own in depths.values():
        _require_one_depth(own)
    return [part for parts in by_role.values() for part in parts]


@dataclass(frozen=True, slots=True)
class _Depth:
    """How many documents of a query a system of a run has re-ordered at most; None for who searches."""

    label: str
    run: Run
    row: Row
    documents: int | None


def _depths(name: str, runs: Sequence[Run], read: Sequence[Recorded]) -> list[_Depth]:
    return [
        _Depth(_label(name, run, runs), run, one.row, rerank_depth_of(run, one.row))
        for run, one in zip(runs, read, strict=True)
    ]


def _require_one_depth(own: Sequence[_Depth]) -> None:
    """Refuse to compare systems of one role that have re-ordered different numbers of documents."""
    first = own[0]
    other = next((one for one in own if one.documents != first.documents), None)
    if other is not None:
        told = ", ".join(f"{one.label} has {one.documents}" for one in own)
        raise ConfigError(
            f"{first.row.system} on {first.row.split} was measured to different depths of re-ranking: {told}",
            expected="one number of documents that are re-ordered (evaluation.rerank_depth)",
            remedy=f"measure them to one depth, such as by: {command_that_measures(other.run, other.row)} "
            f"--set evaluation.rerank_depth={first.documents}",
        )


def _require_all(
    read: Sequence[Recorded | None],
    runs: Sequence[Run],
    name: str,
    system: System,
    arguments: argparse.Namespace,
) -> None:
    for one, run in zip(read, runs, strict=True):
        if one is None:
            sized = f" with {arguments.queries} queries" if arguments.queries else ""
            raise ConfigError(
                f"{_label(name, run, runs)} ({run.folder.path}) has no ranking of {system.name} on "
                f"{arguments.split}{sized}",
                expected="rankings of every run on one split",
                remedy=f"measure it: sparring evaluate {run.folder.path} --split "
                f"{arguments.split}" + (f" --max-queries {arguments.queries}" if arguments.queries else ""),
            )


def _curves(recordings: Recordings, groups: Groups) -> dict[int, list[Part]]:
    """Read what was measured after each iteration, where all runs of a setting have it.

    Curves of a role are of one depth of re-ranking, that of the first setting's newest iteration; what was re-ranked to
    another is left out.
    """
    points: list[tuple[int, Part, list[_Depth]]] = []
    for name, runs in groups.items():
        by_run = [systems_by_iteration(run) for run in runs]
        for role, systems in by_run[0].items():
            for iteration, system in systems.items():
                own = [one.get(role, {}).get(iteration) for one in by_run]
                read = [recordings.read(run, one) if one else None for run, one in zip(runs, own, strict=True)]
                found = [one for one in read if one is not None]
                if len(found) == len(runs):
                    part = _part(name, role, system, found, recordings.metrics)
                    points.append((iteration, part, _depths(name, runs, found)))
    newest: dict[str, int | None] = {}
    for _, part, depths in sorted(points, key=lambda point: -point[0]):
        newest.setdefault(part.role, depths[0].documents)
    curves: dict[int, list[Part]] = {}
    for iteration, part, depths in sorted(points, key=lambda point: point[0]):
        if other := [one for one in depths if one.documents != newest[part.role]]:
            log.warning(
                "%s of iteration %d is left out of the curves: %s has re-ranked %s documents of a query, and the "
                "newest iteration %s",
                *(part.system, iteration, other[0].label, other[0].documents, newest[part.role]),
            )
            continue
        curves.setdefault(iteration, []).append(part)
    return curves


def _require_curves(curves: Mapping[int, Sequence[Part]], groups: Groups, split: str) -> None:
    """Refuse to show the curves of runs that have measured no iteration yet, where nothing else is shown.

    Raises:
        ConfigError: There is no iteration that all runs of a name have measured.
    """
    if not curves:
        raise ConfigError(
            f"there are no curves of {', '.join(groups)}: on {split} no iteration is measured by all runs of a name",
            expected="runs of a recipe with iterations, the first of which is measured by the stage evaluate/0",
            remedy="see by `sparring status RUN` how far they are; without --unfinished finished runs are compared by "
            "what they leave behind",
        )


def _part(name: str, role: str, system: System, read: Sequence[Recorded], metrics: Sequence[str]) -> Part:
    """Pool the runs of a setting, for each metric those that have queries for it: a sample may be without answers.

    Raises:
        DataError: No run has one for a metric.
    """
    pooled = {}
    for metric in metrics:
        if own := [one.values[metric] for one in read if metric in one.values]:
            pooled[metric] = Pooled.of(own)
        elif metric != ENTROPY:  # of retrievers alone
            split, sought = read[0].row.split, "answers" if family_of(metric) in ANSWERED else "judgements"
            raise DataError(
                f"none of the queries of {split} that {name} was measured on has {sought}, which {metric} looks for",
                expected="queries with answers, or metrics by judgements, such as MRR@10",
                remedy=f"measure more of them by `sparring evaluate RUN --split {split} --max-queries N`, or name "
                "other metrics by --metric",
            )
    return Part(name, role, system.name, pooled)


def _label(name: str, run: Run, runs: Sequence[Run]) -> str:
    return name if len(runs) == 1 else f"{name} (seed {run.config.run.seed})"

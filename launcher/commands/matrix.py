"""`python -m launcher matrix RUN...`: every ranker of the runs over every retriever's list, in one table.

    python -m launcher matrix RUN                                    # G, D and BM25 of one run
    python -m launcher matrix bm25=runs/a joint=runs/b --depth 100   # runs by other names
    python -m launcher matrix bm25=runs/a,runs/a43 joint=runs/b,runs/b43 --against joint:R    # two seeds of each
    python -m launcher matrix RUN --retriever all --ranker 0..last --run-file SPLADE=splade.trec

The first rows are retrievers that re-rank other retrievers' lists by their own scores. Several seeds of a setting are
one row, of a query's mean over them. What was measured before is not measured again. Started with ranks
(`mpirun -n 2 python -m launcher matrix ...`), all of them share the work.

Source: R2ANKER Table 4.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial

from engine.errors import ConfigError
from engine.evaluation import figures
from engine.evaluation.contestants import Contestant, without_repetitions
from engine.evaluation.matrix import matrix_tables, transposed
from engine.evaluation.pooled import Pooled
from engine.log import get_logger
from launcher.commands.comparison import Comparison, open_comparison, run_files
from launcher.commands.iterations import states_in

log = get_logger(__name__)
Values = dict[str, dict[str, dict[str, float]]]


def run_command(arguments: argparse.Namespace) -> None:
    """Measure what has not been, and print, write and draw the matrix."""
    with open_comparison(arguments) as comparison:
        retrievers = without_repetitions(
            [
                *comparison.bm25(),
                *(
                    entrant.state(one)
                    for entrant in comparison.entrants
                    for one in states_in(entrant.run, arguments.retriever, rankers=False, option="--retriever")
                ),
                *run_files(arguments.run_file, comparison.entrants[0]),
            ]
        )
        rankers = [one for entrant in comparison.entrants for one in comparison.rankers_of(entrant)]
        rows = without_repetitions([*(one for one in retrievers if one.orders_lists), *rankers])
        names = list(dict.fromkeys(comparison.settings_of(row.label for row in rows).values()))
        if arguments.against is not None and arguments.against not in names:
            raise ConfigError(f"--against {arguments.against} is no row", expected=f"one of {', '.join(names)}")
        values = measure_matrix(comparison, arguments.split, retrievers, rows)
        _publish(comparison, arguments, values)


def measure_matrix(comparison: Comparison, split: str, retrievers: list[Contestant], rows: list[Contestant]) -> Values:
    """Measure every row over every retriever's list.

    Args:
        comparison: Of the runs.
        split: On which.
        retrievers: The columns. Run files are read first, so that one of other queries stops nothing half-way.
        rows: Retrievers and rankers.

    Returns:
        Column -> row -> query id -> metric.
    """
    contest = comparison.contests[split]
    values: Values = {one.label: {} for one in retrievers}
    finders = sorted(retrievers, key=lambda one: one.orders_lists)
    own = {finder.label: contest.list_of(finder) for finder in finders}
    for row in rows:
        others = [one for one in finders if one.identity != row.identity]
        files = dict(zip([one.label for one in others], contest.reorder(row, others), strict=True))
        for finder in finders:
            # A retriever over its own list changes nothing.
            path = files.get(finder.label, own[finder.label])
            values[finder.label][row.label] = contest.values(finder, path)
            log.info("%-28s %s over %s", f"matrix/{split}", row.label, finder.label)
    return values


def _publish(comparison: Comparison, arguments: argparse.Namespace, values: Values) -> None:
    labels = {label for own in values.values() for label in own} | values.keys()
    cells = pool_seeds(values, comparison.settings_of(labels))
    terms = comparison.contests[arguments.split].terms
    printed, written = matrix_tables(
        terms.told, cells, metric=comparison.metric, compared=arguments.against, seed=comparison.seed
    )
    means = {column: {row: one.mean for row, one in own.items()} for column, own in cells.items()}
    draw = partial(figures.heatmap, terms.told, transposed(means), comparison.metric)
    comparison.publish(f"matrix-{terms.file_name}", printed, written, draw)


def pool_seeds(values: Values, setting_of: Mapping[str, str]) -> dict[str, dict[str, Pooled]]:
    """Make one column of the seeds of a retriever, and one row of those of a re-ranker.

    Args:
        values: Column -> row -> query id -> metric, of single runs.
        setting_of: Label -> label without its seed.

    Returns:
        Column -> row -> what all runs of both come to.
    """
    runs: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for column, rows in values.items():
        own = runs.setdefault(setting_of[column], {})
        for row, by_query in rows.items():
            own.setdefault(setting_of[row], []).append(by_query)
    return {column: {row: Pooled.of(found) for row, found in own.items()} for column, own in runs.items()}

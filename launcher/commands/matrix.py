"""`python -m launcher matrix RUN...`: every ranker of the runs over every retriever's list, in one table.

    python -m launcher matrix RUN                                    # G, D and BM25 of one run
    python -m launcher matrix bm25=runs/a joint=runs/b --depth 100   # runs by other names
    python -m launcher matrix bm25=runs/a,runs/a43 joint=runs/b,runs/b43 --against joint:R    # two seeds of each
    python -m launcher matrix RUN --retriever all --ranker 0..last --run-file SPLADE=splade.trec

The first rows are retrievers that re-rank other retrievers' lists by their own scores. Several seeds of a setting are
one row, of a query's mean over them, each over its own seed's lists. What was measured before is not measured again.
Started with ranks (`mpirun -n 2 python -m launcher matrix ...`), all of them share the work.

Source: R2ANKER Table 4.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence, Set
from functools import partial

from engine.errors import ConfigError
from engine.evaluation import figures
from engine.evaluation.contestants import Contestant, without_repetitions
from engine.evaluation.matrix import Cells, Values, matrix_tables, pairs_that_count, pool_seeds, transposed
from engine.log import get_logger
from launcher.commands.comparison import Comparison, open_comparison, run_files
from launcher.commands.iterations import states_in

log = get_logger(__name__)


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
        labels, columns = [row.label for row in rows], [one.label for one in retrievers]
        of = comparison.settings_of([*columns, *labels])
        names = list(dict.fromkeys(of[label].setting for label in labels))
        if arguments.against is not None and arguments.against not in names:
            raise ConfigError(f"--against {arguments.against} is no row", expected=f"one of {', '.join(names)}")
        pairs = pairs_that_count(columns, labels, of)
        values = measure_matrix(comparison, arguments.split, retrievers, rows, pairs)
        _publish(comparison, arguments, pool_seeds(values, of))


def measure_matrix(
    comparison: Comparison,
    split: str,
    retrievers: Sequence[Contestant],
    rows: Sequence[Contestant],
    pairs: Set[tuple[str, str]],
) -> Values:
    """Measure the rows over retrievers' lists.

    Args:
        comparison: Of the runs.
        split: On which.
        retrievers: The columns. Run files are read first, so that one of other queries stops nothing half-way.
        rows: Retrievers and rankers.
        pairs: (column, row) of those that count, by their labels.
    """
    contest = comparison.contests[split]
    values: dict[str, dict[str, dict[str, float]]] = {one.label: {} for one in retrievers}
    finders = sorted(retrievers, key=lambda one: one.orders_lists)
    own = {finder.label: contest.list_of(finder) for finder in finders}
    for row in rows:
        counted = [one for one in finders if (one.label, row.label) in pairs]
        others = [one for one in counted if one.identity != row.identity]
        files = dict(zip([one.label for one in others], contest.reorder(row, others), strict=True))
        for finder in counted:
            # A retriever over its own list changes nothing.
            path = files.get(finder.label, own[finder.label])
            values[finder.label][row.label] = contest.values(finder, path)
            log.info("%-28s %s over %s", f"matrix/{split}", row.label, finder.label)
    return values


def _publish(comparison: Comparison, arguments: argparse.Namespace, cells: Cells) -> None:
    terms = comparison.contests[arguments.split].terms
    printed, written = matrix_tables(
        terms.told, cells, metric=comparison.metric, compared=arguments.against, seed=comparison.seed
    )
    means = {column: {row: one.mean for row, one in own.items()} for column, own in cells.items()}
    draw = partial(figures.heatmap, terms.told, transposed(means), comparison.metric)
    comparison.publish(f"matrix-{terms.file_name}", printed, written, draw)

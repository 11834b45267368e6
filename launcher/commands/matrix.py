"""`python -m launcher matrix RUN...`: every ranker of the runs over every retriever's list, in one table.

    python -m launcher matrix RUN                                    # G, D and BM25 of one run
    python -m launcher matrix bm25=runs/a joint=runs/b --depth 100   # runs by other names
    python -m launcher matrix RUN --retriever all --ranker 0..last --run-file SPLADE=splade.trec

The first rows are retrievers that re-rank other retrievers' lists by their own scores. What was measured before is
not measured again. Started with ranks (`mpirun -n 2 python -m launcher matrix ...`), all of them share the work.

Source: R2ANKER Table 4.
"""

from __future__ import annotations

import argparse

from engine.errors import ConfigError
from engine.evaluation import figures
from engine.evaluation.contestants import Contestant, without_repetitions
from engine.evaluation.tables import Measured, compare, matrix_tables
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
        if arguments.against is not None and arguments.against not in {row.label for row in rows}:
            raise ConfigError(
                f"--against {arguments.against} is no row", expected=f"one of {', '.join(row.label for row in rows)}"
            )
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
    columns = {column: compare(own, arguments.against, seed=comparison.seed) for column, own in values.items()}
    rows = list(next(iter(columns.values())))
    cells: dict[str, dict[str, Measured]] = {row: {column: columns[column][row] for column in columns} for row in rows}
    title = comparison.contests[arguments.split].terms.told
    printed, written = matrix_tables(title, cells, list(columns), comparison.metric, arguments.against)
    means = {row: {column: one.mean for column, one in own.items()} for row, own in cells.items()}
    name = f"matrix-{comparison.contests[arguments.split].terms.file_name}"
    comparison.publish(name, printed, written, lambda: figures.heatmap(title, means, comparison.metric))

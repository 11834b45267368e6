"""What a finished game has taught its retriever on the questions it was played on, and on those it was not.

A game raises a retriever on the questions that it draws; whether it is worth its time shows on the others. Training
questions are put into groups by what has drawn them, from the run's own order; each group and dev are searched through
the index of the warm-up's retriever (G0) and of later ones, and compared question by question. A gain that the drawn
questions have and the others have not says that more questions would help, and more steps on the same would not.

    python benchmarks/seen.py RUN [--metric MRR@10] [--queries 1500] [--data DIR]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from engine.config.timetable import Visit, WeightsOf
from engine.data.batches import rows_drawn
from engine.data.corpus import Data
from engine.evaluation.measures import query_values
from engine.evaluation.significance import randomisation_test, standard_error
from engine.retrievers.choice import Choice
from engine.retrievers.kinds import dense, is_built, open_searcher
from engine.run import Run
from launcher.commands.finished import change_settings, data_of, open_run
from shards.records import Query

WARM_UP, GAME = "warmup_retriever", "retriever/"


def groups_of(visits: Iterable[Visit], seed: int, num_queries: int) -> dict[str, NDArray[np.int64]]:
    """Return the training rows that only the game has drawn, only the warm-up, and neither."""
    of_retriever = [visit for visit in visits if visit.stage == WARM_UP or visit.stage.startswith(GAME)]
    warm = rows_drawn([visit for visit in of_retriever if visit.stage == WARM_UP], seed, num_queries)
    game = rows_drawn([visit for visit in of_retriever if visit.stage != WARM_UP], seed, num_queries)
    return {
        "drawn by the game alone": np.setdiff1d(game, warm),
        "by the warm-up alone": np.setdiff1d(warm, game),
        "by neither": np.setdiff1d(np.arange(num_queries), np.union1d(warm, game)),
    }


def retriever_of(iteration: int) -> Choice:
    """Name the retriever of an iteration."""
    return dense(WeightsOf("retriever", iteration))


def values_of(run: Run, data: Data, iteration: int, queries: Sequence[Query], qrels: Any, metric: str) -> Any:
    """Return a metric of each query [Q], of an iteration's retriever through its index."""
    searcher = open_searcher(run, data, run.folder, retriever_of(iteration))
    hits = searcher.search(queries, 100)
    ranking = {
        query.id: {
            data.shards.docids[int(one)]: float(score) for one, score in zip(own, scores, strict=True) if one >= 0
        }
        for query, own, scores in zip(queries, hits.documents_QK, hits.scores_QK, strict=True)
    }
    found = query_values(ranking, {query.id: qrels[query.id] for query in queries}, metric)
    return np.array([found[query.id] for query in queries])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of ar2 that has kept the index of G0")
    parser.add_argument("--metric", default="MRR@10")
    parser.add_argument("--queries", type=int, default=1500, help="of a group at most, drawn at random (1500)")
    parser.add_argument("--data", type=Path, help="where the run's data folder lies now")
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    if arguments.data is not None:
        change_settings(run, [f"data.path={arguments.data}"])
    data, random = data_of(run, 0), np.random.default_rng(0)
    iterations = [one for one in range(run.timetable.iterations + 1) if is_built(run, run.folder, retriever_of(one))]
    rows = []
    for name, own in groups_of(run.timetable.visits, run.config.run.seed, len(data.train.queries)).items():
        kept = np.sort(random.permutation(own)[: arguments.queries])
        rows.append((name, "train", [data.train.queries[int(row)] for row in kept]))
    rows.append(("dev", "dev", list(data.queries_of("dev", None, 1))))
    lines = []
    for name, split, queries in rows:
        if queries:
            qrels = data.dataset.qrels[split]
            values = [values_of(run, data, one, queries, qrels, arguments.metric) for one in iterations]
            lines.append(line_of(name, iterations, values))
    print(machine_line())
    print(f"\n{arguments.run}: {arguments.metric} of the retrievers by what has drawn a question\n")
    print(table(lines))


def line_of(name: str, iterations: Sequence[int], values: Sequence[Any]) -> dict[str, str]:
    """Return a line of the table: means, and the last one's difference to the first with its error and p."""
    difference = values[-1] - values[0]
    p = randomisation_test(values[-1], values[0], seed=0)
    return {
        "questions": name,
        "number": str(len(difference)),
        **{f"G{one}": f"{own.mean():.4f}" for one, own in zip(iterations, values, strict=True)},
        "the last to the first": f"{difference.mean():+.4f} ±{standard_error(difference):.4f}, p {p:.2g}",
    }


if __name__ == "__main__":
    main()

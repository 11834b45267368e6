"""What rankings of a run are worth query by query: those that `engine.evaluation.rankings` takes for its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config.metric_names import ANSWERED, JUDGED, cutoff_of, family_of
from engine.evaluation.rankings import RankingReader, Recorded, Sought, Values
from engine.evaluation.summary import Row
from launcher.commands.report.opened import Opened
from shards.reader import CorpusShards
from shards.records import Query

JUDGED_DEPTH, ANSWERED_DEPTH = 100, 20
"""Metrics that look deeper are shown without a standard error: a report reads no more of a ranking than this."""


@dataclass(frozen=True)
class Ranked:
    """A row of a run's table with what is known of its queries.

    Attributes:
        row: The row.
        path: Its ranking; None where there is none that gives the row's numbers.
        queries: That were measured; empty without a path.
        values: For the metrics that look no deeper than is read; empty without a path.
    """

    row: Row
    path: Path | None = None
    queries: tuple[Query, ...] = ()
    values: Values = field(default_factory=dict)


def read_ranked(opened: Opened, rows: Sequence[Row]) -> tuple[Ranked, ...]:
    """Return rows of a run with the values of their queries, as far as they are there.

    Args:
        opened: The run.
        rows: Of its table.

    Raises:
        DataError: A line of a ranking is damaged.
        ArtifactError: The shards are.
    """
    if opened.dataset is None:
        return tuple(map(Ranked, rows))
    shards = opened.shards
    reader = RankingReader(opened.dataset, _text_in(shards) if shards is not None else None)
    return tuple(_ranked(reader, opened, row) for row in rows)


def _ranked(reader: RankingReader, opened: Opened, row: Row) -> Ranked:
    names = [name for name in row.metrics if family_of(name) in JUDGED and cutoff_of(name) <= JUDGED_DEPTH]
    if opened.shards is not None:
        names += [name for name in row.metrics if family_of(name) in ANSWERED and cutoff_of(name) <= ANSWERED_DEPTH]
    sought, run = Sought(tuple(names), row.relevance_threshold), opened.run
    found = reader.read(run.folder.results, row, run.config.run.seed, sought) if names else None
    if isinstance(found, Recorded) and found.values:
        return Ranked(row, found.path, found.queries, found.values)
    return Ranked(row)


def _text_in(shards: CorpusShards) -> Callable[[str], str]:
    return lambda docid: shards.document(shards.index_of(docid)).text

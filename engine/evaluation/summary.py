"""`results/summary.json`: a row for each system, iteration, split and sample of its queries, and the table of them.

Numbers of different queries are no replacement for each other: a row says how many it was measured on, and takes the
place only of one with the same queries. Samples are drawn by the run's seed, so those of one size are the same queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tabulate import tabulate

from engine.evaluation.duel import Duel
from engine.evaluation.mixture import Fusion
from engine.evaluation.systems import BM25, RANKER, RETRIEVER, System, place_of_kind
from engine.run import RunFolder
from shards.files import read_record, write_json


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    system: str
    retriever: str
    """The system that searched the corpus: itself, or what a ranker's documents come from in the end."""
    iteration: int | None
    split: str
    metrics: dict[str, float]
    kind: str = ""
    """As `System.kind`."""
    over: str | None = None
    """The system whose ranking it re-orders."""
    over_iteration: int | None = None
    """Whose weights that one has; of summaries that were written without it, the row's own iteration."""
    num_queries: int | None = None
    """Queries that were measured; None in summaries that were written without it."""
    split_queries: int | None = None
    """Queries that the split has: more than were measured where these are a sample."""
    relevance_threshold: int = 1
    """Grade from which a document counted as relevant."""
    rerank_depth: int | None = None
    """Documents of a query that were re-ranked at most; None for who searches, and in summaries written without it."""

    @classmethod
    def of(
        cls,
        system: System,
        split: str,
        metrics: dict[str, float],
        *,
        num_queries: int,
        split_queries: int,
        relevance_threshold: int = 1,
        rerank_depth: int | None = None,
    ) -> Row:
        """Make the row of what was measured."""
        over = system.over
        return cls(
            system.name,
            system.first_stage.name,
            system.iteration,
            split,
            metrics,
            system.kind,
            over.name if over else None,
            over.iteration if over else None,
            num_queries,
            split_queries,
            relevance_threshold,
            rerank_depth if over else None,
        )

    def replaces(self, other: Row) -> bool:
        """Tell whether both are of the same system, weights, split, queries and notion of relevance."""
        mine, theirs = (
            (
                *(row.system, row.retriever, row.over, row.iteration, row.over_iteration),
                *(row.split, row.num_queries, row.relevance_threshold),
            )
            for row in (self, other)
        )
        return mine == theirs


def read_rows(path: Path) -> list[Row]:
    """Read a summary, or no rows where there is none yet.

    Raises:
        ArtifactError: It is damaged.
    """
    rows = read_record(path, list[Row], "the summary of results") if path.exists() else []
    return [_completed(row) for row in rows]


def add_row(path: Path, row: Row) -> None:
    """Put a row into a summary in the place of the one that was measured before, at its end."""
    rows = [old for old in read_rows(path) if not row.replaces(old)]
    write_json(path, [asdict(one) for one in [*rows, row]])


def summary_table(folder: RunFolder) -> str:
    """Format the recorded rows as a table, system by metric.

    Args:
        folder: With a summary.

    Returns:
        Rows by split, sample (the largest first), iteration and kind, then as they were added. What is the same in
        all rows as in a plain one is not shown: whose ranking of another iteration is re-ranked, and from which grade
        on a document is relevant.
    """
    rows = sorted(read_rows(folder.summary), key=_place)
    mixed = any(row.over_iteration != row.iteration for row in rows if row.over)
    graded = any(row.relevance_threshold != 1 for row in rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    table: list[list[object]] = []
    for row in rows:
        place: list[object] = [row.split, _queries(row), row.iteration, row.system]
        place.append(f"{row.over} top {row.rerank_depth or ''}".rstrip() if row.over else "")
        place += [row.over_iteration if row.over else None] * mixed
        place += [row.relevance_threshold] * graded
        table.append([*place, *(row.metrics.get(name) for name in metrics)])
    headers = ["split", "queries", "iteration", "system", "re-ranks", *["of iteration"] * mixed]
    headers += ["relevant from"] * graded
    text: str = tabulate(table, headers=[*headers, *metrics], floatfmt=".3f", missingval="")
    if folder.fusion.exists():
        text += f"\n\n{read_record(folder.fusion, Fusion, 'the weights of the mixture').told}"
    if folder.duel.exists():
        text += f"\n\n{read_record(folder.duel, Duel, 'the verdict of the game').told}"
    return text


def _queries(row: Row) -> str:
    """Write how many queries were measured, and of how many where they are a sample."""
    if row.num_queries is None:
        return ""
    return f"{row.num_queries}" if row.num_queries == row.split_queries else f"{row.num_queries} of {row.split_queries}"


def _place(row: Row) -> tuple[str, int, int, int, bool]:
    """Order by split, sample, iteration and kind; the state before training stands before the warm-up's."""
    iteration, kind = row.iteration or 0, place_of_kind(row.kind)
    return row.split, -(row.num_queries or 0), iteration, kind, row.iteration is not None


def _completed(row: Row) -> Row:
    """Complete a row that was recorded when rows named less.

    At first they had no kind, and all systems were AR2's and its yardsticks; then no number of queries, and every
    ranker stood over the retriever of its own iteration.
    """
    if not row.kind and row.retriever != row.system:
        row = replace(row, kind=RANKER, over=row.retriever)
    elif not row.kind:
        row = replace(row, kind=BM25 if row.system == "BM25" else RETRIEVER)
    if row.num_queries is None and row.over and row.over_iteration is None:
        row = replace(row, over_iteration=row.iteration)
    return row

"""`results/summary.json`: a row for each system, iteration, split and sample of its queries, and the table of them.

Numbers of different queries are no replacement for each other: a row says how many it was measured on, and takes the
place only of one with the same queries. Samples are drawn by the run's seed, so those of one size are the same queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tabulate import SEPARATING_LINE, tabulate

from engine.evaluation.duel import Duel
from engine.evaluation.mixture import recorded_fusion
from engine.evaluation.significance import holm
from engine.evaluation.systems import BM25, RANKER, RETRIEVER, System, place_of_kind
from engine.evaluation.tables import result_of
from engine.run import RunFolder
from shards.files import read_record, write_json

_DIGITS = 3
_BOLD, _STAR, _MARKDOWN = ("\x1b[1m", "\x1b[0m"), ("*", ""), ("**", "**")
"""What stands around the best of a column."""
_WHAT_THEY_ARE = (
    "±: standard error over queries. Differences are paired, query by query; p: randomisation test, corrected by\n"
    "Holm over the rows of a split."
)


@dataclass(frozen=True, slots=True)
class Headline:
    """How sure the metric is by which a row is compared, and how far it lies from the row that it should be above."""

    metric: str
    """Which one."""
    standard_error: float | None
    """Of its mean over queries; None for a single query."""
    to: str | None = None
    """The system that it is compared with; None where none was measured on the same queries."""
    to_iteration: int | None = None
    """Whose weights that one has."""
    difference: float | None = None
    """Mean of the differences over queries, this row's less the other's."""
    difference_error: float | None = None
    """Standard error of that mean; None for a single query."""
    p: float | None = None
    """Of the paired randomisation test, not corrected: which rows stand beside it, the table knows."""
    low: float | None = None
    """Lower end of the paired bootstrap's interval of 95 % for the difference; None for a single query."""
    high: float | None = None
    """Upper end."""


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
    headline: Headline | None = None
    """Of the metric by which it is compared; None in summaries that were written without it."""

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


def summary_table(folder: RunFolder, *, bold: bool = False) -> str:
    """Format the recorded rows, a table for each split and sample, and how surely each differs from what it builds on.

    Args:
        folder: With a summary.
        bold: Show the best of each column in bold, by a terminal's codes; otherwise a star stands before it. That is
            the best of what was trained, and what is better still without training.

    Returns:
        Splits as they are sorted, the largest sample first. What was not trained stands above the line, then rows by
        iteration and kind, then as they were added. The last table has the rows with their standard errors. Where
        nothing was measured, a line says so.
    """
    groups = rows_by_queries(folder)
    text = "\n\n".join(_group_table(own, _BOLD if bold else _STAR) for own in groups)
    text = text or "nothing was measured: neither dev nor test has queries that the recipe measures"
    text += "\n*: the best of what was trained, and above the line what is better still" * ("*" in text)
    if differences := _differences_table([row for own in groups for row in own]):
        text += f"\n\n{differences}\n{_WHAT_THEY_ARE}"
    return "\n\n".join([text, *verdicts(folder)])


def verdicts(folder: RunFolder) -> list[str]:
    """Return in words what the mixture is worth, and whether the game paid, as far as the run has found out.

    Args:
        folder: Of the run.

    Raises:
        ArtifactError: A record is damaged.
    """
    found = []
    if (fusion := recorded_fusion(folder)) is not None:
        found.append(fusion.told)
    if folder.duel.exists():
        found.append(read_record(folder.duel, Duel, "the verdict of the game").told)
    return found


def rows_by_queries(folder: RunFolder) -> list[list[Row]]:
    """Return the recorded rows in the order of the table, those together that were measured on the same queries.

    Args:
        folder: With a summary; without one there are none.
    """
    groups: dict[tuple[str, int | None, int], list[Row]] = {}
    for row in sorted(read_rows(folder.summary), key=_place):
        groups.setdefault(_group(row), []).append(row)
    return list(groups.values())


def markdown_tables(rows: Sequence[Row]) -> str:
    """Format rows of the same queries as the table has them, the best in bold, and below it their standard errors.

    Args:
        rows: One of what `rows_by_queries` returns.
    """
    tables = [_group_table(rows, _MARKDOWN, form="github"), _differences_table(rows, form="github")]
    return "\n\n".join([*filter(None, tables), *([_WHAT_THEY_ARE.replace("\n", " ")] if tables[1] else [])])


def _group_table(rows: Sequence[Row], mark: tuple[str, str], form: str = "simple") -> str:
    """Format rows that were measured on the same queries, what stands around the best of a column given."""
    first = rows[0]
    title = (
        f"{first.split}, {_queries(first)} {'query' if first.split_queries == 1 else 'queries'}"
        if first.num_queries is not None
        else first.split
    )
    title += f", relevant from grade {first.relevance_threshold}" * (first.relevance_threshold != 1)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    trained = [row for row in rows if row.iteration is not None] or list(rows)
    best = {name: best_of(trained, rows, name) for name in metrics}
    table: list[list[str] | str] = []
    for above, row in zip([None, *rows], rows, strict=False):
        if form == "simple" and above is not None and above.iteration is None and row.iteration is not None:
            table.append(SEPARATING_LINE)
        iteration = "" if row.iteration is None else f"{row.iteration}"
        cells = [_cell(row.metrics.get(name), best[name], mark) for name in metrics]
        table.append([_name_of(row), iteration, *cells])
    aligned = ["left", "right", *["right"] * len(metrics)]
    headers = [title, "iteration", *metrics]
    text: str = tabulate(table, headers=headers, tablefmt=form, disable_numparse=True, colalign=aligned)
    return text


def best_of(trained: Sequence[Row], rows: Sequence[Row], metric: str, digits: int = _DIGITS) -> set[float]:
    """Return the best value of what was trained, and what is better still; none where all rows are alike.

    Args:
        trained: Of the rows, those that were trained.
        rows: All that were measured on the same queries.
        metric: By which.
        digits: How many a table shows: values are compared as it shows them.
    """
    best, best_trained = (
        max((round(row.metrics[metric], digits) for row in own if metric in row.metrics), default=None)
        for own in (rows, trained)
    )
    alike = len({round(row.metrics[metric], digits) for row in rows if metric in row.metrics}) < 2
    return set() if alike else {value for value in (best, best_trained) if value is not None}


def _cell(value: float | None, best: set[float], mark: tuple[str, str]) -> str:
    if value is None:
        return ""
    text = f"{value:.{_DIGITS}f}"
    return text.join(mark) if round(value, _DIGITS) in best else text


def _name_of(row: Row) -> str:
    """Name a system with what it re-ranks: `D over G, top 100`, and whose, where that is another iteration's."""
    if row.over is None:
        return row.system
    of = "" if row.over_iteration in {row.iteration, None} else f" of {row.over_iteration}"
    return f"{row.system} over {row.over}{of}" + (f", top {row.rerank_depth}" if row.rerank_depth else "")


def _differences_table(rows: Sequence[Row], form: str = "simple") -> str:
    """Format how far rows lie from those that they build on, within 120 columns; empty where nothing is known."""
    known = [(row, row.headline) for row in rows if row.headline is not None]
    if not known:
        return ""
    corrected: dict[int, float] = {}
    for group in dict.fromkeys(_group(row) for row, _ in known):
        p_values = {f"{id(row)}": one.p for row, one in known if one.p is not None and _group(row) == group}
        corrected |= {int(name): p for name, p in holm(p_values).items()}
    table: list[list[str | int | None]] = []
    for row, one in known:
        system = _name_of(replace(row, rerank_depth=None))
        mean = f"{row.metrics[one.metric]:.3f}{_error(one.standard_error)}"
        line: list[str | int | None] = [row.split, _queries(row), row.iteration, system, one.metric, mean]
        if one.to is None or one.difference is None:
            line += ["", "", ""]
        else:
            line += [_named(one.to, one.to_iteration, row), f"{one.difference:+.3f}{_error(one.difference_error)}"]
            line.append(result_of(one.difference, corrected[id(row)]))
        table.append(line)
    headers = ["split", "queries", "iteration", "system", "metric", "mean", "compared with", "difference", "result"]
    if len(metrics := {one.metric for _, one in known}) == 1:
        headers[4:6] = metrics
        table = [[*line[:4], *line[5:]] for line in table]
    table = [["" if cell is None else f"{cell}" for cell in line] for line in table]
    aligned = ["right" if name == "iteration" else "left" for name in headers]
    # Texts stay as they are: of a single query no error stands beside a number, and +0.500 became 0.5.
    text: str = tabulate(table, headers=headers, tablefmt=form, disable_numparse=True, colalign=aligned)
    return text


def _error(value: float | None) -> str:
    return "" if value is None else f" ±{value:.3f}"


def _named(system: str, iteration: int | None, row: Row) -> str:
    """Name the row that another is compared with, and its iteration where the name alone could be the row's own."""
    return f"{system} of {iteration}" if system == row.system and iteration is not None else system


def _group(row: Row) -> tuple[str, int | None, int]:
    return row.split, row.num_queries, row.relevance_threshold


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

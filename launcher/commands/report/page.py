"""The page: everything that was read of the runs, laid out for the template, which escapes whatever is data."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.config.file import dump_config
from engine.evaluation import systems
from engine.evaluation.summary import Row, best_of, verdicts
from engine.pretrain.measurements import STREAM as HELD_OUT
from engine.reliability.progress import format_seconds
from engine.results import STALENESS
from launcher.commands.report import facts
from launcher.commands.report.charts import Bar, Chart, Charts, Level, Line, Spot
from launcher.commands.report.curves import Curve
from launcher.commands.report.examples import examples_of, split_with_examples
from launcher.commands.report.opened import Opened
from launcher.commands.report.rankings import ANSWERED_DEPTH, JUDGED_DEPTH
from launcher.commands.report.standings import (
    FIGURE_METRICS,
    Standing,
    differences_of,
    error_of,
    main_metric,
    splits_of,
)
from launcher.commands.words.report import MOST_QUERIES

_FOLDER = Path(__file__).parent
_LOSSES = ("loss", "adversarial", "distillation")
_GAME = ("reward", "entropy", "accuracy", "ranker_accuracy")
_PACE = ("tokens_per_second",)
_DIGITS = 4
_MEANINGS = {
    systems.BM25: "finds by words alone",
    systems.RUN_FILE: "rankings of others",
    systems.CANDIDATES: "documents that others chose",
    systems.RETRIEVER: "searches by dense vectors",
    systems.LEXICAL: "searches by weighted words that it has learnt",
    systems.HYBRID: "takes turns with what all that search have found",
    systems.RANKER: 'reads query and document together, and re-orders the first that stand behind "over"',
    systems.FUSED: "mixes the scores of several",
}
"""What systems of a kind are, for those who do not know their names."""
_BEFORE = "the same before any training"
_SCRIPT = (
    "addEventListener('beforeprint',function(){document.querySelectorAll('details').forEach(function(one)"
    "{one.open=true})});"
)
"""The one convenience that needs a script: what is folded is printed, too."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a report is asked for.

    Attributes:
        metric: By which rows are compared; None for a usual one.
        num_queries: Examples at most.
    """

    metric: str | None = None
    num_queries: int = 12


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A row of a table of results, in words."""

    run: str
    system: str
    over: str
    queries: str
    cells: tuple[tuple[str, str, bool], ...]
    """Of each metric the value and its standard error, empty where there is none, and whether it is the best."""


@dataclass(frozen=True, slots=True)
class Results:
    """The table of a split."""

    split: str
    metrics: tuple[str, ...]
    rows: tuple[ResultRow, ...]


@dataclass(frozen=True, slots=True)
class Notes:
    """What must be known of a run before its numbers are read: what is not there, and warnings."""

    run: str
    lacks: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """Charts that belong together."""

    title: str
    note: str
    charts: tuple[Chart, ...]
    is_folded: bool = False


def render(runs: Sequence[Opened], wanted: Wanted) -> str:
    """Write the page.

    Args:
        runs: At least one.
        wanted: What it is asked for.

    Returns:
        A whole HTML document that refers to nothing outside itself.

    Raises:
        ConfigError: No run has the metric that is asked for.
        DataError: A ranking is damaged.
        ArtifactError: The shards are.
    """
    standings = [Standing.of(one) for one in runs]
    metric, splits, charts = main_metric(standings, wanted.metric), splits_of(standings), Charts()
    seed = runs[0].run.config.run.seed
    shown = split_with_examples(standings, splits) if wanted.num_queries else None
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        runs=runs,
        notes=[
            Notes(one.opened.name, (*one.opened.lacks, *one.doubts), tuple(facts.warnings_of(one.opened)))
            for one in standings
        ],
        legend=_legend([one.row for standing in standings for one in standing.ranked]),
        verdicts={one.name: verdicts(one.run.folder) for one in runs},
        ranks={one.name: facts.ranks_of(one) for one in runs},
        made=time.strftime("%Y-%m-%d %H:%M %z"),
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=_SCRIPT,
        script_digest=digest,
        metric=metric,
        results=[_results(standings, split, metric) for split in splits],
        differences={split: differences_of(standings, split, metric, seed=seed) for split in splits} if metric else {},
        iterations=list(_iterations(standings, metric, charts)) if metric else [],
        sections=list(_sections(runs, charts)),
        hours=_hours(runs, charts),
        examples=examples_of(standings, shown, metric, wanted.num_queries) if shown and metric else [],
        examples_split=shown,
        most_queries=MOST_QUERIES,
        configs={one.name: dump_config(one.run.config) for one in runs},
        differing=facts.differing_settings(runs),
        depths=(JUDGED_DEPTH, ANSWERED_DEPTH),
        named=lambda by_run: list(dict.fromkeys(what for own in by_run for what, _ in own)),
        overviews=[facts.overview(one) for one in runs],
        data=[facts.data_of(one) for one in runs],
        code=[facts.code_of(one) for one in runs],
        paces=[facts.paces_of(one) for one in runs],
        slowest=[facts.slowest_ranks(one) for one in runs],
    )


def _legend(rows: Sequence[Row]) -> list[tuple[list[str], str]]:
    """Say what the systems of some rows are: the names of those alike, and words."""
    found: dict[str, dict[str, None]] = {}
    for row in sorted(rows, key=lambda row: (systems.place_of_kind(row.kind), row.iteration is None)):
        has_weights = row.kind in {systems.RETRIEVER, systems.LEXICAL}
        meaning = _BEFORE if has_weights and row.iteration is None else _MEANINGS.get(row.kind)
        if meaning is not None:
            found.setdefault(meaning, {})[row.system] = None
    return [(list(names), meaning) for meaning, names in found.items()]


def _results(standings: Sequence[Standing], split: str, first: str | None) -> Results:
    """Lay out the rows of a split; the metric by which they are compared stands first."""
    ranked = [(standing, one) for standing in standings for one in standing.ranked if one.row.split == split]
    metrics = tuple(dict.fromkeys(name for _, one in ranked for name in one.row.metrics))
    metrics = tuple(sorted(metrics, key=lambda name: name != first))
    best = _best([one.row for _, one in ranked], metrics)
    rows = []
    for standing, one in ranked:
        row = one.row
        cells = []
        for name in metrics:
            value, error = row.metrics.get(name), error_of(one, name)
            is_best = value is not None and round(value, _DIGITS) in best[_measured_on(row), name]
            written = "" if value is None else f"{value:.{_DIGITS}f}"
            cells.append((written, "" if error is None else f"±{error:.{_DIGITS}f}", is_best))
        over = f"{row.over}{'' if row.over_iteration is None else f' ({row.over_iteration})'}" if row.over else ""
        over += f", top {row.rerank_depth}" if row.over and row.rerank_depth else ""
        graded = "" if row.relevance_threshold == 1 else f", relevant from grade {row.relevance_threshold}"
        of = "" if row.num_queries == row.split_queries else f" of {row.split_queries}"
        queries = "not known" if row.num_queries is None else f"{row.num_queries}{of}{graded}"
        name = row.system if row.iteration is None else f"{row.system} ({row.iteration})"
        rows.append(ResultRow(standing.opened.name, name, over, queries, tuple(cells)))
    return Results(split, metrics, tuple(rows))


def _best(rows: Sequence[Row], metrics: Sequence[str]) -> dict[tuple[tuple[int | None, int], str], set[float]]:
    """Return the best values of each metric among the rows that were measured on the same queries."""
    found: dict[tuple[tuple[int | None, int], str], set[float]] = {}
    for queries in dict.fromkeys(_measured_on(row) for row in rows):
        own = [row for row in rows if _measured_on(row) == queries]
        trained = [row for row in own if row.iteration is not None] or own
        found |= {(queries, name): best_of(trained, own, name, _DIGITS) for name in metrics}
    return found


def _measured_on(row: Row) -> tuple[int | None, int]:
    return row.num_queries, row.relevance_threshold


def _iterations(standings: Sequence[Standing], metric: str, charts: Charts) -> Iterator[Chart]:
    """Draw the models of each run over its iterations on dev, by the metric and those of the paper's figure."""
    rows = [one.row for standing in standings for one in standing.ranked]
    for name in dict.fromkeys((metric, *FIGURE_METRICS)):
        if not any(name in row.metrics for row in rows):
            continue
        drawn = [(standing, *_game(standing, name)) for standing in standings]
        ys = [y for _, lines, levels in drawn for line in lines for y in _ends(line)]
        ys += [level.y for _, lines, levels in drawn if lines for level in levels]
        for standing, lines, levels in drawn:
            if lines:
                title = f"{standing.opened.name}: {name} on dev"
                yield charts.lines(title, lines, "iteration", levels=levels, span=(min(ys), max(ys)))


def _game(standing: Standing, metric: str) -> tuple[list[Line], list[Level]]:
    lines: list[Line] = []
    by_role = standing.by_role("dev")
    for rows in by_role.values():
        spots = []
        for one in rows:
            if (value := one.row.metrics.get(metric)) is not None:
                error = error_of(one, metric)
                ends = (None, None) if error is None else (value - error, value + error)
                spots.append(Spot(float(one.row.iteration or 0), value, *ends))
        if spots:
            last = rows[-1].row
            lines.append(Line(f"{last.system}{f' over {last.over}' if last.over else ''}", tuple(spots), len(lines)))
    if any(len(line.spots) > 1 for line in lines):  # what has one point is in the table
        lines = [line for line in lines if len(line.spots) > 1]
    fixed = [one.row for one in standing.ranked if one.row.split == "dev" and one.row.iteration is None]
    levels = {row.system: row.metrics[metric] for row in fixed if metric in row.metrics and row.over is None}
    return lines, [Level(name, value) for name, value in levels.items()]


def _ends(line: Line) -> list[float]:
    return [y for spot in line.spots for y in (spot.y, spot.low, spot.high) if y is not None]


def _sections(runs: Sequence[Opened], charts: Charts) -> Iterator[Section]:
    """Draw what training measured: the players' losses, the game, and the rest."""
    named = {*_LOSSES, *_GAME, *_PACE}
    rest = [name for one in runs for name in one.curves.measures if name not in named]
    width = max((curve.width for one in runs for curve in one.curves.by_tag.values()), default=1)
    joined = f" Up to {width} neighbours are one point, their mean; the band goes from the least to the greatest."
    joined = joined if width > 1 else ""
    yield Section("Losses", "By step of the model." + joined, _measured(runs, _LOSSES, charts))
    yield Section("Reward, entropy, accuracy", "What the losses do not show." + joined, _measured(runs, _GAME, charts))
    yield Section("Index", "Recall against exact search, at the time of its audit.", _indexes(runs, charts))
    stale = dict.fromkeys(tag for one in runs for tag in one.curves.by_tag if tag.startswith(f"{STALENESS}/"))
    about = "What a refresh found of the index before: steps behind, weights moved, candidates kept. By iteration."
    yield Section("Staleness of the index", about, _drawn(runs, list(stale), "iteration", charts))
    yield Section("Pace of training", "Tokens a second of all ranks.", _measured(runs, _PACE, charts))
    held_out = dict.fromkeys(tag for one in runs for tag in one.curves.by_tag if tag.startswith(f"{HELD_OUT}/"))
    yield Section("Held-out documents", "By iteration.", _drawn(runs, list(held_out), "iteration", charts))
    others = _measured(runs, tuple(dict.fromkeys(rest)), charts)
    yield Section("Other measurements", "By step of the model." + joined, others, is_folded=True)


def _measured(runs: Sequence[Opened], measures: Sequence[str], charts: Charts) -> tuple[Chart, ...]:
    """Draw a chart for each phase and measure that some run has, with a line for each run."""
    phases = list(dict.fromkeys(phase for one in runs for phase in one.curves.phases))
    return _drawn(runs, [f"{phase}/{measure}" for measure in measures for phase in phases], "step", charts)


def _drawn(runs: Sequence[Opened], tags: Sequence[str], x_label: str, charts: Charts) -> tuple[Chart, ...]:
    found = []
    for tag in tags:
        curves = {one.name: one.curves.by_tag.get(tag) for one in runs}
        lines = [_curve(name, curve, style) for style, (name, curve) in enumerate(curves.items()) if curve]
        if lines:
            chart = charts.lines(tag.replace("/", ": "), lines, x_label)
            found.append(chart if len(runs) > 1 else replace(chart, keys=()))
    return tuple(found)


def _curve(name: str, curve: Curve, style: int) -> Line:
    is_joined = curve.width > 1
    spots = [Spot(one.x, one.y, *((one.low, one.high) if is_joined else (None, None))) for one in curve.bins]
    return Line(name, tuple(spots), style, is_banded=is_joined)


def _indexes(runs: Sequence[Opened], charts: Charts) -> tuple[Chart, ...]:
    """Draw the recall of the indexes, in the order of the first run in which each stands."""
    recalls: dict[str, Mapping[str, float]] = {
        one.name: {
            name: result["recall"]
            for name, result in one.results_of("index").items()
            if isinstance(result.get("recall"), int | float)
        }
        for one in runs
    }
    names = list(dict.fromkeys(name for own in recalls.values() for name in own))
    lines = [
        Line(run, tuple(Spot(float(place), own[name]) for place, name in enumerate(names) if name in own), style)
        for style, (run, own) in enumerate(recalls.items())
        if own
    ]
    return (charts.lines("recall of the index", lines, "index", names=names),) if lines else ()


def _hours(runs: Sequence[Opened], charts: Charts) -> list[Chart]:
    """Draw where the hours went: a chart for each run, its longest kind of work first."""
    drawn = []
    for style, one in enumerate(runs):
        work = sorted(facts.work_of(one), key=lambda own: -own.seconds)
        whole = sum(own.seconds for own in work) or 1.0
        bars = [
            Bar(
                f"{own.kind}{f' ({own.num_stages} times)' if own.num_stages > 1 else ''}",
                own.seconds,
                f"{format_seconds(own.seconds)}, {own.seconds / whole:.0%}",
                style,
            )
            for own in work
        ]
        if bars:
            drawn.append(charts.bars(f"{one.name}: time by kind of stage", bars))
    return drawn

"""Tables and figures of several settings of a recipe side by side, each of one run or of several seeds.

    final     what each setting leaves behind, by the part that it plays: retriever, ranker, mixture (AR2 Tables 5, 6)
    curves    the same after each iteration (AR2 Figures 3, 4)

Nothing here reads or searches: it is given values query by query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.metric_names import ENTROPY
from engine.evaluation import figures
from engine.evaluation.figures import Point
from engine.evaluation.pooled import Difference, Pooled, differences
from engine.evaluation.tables import Table, Value, result_of


@dataclass(frozen=True, slots=True)
class Part:
    """What plays a role in one setting.

    Attributes:
        name: Of the setting.
        role: Such as `retriever`.
        system: What the run's own table calls it, such as `G`.
        metrics: Metric -> what was measured.
    """

    name: str
    role: str
    system: str
    metrics: Mapping[str, Pooled]


@dataclass(frozen=True, slots=True)
class Terms:
    """What all are measured by.

    Attributes:
        split: Name of the split.
        metrics: The first is the headline; figures are of it.
        compared: Name of the setting that the others are compared with.
        seed: Of the tests.
    """

    split: str
    metrics: tuple[str, ...]
    compared: str
    seed: int


def final_tables(parts: Sequence[Part], terms: Terms) -> tuple[list[Table], Table]:
    """Return what settings leave behind: a table for each metric, and one with a line for each number.

    Args:
        parts: In the order of the tables.
        terms: By which they were measured.

    Returns:
        The printed tables, and the one for CSV.

    Raises:
        ConfigError: Two that play one role were measured on different queries.

    Source: AR2 Tables 5 and 6.
    """
    printed: list[Table] = []
    lines: list[tuple[Value, ...]] = []
    for metric in terms.metrics:
        rows: list[tuple[Value, ...]] = []
        by_role = _by_role(parts, metric)
        for own in by_role.values():
            found = _differences(own, metric, terms)
            for part in own:
                pooled, difference = part.metrics[metric], found.get(part.name)
                rows.append((part.system, part.name, pooled.shown, _spread(pooled), *_shown(difference, metric)))
                lines.append((metric, part.role, part.system, part.name, *_numbers(pooled, difference)))
        if rows:
            to = f"to {terms.compared}"
            headers = ("system", "name", metric, "sd of seeds", to, "interval of 95 %", "result")
            printed.append(_without_empty_columns(Table(_title(metric, parts, terms), headers, tuple(rows))))
    notes = (
        "±: standard error over queries; values of several seeds are averaged query by query, and the deviation of",
        "the seeds' means stands beside them. Differences are paired; p: randomisation test over queries, corrected by",
        "Holm over the names; interval: percentile bootstrap over queries. None of them speaks of other seeds.",
    )
    if printed:
        last = printed[-1]
        printed[-1] = Table(last.title, last.headers, last.rows, notes)
    return printed, Table("", ("metric", "role", "system", "name", *_headers(terms)), tuple(lines))


def final_figure(parts: Sequence[Part], terms: Terms) -> Any:
    """Draw the headline metric of all settings as bars, a colour for each role."""
    metric = terms.metrics[0]
    by_role, names = _by_role(parts, metric), list(dict.fromkeys(part.name for part in parts))
    groups = {}
    for role, own in by_role.items():
        by_name = {part.name: part.metrics[metric] for part in own}
        groups[role] = [
            Point(name, float(place), by_name[name].mean, by_name[name].standard_error)
            if name in by_name
            else Point(name, float(place), float("nan"))
            for place, name in enumerate(names)
        ]
    return figures.bars(_title(metric, parts, terms), groups, metric)


def curve_tables(curves: Mapping[int, Sequence[Part]], terms: Terms) -> tuple[list[Table], Table]:
    """Return settings by iteration: a table for each metric, and one with a line for each number.

    Args:
        curves: Iteration -> what the settings had then; 0 is the warm-up.
        terms: By which they were measured.

    Raises:
        ConfigError: Two of one role and iteration were measured on different queries.

    Source: AR2 Figures 3 and 4.
    """
    printed: list[Table] = []
    lines: list[tuple[Value, ...]] = []
    for metric in terms.metrics:
        series = list(dict.fromkeys((one.name, one.role) for own in curves.values() for one in own))
        rows: list[tuple[Value, ...]] = []
        for iteration, parts in sorted(curves.items()):
            cells: dict[tuple[str, str], str] = {}
            for own in _by_role(parts, metric).values():
                found = _differences(own, metric, terms)
                for part in own:
                    pooled, difference = part.metrics[metric], found.get(part.name)
                    mark = "*" if difference is not None and not difference.is_noise else ""
                    cells[part.name, part.role] = f"{pooled.shown}{mark}"
                    lines.append((metric, iteration, part.role, part.name, *_numbers(pooled, difference)))
            rows.append((iteration, *(cells.get(one) for one in series)))
        shown = [place for place, one in enumerate(series, start=1) if any(row[place] for row in rows)]
        if shown:
            headers = ("iteration", *(_label(*series[place - 1]) for place in shown))
            kept = tuple((row[0], *(row[place] for place in shown)) for row in rows)
            note = f"*: differs from {terms.compared} in the same iteration (Holm over the names of an iteration)"
            title = f"{metric} on {terms.split} by iteration"
            printed.append(Table(title, headers, kept, (note,) if len({name for name, _ in series}) > 1 else ()))
    return printed, Table("", ("metric", "iteration", "role", "name", *_headers(terms)), tuple(lines))


def curve_figure(curves: Mapping[int, Sequence[Part]], terms: Terms) -> Any:
    """Draw the headline metric over the iterations, with a band of a standard error on each side."""
    metric = terms.metrics[0]
    found: dict[str, list[Point]] = {}
    for iteration, parts in sorted(curves.items()):
        for part in parts:
            if metric in part.metrics:
                pooled = part.metrics[metric]
                point = Point(part.name, float(iteration), pooled.mean, pooled.standard_error)
                found.setdefault(_label(part.name, part.role), []).append(point)
    return figures.lines(f"{metric} on {terms.split} by iteration", found, "iteration", metric, bands=True)


def _without_empty_columns(table: Table) -> Table:
    kept = [place for place in range(len(table.headers)) if any(row[place] is not None for row in table.rows)]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return Table(table.title, tuple(table.headers[place] for place in kept), rows, table.notes)


def _by_role(parts: Sequence[Part], metric: str) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        if metric in part.metrics:
            found.setdefault(part.role, []).append(part)
    return found


def _differences(own: Sequence[Part], metric: str, terms: Terms) -> dict[str, Difference]:
    """Compare those of one role; where the one to compare with has none of it, nothing is compared."""
    pooled = {part.name: part.metrics[metric] for part in own}
    if terms.compared not in pooled:
        return {}
    return differences(
        pooled, terms.compared, seed=terms.seed, metric=f"{metric} of the {own[0].role}", of_queries=terms.split
    )


def _title(metric: str, parts: Sequence[Part], terms: Terms) -> str:
    counts = sorted({len(part.metrics[metric].values) for part in parts if metric in part.metrics})
    return f"{metric} on {terms.split} ({' and '.join(map(str, counts))} queries)"


def _label(name: str, role: str) -> str:
    return f"{name} {role}"


def _spread(pooled: Pooled) -> str | None:
    return None if pooled.spread is None else f"{pooled.spread:.4f} of {len(pooled.run_means)}"


def _shown(difference: Difference | None, metric: str) -> tuple[Value, ...]:
    if difference is None:
        return None, None, None
    more, less = ("higher", "lower") if metric == ENTROPY else ("better", "worse")
    error = "" if difference.standard_error != difference.standard_error else f" ±{difference.standard_error:.4f}"
    result = result_of(difference.mean, difference.p, more=more, less=less)
    interval = "" if difference.low != difference.low else f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    return f"{difference.mean:+.4f}{error}", interval, result


def _headers(terms: Terms) -> tuple[str, ...]:
    """Name the columns of `_numbers`."""
    return (
        *("num_runs", "num_queries", "mean", "standard_error", "sd_of_seeds"),
        *(f"difference_to_{terms.compared}", "difference_standard_error", "low", "high", "p_corrected"),
    )


def _numbers(pooled: Pooled, difference: Difference | None) -> tuple[Value, ...]:
    own = (len(pooled.run_means), len(pooled.values), pooled.mean, pooled.standard_error, pooled.spread)
    if difference is None:
        return *own, None, None, None, None, None
    return *own, difference.mean, difference.standard_error, difference.low, difference.high, difference.p

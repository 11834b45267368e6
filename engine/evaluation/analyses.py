"""The second paper's analyses of rankers by the negatives that they were trained on, from values query by query.

Nothing here searches, scores or reads: it is given what was measured, and returns tables and figures of them.

    divergence   Figure 2: how far the negatives lie from BM25's candidates, against how good the ranker is
    shift        Figure 3: how far training moves the ranker from its negatives' distribution, against the same
    negatives    Tables 5 to 7: rankers of different negatives, on training and dev queries
    progress     the same of one run over its iterations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.evaluation import figures
from engine.evaluation.distributions import Divergences, Form
from engine.evaluation.figures import Point
from engine.evaluation.significance import standard_error
from engine.evaluation.tables import Measured, Table, Value, compare

_FEWEST_CORRELATED = 3


@dataclass(frozen=True, slots=True)
class Judged:
    """A ranker that was trained on some negatives, and what was measured of it.

    Attributes:
        name: Of the ranker.
        negatives: Who found them, such as `bm25,dense-002`.
        values: Query id -> the metric of its re-ranking of BM25's list.
        of_negatives: KL of the joint distribution of the negatives to BM25's, by query.
        of_ranker: KL of the ranker's own distribution over BM25's list to BM25's.
    """

    name: str
    negatives: str
    values: Mapping[str, float]
    of_negatives: Divergences
    of_ranker: Divergences | None = None


def divergence_table(
    title: str, rankers: Sequence[Judged], metric: str, form: Form, compared: str | None = None, *, seed: int
) -> Table:
    """Return the numbers of Figure 2.

    Args:
        title: Of the table.
        rankers: Each measured on the same queries.
        metric: What `values` are.
        form: Of the distributions.
        compared: The ranker that the others are tested against; None for the best.
        seed: Of the tests.

    Source: R2ANKER section 4.3, Figure 2.
    """
    measured = compare({one.name: one.values for one in rankers}, compared, seed=seed)
    rows: list[tuple[Value, ...]] = []
    for one in rankers:
        nats = list(one.of_negatives.values.values())
        rows.append((one.name, one.negatives, *_mean_and_error(nats), len(nats), *_measured(measured[one.name])))
    headers = ("ranker", "negatives", "KL", "KL_standard_error", "KL_queries", *_headers(metric))
    points = [(float(row[2] or 0), measured[str(row[0])].mean) for row in rows]
    notes = (_form_note(form), f"Spearman's correlation of KL with {metric}: {_correlation(points)}")
    return Table(title, headers, tuple(rows), notes)


def shift_table(
    title: str, rankers: Sequence[Judged], metric: str, form: Form, compared: str | None = None, *, seed: int
) -> Table:
    """Return the numbers of Figure 3: Delta is the KL of the negatives less that of the ranker, query by query.

    Args:
        title: Of the table.
        rankers: Each measured on the same queries, with `of_ranker`.
        metric: What `values` are.
        form: Of the distributions.
        compared: The ranker that the others are tested against; None for the best.
        seed: Of the tests.

    Source: R2ANKER section 4.4, Figure 3.
    """
    measured = compare({one.name: one.values for one in rankers}, compared, seed=seed)
    rows: list[tuple[Value, ...]] = []
    for one in rankers:
        if one.of_ranker is None:
            raise ValueError(f"{one.name} has no divergence of its own")
        ranker = one.of_ranker.values
        pairs = [(nats, ranker[qid]) for qid, nats in one.of_negatives.values.items() if qid in ranker]
        of_negatives, of_ranker = (np.array(side) for side in zip(*pairs, strict=True))
        deltas = _mean_and_error((of_negatives - of_ranker).tolist())
        means = (float(of_negatives.mean()), float(of_ranker.mean()))
        rows.append((one.name, one.negatives, *means, *deltas, len(pairs), *_measured(measured[one.name])))
    kls = ("KL_negatives", "KL_ranker", "Delta", "Delta_standard_error", "KL_queries")
    points = [(abs(float(row[4] or 0)), measured[str(row[0])].mean) for row in rows]
    notes = (_form_note(form), f"Spearman's correlation of |Delta| with {metric}: {_correlation(points)}")
    return Table(title, ("ranker", "negatives", *kls, *_headers(metric)), tuple(rows), notes)


def shown_by(table: Table, x: str, y: str, x_label: str) -> Any:
    """Draw two columns of a table of rankers as Figures 2 and 3 have them.

    Args:
        table: Of `divergence_table` or `shift_table`.
        x: Header of the x-axis.
        y: Header of the y-axis, behind which its standard error stands.
        x_label: What is written at the x-axis.
    """
    place_x, place_y = table.headers.index(x), table.headers.index(y)
    points = [
        Point(f"{row[0]} ({row[1]})", _number(row[place_x]), _number(row[place_y]), _number(row[place_y + 1]))
        for row in table.rows
    ]
    return figures.scatter(table.title, points, x_label, y)


def negatives_table(
    title: str,
    train: Mapping[str, Mapping[str, float]],
    dev: Mapping[str, Mapping[str, float]],
    negatives: Mapping[str, str],
    metric: str,
    compared: str | None,
    *,
    seed: int,
) -> Table:
    """Compare rankers of different negatives on training and dev queries.

    Args:
        title: Of the table.
        train: Ranker -> training query -> metric.
        dev: Ranker -> dev query -> metric.
        negatives: Ranker -> who found its negatives.
        metric: Its name.
        compared: The ranker that the others are tested against; None for the best on each side.
        seed: Of the tests.

    Source: R2ANKER Tables 5, 6 and 7.
    """
    by_split = [compare(values, compared, seed=seed) for values in (train, dev)]
    rows: list[tuple[Value, ...]] = []
    for name in dev:
        on_train, on_dev = (one[name] for one in by_split)
        rows.append((name, negatives[name], *_measured(on_train), *_measured(on_dev), on_dev.mean - on_train.mean))
    sides = [f"{split}_{header}" for split in ("train", "dev") for header in _headers(metric)]
    note = f"p against {compared or 'the best of its side'}: paired randomisation test over queries, Holm-corrected"
    return Table(title, ("ranker", "negatives", *sides, "dev_less_train"), tuple(rows), (note,))


def negatives_figure(table: Table, metric: str) -> Any:
    """Draw the two sides of `negatives_table` as bars."""
    return figures.bars(table.title, _sides(table, metric, [0.0] * len(table.rows)), metric)


def progress_table(
    title: str,
    train: Mapping[int, Mapping[str, float]],
    dev: Mapping[int, Mapping[str, float]],
    metric: str,
    *,
    seed: int,
) -> Table:
    """Compare a ranker's iterations on training and dev queries; each is tested against the last.

    Args:
        title: Of the table.
        train: Iteration -> training query -> metric.
        dev: Iteration -> dev query -> metric.
        metric: Its name.
        seed: Of the tests.
    """
    last = str(max(dev))
    by_split = [
        compare({str(iteration): values for iteration, values in one.items()}, last, seed=seed) for one in (train, dev)
    ]
    rows: list[tuple[Value, ...]] = []
    for iteration in sorted(dev):
        on_train, on_dev = (one[str(iteration)] for one in by_split)
        rows.append((iteration, *_measured(on_train), *_measured(on_dev), on_dev.mean - on_train.mean))
    sides = [f"{split}_{header}" for split in ("train", "dev") for header in _headers(metric)]
    note = f"p against iteration {last}: paired randomisation test over queries, Holm-corrected"
    return Table(title, ("iteration", *sides, "dev_less_train"), tuple(rows), (note,))


def progress_figure(table: Table, metric: str) -> Any:
    """Draw the two sides of `progress_table` over the iterations."""
    places = [_number(row[0]) for row in table.rows]
    return figures.lines(table.title, _sides(table, metric, places), "iteration", metric)


def _sides(table: Table, metric: str, places: Sequence[float]) -> dict[str, list[Point]]:
    sides = {}
    for side in ("train", "dev"):
        column = table.headers.index(f"{side}_{metric}")
        sides[side] = [
            Point(str(row[0]), place, _number(row[column]), _number(row[column + 1]))
            for row, place in zip(table.rows, places, strict=True)
        ]
    return sides


def _headers(metric: str) -> tuple[str, str, str, str]:
    return metric, "standard_error", "num_queries", "p_corrected"


def _measured(one: Measured) -> tuple[Value, ...]:
    return one.mean, one.standard_error, one.num_queries, one.p


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)) if values else float("nan"), standard_error(values)


def _number(value: Value) -> float:
    return float("nan") if value is None else float(value)


def _form_note(form: Form) -> str:
    how = "all alike"
    if form.weights == "softmax":
        how = f"softmax of scores ({form.normalisation}, temperature {form.temperature:g})"
    return (
        f"KL in nats over the union of the top {form.top} without positives, {how}, "
        f"{form.epsilon:g} of the uniform distribution mixed in; joint distributions are means of their members"
    )


def _correlation(points: Sequence[tuple[float, float]]) -> str:
    """Return Spearman's rank correlation of some points as text; fewer than three say nothing."""
    if len(points) < _FEWEST_CORRELATED:
        return f"none is told for {len(points)} rankers"
    x, y = (_ranks(np.array(side)) for side in zip(*points, strict=True))
    if not x.std() or not y.std():
        return "none, as one of them does not vary"
    return f"{float(np.corrcoef(x, y)[0, 1]):.2f} over {len(points)} rankers"


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Return ranks; those of equal values are the mean of their places."""
    below = (values_N[None, :] < values_N[:, None]).sum(1)
    same = (values_N[None, :] == values_N[:, None]).sum(1)
    ranks: np.ndarray = below + (same - 1) / 2
    return ranks

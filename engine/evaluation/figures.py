"""Figures of comparisons: drawn once, written as a PNG and into TensorBoard.

matplotlib is an extra (`figures`), since a run needs none on its machines. It is loaded here alone, inside functions,
and without a window system: figures are made on the canvas of Agg, which leaves the user's own settings alone.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ConfigError
from shards.files import write_atomically

_DPI = 150


def require_matplotlib() -> None:
    """Refuse to begin where a figure could not be drawn in the end.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the figure needs matplotlib, which is not installed",
            expected="the extra `figures`: pip install -e '.[figures]'",
            remedy="install it, or leave the figure out by --no-figure",
        )


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scatter plot or a line."""

    label: str
    x: float
    y: float
    y_error: float = float("nan")
    """Standard error; NaN where there is none to draw."""


def heatmap(title: str, values: Mapping[str, Mapping[str, float]], metric: str) -> Any:
    """Draw a matrix with its values (R2ANKER Table 4).

    Args:
        title: Above it.
        values: Row -> column -> value; every row has the same columns.
        metric: What the colours are.

    Returns:
        A figure of matplotlib.
    """
    columns = list(next(iter(values.values())))
    figure, axes = _figure(title, width=3.0 + 1.1 * len(columns), height=1.8 + 0.4 * len(values))
    grid = np.array([[own[column] for column in columns] for own in values.values()])
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_xlabel("retriever")
    axes.set_ylabel("re-ranker")
    middle = (grid.min() + grid.max()) / 2
    for (row, column), value in np.ndenumerate(grid):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{100 * value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label=metric)
    return figure


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> Any:
    """Draw labelled points with their standard errors (R2ANKER Figures 2 and 3).

    Args:
        title: Above it.
        points: With labels.
        x_label: Of the x-axis.
        y_label: Of the y-axis.

    Returns:
        A figure of matplotlib.
    """
    figure, axes = _figure(title, width=6.5, height=4.5)
    axes.errorbar(
        *([point.x for point in points], [point.y for point in points]),
        yerr=[0.0 if np.isnan(point.y_error) else point.y_error for point in points],
        **{"fmt": "o", "capsize": 2, "linewidth": 0.8},
    )
    for point in points:
        axes.annotate(point.label, (point.x, point.y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.25, y=0.15)  # room for the labels
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure


def bars(title: str, groups: Mapping[str, Sequence[Point]], y_label: str) -> Any:
    """Draw bars side by side with their standard errors (R2ANKER Tables 5 to 7).

    Args:
        title: Above it.
        groups: What bars of one colour are -> a point for each place; the labels are those of the places, the same in
            every group.
        y_label: Of the y-axis.

    Returns:
        A figure of matplotlib.
    """
    places = [point.label for point in next(iter(groups.values()))]
    figure, axes = _figure(title, width=2.5 + 1.2 * len(places), height=4.0)
    width = 0.8 / len(groups)
    for number, (name, points) in enumerate(groups.items()):
        x = np.arange(len(places)) + (number - (len(groups) - 1) / 2) * width
        errors = [0.0 if np.isnan(point.y_error) else point.y_error for point in points]
        axes.bar(x, [point.y for point in points], width, yerr=errors, capsize=2, label=name)
    axes.set_xticks(range(len(places)), places, rotation=20, ha="right")
    axes.set_ylabel(y_label)
    axes.legend()
    return figure


def lines(title: str, curves: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, bands: bool = False) -> Any:
    """Draw curves with their standard errors, such as train and dev over the iterations.

    Args:
        title: Above it.
        curves: Name -> its points, by x ascending.
        x_label: Of the x-axis, which counts.
        y_label: Of the y-axis.
        bands: Show standard errors as a band around each curve, which many curves need to stay readable.

    Returns:
        A figure of matplotlib.
    """
    figure, axes = _figure(title, width=6.5, height=4.5)
    for name, points in curves.items():
        errors = np.array([0.0 if np.isnan(point.y_error) else point.y_error for point in points])
        x, y = [point.x for point in points], np.array([point.y for point in points])
        if bands:
            (line,) = axes.plot(x, y, "o-", markersize=4, label=name)
            axes.fill_between(x, y - errors, y + errors, color=line.get_color(), alpha=0.15, linewidth=0)
        else:
            axes.errorbar(x, y, yerr=errors, fmt="o-", capsize=2, label=name)
    axes.set_xticks(sorted({int(point.x) for points in curves.values() for point in points}))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write_figure(figure: Any, path: Path, board: Path, tag: str) -> None:
    """Write a figure as a PNG, and as an image of TensorBoard in the place of an older one.

    Args:
        figure: Of matplotlib.
        path: The PNG.
        board: A folder of TensorBoard events that holds this figure alone; replaced.
        tag: Its name there.
    """
    from torch.utils.tensorboard import SummaryWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    canvas = np.asarray(figure.canvas.buffer_rgba())
    shutil.rmtree(board, ignore_errors=True)
    writer = SummaryWriter(str(board))
    writer.add_image(tag, canvas[..., :3], dataformats="HWC")
    writer.close()


def _figure(title: str, *, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure on the canvas of Agg with one pair of axes; inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=9, wrap=True)
    return figure, axes

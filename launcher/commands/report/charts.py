"""Charts as SVG that stands in a page of HTML: lines with error bars or bands, and bars with their numbers.

Nothing is told by colour alone: lines have dashes and marks of their own, bars their values beside them, and every
chart a title and a description in words for those who do not see it. Colours are the page's (`var(--line-0)`), so that
a dark page has others. Written by hand, since a run's machines need no matplotlib, and these two forms are all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from markupsafe import Markup

NUM_STYLES = 6
"""Colours, dashes and marks. A seventh line has the first one's colour and dash, and another mark."""
_WIDTH, _HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 12.0, 10.0, 36.0
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4")
_MOST_MARKED = 24
"""Points of a line up to which each has a mark; of more, every so many."""
_TICKS = 5
_BAR, _BAR_GAP, _BAR_LABEL = 14.0, 24.0, 13.0
_INSET, _ASIDE = 8.0, 4.0
_LETTER = 6.0
"""Width of a letter, about."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One point of a line.

    Attributes:
        x: Where.
        y: How much.
        low: Lower end of what is drawn around it; None for nothing.
        high: Upper end.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: What it is.
        spots: By x, ascending.
        style: Which of the dashes, marks and colours it has.
        is_banded: Whether low and high are a band behind the line; else bars of error at its points.
    """

    label: str
    spots: tuple[Spot, ...]
    style: int
    is_banded: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A value that does not change along the x-axis, such as that of a yardstick."""

    label: str
    y: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its label, how long it is, and its value in words, which stands beside it."""

    label: str
    value: float
    told: str
    style: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart.

    Attributes:
        title: What it shows.
        svg: The drawing, with title and description inside.
        keys: Label and drawn sample of each line, for the legend; empty where the drawing says it itself.
    """

    title: str
    svg: Markup
    keys: tuple[tuple[str, Markup], ...] = ()


class Charts:
    """Draws the charts of one page; their ids differ."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def lines(
        self,
        title: str,
        lines: Sequence[Line],
        x_label: str,
        *,
        levels: Sequence[Level] = (),
        names: Sequence[str] | None = None,
        span: tuple[float, float] | None = None,
    ) -> Chart:
        """Draw lines over one pair of axes.

        Args:
            title: What the y-axis is.
            lines: At least one, with at least one spot each; finite numbers.
            x_label: What the x-axis is.
            levels: Values without an x.
            names: What stands at x = 0, 1, 2, ... in place of the numbers.
            span: Lowest and highest y that must be seen, for charts that are compared; None for those of the lines.

        Raises:
            ValueError: There is nothing to draw.
        """
        spots = [spot for line in lines for spot in line.spots]
        if not spots:
            raise ValueError(f"{title}: a chart without a point")
        ys = [y for spot in spots for y in (spot.y, spot.low, spot.high) if y is not None]
        ys += [*(level.y for level in levels), *(span or ())]
        x_axis = _Axis.over([spot.x for spot in spots], _LEFT + _INSET, _WIDTH - _RIGHT - _INSET, is_whole=True)
        if levels and min(ys) == min(level.y for level in levels):
            ys.append(min(ys) - 0.05 * (max(ys) - min(ys)))  # room for its label below it
        y_axis = _Axis.over(ys, _HEIGHT - _BOTTOM, _TOP)
        parts = [*_frame(x_axis, y_axis, x_label, names), *(_level(level, y_axis) for level in levels)]
        with_errors = [
            line for line in lines if not line.is_banded and any(spot.low is not None for spot in line.spots)
        ]
        for line in lines:
            # Bars of error at one x would hide each other.
            aside = _ASIDE * (with_errors.index(line) - (len(with_errors) - 1) / 2) if line in with_errors else 0.0
            parts += _line(line, x_axis, y_axis, aside)
        curves = [[(x_axis.at(spot.x), y_axis.at(spot.y)) for spot in line.spots] for line in lines]
        parts += [_label(level, y_axis.at(level.y), curves) for level in levels]
        keys = tuple((line.label, _sample(line.style)) for line in lines)
        keys += tuple((f"{level.label}: {number(level.y)}", _level_sample()) for level in levels)
        told = "; ".join([*map(_told, lines), *(f"{level.label} at {number(level.y)}" for level in levels)])
        return Chart(title, self._svg(title, f"Over {x_label}. {told}.", parts, _HEIGHT), keys)

    def bars(self, title: str, bars: Sequence[Bar]) -> Chart:
        """Draw bars below each other, each with its label above it and its value behind it.

        Args:
            title: What is measured.
            bars: At least one; values of 0 or more.

        Raises:
            ValueError: There is nothing to draw.
        """
        if not bars:
            raise ValueError(f"{title}: a chart without a bar")
        longest, room = max(bar.value for bar in bars) or 1.0, _WIDTH - 110.0
        parts, y = [], 4.0
        for bar in bars:
            length = max(1.0, room * bar.value / longest)
            parts.append(_text(0, y + _BAR_LABEL - 3, bar.label))
            parts.append(
                Markup('<rect class="bar s{}" x="0" y="{:.1f}" width="{:.1f}" height="{:.0f}"/>').format(
                    bar.style % NUM_STYLES, y + _BAR_LABEL, length, _BAR
                )
            )
            parts.append(_text(length + 5, y + _BAR_LABEL + 11, bar.told))
            y += _BAR_LABEL + _BAR_GAP
        told = "; ".join(f"{bar.label}: {bar.told}" for bar in bars)
        return Chart(title, self._svg(title, f"{told}.", parts, y))

    def _svg(self, title: str, description: str, parts: Sequence[Markup], height: float) -> Markup:
        own = f"chart-{next(self._numbers)}"
        return Markup(
            '<svg role="img" viewBox="0 0 {:.0f} {:.0f}" aria-labelledby="{}-title {}-desc">'
            '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}</svg>'
        ).format(_WIDTH, height, own, own, own, title, own, description, Markup("").join(parts))


def number(value: float) -> str:
    """Write a number as short as four digits tell it."""
    return f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    is_whole: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, is_whole: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if low == high:
            room = 0.5 if is_whole else abs(low) * 0.05 or 0.5
        else:
            room = 0.0 if is_whole else 0.06 * (high - low)
        return cls(low - room, high + room, start, end, is_whole)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= 0.8 * rough)
        step = max(1.0, round(step)) if self.is_whole else step
        place = math.ceil(self.low / step - 1e-9)
        while place * step <= self.high + 1e-9 * step:
            yield place * step
            place += 1


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, names: Sequence[str] | None) -> Iterator[Markup]:
    bottom = _HEIGHT - _BOTTOM
    for value in y_axis.ticks():
        y = y_axis.at(value)
        yield _stroke("grid", _LEFT, y, _WIDTH - _RIGHT, y)
        yield _text(_LEFT - 5, y + 4, _short(value), "end")
    for value in x_axis.ticks():
        x = x_axis.at(value)
        yield _stroke("axis", x, bottom, x, bottom + 4)
        if names is None:
            label = _short(value)
            yield _text(x, bottom + 16, label, "middle" if x < _WIDTH - 30 or len(label) < 3 else "end")
        elif 0 <= value < len(names):
            # In two rows, since names are longer than numbers.
            anchor = "start" if x < _LEFT + 30 else "middle" if x < _WIDTH - 40 else "end"
            yield _text(x, bottom + (16 if value % 2 == 0 else 28), names[int(value)], anchor)
    yield _stroke("axis", _LEFT, bottom, _WIDTH - _RIGHT, bottom)
    if names is None:
        yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x_label, "middle")


def _line(line: Line, x_axis: _Axis, y_axis: _Axis, aside: float) -> Iterator[Markup]:
    style, mark, spots = line.style % NUM_STYLES, _mark_of(line.style), line.spots
    ends = [
        (x_axis.at(spot.x) + aside, y_axis.at(spot.low), y_axis.at(spot.high))
        for spot in spots
        if spot.low is not None and spot.high is not None
    ]
    if line.is_banded and len(ends) > 1:
        around = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
        yield Markup('<polygon class="band s{}" points="{}"/>').format(style, _points(around))
    elif not line.is_banded:
        for x, low, high in ends:
            yield _stroke(f"error s{style}", x, low, x, high)
            yield from (_stroke(f"error s{style}", x - 3, y, x + 3, y) for y in (low, high))
    places = [(x_axis.at(spot.x) + aside, y_axis.at(spot.y)) for spot in spots]
    yield Markup('<polyline class="line s{}" stroke-dasharray="{}" points="{}"/>').format(
        style, _DASHES[style], _points(places)
    )
    every = max(1, math.ceil(len(places) / _MOST_MARKED))
    yield from (_mark(style, mark, x, y) for x, y in places[::every])


def _mark_of(style: int) -> int:
    return (style + style // NUM_STYLES) % NUM_STYLES


def _mark(style: int, mark: int, x: float, y: float) -> Markup:
    """Draw one of the marks: circle, square, triangle, diamond, ring, cross."""
    if mark in (0, 4):
        hollow = " hollow" if mark == 4 else ""
        return Markup('<circle class="mark s{}{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, hollow, x, y)
    if mark == 5:
        path = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
        return Markup('<path class="mark s{} hollow" d="{}"/>').format(style, path)
    corners = {1: ((-3, -3), (3, -3), (3, 3), (-3, 3)), 2: ((0, -4), (4, 3), (-4, 3))}
    around = [(x + dx, y + dy) for dx, dy in corners.get(mark, ((0, -4), (4, 0), (0, 4), (-4, 0)))]
    return Markup('<polygon class="mark s{}" points="{}"/>').format(style, _points(around))


def _level(level: Level, y_axis: _Axis) -> Markup:
    y = y_axis.at(level.y)
    return _stroke("level", _LEFT, y, _WIDTH - _RIGHT, y)


def _label(level: Level, y: float, curves: Sequence[Sequence[tuple[float, float]]]) -> Markup:
    """Write what a level is above or below it, at the end where the curves are farthest away."""
    width, ends = _LETTER * len(level.label), (_LEFT + _INSET, _WIDTH - _RIGHT - _INSET)
    places = [(left, base) for base in (y - 3, y + 11) for left in (ends[0], ends[1] - width)]
    inside = [(left, base) for left, base in places if _TOP <= base <= _HEIGHT - _BOTTOM] or places[:1]
    on_curves = [spot for curve in curves for spot in _along(curve)]

    def nearest(place: tuple[float, float]) -> float:
        left, base = place
        return min(
            math.hypot(max(left - x, 0.0, x - left - width), max(base - 9 - y, 0.0, y - base)) for x, y in on_curves
        )

    left, base = max(inside, key=nearest)
    return _text(*((ends[1], base, level.label, "end") if left > ends[0] else (left, base, level.label)))


def _along(curve: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield points of a curve that lie close to each other."""
    yield curve[0]
    for (x, y), (to_x, to_y) in pairwise(curve):
        pieces = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / _LETTER))
        yield from ((x + (to_x - x) * n / pieces, y + (to_y - y) * n / pieces) for n in range(1, pieces + 1))


def _sample(style: int) -> Markup:
    mark, style = _mark_of(style), style % NUM_STYLES
    stroke = Markup('<polyline class="line s{}" stroke-dasharray="{}" points="0,6 36,6"/>').format(
        style, _DASHES[style]
    )
    return _hidden(stroke + _mark(style, mark, 18, 6))


def _level_sample() -> Markup:
    return _hidden(_stroke("level", 0, 6, 36, 6))


def _hidden(drawn: Markup) -> Markup:
    """Return a drawing of a legend, which has its words beside it."""
    return Markup('<svg class="key" viewBox="0 0 36 12" aria-hidden="true">{}</svg>').format(drawn)


def _stroke(kind: str, x: float, y: float, to_x: float, to_y: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x, y, to_x, to_y)


def _text(x: float, y: float, words: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _short(value: float) -> str:
    """Write a number for an axis: 20k in place of 20000."""
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _told(line: Line) -> str:
    """Say a line in words: all of it where it is short."""
    spots = line.spots
    if len(spots) <= 8:
        return f"{line.label}: " + ", ".join(f"{number(spot.y)} at {spot.x:g}" for spot in spots)
    ys = [spot.y for spot in spots]
    return (
        f"{line.label}: from {number(ys[0])} at {spots[0].x:g} to {number(ys[-1])} at {spots[-1].x:g}, "
        f"lowest {number(min(ys))}, highest {number(max(ys))}"
    )

"""Charts as SVG: drawn to scale, inside their frame, told in words, and told apart without colours."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from launcher.commands.report.charts import Bar, Charts, Level, Line, Spot


def line(*ys: float, label: str = "a", style: int = 0) -> Line:
    return Line(label, tuple(Spot(float(x), y) for x, y in enumerate(ys)), style)


def drawn(svg: str) -> ElementTree.Element:
    """The drawing, read as strictly as XML is."""
    return ElementTree.fromstring(svg)


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def test_higher_values_are_drawn_higher_and_to_scale() -> None:
    svg = drawn(Charts().lines("t", [line(0.0, 1.0, 3.0)], "x").svg)
    (curve,) = (one for one in svg.iter("polyline"))
    (x0, y0), (x1, y1), (x2, y2) = points(curve)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx(3 * (y0 - y1), abs=0.5)
    assert y2 < y1 < y0, "SVG counts from the top"


@pytest.mark.parametrize(
    "ys",
    [(0.5,), (0.0, 0.0), (1e-9, 2e-9), (-3.0, 4e12), (1.0, 1.0 + 1e-12), (-1.0,), tuple(map(float, range(500)))],
)
def test_every_curve_lies_inside_the_drawing(ys: tuple[float, ...]) -> None:
    svg = drawn(Charts().lines("t", [line(*ys)], "x", levels=[Level("l", ys[0])]).svg)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for element in svg.iter():
        for name, limit in (("x", width), ("x1", width), ("x2", width), ("y", height), ("y1", height), ("cy", height)):
            assert 0 <= float(element.attrib.get(name, 0)) <= limit
        if "points" in element.attrib:
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points(element))
    assert len(list(svg.iter("circle"))) <= 24, "marks do not make a long line a band"


def test_axes_have_round_numbers() -> None:
    svg = drawn(Charts().lines("t", [line(0.03, 0.11, 0.27)], "x").svg)
    texts = [element.text for element in svg.iter("text")]
    assert texts == ["0.05", "0.1", "0.15", "0.2", "0.25", "0", "1", "2", "x"]


def test_lines_differ_without_colour() -> None:
    lines = [line(1.0, 2.0, label=str(style), style=style) for style in range(12)]
    chart = Charts().lines("t", lines, "x")
    curves = list(drawn(chart.svg).iter("polyline"))
    assert len({curve.attrib["stroke-dasharray"] for curve in curves}) == 6
    samples = [re.sub(r"\bs\d\b", "", str(sample)) for _, sample in chart.keys]
    assert len(set(samples)) == 12, "dashes and marks of the legend differ together, where dashes come again"


@pytest.mark.parametrize("ys", [(0.0, 0.0, 0.5), (0.5, 0.0, 0.0)])
def test_the_name_of_a_level_stands_where_no_curve_is(ys: tuple[float, ...]) -> None:
    """The name of a yardstick at the bottom of the chart covered the first points of the curves."""
    svg = drawn(Charts().lines("t", [line(*ys)], "x", levels=[Level("zero-shot", 0.01)]).svg)
    (name,) = (one for one in svg.iter("text") if one.text == "zero-shot")
    (curve,) = svg.iter("polyline")
    left = float(name.attrib["x"]) - (54 if name.attrib["text-anchor"] == "end" else 0)
    lies_low = [x for x, y in points(curve) if abs(y - float(name.attrib["y"])) < 12]
    assert not any(left <= x <= left + 54 for x in lies_low)


def test_errors_are_bars_and_ends_of_joined_points_a_band() -> None:
    spots = (Spot(0.0, 1.0, 0.5, 1.5), Spot(1.0, 2.0, 1.0, 3.0))
    bars = drawn(Charts().lines("t", [Line("a", spots, 0)], "x").svg)
    band = drawn(Charts().lines("t", [Line("a", spots, 0, is_banded=True)], "x").svg)
    errors = [one for one in bars.iter("line") if one.attrib["class"].startswith("error")]
    assert len(errors) == 6, "an upright and two ends for each point"
    upright = errors[0]
    assert float(upright.attrib["y1"]) > float(upright.attrib["y2"])
    assert not [one for one in band.iter("line") if one.attrib["class"].startswith("error")]
    (polygon,) = (one for one in band.iter("polygon") if one.attrib["class"].startswith("band"))
    assert len(points(polygon)) == 4


def test_bars_are_as_long_as_what_they_measure_and_say_it() -> None:
    svg = drawn(Charts().bars("t", [Bar("long", 4.0, "4 h"), Bar("short", 1.0, "1 h"), Bar("none", 0.0, "0 h")]).svg)
    widths = [float(one.attrib["width"]) for one in svg.iter("rect")]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.3)
    assert widths[2] == 1.0, "what took no time is still seen"
    assert [one.text for one in svg.iter("text")] == ["long", "4 h", "short", "1 h", "none", "0 h"]


def test_a_chart_says_in_words_what_it_shows_and_escapes_names() -> None:
    hostile = '<script>"&'
    charts = Charts()
    chart = charts.lines(hostile, [line(0.25, 0.5, label=hostile)], hostile, levels=[Level(hostile, 0.3)])
    svg = drawn(chart.svg)
    title, description = svg.find("title"), svg.find("desc")
    assert title is not None
    assert description is not None
    assert title.text == hostile
    assert description.text == f"Over {hostile}. {hostile}: 0.25 at 0, 0.5 at 1; {hostile} at 0.3."
    assert not list(svg.iter("script"))
    other = drawn(charts.bars("t", [Bar(hostile, 1.0, hostile)]).svg)
    assert svg.attrib["aria-labelledby"] != other.attrib["aria-labelledby"]


def test_nothing_is_no_chart() -> None:
    with pytest.raises(ValueError, match="without a point"):
        Charts().lines("t", [], "x")
    with pytest.raises(ValueError, match="without a bar"):
        Charts().bars("t", [])

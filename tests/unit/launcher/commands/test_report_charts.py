"""Charts as SVG, thinned curves, marked words: what the page of a report is made of."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine.config.bm25 import Bm25Config
from launcher.commands.report.charts import Bar, Charts, Level, Line, Spot
from launcher.commands.report.curves import MOST_POINTS, Curve, read_curves
from launcher.commands.report.marking import Marker

SVG = "{http://www.w3.org/2000/svg}"


def line(*ys: float, label: str = "a", style: int = 0) -> Line:
    return Line(label, tuple(Spot(float(x), y) for x, y in enumerate(ys)), style)


def drawn(svg: str) -> ElementTree.Element:
    """The drawing, read as strictly as XML is."""
    return ElementTree.fromstring(svg)


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


# --- charts ----------------------------------------------------------------------------------------------------------


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


# --- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 3, 100_000])
def test_a_curve_of_any_length_keeps_its_mean_and_its_ends(length: int) -> None:
    random.seed(length)
    ys = [random.gauss(0.0, 1.0) for _ in range(length)]
    curve = Curve()
    for x, y in enumerate(ys):
        curve.add(float(x), y)
    assert MOST_POINTS / 2 <= len(curve.bins) <= MOST_POINTS or length < MOST_POINTS
    assert sum(one.count for one in curve.bins) == curve.num_points == length
    assert sum(one.y_sum for one in curve.bins) == pytest.approx(math.fsum(ys))
    assert min(one.low for one in curve.bins) == min(ys)
    assert max(one.high for one in curve.bins) == max(ys)
    assert [one.x for one in curve.bins] == sorted(one.x for one in curve.bins)
    start = 0
    for one in curve.bins:
        own = ys[start : start + one.count]
        assert one.y == pytest.approx(math.fsum(own) / len(own))
        assert (one.low, one.high) == (min(own), max(own))
        start += one.count


def test_measurements_are_read_by_phase(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"time": 5.0, "stage": "warmup", "step": 2, "warmup/loss": 1.0, "warmup/lr": 0.1},
        {"time": 7.0, "stage": "encode/000", "step": 0, "encode/slowest_rank": 0.25},
        {"time": 8.0, "stage": "encode/001", "step": 0, "encode/slowest_rank": 0.75},
        {"time": 9.0, "stage": "evaluate/0", "step": 0, "dev/loss": 0.5},
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    curves = read_curves(path)
    assert curves.phases == ["warmup"], "a held-out loss is no phase of training"
    assert curves.measures == ["loss", "lr"]
    assert curves.by_stage == {"encode/slowest_rank": {"encode/000": 0.25, "encode/001": 0.75}}
    assert (curves.num_lines, curves.seconds) == (4, 4.0)
    assert read_curves(tmp_path / "none").by_tag == {}


# --- marked words ----------------------------------------------------------------------------------------------------


def found(query: str, text: str, **settings: str) -> list[str]:
    pieces = Marker(Bm25Config(**settings), query).marked(text)  # type: ignore[arg-type]
    assert "".join(piece for piece, _ in pieces) == text
    return [piece for piece, is_marked in pieces if is_marked]


def test_words_of_the_query_are_marked_by_their_stems() -> None:
    assert found("who was running the city", "Cities run, the runner was") == ["Cities", "run"]
    assert found("Käse", "KÄSE und käse", language="german") == ["KÄSE", "käse"]


def test_words_without_spaces_between_them_are_marked_by_pairs() -> None:
    assert found("東京大学", "私は東京の大学にいる") == ["東京", "大学"]


def test_a_long_passage_is_shown_around_the_first_marked_word() -> None:
    marker = Marker(Bm25Config(), "needle")
    text = "hay " * 300 + "needle\n" + "straw " * 300
    shown = marker.snippet(text)
    assert shown.startswith("… hay")
    assert shown.endswith("straw …")
    assert 250 < len(shown) < 330
    assert "needle" in shown
    assert marker.snippet("a needle") == "a needle"
    assert marker.snippet("hay " * 300).startswith("hay hay"), "without one, the beginning"
    assert len(marker.snippet("x" * 5000)) < 330

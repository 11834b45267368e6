"""TensorBoard as a person reads it: the game's curve first, what was measured once as tables.

The tab "Custom scalars" has the charts of `layout_of`, in the order in which one asks: whether the game pays (Figure 3
of AR2), whether training is sound, what the index finds, where the time goes. What a run measures once (yardsticks, the
test split, a warm-up's seconds) would be a chart with one dot; it stands as a table in the tab "Text", as the settings
do. `metrics.jsonl` has all of it, by the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.metric_names import ANSWERED, family_of

TENSORBOARD = "tensorboard"
Layout = dict[str, dict[str, list[Any]]]
"""Title of a group -> title of a chart -> its form and the patterns of its tags, as `add_custom_scalars` takes it."""
NOT_TAGS = frozenset({"time", "stage", "step"})
"""Keys of a line of metrics.jsonl that are no measurements."""
_HEADLINES = ("MRR@10", "R@50")
"""Shown first, beside the metric by which iterations are compared: AR2's on MS MARCO (Table 3)."""
_YARDSTICKS = "evaluate/yardsticks"
_NUM_QUERIES = "/num_queries"


@dataclass(frozen=True, slots=True)
class BoardPlan:
    """Where a run's measurements are shown, and in which order."""

    metrics: tuple[str, ...] = ()
    """What is measured on dev, such as `MRR@10`; iterations are compared by the first."""
    games: tuple[str, ...] = ()
    """Names of the phases that come back in iterations, or that are visited once after all warm-ups."""
    warmups: tuple[str, ...] = ()
    """Names of the phases before."""
    settings: str = ""
    """The configuration as YAML."""
    trackers: tuple[str, ...] = (TENSORBOARD,)
    """As `run.trackers`."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The configuration, dotted key -> value."""


def layout_of(plan: BoardPlan) -> Layout:
    """Return the charts, those first that are asked for first.

    Args:
        plan: The recipe's metrics and phases.

    Source: AR2 Figure 3 (retriever and ranker over the iterations), Table 6 (entropy).
    """
    games, warmups = _any_of(plan.games), _any_of(plan.warmups)
    on_dev = {metric: _lines(rf"^dev/[^/]+/{re.escape(metric)}$") for metric in plan.metrics}
    headlines = [metric for metric in dict.fromkeys((*plan.metrics[:1], *_HEADLINES)) if metric in on_dev]
    by_answers = [metric for metric in on_dev if metric not in headlines and family_of(metric) in ANSWERED]
    layout: Layout = {
        "The game on dev, over iterations (AR2 Figure 3)": {metric: on_dev.pop(metric) for metric in headlines},
        "Losses": {
            "both players": _lines(rf"^{games}/loss$"),
            "parts of the retriever's": _lines(rf"^{games}/(adversarial|distillation|label|contrastive|flops)$"),
            "warm-ups": _lines(rf"^{warmups}/loss$"),
        },
        "Reward and entropy": {
            "reward of the retriever": _lines(rf"^{games}/reward$"),
            "entropy over a group, in training": _lines(rf"^{games}/entropy$"),
            "entropy of a ranking, on dev (AR2 Table 6)": _lines(r"^dev/[^/]+/entropy@\d+$"),
            "how far the ranker leads": _lines(rf"^{games}/(lead|ranker_leads|ranker_accuracy|taught)$"),
        },
        "The index at each refresh": {
            "recall against exact search": _lines("^index/recall$"),
            "milliseconds a query": _lines("^index/milliseconds_per_query$"),
            "documents encoded a second": _lines("^encode/documents_per_second$"),
            "candidates that were removed": _lines("^candidates/removed_"),
        },
        "Where the time goes": {
            "seconds of each stage": _lines("^seconds/"),
            "tokens a second, in training": _lines(r"^\w+/tokens_per_second$"),
            "the most GiB of a rank, in training": _lines(r"^\w+/peak_gib$"),
        },
        "Optimizers": {
            "learning rate": _lines(r"^\w+/lr$"),
            "norm of the gradient": _lines(r"^\w+/grad_norm$"),
        },
        "Other metrics on dev": {name: chart for name, chart in on_dev.items() if name not in by_answers},
        "By answers in the text, on dev (where the data have answers)": {name: on_dev[name] for name in by_answers},
    }
    return {title: charts for title, charts in layout.items() if charts}


def is_measured_once(tag: str, stage: str) -> bool:
    """Whether a run has one value of a tag, or none that differ, so that a chart of it shows nothing.

    Args:
        tag: Such as `test/ranker/MRR@10`.
        stage: Which wrote it.
    """
    if tag.startswith("seconds/"):
        return "/" not in stage
    of_one_state = stage == _YARDSTICKS or stage.startswith("fusion/")
    return (
        tag.startswith(("test/", "scores/")) or tag.endswith(_NUM_QUERIES) or (of_one_state and tag.startswith("dev/"))
    )


class Board:
    """TensorBoard's events of a run.

    Args:
        folder: Takes the events; what is in it is replaced.
        plan: What it is made for.
    """

    def __init__(self, folder: Path, plan: BoardPlan) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer: Any = SummaryWriter(str(folder))
        self._once: dict[str, dict[str, float]] = {}
        self._writer.add_custom_scalars(layout_of(plan))
        if plan.settings:
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in plan.settings.splitlines()))

    def show(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.jsonl; its stage has ended where it says how long that took."""
        stage, ends = str(line["stage"]), False
        for tag in sorted(line.keys() - NOT_TAGS):
            ends = ends or tag.startswith("seconds/")
            if is_measured_once(tag, stage):
                self._once.setdefault(stage, {})[tag] = line[tag]
            else:
                self._writer.add_scalar(tag, line[tag], line["step"], walltime=line["time"])
        values = self._once.get(stage, {})
        if ends and any(not tag.startswith("seconds/") and not tag.endswith(_NUM_QUERIES) for tag in values):
            self._writer.add_text(f"measured once/{stage}", table_of(values), line["step"], walltime=line["time"])

    def show_text(self, line: Mapping[str, Any]) -> None:
        """Show a line of texts.jsonl."""
        self._writer.add_text(line["tag"], line["text"], line["step"], walltime=line["time"])

    def flush(self) -> None:
        """Make what was shown so far visible."""
        self._writer.flush()

    def close(self) -> None:
        """Show the seconds of stages that a run has once, and end."""
        seconds = {
            tag: value for own in self._once.values() for tag, value in own.items() if tag.startswith("seconds/")
        }
        if seconds:
            self._writer.add_text("measured once/seconds", table_of(seconds))
        self._writer.close()


def table_of(values: Mapping[str, float]) -> str:
    """Write measurements as a table in Markdown: systems by metrics, or names with values.

    Args:
        values: By tag; `split/system/metric` is a cell of the first form.
    """
    systems: dict[str, dict[str, float]] = {}
    others: dict[str, float] = {}
    for tag, value in values.items():
        place = tag.rsplit("/", 1)
        if tag.count("/") == 2:
            systems.setdefault(place[0].replace("/", ": "), {})[place[1]] = value
        else:
            others[tag] = value
    metrics = list(dict.fromkeys(metric for own in systems.values() for metric in own))
    parts = []
    if systems:
        rows = [[name, *(_number(own.get(metric)) for metric in metrics)] for name, own in systems.items()]
        parts.append(_markdown(["", *metrics], rows))
    if others:
        parts.append(_markdown(["", "value"], [[tag, _number(value)] for tag, value in others.items()]))
    return "\n\n".join(parts)


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [headers, ["---"] * len(headers), *rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _any_of(names: Sequence[str]) -> str:
    return f"({'|'.join(map(re.escape, names)) or '$^'})"


def _lines(pattern: str) -> list[Any]:
    return ["Multiline", [pattern]]

"""What a run took: seconds by kind of stage from its ledger, seconds of a step, and what its index took to search.

Seconds are the clock's, of the ranks that the run had, so runs on other machines are not comparable by them; the number
of ranks stands beside them. A stage that a start was ended in counts from the last start on.

Source: AR2 Table 4 (latency) and Table 8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from engine.config.timetable import Phase
from engine.evaluation import figures
from engine.evaluation.figures import Point
from engine.evaluation.tables import Table, Value
from engine.reliability.starts import read_starts
from engine.results import read_ledger
from engine.run import Run

WARMUP, ENCODING, INDEX, MINING, TEACHING, EVALUATION, OTHER = (
    *("warm-up", "encoding", "index", "mining", "teacher's scores", "evaluation"),
    "other",
)
_KINDS = {
    "encode": ENCODING,
    "index": INDEX,
    "candidates": MINING,
    "negatives": MINING,
    "rescore": MINING,
    "scores": TEACHING,
    "evaluate": EVALUATION,
    "fusion": EVALUATION,
}
"""First word of a stage's name -> the kind of work."""
OVERALL = "overall"
_OF_A_STEP = "milliseconds of a step, "


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took.

    Attributes:
        facts: What the seconds depend on, such as `negatives of a query (n)`; equal for the seeds of a setting.
        seconds: Kind of work -> seconds; all kinds, and `overall`, in which what ran beside training counts once.
        rates: Such as `milliseconds of a step, retriever`.
        restarted: Whether the run was started more than once.
    """

    facts: Mapping[str, float]
    seconds: Mapping[str, float]
    rates: Mapping[str, float]
    restarted: bool


def cost_of(run: Run) -> Cost:
    """Read what a run took.

    Raises:
        ArtifactError: The ledger or the list of starts is damaged.
    """
    stages = read_ledger(run.folder.ledger)
    phase_of = {visit.stage: visit.phase for visit in run.timetable.visits}
    seconds: dict[str, float] = {}
    for name, stage in stages.items():
        kind = _kind(name, phase_of)
        seconds[kind] = seconds.get(kind, 0.0) + float(stage["seconds"])
    starts = read_starts(run.folder.path)
    facts: dict[str, float] = {"ranks": float(starts[-1].num_ranks)} if starts else {}
    if run.config.refresh_devices:
        facts["devices of a host that only refresh"] = float(run.config.refresh_devices)
    if run.timetable.iterations:
        facts["iterations"] = float(run.timetable.iterations)
    for phase in run.timetable.phases:
        if not phase.is_warmup:
            facts[f"queries of a step, {phase.name}"] = float(phase.batch_size)
            facts[f"negatives of a query (n), {phase.name}"] = float(phase.num_negatives)
            facts[f"steps, {phase.name}"] = float(phase.total_steps)
    rates = _rates_of_training(run, phase_of) | _rates_of_search(stages)
    hidden = sum(stage["result"]["hidden_seconds"] for name, stage in stages.items() if name.startswith("overlap/"))
    return Cost(facts, seconds | {OVERALL: sum(seconds.values()) - hidden}, rates, len(starts) > 1)


def efficiency_tables(costs: Mapping[str, Sequence[Cost]]) -> tuple[Table, Table]:
    """Return what settings took, a column for each: means over their runs.

    Args:
        costs: Name -> its runs.

    Returns:
        The printed table, and the same with all digits for CSV.

    Source: AR2 Tables 4 and 8.
    """
    printed: list[tuple[Value, ...]] = []
    written: list[tuple[Value, ...]] = []
    for title, section, digits in (("facts", "{}", "g"), ("seconds", "seconds: {}", ".1f"), ("rates", "{}", ".4g")):
        for key, *means in _rows(costs, title):
            written.append((section.format(key), *means))
            printed.append((section.format(key), *(None if one is None else f"{one:{digits}}" for one in means)))
    notes = ["Seconds of the clock, means over the runs of a name; a step's is the median between two logged points."]
    if any(cost.restarted for own in costs.values() for cost in own):
        notes.append("Some runs were started more than once: a stage counts from the start that finished it.")
    headers = ("what", *costs)
    return Table("Efficiency", headers, tuple(printed), tuple(notes)), Table("", headers, tuple(written))


def rates_table(costs: Mapping[str, Sequence[Cost]]) -> Table:
    """Return the rates of settings alone, with all digits for CSV; arguments as of `efficiency_tables`."""
    return Table("", ("what", *costs), tuple(_rows(costs, "rates")))


def latency_of(costs: Mapping[str, Sequence[Cost]]) -> dict[str, list[Point]]:
    """Return the milliseconds of a step of each phase that was logged more than once, a point for each setting."""
    return {
        key.removeprefix(_OF_A_STEP): [
            Point(name, float(place), mean or 0.0) for place, (name, mean) in enumerate(zip(costs, means, strict=True))
        ]
        for key, *means in _rows(costs, "rates")
        if key.startswith(_OF_A_STEP)
    }


def latency_figure(latency: Mapping[str, Sequence[Point]]) -> Any:
    """Draw what `latency_of` returns as bars; AR2 Table 4 has it by n."""
    return figures.bars("Latency of a step by phase", latency, "milliseconds")


def efficiency_figure(costs: Mapping[str, Sequence[Cost]]) -> Any:
    """Draw the seconds of each setting by kind of work as bars."""
    kinds = dict.fromkeys(key for own in costs.values() for cost in own for key in cost.seconds)
    groups = {
        kind: [
            Point(name, float(place), fmean(cost.seconds.get(kind, 0.0) for cost in own))
            for place, (name, own) in enumerate(costs.items())
        ]
        for kind in kinds
        if kind != OVERALL
    }
    return figures.bars("Seconds by kind of work", groups, "seconds")


def _kind(stage: str, phase_of: Mapping[str, Phase]) -> str:
    if (phase := phase_of.get(stage)) is not None:
        return WARMUP if phase.is_warmup else f"training, {phase.name}"
    return _KINDS.get(stage.split("/")[0], OTHER)


def _rates_of_training(run: Run, phase_of: Mapping[str, Phase]) -> dict[str, float]:
    """Return the median time of a step of each phase, between two points of a stage, and its peak of memory."""
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    before: dict[str, tuple[float, int]] = {}
    path = run.folder.path / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if not text.endswith("\n"):
            continue  # a kill has cut it
        line = json.loads(text)
        stage, step = line["stage"], line["step"]
        phase = phase_of.get(stage)
        if phase is None or f"{phase.name}/loss" not in line:
            continue
        if stage in before and step > before[stage][1]:
            seconds.setdefault(phase.name, []).append((line["time"] - before[stage][0]) / (step - before[stage][1]))
        before[stage] = (line["time"], step)
        if peak := line.get(f"{phase.name}/peak_gib"):
            peaks[phase.name] = max(peaks.get(phase.name, 0.0), peak)
    rates = {f"{_OF_A_STEP}{name}": 1000 * median(own) for name, own in seconds.items()}
    return rates | {f"peak GiB of a rank, {name}": peak for name, peak in peaks.items()}


def _rates_of_search(stages: Mapping[str, Any]) -> dict[str, float]:
    """Return what the last index took to search, and how fast the corpus was encoded on the whole."""
    rates: dict[str, float] = {}
    encoded = [
        (float(stage["result"]["encoded"]), float(stage["result"]["documents_per_second"]))
        for name, stage in stages.items()
        if name.startswith("encode/") and (stage["result"] or {}).get("documents_per_second")
    ]
    if encoded:
        rates["documents encoded a second"] = sum(own for own, _ in encoded) / sum(own / pace for own, pace in encoded)
    for name, stage in stages.items():
        milliseconds = (stage["result"] or {}).get("milliseconds_per_query") if name.startswith("index/") else None
        if milliseconds is not None:
            rates["milliseconds of a search, last index"] = float(milliseconds)
    return rates


def _rows(costs: Mapping[str, Sequence[Cost]], section: str) -> Iterator[tuple[str, *tuple[float | None, ...]]]:
    """Yield each key of a section, what is overall last, with its mean over the runs of each setting."""
    keys = dict.fromkeys(key for own in costs.values() for cost in own for key in getattr(cost, section))
    for key in [key for key in keys if key != OVERALL] + [OVERALL] * (OVERALL in keys):
        yield key, *(_mean(own, section, key) for own in costs.values())


def _mean(costs: Sequence[Cost], section: str, key: str) -> float | None:
    values = [getattr(cost, section)[key] for cost in costs if key in getattr(cost, section)]
    return fmean(values) if values else None

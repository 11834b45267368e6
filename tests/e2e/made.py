"""What a run has made, as its user finds it: read from the files alone, without the code that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OF_THE_MACHINE = ("seconds", "_per_second", "slowest_rank", "peak_gib")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(folder: Path) -> dict[tuple[str, int, str], float]:
    """(stage, step, name) -> value of all that is not of the machine: its clock, its memory."""
    return {
        (line["stage"], line["step"], name): value
        for line in metrics_of(folder)
        for name, value in line.items()
        if name not in {"time", "stage", "step"} and not any(word in name for word in OF_THE_MACHINE)
    }


def losses_of(folder: Path) -> dict[tuple[str, int, str], float]:
    """The losses and their parts, of all training stages."""
    parts = ("loss", "adversarial", "distillation", "reward")
    return {key: value for key, value in measured(folder).items() if key[2].split("/")[-1] in parts}


def summary_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of results/summary.json."""
    rows: list[dict[str, Any]] = json.loads((folder / "results" / "summary.json").read_text())
    return rows


def weights_of(folder: Path) -> dict[str, str]:
    """Model and iteration -> sha256 of the weights that were published."""
    return {
        str(path.parent.relative_to(folder / "weights")): json.loads(path.read_text())["sha256"]
        for path in sorted((folder / "weights").glob("*/*/weights.json"))
    }


def ledger_of(folder: Path) -> dict[str, Any]:
    """Finished stages, in the order in which they finished; empty before the first."""
    path = folder / "ledger.json"
    if not path.exists():
        return {}
    stages: dict[str, Any] = json.loads(path.read_text())["stages"]
    return stages


def ranking_of(path: Path) -> dict[str, list[tuple[str, float]]]:
    """Return the documents of each query with their scores, best first."""
    ranked: dict[str, list[tuple[str, float]]] = {}
    for line in path.read_text().splitlines():
        qid, _, docid, _, score, _ = line.split()
        ranked.setdefault(qid, []).append((docid, float(score)))
    return ranked

"""A real sweep: two settings of the smallest recipe, cut shorter still, and the table of what they have measured."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.e2e.made import metrics_of
from tests.e2e.starts import TINY, Zygote

SHORT = (
    *("ar2.iterations=1", "warmup_retriever.steps=2", "warmup_ranker.steps=2", "ar2.retriever.steps=4"),
    *("ar2.ranker.steps=2", "evaluation.test_at_end=false", "evaluation.zero_shot=false", "evaluation.fuse=false"),
    *("evaluation.max_dev_queries=8", "evaluation.metrics=[MRR@10,A@5]", "run.preflight=false", "run.device=cpu"),
)


def test_a_sweep_runs_its_settings_and_compares_them(zygote: Zygote, small_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    words = ", ".join(f'"{word}"' for word in SHORT)
    file.write_text(
        f"base: {{config: {TINY}, set: [{words}]}}\n"
        "variants: {n4: [], n1: {ar2.num_negatives: 1}}\n"
        f"seeds: [1]\nout: {tmp_path / 'out'}\n"
        'compare: [--metric, "MRR@10,A@5,entropy@15"]\n'
    )
    ended = zygote.launcher("sweep", str(file), f"data.path={small_data}", "--starter", sys.executable, "--no-figure")
    assert ended.code == 0, ended.err + "".join(path.read_text() for path in (tmp_path / "out" / "logs").iterdir())
    assert "2 of 2 runs are finished" in ended.out
    with (tmp_path / "out" / "comparison" / "compare-dev-MRR@10.csv").open(newline="") as lines:
        rows = {(row["metric"], row["system"], row["name"]): row for row in csv.DictReader(lines)}
    systems = [("G", "n4"), ("G", "n1"), ("D", "n4"), ("D", "n1")]
    assert set(rows) == {
        *((metric, *own) for metric in ("MRR@10", "A@5") for own in systems),
        *(("entropy@15", *own) for own in systems[:2]),
    }
    for name in ("n4", "n1"):
        run = tmp_path / "out" / name / "seed-1"
        measured = {tag: value for line in metrics_of(run) for tag, value in line.items() if line["step"] == 1}
        assert float(rows["entropy@15", "G", name]["mean"]) == pytest.approx(measured["dev/retriever/entropy@15"])
        assert float(rows["A@5", "D", name]["mean"]) == pytest.approx(measured["dev/ranker/A@5"])
        summary = json.loads((run / "results" / "summary.json").read_text())
        assert [(row["system"], row["headline"]["to"]) for row in summary] == [
            *(("BM25", None), ("G0", None), ("D0", "G0"), ("G", "G0"), ("D", "G")),
        ]
    ended = zygote.launcher("compare", str(tmp_path / "out"), "--efficiency", "--no-figure")
    assert ended.code == 0, ended.err
    told = {line.split("  ")[0]: line.split()[-2:] for line in ended.out.splitlines()}
    assert told["what"] == ["n1", "n4"], "the folders of the seeds name the settings"
    assert told["negatives of a query (n), retriever"] == ["1", "4"]
    assert "milliseconds of a step, retriever" in told

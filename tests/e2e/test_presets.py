"""The recipes with the papers' numbers run for a few steps, with everything big made small."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.made import losses_of, measured, summary_of
from tests.e2e.starts import ROOT, Zygote

CONFIGS = ROOT / "configs"
PAPER = [CONFIGS / f"ar2_{name}.yaml" for name in ("msmarco", "nq", "triviaqa")]
CODE = [CONFIGS / f"{name}.yaml" for name in ("ar2_triviaqa_released", "simans_msmarco")]
SMALL = (
    *("retriever.name=random", "ranker.name=random", "retriever.precision=fp32", "ranker.precision=fp32"),
    *("random_model.hidden_size=16", "random_model.vocab_size=600", "index.recall_floor=0.2"),
    *("warmup_retriever.steps=2", "warmup_retriever.batch_size=8", "warmup_retriever.micro_batch_size=4"),
    *("warmup_ranker.steps=2", "warmup_ranker.batch_size=4"),
    *("ar2.iterations=1", "ar2.retriever.steps=2", "ar2.retriever.batch_size=4", "ar2.retriever.micro_batch_size=2"),
    *("ar2.ranker.steps=2", "ar2.ranker.batch_size=4", "run.log_every_steps=1"),
    *("evaluation.rerank_depth=5", "evaluation.max_dev_queries=4", "evaluation.max_test_queries=4"),
    "evaluation.iteration=last",
)


@pytest.mark.parametrize("path", [*PAPER, *CODE], ids=lambda path: path.stem)
def test_a_preset_runs(path: Path, zygote: Zygote, small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = zygote.recipe(f"run.path={folder}", f"data.path={small_data}", *SMALL, config=path).wait()
    assert ended.code == 0, ended.err[-6000:]
    assert all(math.isfinite(value) for value in losses_of(folder).values())
    assert {key[0] for key in losses_of(folder)} == {"warmup_retriever", "warmup_ranker", "retriever/1", "ranker/1"}
    assert [row["system"] for row in summary_of(folder) if row["split"] == "test"] == [
        *("BM25", "zero-shot", "G0", "D0", "G", "D")
    ]


def test_bf16_stays_near_the_losses_of_fp32(zygote: Zygote, small_data: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        words = (f"retriever.precision={precision}", f"ranker.precision={precision}", "retriever.dropout=0.0")
        start = zygote.recipe(
            f"run.path={tmp_path / precision}",
            f"data.path={small_data}",
            *(*SMALL, *words, "ranker.dropout=0.0", "evaluation.zero_shot=false", "ar2.iterations=0"),
            config=CONFIGS / "ar2_msmarco.yaml",
        )
        ended = start.wait()
        assert ended.code == 0, ended.err[-6000:]
    exact, rounded = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert list(exact) == list(rounded)
    warmup = [key for key in exact if key[0] == "warmup_retriever"]
    assert [rounded[key] for key in warmup] == pytest.approx([exact[key] for key in warmup], rel=0.05)
    assert [rounded[key] for key in warmup] != [exact[key] for key in warmup]
    assert measured(tmp_path / "bf16")

"""Activations are recomputed where a model would not fit otherwise, and nowhere else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.config.file import load_config
from engine.config.recipe import Config
from launcher.plan.hardware import GIB, Gpu
from launcher.plan.models import shapes_of
from launcher.plan.recomputation import decide_recomputation, device_here

NQ = Path(__file__).parents[4] / "configs" / "ar2_nq.yaml"
WORDS = {"retriever": "bert-base", "ranker": "bert-large"}


def decided(memory_gib: float, *words: str) -> dict[str, object]:
    config: Config = load_config(NQ, ["data.path=/nowhere", "run.path=/nowhere", *words])
    gpu = Gpu("some", int(memory_gib * GIB), 1e12, 1e12, 1e9)
    found = decide_recomputation(config, shapes_of(config, WORDS), gpu, 8)
    return {name: section.gradient_checkpointing for name, section in found.models.items()}


AUTO = ("retriever.gradient_checkpointing=auto", "ranker.gradient_checkpointing=auto")


def test_nothing_is_recomputed_where_all_fits() -> None:
    assert decided(10_000, *AUTO) == {"retriever": False, "ranker": False}


def test_all_is_recomputed_where_nothing_fits() -> None:
    assert decided(4, *AUTO) == {"retriever": True, "ranker": True}


def test_each_model_is_judged_by_its_own_phases() -> None:
    """Symptom: the small retriever recomputed because the large ranker had to."""
    results = [decided(gib, *AUTO) for gib in (4, 8, 8.5, 9, 16)]
    assert any(one["retriever"] != one["ranker"] for one in results)
    for before, after in pairwise(results):
        assert all(before[name] or not after[name] for name in before), "more memory, no more recomputing"


@pytest.mark.parametrize("chosen", [True, False])
def test_a_choice_by_hand_stays(chosen: bool) -> None:
    words = [f"{name}.gradient_checkpointing={str(chosen).lower()}" for name in WORDS]
    assert decided(1, *words) == dict.fromkeys(WORDS, chosen) == decided(10_000, *words)


def test_ranks_on_a_cpu_share_its_memory() -> None:
    alone, shared = (device_here(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert alone.is_cpu
    assert shared.memory_bytes == pytest.approx(alone.memory_bytes / 4, rel=0.01)

"""The plan of an index follows the corpus, the memory and the settings, and what cannot work is refused at once."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.recipe import IndexConfig
from engine.errors import ConfigError
from engine.index.estimate import estimate_index, measured_gigaflops
from engine.index.plan import GIB, IndexPlan, cut_parts, factory_sizes, for_other_corpus, plan_index
from shards.files import parse_record


def planned(factory: str, *, num_documents: int, dimension: int, **settings: Any) -> IndexPlan:
    return plan_index(IndexConfig(factory=factory, **settings), num_documents=num_documents, dimension=dimension)


@pytest.mark.parametrize(
    ("num_documents", "dimension", "factory", "placement"),
    [
        (300, 32, "Flat", "disk"),
        (5000, 384, "IVF39,PQ192x4fs", "memory"),
        (1_000_000, 384, "IVF4000,PQ192x4fs", "memory"),
        (8_841_823, 768, "IVF11892,PQ384x4fs", "memory"),
        (21_015_324, 768, "OPQ96,IVF18336_HNSW32,PQ96", "memory"),
        (138_000_000, 768, "OPQ64,IVF46988_HNSW32,PQ64", "parts"),
        (1_000_000_000, 768, "OPQ64,IVF126488_HNSW32,PQ64", "parts"),
    ],
)
def test_auto_follows_the_size(num_documents: int, dimension: int, factory: str, placement: str) -> None:
    plan = planned("auto", num_documents=num_documents, dimension=dimension)
    assert (plan.factory, plan.placement) == (factory, placement)
    assert plan.num_lists <= max(plan.train_size, 1) <= num_documents
    assert plan.nprobe is plan.refine_factor is None
    assert plan.reasons


@pytest.mark.parametrize(
    ("settings", "num_documents", "factory"),
    [
        (IndexConfig(factory="IVF8,PQ8x4", nprobe=8, refine_factor=8), 5, "Flat"),
        (IndexConfig(factory="IVF8,PQ8x4", nprobe=8, refine_factor=8), 999, "Flat"),
        (IndexConfig(factory="IVF8,PQ8x4", nprobe=8, refine_factor=8), 1000, "IVF8,PQ8x4"),
        (IndexConfig(factory="IVF4096,PQ8", placement="disk"), 3000, "Flat"),
        (IndexConfig(factory="IVF64,PQ8x4", train_documents=500), 1200, "IVF64,PQ8x4"),
        (IndexConfig(factory="auto", placement="memory", train_documents=9000), 1, "Flat"),
        (IndexConfig(factory="auto", nprobe=4), 30, "Flat"),
        (IndexConfig(factory="auto", nprobe=4), 5000, "auto"),
        (IndexConfig(factory="Flat"), 5000, "Flat"),
    ],
)
def test_another_corpus_is_searched_exactly_where_it_is_too_small_for_the_index(
    settings: IndexConfig, num_documents: int, factory: str
) -> None:
    """Symptom: a run with an index could not be evaluated on a small corpus."""
    found = for_other_corpus(settings, num_documents=num_documents, dimension=32)
    assert found.factory == factory
    assert factory == "Flat" or found == settings
    plan = plan_index(found, num_documents=num_documents, dimension=32)
    assert plan.exact == (factory == "Flat")


def test_a_high_recall_target_takes_finer_codes_where_they_fit() -> None:
    """Symptom: a target of 0.99 gets the codes of 0.9, and the search re-scores ten times as many candidates."""
    factories = [
        planned("auto", num_documents=21_015_324, dimension=768, recall_target=target, memory_gib=gib).factory
        for target, gib in ((0.9, 8.0), (0.99, 8.0), (0.99, 3.0))
    ]
    assert [factory.rpartition(",")[2] for factory in factories] == ["PQ96", "PQ192", "PQ96"]


def test_auto_stays_within_the_memory() -> None:
    for memory_gib in (3.0, 1.5, 1.0):
        plan = planned("auto", num_documents=8_841_823, dimension=768, memory_gib=memory_gib)
        needed = factory_sizes(plan.factory, 768).index_bytes(8_841_823)
        assert plan.placement == "memory"
        assert needed <= memory_gib * GIB
        assert plan.factory.endswith("x4fs") == (memory_gib == 3.0)  # shorter codes where the long ones do not fit
    small = planned("auto", num_documents=8_841_823, dimension=768, memory_gib=0.5)
    assert (small.placement, small.code_bytes) == ("parts", 64)
    asked = planned("auto", num_documents=100_000, dimension=64, placement="disk")
    assert (asked.placement, asked.factory) == ("disk", "OPQ8,IVF781,PQ8")


def test_every_small_corpus_can_train_its_lists() -> None:
    for num_documents in (1, 15, 999, 1000, 1500, 5000, 60_000):
        plan = planned("auto", num_documents=num_documents, dimension=24)
        assert plan.exact == (num_documents < 1000)
        assert 1 <= plan.num_lists <= max(1, plan.train_size)


def test_what_is_given_is_kept() -> None:
    plan = planned(
        "OPQ4,IVF20,PQ4x6",
        num_documents=5000,
        dimension=16,
        nprobe=3,
        refine_factor=9,
        train_documents=700,
        kmeans_iterations=2,
        recall_target=0.5,
        recall_floor=0.5,
    )
    assert plan == IndexPlan("OPQ4,IVF20,PQ4x6", 20, 3, 700, 2, "memory", 3, 9, 0.5)
    assert planned("IVF20,SQ8", num_documents=5000, dimension=16, nprobe=99).nprobe == 20
    assert planned("Flat", num_documents=3, dimension=16).exact


def test_a_plan_survives_json() -> None:
    import json
    from dataclasses import asdict

    plan = planned("auto", num_documents=5000, dimension=16)
    again = parse_record(json.loads(json.dumps(asdict(plan))), IndexPlan, "the plan")
    assert (again, again.reasons) == (plan, plan.reasons)


@pytest.mark.parametrize(
    ("factory", "more", "message"),
    [
        ("IVF301,PQ4x4", {}, "301 inverted lists, but 300 embeddings"),
        ("IVF8,PQ4", {"num_documents": 200}, "256 entries in a codebook, but 200 embeddings"),
        ("IVF30,PQ4x4", {"train_documents": 29}, "30 inverted lists, but 29 embeddings"),
        ("IVF8,PQ5x4", {}, "cannot make 'IVF8,PQ5x4' for embeddings of 16 dimensions"),
        ("IVF8,Nonsense", {}, "cannot make"),
        ("HNSW32", {}, "cannot make 'HNSW32'"),
        ("IVF8,PQ8x4,RFlat", {}, "lie inside another index"),
        ("IVF8,LSQ2x4fs", {}, "cannot make"),
        ("Flat", {"nprobe": 3}, "index.nprobe is 3 for exact search"),
        ("Flat", {"placement": "parts"}, "index.placement is 'parts' for exact search"),
        ("IVF8,PQ8x4fs", {"placement": "disk"}, "are searched in memory only"),
        ("IVF8,PQ8x4fs", {"memory_gib": 1e-6}, "are searched in memory only"),
        ("IVF8,PQ8x4", {"memory_gib": 1e-6, "placement": "memory"}, "placement is memory, but the index takes"),
        ("IVF8,PQ8x4", {"recall_floor": 0.99}, "recall_floor 0.99 is above index.recall_target 0.95"),
    ],
)
def test_what_cannot_work_is_refused(factory: str, more: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"num_documents": 300, "dimension": 16} | more
    with pytest.raises(ConfigError, match=message):
        planned(factory, **settings)


def test_exact_search_names_all_that_it_cannot_have_at_once_as_words() -> None:
    """Symptom: `index.factory=Flat`, a remedy itself, was refused for one key of the recipe's after the other."""
    settings = {"nprobe": 8, "refine_factor": 4, "train_documents": 9000, "placement": "disk"}
    with pytest.raises(ConfigError) as caught:
        planned("Flat", num_documents=5000, dimension=16, **settings)
    assert "index.nprobe is 8, index.refine_factor is 4, index.train_documents is 9000" in str(caught.value)
    words = "index.nprobe=null index.refine_factor=null index.train_documents=null index.placement=auto"
    assert f"Remedy: give {words}, too" in str(caught.value)


def test_parts_are_contiguous_complete_and_neither_few_nor_many() -> None:
    for sizes in ([5], [1, 1, 100, 1, 1], [1000] * 21, [10] * 3 + [10_000] * 40, [4000] * 5254, [250_000] * 30):
        parts = cut_parts(sizes)
        assert [number for part in parts for number in part] == list(range(len(sizes)))
        assert min(8, len(sizes)) <= len(parts) <= 64
        assert all(len(part) for part in parts)
    assert len(cut_parts([4000] * 5254)) == 64
    assert [len(part) for part in cut_parts([1000] * 16)] == [2] * 8


def test_an_estimate_counts_what_the_index_holds() -> None:
    plan = planned("auto", num_documents=21_015_324, dimension=768)
    told = estimate_index(plan, num_documents=21_015_324, dimension=768, num_parts=64, gigaflops=100)
    assert told.codes_bytes == 96 * 21_015_324
    assert told.ids_bytes == 8 * 21_015_324
    assert 18336 * 768 * 4 < told.lists_bytes < 1.2 * 18336 * 768 * 4
    assert 20 * 18336 * 768 < told.training_bytes < told.sample_bytes == 4 * 768 * plan.train_size
    assert told.warm_minutes == pytest.approx(0.3 * told.train_minutes)
    assert told.rank_bytes < told.index_bytes / 2
    assert told.embeddings_bytes == 4 * 768 * 21_015_324
    slower = estimate_index(plan, num_documents=21_015_324, dimension=768, num_parts=64, gigaflops=50)
    assert slower.train_minutes == pytest.approx(2 * told.train_minutes)
    assert slower.add_minutes == pytest.approx(2 * told.add_minutes)
    lines = told.lines(plan)
    for part in ("OPQ96,IVF18336_HNSW32,PQ96", "GiB of the 8 allowed", "train ", "GFLOP/s", "embeddings 60.1 GiB"):
        assert any(part in line for line in lines), part
    unmerged = planned("auto", num_documents=138_000_000, dimension=768)
    assert estimate_index(unmerged, num_documents=138_000_000, dimension=768, num_parts=64).merged_bytes == 0
    flat = planned("Flat", num_documents=1000, dimension=768)
    assert estimate_index(flat, num_documents=1000, dimension=768, num_parts=8).index_bytes == 0
    assert measured_gigaflops() > 0.1

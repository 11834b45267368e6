"""A lexical retriever's postings in the plan: disk, memory of a rank, time, and nothing where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.refresh import mining
from engine.retrievers.lexical import LexicalSearcher
from launcher.plan.corpus import Corpus
from launcher.plan.durations import Rates
from launcher.plan.estimate import Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.models import shapes_of
from launcher.plan.postings import QUERIES_A_PASS, postings_use
from launcher.plan.report import report
from launcher.plan.storage import host_peak
from tests.sparse_stores import make_postings
from tests.unit.launcher.plan.test_estimate import row

TINY = Path(__file__).parents[4] / "configs" / "r2anker_tiny.yaml"
CORPUS = Corpus(documents=20_000, train=9000, dev=100, test=0, text_bytes=600.0, tokens=120.0, sources=(), terms=150.0)
WORDS = 1000


def recipe() -> Config:
    return load_config(TINY).sized(CORPUS.sizes)


def planned(corpus: Corpus = CORPUS) -> Plan:
    config = recipe()
    shapes = shapes_of(config)
    return make_plan(config, corpus, shapes, find_gpu("a100-80gb"), nodes=1, ranks_per_node=2, rates=Rates())


def test_disk_is_what_the_store_writes(tmp_path: Path) -> None:
    """Two states and zero-shot, each with a part a shard; against files that are really written."""
    rng = np.random.default_rng(0)
    weights_NV = np.zeros((640, WORDS), dtype=np.float32)
    for document in weights_NV:
        document[rng.choice(WORDS, 150, replace=False)] = 1
    store = make_postings(tmp_path, weights_NV, [64] * 10, dtype="float16")
    written = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    assert store.num_postings == 640 * 150
    config = recipe()
    use = postings_use(config, replace(CORPUS, documents=640), shapes_of(config))
    assert use is not None
    assert use.num_bytes == pytest.approx(written, rel=0.01)
    assert use.states == {"lexical": 3}
    assert use.disk_bytes == 3 * use.num_bytes
    plan = planned()
    assert plan.disk.parts["postings"][0] == 3 * (20_000 * 150 * 4 + 313 * 8 * (WORDS + 1))


def test_a_rank_holds_hits_of_a_pass_and_no_more_with_more_documents() -> None:
    assert mining._BLOCKS_A_GROUP * LexicalSearcher.block_size == QUERIES_A_PASS
    config = recipe()
    shapes = shapes_of(config)
    uses = [postings_use(config, replace(CORPUS, documents=number), shapes) for number in (20_000, 2_000_000)]
    assert uses[0] is not None
    assert uses[1] is not None
    assert uses[0].rank_bytes == uses[1].rank_bytes == 8192 * 25 * 12 + 48 * 2**20 + 64 * 150 * 12
    assert uses[1].num_bytes == pytest.approx(100 * uses[0].num_bytes, rel=0.01)
    assert uses[0].passes == 2 * 2, "9,000 queries by both states"
    assert uses[0].queries == 2 * 9000 + 3 * 16, "and the dev queries that are measured"


def test_the_report_tells_it() -> None:
    text = report(planned())
    hours = text[text.index("\nTime\n") :]
    assert row(hours, "encode lexical")[1] == "3"
    assert row(hours, "lexical search")[-1].startswith("18048 queries, exact; mining reads all postings 4 times")
    assert row(hours, "encode")[1] == "3", "the dense one, in two states and zero-shot: not the lexical one's too"
    assert "150 terms a document (--document-terms)" in text
    assert row(text, "postings")[-1] == "each rank, while a lexical retriever encodes or searches"
    assert "frozen lexical" in row(text, "encode, mine lexical")[1]
    more = planned(replace(CORPUS, terms=300.0))
    assert more.disk.postings - planned().disk.postings == 3 * 20_000 * 150 * 4


def test_postings_are_held_in_their_turn() -> None:
    parts = planned().host
    grown = {**parts, "postings": (10**12, "")}
    assert host_peak(grown) - host_peak({**parts, "postings": (0, "")}) > 0.9 * 10**12


def test_without_a_lexical_retriever_there_is_nothing_of_it() -> None:
    config = load_config(TINY, ["lexical=null"])
    shapes = shapes_of(config)
    plan = make_plan(config, CORPUS, shapes, find_gpu("a100-80gb"), nodes=1, ranks_per_node=2, rates=Rates())
    text = report(plan)
    assert plan.postings is None
    assert "lexical" not in text
    assert "postings" not in text

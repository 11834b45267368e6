"""What a plan makes of rarer refreshes, and of one that runs beside the ranker's phase."""

from __future__ import annotations

import pytest

from engine.config.file import load_config
from launcher.plan.corpus import Corpus
from launcher.plan.durations import Rates
from launcher.plan.estimate import Plan, make_plan
from launcher.plan.hardware import find_gpu
from launcher.plan.models import shapes_of
from launcher.plan.phases import CONTEXT_BYTES
from launcher.plan.storage import PROCESS_BYTES, mined_queries
from tests.distributed.processes import ROOT

CORPUS = Corpus(documents=2_000_000, train=9000, dev=100, test=0, text_bytes=600.0, tokens=120.0, sources=())


def planned(*words: str) -> Plan:
    given = ["ar2.iterations=7", "ar2.ranker.steps=4000", "index.factory=auto", "index.nprobe=null", *words]
    config = load_config(ROOT / "configs" / "tiny.yaml", [*given, "index.refine_factor=null"])
    shapes, gpu = shapes_of(config), find_gpu("a100-80gb")
    return make_plan(config, CORPUS, shapes, gpu, nodes=1, ranks_per_node=2, rates=Rates())


def times(plan: Plan) -> dict[str, int]:
    return {phase.name: phase.times for phase in plan.hours}


def seconds(plan: Plan) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in plan.hours}


@pytest.fixture(scope="module")
def plain() -> Plan:
    return planned()


def test_rarer_refreshes_are_fewer_indexes_searches_and_measurements(plain: Plan) -> None:
    rare = planned("ar2.refresh_every=3")  # after 0, 3, 6 and 7
    for name, (before, after) in {"index: train": (9, 5), "mining search": (8, 4), "evaluation": (8, 4)}.items():
        assert (times(plain)[name], times(rare)[name]) == (before, after)
    assert times(rare)["ranker phase"] == times(plain)["ranker phase"]


def test_the_start_is_encoded_once_whoever_asks_for_it(plain: Plan) -> None:
    word, unmeasured = "warmup_retriever.candidates=zero_shot", "evaluation.zero_shot=false"
    both, mined, neither = planned(word), planned(word, unmeasured), planned(unmeasured)
    assert [times(one)["encode"] for one in (plain, both, mined, neither)] == [9, 9, 9, 8]
    assert [times(one)["mining search"] for one in (plain, both)] == [8, 8]
    assert (times(both)["mining search, zero-shot"], "mining search, zero-shot" in times(plain)) == (1, False)
    assert [one.disk.indexes_kept for one in (plain, both, mined)] == [plain.disk.indexes_kept] * 3
    assert mined.disk.weights == plain.disk.weights > neither.disk.weights


def test_a_mixture_has_the_ranker_score_what_others_found() -> None:
    """Of the ten documents of a query five are BM25's; the ranker has not scored them behind its retriever."""
    only, both = (
        seconds(planned(f"evaluation.fusion_candidates={one}", "evaluation.rerank_depth=10"))["evaluation"]
        for one in ("retriever", "hybrid")
    )
    without = seconds(planned("evaluation.fuse=false", "evaluation.rerank_depth=10"))["evaluation"]
    deeper = seconds(planned("evaluation.fuse=false", "evaluation.rerank_depth=20"))["evaluation"]
    assert only == without
    assert both - only == pytest.approx((deeper - without) * 5 / 80), "once, where the table has eight measurements"


def test_of_sampled_queries_the_largest_refresh_counts() -> None:
    """Symptom: the queries of one iteration would stand for those of three that draw from one refresh."""

    def mined(*words: str) -> int:
        table = load_config(ROOT / "configs" / "tiny.yaml", ["ar2.mine=sampled", "ar2.iterations=7", *words]).timetable
        return mined_queries(table, CORPUS, table.minings[-1])

    one = (6 + 4) * 8
    assert mined() == one
    assert mined("ar2.refresh_every=3") == 3 * one
    assert mined("ar2.refresh_until=0.9") == 6 * (4 + 6) * 8, "if the first one turned out to be the last"


def test_what_runs_beside_the_ranker_takes_its_memory_and_hides_its_hours(plain: Plan) -> None:
    beside = planned("ar2.overlap=ranker")
    rows = [name for name in seconds(plain) if name.startswith(("index: ", "mining"))]
    hidden = sum(seconds(plain)[name] - seconds(beside)[name] for name in rows)
    assert 0 < hidden <= seconds(plain)["ranker phase"]
    assert all(seconds(beside)[name] > 0 for name in rows if name in seconds(beside)), "the warm-up's hides nowhere"
    assert seconds(beside)["ranker phase"] == seconds(plain)["ranker phase"]
    own = {phase.name: phase.parts.get("the refresh beside it", 0) for phase in beside.phases}
    assert own["ranker"] > CONTEXT_BYTES
    assert sum(own.values()) == own["ranker"], "nobody else has it beside"
    assert beside.host["processes"][0] == 2 * plain.host["processes"][0] == 4 * PROCESS_BYTES


def test_devices_of_their_own_take_no_ranks_memory_and_encode_by_their_number(plain: Plan) -> None:
    """Symptom: the refresh of two devices would be planned as fast as that of all ranks, and in the ranks' memory."""
    split = planned("ar2.overlap=split", "ar2.refresh_devices=1")
    assert not any("the refresh beside it" in phase.parts for phase in split.phases)
    assert split.host["processes"][0] == 3 * PROCESS_BYTES
    assert (split.world_size, split.num_devices) == (2, 3)
    before, after = (
        sum(took for name, took in seconds(plan).items() if name.startswith(("encode", "index: ", "mining search")))
        for plan in (plain, split)
    )
    beside = {name: seconds(plain)[name] * 7 / times(plain)[name] for name in ("encode", "mining search")}
    assert before - after == pytest.approx(seconds(plain)["ranker phase"] - sum(beside.values())), (
        "one device takes twice the time of two ranks for these, and the ranker's phase is full of it"
    )
    lone = planned("ar2.overlap=split", "ar2.refresh_devices=2", "ar2.ranker.steps=400000")
    assert "mining search" in seconds(lone), "the warm-up's hides nowhere"
    assert seconds(lone)["mining search"] == pytest.approx(seconds(plain)["mining search"] / 8)


def test_candidates_that_are_scored_anew_take_disk_beside_what_they_were() -> None:
    words = ("ar2.refresh_every=2", "ar2.iterations=2", "ar2.top_k=100")
    plain, scored = planned(*words).disk.candidates, planned(*words, "ar2.rescore=always").disk.candidates
    # The first ranker's phase and the second retriever's draw the warm-up's candidates at the scores of G_1.
    queries = 4000 * 8 + 6 * 8
    assert scored - plain == min(CORPUS.train, queries) * (12 * 100 + 16)


def test_candidates_that_are_scored_anew_take_the_hours_of_encoding_them() -> None:
    words = ("ar2.refresh_every=2", "ar2.iterations=2", "ar2.top_k=100", "ar2.rescore=always")
    rows = {phase.name: phase for phase in planned(*words).hours}
    # 9,000 queries of 100 candidates are fewer than the corpus' documents, which an encoding takes as a whole.
    a_document = rows["encode"].flops / rows["encode"].times / CORPUS.documents
    assert rows["new scores"].times == 1
    assert rows["new scores"].flops == pytest.approx(CORPUS.train * 100 * a_document)
    assert "new scores" not in times(planned("ar2.rescore=always")), "each phase draws from fresh candidates"


def test_beside_the_ranker_the_newest_embeddings_are_read_and_nothing_is_encoded_twice() -> None:
    rows = {phase.name: phase for phase in planned("ar2.overlap=ranker", "ar2.rescore=always").hours}
    assert rows["new scores"].times == 7
    assert rows["new scores"].flops == 0
    assert rows["new scores"].seconds > 0


def test_where_the_corpus_is_encoded_beside_the_ranker_candidates_are_encoded_by_the_ranks() -> None:
    words = ("ar2.overlap=split", "ar2.refresh_devices=1", "ar2.rescore=always")
    rows = {phase.name: phase for phase in planned(*words).hours}
    assert rows["new scores"].flops > 0

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data import tokenization
from engine.data.candidates import Candidates
from engine.errors import ConfigError
from engine.index.plan import plan_index
from engine.retrievers import bm25_build
from engine.retrievers.bm25_files import Bm25Folder
from engine.training import state as training_state
from launcher.plan import bm25 as plan_bm25
from launcher.plan import corpus as corpus_module
from launcher.plan.bm25 import bm25_use
from launcher.plan.corpus import Corpus, corpus_of
from launcher.plan.models import shape_of, shapes_of
from launcher.plan.phases import training_work
from launcher.plan.storage import (
    DEFAULT_DOCUMENTS_PER_SHARD,
    STATE_FILE_BYTES,
    DiskUse,
    disk_use,
    host_memory,
    host_peak,
    index_needs,
    mined_queries,
    offloaded_bytes,
    shard_bytes,
    shard_sizes,
)
from launcher.plan.traffic import gradient_bytes, iteration_traffic
from shards.embeddings import Stamp, write_part
from shards.made.generated import generate_dataset
from shards.manifest import TokenStream
from shards.records import Document
from shards.writer import Tokenization, write_shard

ROOT = Path(__file__).parents[4]


def tiny(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.yaml", overrides)


def corpus(**sizes: float) -> Corpus:
    values = {"documents": 20_000, "train": 1000, "dev": 100, "test": 100, "text_bytes": 600.0, "tokens": 120.0}
    return Corpus(**(values | sizes), sources=())  # type: ignore[arg-type]


def use(config: Config, **sizes: float) -> DiskUse:
    shapes, found = shapes_of(config), corpus(**sizes)
    dimension = shapes["retriever"].hidden
    plan = plan_index(config.index, num_documents=found.documents, dimension=dimension)
    return disk_use(config, found, shapes, index_needs(config, found, plan, dimension, 50.0))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_shards_and_embeddings_take_what_is_planned(tmp_path: Path) -> None:
    """The disk filled up although the plan had found it large enough."""
    rng = np.random.default_rng(0)
    words = [["word"] * int(rng.integers(40, 120)) for _ in range(200)]
    documents = [Document(f"d{number}", "title", " ".join(text)) for number, text in enumerate(words)]
    stream = Tokenization(TokenStream("retriever", "0" * 64, 512), lambda texts: [[7] * len(t.split()) for t in texts])
    entry = write_shard(documents, tmp_path / "shards", 0, 0, [stream], "{title} {text}")
    text = float(np.mean([len(document.title + document.text) for document in documents]))
    tokens = entry.num_tokens["retriever"] / len(documents)
    written = (tmp_path / "shards" / entry.name).stat().st_size
    assert len(documents) * shard_bytes(text, [tokens]) == pytest.approx(written, rel=0.1)

    write_part(tmp_path / "store", entry, np.zeros((200, 32), dtype=np.float16), Stamp("000", "0" * 64, "0" * 64))
    found = use(tiny("data.documents_per_shard=200"), documents=200)
    assert found.embeddings == pytest.approx(folder_bytes(tmp_path / "store"), rel=0.02)


def test_candidates_take_what_is_planned(tmp_path: Path) -> None:
    queries, depth = 300, 20
    scores = np.zeros((queries, depth), dtype=np.float32)
    qids = [f"question-{number:04d}" for number in range(queries)]
    saved = Candidates("dense", Stamp("000", "0" * 64, "0" * 64), qids, scores.astype(np.int64), scores, Counter())
    saved.save(tmp_path)
    # Four times as many: BM25's, and those of the warm-up and of both iterations.
    found = use(tiny("warmup_retriever.bm25_depth=20"), train=queries)
    assert found.candidates / 4 == pytest.approx(folder_bytes(tmp_path), rel=0.05)


def test_only_queries_that_are_drawn_are_mined() -> None:
    """The warm-ups' queries were counted at each refresh, or the game's at none."""
    config, found = tiny("ar2.mine=sampled"), corpus(train=10_000)
    table = config.timetable
    mined = {mining.name: mined_queries(table, found, mining) for mining in table.minings}
    game = config.ar2.retriever.steps * 8 + config.ar2.ranker.steps * 8
    assert mined == {"bm25": 10 * 16, "000": 8 * 8 + game, "001": game, "002": game}
    assert {mined_queries(table, corpus(train=50), mining) for mining in table.minings} == {50}


def test_kept_and_written_checkpoints_count() -> None:
    config = tiny()
    both = sum(shape.parameters for shape in shapes_of(config).values())
    assert use(config).checkpoints == 2 * 12 * both
    assert use(tiny("run.keep_checkpoints=3")).checkpoints == 3 * 12 * both
    # Steps 5 and 10 of the warm-ups (10 and 8 steps) and 5 of the retriever's two phases (6 steps; the ranker has 4).
    kept = use(tiny("run.keep_every_steps=5")).checkpoints
    retriever = shape_of(config, "retriever").parameters
    assert kept == 12 * ((2 + 4) * retriever + (2 + 1) * (both - retriever))


def test_the_new_index_lies_beside_the_kept_ones() -> None:
    """The disk held the indexes that are kept, and not the one that was being built."""
    assert use(tiny("ar2.iterations=5")).indexes_kept == 2 + 2  # the newest two, zero-shot's and the warm-up's
    assert use(tiny("ar2.iterations=0")).indexes_kept == 1  # zero-shot's, while the warm-up's is built
    assert use(tiny("ar2.iterations=5", "evaluation.iteration=best")).indexes_kept == 2 + 2 + 1  # and the best one's
    two = use(tiny("ar2.iterations=2", "evaluation.iteration=best"))
    assert two.indexes_kept == use(tiny("ar2.iterations=2")).indexes_kept, "it is among the newest"
    found = use(tiny("run.keep_indexes=4", "ar2.iterations=5"))
    assert found.parts["embeddings"][0] == 7 * found.embeddings


def test_embeddings_on_the_hosts_leave_the_run_folder_and_its_traffic() -> None:
    """What lies on the hosts fills no shared disk; what is copied there at the end is counted, and told apart."""
    words = ("index.embeddings=local", "index.local_folder=/scratch", "evaluation.fuse=false")
    shared, local = use(tiny()), use(tiny(*words))
    alone = use(tiny(*words, "index.gather_embeddings=false"))
    assert local.local_bytes == alone.local_bytes == shared.parts["embeddings"][0] > 0
    assert shared.local_bytes == 0
    assert local.parts["embeddings"][0] == 20_000 * 32 * 2
    assert shared.peak - alone.peak == shared.parts["embeddings"][0]
    moved = {}
    for name, config in (("shared", tiny()), ("local", tiny(*words))):
        shapes, found = shapes_of(config), corpus()
        plan = plan_index(config.index, num_documents=found.documents, dimension=32)
        needs = index_needs(config, found, plan, 32, 50.0)
        stages = dict.fromkeys(shapes, 1)
        rows = iteration_traffic(config, found, shapes, training_work(config, shapes, 2), stages, 2, plan, needs, 1000)
        moved[name] = {way: sum(row.total for row in rows if row.way == way) for way in ("files", "local disks")}
        exchanged = sum(row.total for row in rows if row.what == "re-scoring")
    assert moved["shared"]["local disks"] == 0
    assert moved["local"]["local disks"] > 3 * 20_000 * 32 * 2, "written, searched, added, and read at random"
    assert sum(moved["local"].values()) == pytest.approx(moved["shared"]["files"] + exchanged)
    assert exchanged > 0


def test_numbers_that_are_written_down_twice_are_the_engines() -> None:
    assert STATE_FILE_BYTES == training_state.MAX_FILE_BYTES
    own = (tokenization._MOST_SHARDS, tokenization._FEWEST_DOCUMENTS, tokenization._MOST_DOCUMENTS)
    assert own == DEFAULT_DOCUMENTS_PER_SHARD


def test_shards_cover_the_corpus() -> None:
    sizes = shard_sizes(tiny("data.documents_per_shard=64"), 300)
    assert (sum(sizes), len(sizes), max(sizes)) == (300, 5, 64)


def test_a_host_holds_the_index_once_a_rank_and_both_engines() -> None:
    """A node of eight GPUs ran out of memory: every rank had loaded the index."""
    config = tiny()
    shapes = shapes_of(config)
    plan = plan_index(config.index, num_documents=20_000, dimension=shapes["retriever"].hidden)
    needs = index_needs(config, corpus(), plan, shapes["retriever"].hidden, 50.0)

    def parts(ranks: int, training: int | None = None) -> dict[str, tuple[int, str]]:
        return host_memory(config, corpus(), shapes, plan, needs, ranks_per_host=ranks, world_size=8, training=training)

    assert parts(8)["index"][0] == 8 * needs.index_bytes == 8 * parts(1)["index"][0]
    assert parts(8)["offloaded engines"][0] == 8 * parts(1)["offloaded engines"][0] > 0
    assert parts(2, training=10**9)["offloaded engines"][0] == 0
    assert host_peak(parts(2, training=10**9)) > 2 * 10**9


def test_an_engine_at_rest_takes_its_state() -> None:
    shape = shape_of(tiny(), "ranker")
    total = shape.parameters
    assert offloaded_bytes(shape, "fp32", 0, 1) == 12 * total
    assert offloaded_bytes(shape, "bf16", 0, 1) == 10 * total  # the masters stay on the GPU
    assert offloaded_bytes(shape, "bf16", 1, 1) == 14 * total


@pytest.mark.parametrize(("stage", "expected"), [(0, 2), (1, 3), (2, 5), (3, 4)])
def test_traffic_of_gradients(stage: int, expected: int) -> None:
    """Two micro-batches on two ranks, in halves of the weights: what DeepSpeed's collectives were counted to send."""
    shape = shape_of(tiny(), "ranker")
    sent = gradient_bytes(shape, "bf16", stage=stage, world_size=2, micro_batches=2)
    assert sent == expected * shape.parameters
    assert gradient_bytes(shape, "bf16", stage=stage, world_size=1, micro_batches=2) == 0


def test_all_batches_that_cannot_be_shared_are_named() -> None:
    config = tiny("warmup_ranker.batch_size=9")
    shapes = shapes_of(config)
    with pytest.raises(ConfigError, match=r"3 ranks cannot share warmup_retriever.batch_size=16, ar2.retriever"):
        training_work(config, shapes, world_size=3)
    works = training_work(tiny(), shapes, world_size=2)
    assert [(work.name, work.queries, work.micro_batches) for work in works] == [
        ("warm-up retriever", 8, 2),
        ("warm-up ranker", 4, 2),
        ("retriever", 4, 2),
        ("ranker", 4, 2),
    ]


def test_a_made_up_set_has_the_size_that_is_generated(tmp_path: Path) -> None:
    counts = generate_dataset(tmp_path / "data", num_documents=300)
    found = corpus_of(tiny())
    assert found.documents == counts["documents"]
    assert [found.train, found.dev, found.test] == [counts[f"{split} queries"] for split in ("train", "dev", "test")]


def test_a_folder_says_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A help desk of 304 documents and 608 queries was planned as 65 and 609: by 650 bytes a document, and by lines."""
    (tmp_path / "data" / "qrels").mkdir(parents=True)
    (tmp_path / "data" / "corpus.jsonl").write_text(('{"_id": "1", "text": "' + "x" * 40 + '"}\n') * 100_000)
    (tmp_path / "data" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\nq\t2\t1\np\t1\t1\n")
    (tmp_path / "data" / "qrels" / "dev.tsv").write_text("r\t1\t1\n")
    found = corpus_of(tiny(f"data.path={tmp_path / 'data'}"))
    assert (found.documents, found.train, found.dev) == (100_000, 2, 1)
    assert "documents: lines of corpus.jsonl" in found.sources
    assert found.text_bytes == pytest.approx(40, abs=25), "a passage of Wikipedia has 620"
    monkeypatch.setattr(corpus_module, "_COUNTED_BYTES", 2**20)
    found = corpus_of(tiny(f"data.path={tmp_path / 'data'}"))
    assert found.documents == pytest.approx(100_000, rel=1e-3)
    assert any("guessed" in line for line in found.sources)


def test_sizes_that_nobody_gave_are_asked_for() -> None:
    config = load_config(ROOT / "configs" / "ar2_nq.yaml")
    with pytest.raises(ConfigError, match="--documents N and --queries N"):
        corpus_of(config)
    assert corpus_of(config, documents=10, queries=40).dev == 2


def test_bm25_takes_what_is_planned_at_its_fullest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom guarded against: the disk is found large enough, and full once all parts are counted."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 3000, 100)) for _ in range(400)]
    files, most = Bm25Folder(tmp_path / "bm25"), 0
    weight_part = bm25_build.weight_part

    def watched(*arguments: Any) -> None:
        nonlocal most
        most = max(most, folder_bytes(files.path))
        weight_part(*arguments)

    monkeypatch.setattr(bm25_build, "weight_part", watched)
    coordinator = Coordinator(LocalTransport())
    bm25_build.build_bm25(coordinator, lambda part: texts[100 * part : 100 * part + 100], [100] * 4, files.path)
    monkeypatch.setattr(plan_bm25, "cut_documents", partial(plan_bm25.cut_documents, most=100))
    monkeypatch.setattr(plan_bm25, "_INDEXED", 1.0)
    monkeypatch.setattr(plan_bm25, "_DIFFERENT", 0.98)
    monkeypatch.setattr(plan_bm25, "_different_words", lambda words: 3000 if words > 10**4 else 2890)
    found = bm25_use(tiny(), corpus(documents=400, text_bytes=600.0), [50] * 8)
    assert found.num_parts == 4
    assert found.disk_bytes == pytest.approx(most, rel=0.05)
    assert found.disk_bytes >= folder_bytes(files.path), "counts are gone"


def test_bm25_that_is_left_out_takes_nothing() -> None:
    found, words = corpus(), ("bm25.enabled=false", "warmup_retriever.hard_negatives=0")
    assert bm25_use(tiny(*words), found, [20_000]) == plan_bm25.Bm25Use()
    assert "BM25 index" not in use(tiny(*words)).parts
    assert use(tiny()).parts["BM25 index"][0] > 0


def test_the_memory_of_bm25_does_not_grow_with_the_corpus() -> None:
    """Symptom: 21 million passages needed 20 GB on rank 0, and 138 million did not fit."""
    uses = [bm25_use(tiny(), corpus(documents=20_000 * n), [20_000] * n) for n in (50, 500, 6900)]
    assert len({use.rank_bytes for use in uses}) == 1
    assert uses[0].rank_bytes < 512 * 2**20
    assert uses[2].num_parts == 2300
    large = bm25_use(tiny(), corpus(documents=10**7), [10**6] * 10)
    assert large.rank_bytes > 5 * uses[0].rank_bytes, "a shard is never cut"

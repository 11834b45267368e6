"""What a refresh's index takes on one rank and on two, from nothing and from the last index, beside FAISS's training.

For each corpus: FAISS trains in one process of one core, from the same sample (how an index was trained before all
ranks did it). Then one rank, and two, each with one core of its own, build the index of made-up vectors; and again that
of the same vectors, moved as a retriever's phase moves them, from nothing and from the first index. Ranks' indexes are
compared by their bytes. User seconds are the processor time of all ranks together, and so what is comparable where
other work has a share of the cores.

    python benchmarks/index_refresh.py [--documents 1000000 2000000] [--ranks 1 2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import faiss

from benchmarks.index_build import told_by
from benchmarks.index_worlds import (
    DIMENSION,
    GIB,
    corpus_of,
    make_embeddings,
    pin,
    run_world,
    stamp_of,
    status_bytes,
)
from benchmarks.report import machine_line, table
from engine.config.recipe import IndexConfig
from engine.index.files import sha256_file
from engine.index.plan import empty_index, plan_index
from engine.index.sample import draw
from shards.embeddings import EmbeddingStore


def faiss_alone(job: dict[str, Any]) -> None:
    """Train in this process, of one core; print what it took."""
    pin(0)
    faiss.omp_set_num_threads(1)
    manifest = corpus_of(job["num_documents"], job["per_shard"])
    store = EmbeddingStore.open(Path(job["embeddings"]), manifest, stamp_of(manifest))
    plan = plan_index(IndexConfig(**job["plan"]), num_documents=store.num_documents, dimension=store.dimension)
    start, user = time.perf_counter(), os.times().user
    index = empty_index(plan.factory, store.dimension)
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.cp.niter = ivf.pq.cp.niter = plan.num_iterations
    ivf.cp.min_points_per_centroid = ivf.pq.cp.min_points_per_centroid = 1
    ivf.do_polysemous_training = False
    index.train(store.rows(draw(store.num_documents, plan.train_size, 0)))
    told = {"train": time.perf_counter() - start, "user": os.times().user - user, "peak": status_bytes("VmHWM")}
    print(json.dumps(told))


def refreshed(folder: Path, job: dict[str, Any], num_ranks: int, name: str) -> tuple[dict[str, Any], Path]:
    """Build an index; return a row of the table, and its folder."""
    index = folder / f"{name.replace(' ', '-')}-{num_ranks}"
    ranks = run_world(num_ranks, 1, job | {"folder": str(index), "pinned": True})
    seconds, built = ranks[0]["seconds"], ranks[0]["built"]
    row = {
        "who": f"{num_ranks} rank(s), {name}",
        "train s": seconds["train"],
        "user s of it": sum(rank["user_seconds"]["train"] for rank in ranks),
        "iterations": built["train_iterations"],
        "moved": built["centroid_movement"],
        "fill s": seconds["fill"],
        "merge s": seconds["merge"],
        "tune s": seconds["exact search"] + seconds["tune"],
        "VmHWM GiB": max(rank["peak_bytes"] for rank in ranks) / GIB,
        "recall@100": built["recall"],
        "nprobe": built["nprobe"],
        "refine": built["refine_factor"],
    }
    return row, index


def compare(folder: Path, num_documents: int, worlds: list[int], factory: str) -> None:
    """Refresh twice with each number of ranks and print the table."""
    per_shard = min(50_000, max(1, num_documents // 40))
    job = {"num_documents": num_documents, "per_shard": per_shard, "plan": {"factory": factory}}
    first, second = (
        job | {"embeddings": str(folder / name), "moved": name == "second"} for name in ("first", "second")
    )
    for one in (first, second):
        make_embeddings(Path(str(one["embeddings"])), num_documents, per_shard, moved=bool(one["moved"]))
    peer = told_by([sys.executable, __file__, "--peer", json.dumps(first)], 1)
    train = {"train s": peer["train"], "user s of it": peer["user"], "VmHWM GiB": peer["peak"] / GIB}
    rows: list[dict[str, Any]] = [{"who": "FAISS's own training, one core"} | train]
    hashes: dict[str, set[str]] = {}
    for num_ranks in worlds:
        last: dict[str, str] = {}
        for name, one in (("first", first), ("second from nothing", second), ("second from the first", second)):
            begun = {"last": last["first"]} if name.endswith("from the first") else {}
            row, index = refreshed(folder, one | begun, num_ranks, name)
            last[name] = str(index)
            hashes.setdefault(name, set()).add(
                sha256_file(index / "index.faiss") + sha256_file(index / "trained.faiss")
            )
            rows.append(row)
    print(table([dict.fromkeys(rows[-1]) | row for row in rows]))
    same = all(len(found) == 1 for found in hashes.values())
    plan = plan_index(IndexConfig(factory=factory), num_documents=num_documents, dimension=DIMENSION)
    by_name = {row["who"]: row for row in rows}
    print(f"\n{num_documents} documents of {DIMENSION} dimensions, {plan.factory}, {plan.train_size} train it.")
    print(f"Indexes of different numbers of ranks have {'the same bytes' if same else 'DIFFERENT BYTES'}.")
    for what, key in (("wall", "train s"), ("user", "user s of it")):
        start, end = by_name[f"{worlds[0]} rank(s), first"][key], by_name[f"{worlds[-1]} rank(s), first"][key]
        warm = by_name[f"{worlds[-1]} rank(s), second from the first"][key]
        print(
            f"Training by {what} time: {worlds[0]} rank(s) {start:.1f} s, {worlds[-1]} {end:.1f} s ({start / end:.2f} "
            f"times), from the last index {warm:.1f} s ({end / warm:.1f} times)."
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 2_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--folder", type=Path, help="where embeddings and indexes lie for a while")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        faiss_alone(json.loads(arguments.peer))
        return
    for num_documents in arguments.documents:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            compare(Path(name), num_documents, arguments.ranks, arguments.factory)
    print(f"\n{machine_line()}")


if __name__ == "__main__":
    main()

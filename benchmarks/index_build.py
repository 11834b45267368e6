"""An index built by two ranks against one, against a single FAISS process, and against autofaiss, on the same vectors.

(a) Two ranks of one thread each against one rank of one thread, from the same trained index: the ratio of the times in
which the parts are filled, and of the whole build after the training. (b) One process that loads all embeddings and
lets FAISS train, add and write the same factory string. (c) autofaiss, told the same memory, if `--autofaiss-python`
names a Python that has it. Recall is that of the best 100 documents on queries that no peer has seen; ours and FAISS's
also after the same number of candidates was scored exactly.

    python benchmarks/index_build.py [--quick] [--documents 200000] [--autofaiss-python PYTHON] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import faiss
import numpy as np

from benchmarks.index_worlds import (
    DIMENSION,
    GIB,
    corpus_of,
    made_queries,
    make_embeddings,
    quiet,
    run_world,
    stamp_of,
    status_bytes,
)
from benchmarks.report import machine_line, table
from engine.config.recipe import IndexConfig
from engine.index.dense import DenseIndex
from engine.index.exact import exact_search, rescore
from engine.index.plan import plan_index
from engine.index.tune import recall_of
from engine.search import Hits
from shards.embeddings import EmbeddingStore

K, QUERIES = 100, 200
_AUTOFAISS = """
import json, resource, sys, time
import numpy as np
from autofaiss import build_index
job = json.loads(sys.argv[1])
start = time.perf_counter()
build_index(
    embeddings=job["embeddings"], index_path=job["index"], index_infos_path=job["index"] + ".json",
    metric_type="ip", max_index_memory_usage=job["memory"], current_memory_available="8GB", nb_cores=job["threads"],
    max_index_query_time_ms=job["milliseconds"], verbose=30,
)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def ours(folder: Path, job: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Build after the training with so many ranks of one thread; return what rank 0 told, with the largest peak."""
    index = folder / f"ours-{num_ranks}"
    index.mkdir()
    for name in ("trained.faiss", "trained.json", "labels.npy"):
        shutil.copy(folder / "trained" / name, index)
    ranks = run_world(num_ranks, 1, job | {"folder": str(index)})
    return ranks[0] | {"peak_bytes": max(rank["peak_bytes"] for rank in ranks), "folder": index}


def plain_faiss(job: dict[str, Any]) -> None:
    """Train, add and write in this process, all embeddings in memory; print seconds and the peak."""
    faiss.omp_set_num_threads(job["threads"])
    start = time.perf_counter()
    rows_ND = np.concatenate([np.load(path) for path in sorted(Path(job["embeddings"]).glob("*.npy"))])
    rows_ND = rows_ND.astype(np.float32)
    index = faiss.index_factory(rows_ND.shape[1], job["factory"], faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.cp.niter = ivf.pq.cp.niter = job["iterations"]
    sample = np.sort(np.random.default_rng(0).choice(len(rows_ND), size=job["train_size"], replace=False))
    loaded = time.perf_counter()
    index.train(rows_ND[sample])
    trained = time.perf_counter()
    index.add(rows_ND)
    faiss.write_index(index, job["index"])
    done = time.perf_counter()
    told = {"load": loaded - start, "train": trained - loaded, "after": done - trained, "peak": status_bytes("VmHWM")}
    print(json.dumps(told))


def told_by(command: list[str], threads: int) -> dict[str, Any]:
    """Run a peer in a process of its own and return the JSON of its last line."""
    import os

    ended = subprocess.run(command, env={**os.environ, **quiet(threads)}, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{command[:2]} failed:\n{ended.stderr[-3000:]}")
    told: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return told


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40,000 documents")
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--autofaiss-python", type=Path)
    parser.add_argument("--folder", type=Path, help="where embeddings and indexes lie for a while")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        plain_faiss(json.loads(arguments.peer))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        compare(Path(name), arguments, 40_000 if arguments.quick else arguments.documents)
    print(f"\n{machine_line()}")


def compare(folder: Path, arguments: argparse.Namespace, num_documents: int) -> None:
    """Build with everybody and print the table."""
    per_shard = max(1, num_documents // 40)
    make_embeddings(folder / "embeddings", num_documents, per_shard)
    plan = plan_index(IndexConfig(factory=arguments.factory), num_documents=num_documents, dimension=DIMENSION)
    job = {"embeddings": str(folder / "embeddings"), "num_documents": num_documents, "per_shard": per_shard}
    job |= {"plan": {"factory": arguments.factory}}
    first = run_world(1, 1, job | {"folder": str(folder / "trained")})[0]
    one, two = ours(folder, job, 1), ours(folder, job, 2)
    same = (one["folder"] / "index.faiss").read_bytes() == (two["folder"] / "index.faiss").read_bytes()
    manifest = corpus_of(num_documents, per_shard)
    store = EmbeddingStore.open(folder / "embeddings", manifest, stamp_of(manifest))
    queries_QD = made_queries(128 + QUERIES)[128:]
    truth = exact_search(store, queries_QD, K)
    opened = DenseIndex.open(one["folder"], store)
    nprobe, factor = opened.manifest.nprobe, opened.manifest.refine_factor
    recall = recall_of(opened.search(queries_QD, K).scores_QK, truth, K)
    rows = [
        row(f"ours, {ranks} rank(s) of 1 thread", first["seconds"]["train"], after(told), told["peak_bytes"], recall)
        | {"fill s": told["seconds"]["fill"], "index GiB": first["built"]["index_bytes"] / GIB}
        for ranks, told in ((1, one), (2, two))
    ]
    peer = {"embeddings": job["embeddings"], "factory": plan.factory, "train_size": plan.train_size, "threads": 1}
    peer |= {"iterations": plan.num_iterations, "index": str(folder / "peer.faiss")}
    told = told_by([sys.executable, __file__, "--peer", json.dumps(peer)], 1)
    found = searched(folder / "peer.faiss", queries_QD, factor * K, nprobe)
    exact = rescore(store, queries_QD, found.documents_QK, K)
    rows.append(
        row(
            "FAISS, 1 process of 1 thread",
            told["train"],
            told["after"],
            told["peak"],
            recall_of(exact.scores_QK, truth, K),
        )
        | {"fill s": told["after"], "index GiB": (folder / "peer.faiss").stat().st_size / GIB}
        | {"recall@100 by codes": overlap(found.documents_QK[:, :K], truth)}
    )
    if arguments.autofaiss_python:
        rows.append(autofaiss_row(folder, arguments, first["built"], queries_QD, truth))
    print(table([{**dict.fromkeys(rows[-1] | rows[-2] | rows[0]), **one_row} for one_row in rows]))
    print(
        f"\n{num_documents} documents of {DIMENSION} dimensions, {plan.factory}, {nprobe} lists visited, {factor} * k "
        f"re-scored. Two ranks against one: fill {one['seconds']['fill'] / two['seconds']['fill']:.2f} times as fast, "
        f"all after the training {after(one) / after(two):.2f} times; their indexes have "
        f"{'the same bytes' if same else 'DIFFERENT BYTES'}."
    )


def after(told: dict[str, Any]) -> float:
    """Return the seconds of a build without its training and without tuning, which no peer has."""
    seconds = told["seconds"]
    return float(seconds["fill"] + seconds["merge"])


def row(who: str, train: float, after_training: float, peak_bytes: float, recall: float) -> dict[str, Any]:
    """Return what all rows have."""
    numbers = {"train s": train, "after s": after_training, "all s": train + after_training}
    return {"who": who, **numbers, "VmHWM GiB": peak_bytes / GIB, "recall@100": recall}


def searched(path: Path, queries_QD: np.ndarray, depth: int, nprobe: int | None) -> Hits:
    """Search a peer's index."""
    index = faiss.read_index(str(path))
    if nprobe is not None:
        faiss.extract_index_ivf(index).nprobe = nprobe
    scores_QC, documents_QC = index.search(queries_QD, depth)
    return Hits(documents_QC, scores_QC)


def overlap(documents_QK: np.ndarray, truth: Hits) -> float:
    """Return the share of the exact best documents that a peer returned."""
    pairs = zip(documents_QK, truth.documents_QK, strict=True)
    return float(np.mean([np.isin(exact_K, found_K).mean() for found_K, exact_K in pairs]))


def autofaiss_row(
    folder: Path, arguments: argparse.Namespace, built: dict[str, Any], queries_QD: np.ndarray, truth: Hits
) -> dict[str, Any]:
    """Build with autofaiss from the same files, and search its index as it was tuned."""
    plain = folder / "plain"
    plain.mkdir()
    for path in (folder / "embeddings").glob("*.npy"):
        np.save(plain / path.name, np.load(path).astype(np.float32))
    job = {"embeddings": str(plain), "index": str(folder / "autofaiss.index"), "threads": 1}
    job |= {"memory": f"{built['index_bytes'] / 2**20:.0f}MB", "milliseconds": 10}
    told = told_by([str(arguments.autofaiss_python), "-c", _AUTOFAISS, json.dumps(job)], 1)
    path = folder / "autofaiss.index"
    found = searched(path, queries_QD, K, None)
    recall = overlap(found.documents_QK, truth)
    return {
        "who": "autofaiss, 1 process of 1 thread",
        "all s": told["seconds"],
        "VmHWM GiB": told["peak"] / GIB,
        "recall@100": recall,
        "recall@100 by codes": recall,
        "index GiB": path.stat().st_size / GIB,
    }


if __name__ == "__main__":
    main()

"""What the benchmarks of the index share: made-up embeddings like real ones, and worlds of ranks that build an index.

The vectors lie in clusters, their variance falls off over the directions as in trained encoders, and their norms
differ. They are written part by part and are never in memory as a whole. Run as a program, this file is one rank.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport
from engine.index.build import build_index
from engine.index.plan import plan_index
from shards.embeddings import EmbeddingStore, Stamp, part_is_complete, write_part
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name

DIMENSION, CENTERS, PER_SHARD = 384, 5000, 50_000
SHARED_DRIFT, OWN_DRIFT = 0.3, 0.3
"""How far vectors move from one refresh to the next, relative to their size: all by one map, and each by itself."""
_NO_TRAINING = ("plan", "queries", "exact search", "start", "look for it", "parts", "fill", "merge", "tune", "report")
"""Phases of a build that are no training."""
GIB = 2**30


class Vectors:
    """Draws documents and queries; the same seed draws the same ones."""

    def __init__(self, dimension: int = DIMENSION) -> None:
        rng = np.random.default_rng(7)
        spectrum_D = (1.0 + np.arange(dimension)) ** -0.5
        self._spectrum_D = (spectrum_D * np.sqrt(dimension / (spectrum_D**2).sum())).astype(np.float32)
        self._rotation_DD = np.linalg.qr(rng.standard_normal((dimension, dimension)))[0].astype(np.float32)
        self._centers_CD = rng.standard_normal((CENTERS, dimension), dtype=np.float32) * self._spectrum_D
        self._dimension = dimension
        drift_DD = np.random.default_rng(17).standard_normal((dimension, dimension)) / np.sqrt(dimension)
        self._drift_DD = (np.eye(dimension) + SHARED_DRIFT * drift_DD).astype(np.float32)

    def draw(self, count: int, seed: int) -> np.ndarray:
        """Return float32 [count, dimension]."""
        rng = np.random.default_rng([11, seed])
        noise_ND = rng.standard_normal((count, self._dimension), dtype=np.float32) * self._spectrum_D
        rows_ND = self._centers_CD[rng.integers(CENTERS, size=count)] + 0.8 * noise_ND
        norms_N1 = rng.normal(1.0, 0.1, size=(count, 1)).astype(np.float32)
        found: np.ndarray = norms_N1 * (rows_ND @ self._rotation_DD) / np.sqrt(self._dimension)
        return found

    def moved(self, rows_ND: np.ndarray, seed: int) -> np.ndarray:
        """Return vectors as the next iteration's retriever might: turned and stretched by one map, each moved a bit."""
        rng = np.random.default_rng([13, seed])
        own_ND = rng.standard_normal(rows_ND.shape, dtype=np.float32) * self._spectrum_D @ self._rotation_DD
        found: np.ndarray = rows_ND @ self._drift_DD + OWN_DRIFT * own_ND / np.sqrt(self._dimension)
        return found


def corpus_of(num_documents: int, per_shard: int = PER_SHARD) -> CorpusManifest:
    """Return the manifest of a corpus of so many documents, which has embeddings and no text."""
    firsts = range(0, num_documents, per_shard)
    entries = tuple(
        ShardEntry(shard_name(i), 1, "a" * 64, min(per_shard, num_documents - first), first, "a" * 64, {"made": 1})
        for i, first in enumerate(firsts)
    )
    stream = TokenStream("made", "a" * 64, 8)
    return CorpusManifest("a" * 64, "{text}", (stream,), entries, num_documents, {"made": len(entries)}, "a" * 64)


def stamp_of(manifest: CorpusManifest, *, moved: bool = False) -> Stamp:
    """Return the stamp of the made-up embeddings, at the first refresh or the second."""
    return Stamp("001" if moved else "000", ("c" if moved else "b") * 64, manifest.sha256)


def make_embeddings(
    folder: Path, num_documents: int, per_shard: int = PER_SHARD, *, moved: bool = False
) -> CorpusManifest:
    """Write float16 embeddings, at the first refresh or the second, except where they are there already."""
    manifest, vectors = corpus_of(num_documents, per_shard), Vectors()
    stamp = stamp_of(manifest, moved=moved)
    for entry in manifest.shards:
        if not part_is_complete(folder, entry, stamp):
            rows_ND = vectors.draw(entry.num_documents, entry.number)
            rows_ND = vectors.moved(rows_ND, entry.number) if moved else rows_ND
            write_part(folder, entry, rows_ND.astype(np.float16), stamp)
    return manifest


def made_queries(count: int, *, moved: bool = False) -> np.ndarray:
    """Return queries that no document equals: float32 [count, dimension]."""
    vectors = Vectors()
    drawn = vectors.draw(count, 10**6)
    return vectors.moved(drawn, 10**6) if moved else drawn


def run_world(num_ranks: int, threads: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Build an index with so many ranks, each a process.

    Args:
        num_ranks: Ranks.
        threads: Of each.
        job: `embeddings`, `folder`, `num_documents`, `per_shard`, and the settings of an `IndexConfig` under `plan`;
            also `moved` for embeddings of the second refresh, `last` for the folder of the first one's index, and
            `pinned` to give each rank a core of its own, and no other.

    Returns:
        What each rank tells: `seconds` and `user_seconds` by phase, `peak_bytes`, `anonymous_bytes`, `before_bytes`,
        and `built`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(num_ranks):
        world = {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, json.dumps(job)]
        env = {**os.environ, **world, **quiet(threads), "BENCHMARK_THREADS": str(threads)}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    told = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"a rank failed: {[process.returncode for process in ranks]}")
    return [json.loads(text.splitlines()[-1]) for text in told]


def quiet(threads: int) -> dict[str, str]:
    """Return variables that bound a process's threads, and let idle ones sleep where others want the cores."""
    return {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def pin(rank: int) -> None:
    """Give this process one of the machine's cores, by its rank, and no other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


class TimedCoordinator(Coordinator):
    """Notes how long each phase takes on this rank."""

    def __init__(self, transport: Any, timeout_seconds: float) -> None:
        self.seconds: dict[str, float] = {}
        self.user_seconds: dict[str, float] = {}
        super().__init__(transport, timeout_seconds)

    def only_rank_zero(self, name: str, function: Any, timeout_seconds: float | None = None) -> Any:
        """As the coordinator's, timed."""
        with self._timed(name):
            return super().only_rank_zero(name, function, timeout_seconds)

    @contextmanager
    def agreement(self, name: str, timeout_seconds: float | None = None) -> Iterator[None]:
        """As the coordinator's, timed."""
        with self._timed(name), super().agreement(name, timeout_seconds):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start, user = time.perf_counter(), os.times().user
        yield
        phase = name.partition(": ")[2]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        self.user_seconds[phase] = self.user_seconds.get(phase, 0.0) + os.times().user - user


def status_bytes(name: str) -> int:
    """Return a line of /proc/self/status, such as VmHWM or RssAnon, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class AnonymousPeak:
    """Looks 50 times a second at the memory that is no file's."""

    def __init__(self) -> None:
        self.peak_bytes = status_bytes("RssAnon")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, status_bytes("RssAnon"))
            time.sleep(0.02)


def folder_bytes(paths: Sequence[Path]) -> int:
    """Return the size of all files below some folders."""
    return sum(path.stat().st_size for folder in paths for path in folder.rglob("*") if path.is_file())


def _with_training(seconds: dict[str, float]) -> dict[str, float]:
    """Add what the steps of the training took together, as the phase `train`."""
    return seconds | {"train": sum(taken for phase, taken in seconds.items() if phase not in _NO_TRAINING)}


def _be_a_rank(job: dict[str, Any]) -> None:
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    rank, world, moved = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), bool(job.get("moved"))
    if job.get("pinned"):
        pin(rank)
    transport: Any = LocalTransport()
    if world > 1:
        transport = StoreTransport(rank, world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 7200)
    coordinator = TimedCoordinator(transport, 7200)
    manifest = corpus_of(job["num_documents"], job["per_shard"])
    store = EmbeddingStore.open(Path(job["embeddings"]), manifest, stamp_of(manifest, moved=moved))
    plan = plan_index(IndexConfig(**job["plan"]), num_documents=store.num_documents, dimension=store.dimension)
    queries_QD = made_queries(job.get("num_queries", 128), moved=moved)
    before, watched, start = status_bytes("VmRSS"), AnonymousPeak(), time.perf_counter()
    folder = Path(job["folder"])
    built = build_index(
        *(coordinator, store, plan, folder),
        seed=0,
        audit_queries_QD=queries_QD,
        recall_k=100,
        recall_floor=0.0,
        warm_start=True,
        last=[Path(job["last"])] if job.get("last") else [],
    )
    told = {
        "built": asdict(built),
        "seconds": _with_training(coordinator.seconds) | {"all": time.perf_counter() - start},
        "user_seconds": _with_training(coordinator.user_seconds),
        "before_bytes": before,
        "peak_bytes": status_bytes("VmHWM"),
        "anonymous_bytes": watched.peak_bytes,
    }
    print(json.dumps(told), flush=True)
    coordinator.close()


if __name__ == "__main__":
    _be_a_rank(json.loads(sys.argv[1]))

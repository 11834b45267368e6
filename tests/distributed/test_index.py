"""Real ranks build one index: the same bytes for any number of them, also where one is killed in the middle.

`build_on_every_rank` runs on the ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import RankResult, report, run_ranks

HERE = "tests.distributed.test_index"
SIZES = (200, 40, 1, 300, 59, 100, 80, 20, 250, 33)
D, K = 16, 10


# --- on the ranks ----------------------------------------------------------------------------------------------------


def build_on_every_rank() -> None:
    """Build the indexes that TEST_JOBS names, and print what each build returned, raised or left."""
    import torch

    torch.set_num_threads(1)
    from engine.config.recipe import IndexConfig
    from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport
    from engine.errors import SparringError
    from engine.index.build import build_index
    from engine.index.dense import DenseIndex
    from engine.index.plan import plan_index
    from tests.embedding_stores import clustered, make_store, open_store

    root, jobs = Path(os.environ["TEST_FOLDER"]), json.loads(os.environ["TEST_JOBS"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = float(os.environ.get("TEST_TIMEOUT", "60"))
    transport: Any = LocalTransport()
    if world > 1:
        transport = StoreTransport(rank, world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 60)
    coordinator = Coordinator(transport, timeout)
    num, queries_QD = sum(SIZES), clustered(30, D, 1)
    if rank == 0:
        make_store(root, clustered(num, D, 0), SIZES)
    coordinator.barrier("embeddings")
    opened = open_store(root, SIZES)
    for job in jobs:
        plan = plan_index(
            IndexConfig(factory=job["factory"], kmeans_iterations=3, placement=job.get("placement", "auto")),
            num_documents=num,
            dimension=D,
        )
        folder = root / job["folder"]
        if rank == job.get("killed_rank", -1):
            kill_after(job.get("parts"), job.get("units"))
        told: dict[str, Any] = {"job": job["folder"]}
        try:
            built = build_index(
                *(coordinator, opened, plan, folder),
                seed=0,
                audit_queries_QD=queries_QD + 1e-3 * rank,  # rank 0's are used
                recall_k=K,
                recall_floor=job.get("recall_floor", 0.8),
            )
            hits = DenseIndex.open(folder, opened).search(queries_QD, K)
            told |= {"built": asdict(built), "found": hits.documents_QK.tolist()}
        except SparringError as error:
            told["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(told), flush=True)
        if "error" in told:
            break
    coordinator.close()


def kill_after(parts: int | None, units: int | None) -> None:
    """Let this process die in the part, or in the unit of the lists' training, after so many."""
    from engine.index import build as index_build
    from engine.index import lists as index_lists

    place, name = (index_build, "fill_part") if units is None else (index_lists.ListSums, "add")
    real, done = getattr(place, name), []

    def die_at_last(*arguments: Any) -> None:
        if len(done) == (parts if units is None else units):
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)
        done.append(name)

    setattr(place, name, die_at_last)


# --- the tests -------------------------------------------------------------------------------------------------------


def run(folder: Path, world_size: int, jobs: list[dict[str, Any]], **env: str) -> list[RankResult]:
    variables = {"TEST_FOLDER": str(folder), "TEST_JOBS": json.dumps(jobs), **env}
    return run_ranks(f"{HERE}:build_on_every_rank", world_size, timeout=60, env=variables)


def told(results: list[RankResult]) -> list[list[dict[str, Any]]]:
    assert all(result.returncode == 0 for result in results), report(results)
    return [[json.loads(line) for line in result.stdout.splitlines()] for result in results]


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.iterdir() if path.name not in ("manifest.json", "embeddings"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


JOBS = [
    {"folder": "interleaved", "factory": "IVF20,PQ8x4fs"},
    {"folder": "disk", "factory": "OPQ4,IVF20_HNSW8,PQ4x4", "placement": "disk"},
    {"folder": "parts", "factory": "IVF20,SQ8", "placement": "parts"},
    {"folder": "flat", "factory": "Flat"},
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, told(run(folder, 1, JOBS))[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_builds_the_same_bytes(
    tmp_path: Path, alone: tuple[Path, list[dict[str, Any]]], world_size: int
) -> None:
    ranks = told(run(tmp_path, world_size, JOBS))
    assert all(rank == ranks[0] for rank in ranks)
    timed = ("milliseconds_per_query", "tuning_seconds")
    for mine, theirs in zip(ranks[0], alone[1], strict=True):
        for key in timed:
            mine["built"].pop(key)
        expected = {key: value for key, value in theirs["built"].items() if key not in timed}
        assert (mine["built"], mine["found"]) == (expected, theirs["found"])
    for job in JOBS:
        assert hashes(tmp_path / job["folder"]) == hashes(alone[0] / job["folder"])


def test_a_killed_rank_costs_its_iteration_or_its_part_alone(
    tmp_path: Path, alone: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder = tmp_path / JOBS[0]["folder"]
    killed_in_training = JOBS[0] | {"killed_rank": 1, "units": 0}
    results = run(tmp_path, 2, [killed_in_training], TEST_TIMEOUT="3")
    assert results[1].returncode == -signal.SIGKILL, report(results)
    assert "CoordinationError" in json.loads(results[0].stdout)["error"], report(results)
    assert len(list((folder / "training").glob("rows-*.npy"))) == 3
    assert not (folder / "trained.json").exists()
    killed_in_part = JOBS[0] | {"killed_rank": 1, "parts": 2}
    results = run(tmp_path, 2, [killed_in_part], TEST_TIMEOUT="3")
    assert results[1].returncode == -signal.SIGKILL, report(results)
    assert "CoordinationError" in json.loads(results[0].stdout)["error"], report(results)
    assert len(list(folder.glob("part-*.lists"))) == 7  # all but the one in which the rank died
    again = told(run(tmp_path, 1, [JOBS[0]]))[0][0]
    assert again["found"] == alone[1][0]["found"]
    assert hashes(folder) == hashes(alone[0] / JOBS[0]["folder"])


def test_low_recall_stops_every_rank(tmp_path: Path) -> None:
    job = {"folder": "poor", "factory": "IVF200,PQ1x4", "recall_floor": 1.01}
    first, second = told(run(tmp_path, 2, [job]))
    assert "IndexQualityError" in first[0]["error"]
    assert "IVF200,PQ1x4" in second[0]["error"]
    assert not (tmp_path / "poor" / "manifest.json").exists()

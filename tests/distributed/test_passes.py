"""Passes over the corpus by real ranks: the same bytes whoever does what, however slow, and also after a kill.

`passes_on_every_rank` runs on the ranks: it writes shards, encodes them, indexes them for BM25 in parts, and searches
the training queries in these.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import RankResult, report, run_ranks

HERE = "tests.distributed.test_passes"
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
NUM_DOCUMENTS, PER_SHARD = 120, 10


# --- on the ranks ----------------------------------------------------------------------------------------------------


class Untrained:
    """Stands for an engine whose weights are those it began with."""

    name = "retriever"

    def __init__(self, module: Any) -> None:
        self.module = module

    def full_state_dict(self) -> dict[str, Any]:
        return dict(self.module.state_dict())


def made_up(run: Any, folder: Path, num_documents: int) -> tuple[Any, str, dict[str, Any]]:
    """Make data and a random model on rank 0, unless they are there; return the data, the model, and how it reads."""
    from engine.data.corpus import model_texts, random_model_folder
    from shards.formats import open_dataset
    from shards.made.generated import generate_dataset

    run.coordinator.only_rank_zero(
        "data", lambda: folder.exists() or generate_dataset(folder, num_documents=num_documents, seed=1)
    )
    dataset = open_dataset(folder)
    name = run.coordinator.only_rank_zero("model", lambda: str(random_model_folder(run.config, dataset, run.folder)))
    return dataset, name, model_texts(run.config, dict.fromkeys(run.config.models, name))


def passes_on_every_rank() -> None:
    import torch

    torch.set_num_threads(1)
    from engine.config.file import load_config
    from engine.config.timetable import WeightsOf
    from engine.data.corpus import open_data, write_shards
    from engine.models.retriever import Retriever
    from engine.refresh.refresh import warmup_candidates
    from engine.retrievers.dense import encode_corpus
    from engine.retrievers.kinds import dense
    from engine.run import Run
    from engine.training.publishing import publish_weights

    folder = Path(os.environ["TEST_FOLDER"])
    words = [f"run.path={folder / 'run'}", f"data.documents_per_shard={PER_SHARD}"]
    words += [f"data.generated_documents={NUM_DOCUMENTS}", "warmup_retriever.bm25_depth=20"]
    run = Run.open(load_config(TINY, words), connect(), torch.device("cpu"))
    dataset, name, texts = made_up(run, folder / "data", NUM_DOCUMENTS)
    misbehave(run.coordinator.rank)
    run.once("shards", write_shards, dataset, texts, run.folder)
    data = open_data(run.config, dataset, texts, run.folder)
    module = Retriever.load(name, pooling="cls", similarity="dot", tied=True)
    run.once("weights", lambda stage: publish_weights(stage.run, Untrained(module), texts["retriever"], "000"))  # type: ignore[arg-type]
    run.once("encode/000", encode_corpus, data, run.folder, dense(WeightsOf("retriever", 0)))
    warmup_candidates(run, data)
    print(json.dumps(DONE))
    run.coordinator.close()


PATIENCE = float(os.environ.get("TEST_PATIENCE", "60"))
DONE: dict[str, int] = {"shards": 0, "parts": 0, "searches": 0, "counts": 0, "weights": 0}


def connect() -> Any:
    from engine.coordination.coordinator import Coordinator, LocalTransport, MpiTransport, StoreTransport

    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return Coordinator(MpiTransport(), PATIENCE)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return Coordinator(LocalTransport())
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Coordinator(StoreTransport(rank, world_size, address, port, PATIENCE), PATIENCE)


def misbehave(rank: int) -> None:
    """Count what this rank does; let it be slow, or die in the middle of a pass, where the test says so."""
    import engine.data.tokenization
    import engine.models.encode
    import engine.refresh.mining

    seconds = 2.2 if os.environ.get("TEST_SLOW") == str(rank) else 0.0
    doomed = os.environ.get("TEST_DIES", "") if rank == 1 else ""

    def counting(function: Any, what: str) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if doomed == what and DONE[what] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(seconds or 0.05)  # long enough that every rank gets something
            DONE[what] += 1
            return function(*args, **kwargs)

        return counted

    engine.data.tokenization.write_tokenized = counting(engine.data.tokenization.write_tokenized, "shards")
    engine.models.encode.write_part = counting(engine.models.encode.write_part, "parts")
    engine.refresh.mining._mine_block = counting(engine.refresh.mining._mine_block, "searches")
    from engine.retrievers import bm25, bm25_build, bm25_index

    bm25_build.count_part = counting(bm25_build.count_part, "counts")
    bm25_build.weight_part = counting(bm25_build.weight_part, "weights")
    bm25_index.cut_documents = partial(bm25_index.cut_documents, most=2 * PER_SHARD)
    bm25.DOCUMENTS_SEARCHED_AS_ONE = 0
    bm25.BM25Searcher.block_size = 20


# --- in the tests ----------------------------------------------------------------------------------------------------


def start(folder: Path, world_size: int, launcher: Any = "store", **env: str) -> list[RankResult]:
    variables = {"TEST_FOLDER": str(folder), **env}
    return run_ranks(f"{HERE}:passes_on_every_rank", world_size, launcher, timeout=150, env=variables)


def passed(results: list[RankResult]) -> list[dict[str, int]]:
    assert all(result.returncode == 0 for result in results), report(results)
    return [json.loads(result.stdout.splitlines()[-1]) for result in results]


def bytes_of(run: Path) -> dict[str, str]:
    """Hash every file that the passes made, but for what tells the time."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("shards", "index", "bm25", "candidates")
        for path in sorted((run / folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("alone")
    (done,) = passed(start(folder, 1))
    assert done["shards"] == done["parts"] == NUM_DOCUMENTS // PER_SHARD
    assert done["searches"] > 3
    assert done["counts"] == done["weights"] == NUM_DOCUMENTS // PER_SHARD // 2
    return bytes_of(folder / "run")


@pytest.mark.parametrize(("world_size", "launcher"), [(3, "store"), (2, "mpirun")])
def test_any_number_of_ranks_makes_the_same_bytes(
    tmp_path: Path, alone: dict[str, str], world_size: int, launcher: str
) -> None:
    """Symptom: another number of ranks gives another index, and other negatives."""
    done = passed(start(tmp_path, world_size, launcher))
    assert bytes_of(tmp_path / "run") == alone
    for what in ("shards", "parts"):
        counts = [one[what] for one in done]
        assert sum(counts) == NUM_DOCUMENTS // PER_SHARD, "each exactly once"
        assert min(counts) >= 1


def test_a_slow_rank_does_not_hold_the_others(tmp_path: Path, alone: dict[str, str]) -> None:
    """Symptom: one slow node, with an equal share of the shards, makes the whole cluster wait at each refresh."""
    results = start(tmp_path, 2, TEST_SLOW="1")
    done = passed(results)
    assert bytes_of(tmp_path / "run") == alone
    for what in ("shards", "parts"):
        assert done[1][what] <= 3, "an equal share would be 6"
    assert f"encode/000: slow: rank 1 on {socket.gethostname()} (" in results[0].stderr, report(results)
    assert "in training all wait for it at every step" in results[0].stderr
    assert "slow: " not in results[1].stderr, "one rank tells it"


@pytest.mark.parametrize("dies_at", ["shards", "parts", "searches"])
def test_a_killed_rank_costs_only_the_unit_it_was_at(tmp_path: Path, alone: dict[str, str], dies_at: str) -> None:
    """Symptom: after a kill near the end of a pass over millions of passages, the pass began anew."""
    first = start(tmp_path, 2, TEST_DIES=dies_at, TEST_PATIENCE="12")
    assert first[1].returncode == -signal.SIGKILL
    assert first[0].returncode not in (0, -signal.SIGKILL), report(first)
    assert "rank 1" in first[0].stderr
    folder = tmp_path / "run" / {"shards": "shards", "parts": "index", "searches": "candidates"}[dies_at]
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in {".tar", ".npy"}}
    assert kept
    done = passed(start(tmp_path, 3 if dies_at == "parts" else 1))
    assert bytes_of(tmp_path / "run") == alone
    assert sum(one["searches"] for one in done) >= 1
    if dies_at != "searches":  # parts of a search are joined in the end
        assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
        num_kept = len([path for path in kept if path.suffix == ".tar" or path.name.startswith("part-")])
        again = sum(one[dies_at] for one in done)
        assert again == NUM_DOCUMENTS // PER_SHARD - num_kept

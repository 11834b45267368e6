"""BM25's parts by several ranks, one of which is killed: the next start goes on, and the bytes are the same.

The ranks are forked from this process, which has imported what they need.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport
from engine.retrievers import bm25_build
from engine.retrievers.bm25 import BM25Searcher

NUM_PARTS, PER_PART = 6, 5
PATIENCE = 4.0


def read(number: int) -> list[str]:
    rng = np.random.default_rng(number)
    return [" ".join(f"w{word}" for word in rng.integers(0, 40, rng.integers(0, 12))) for _ in range(PER_PART)]


def build(coordinator: Coordinator, folder: Path) -> None:
    bm25_build.build_bm25(coordinator, read, [PER_PART] * NUM_PARTS, folder)


def on_rank(rank: int, port: int, folder: Path, dies_at: str) -> None:
    function, own = getattr(bm25_build, dies_at), []

    def killed(*arguments: Any) -> None:
        if rank == 1 and own:
            os.kill(os.getpid(), signal.SIGKILL)
        own.append(arguments[1])
        time.sleep(0.1)  # long enough that every rank gets something
        function(*arguments)

    setattr(bm25_build, dies_at, killed)
    coordinator = Coordinator(StoreTransport(rank, 2, "127.0.0.1", port, PATIENCE), PATIENCE)
    build(coordinator, folder)
    coordinator.close()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dies_at", ["count_part", "weight_part"])
def test_a_rank_that_is_killed_in_a_pass_costs_the_part_it_was_at(tmp_path: Path, dies_at: str) -> None:
    """Symptom guarded against: after a kill, words have other ids in the parts that were made before it."""
    context, port = multiprocessing.get_context("fork"), free_port()
    ranks = [context.Process(target=on_rank, args=(rank, port, tmp_path / "killed", dies_at)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert ranks[1].exitcode == -signal.SIGKILL
    assert ranks[0].exitcode == 1, "it says who is missing, and ends"
    made = {"count_part": "counts-*.npy", "weight_part": "part-*.npy"}[dies_at]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob(made)}
    assert 2 <= len(kept) < NUM_PARTS
    with pytest.MonkeyPatch.context() as patched:
        again = []
        function = getattr(bm25_build, dies_at)
        patched.setattr(
            bm25_build, dies_at, lambda files, number, *rest: (again.append(number), function(files, number, *rest))
        )
        build(Coordinator(LocalTransport()), tmp_path / "killed")
    assert len(again) == NUM_PARTS - len(kept)
    if dies_at == "weight_part":
        assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    build(Coordinator(LocalTransport()), tmp_path / "alone")
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "alone")
    assert BM25Searcher.open(tmp_path / "killed", verify=True).num_documents == NUM_PARTS * PER_PART

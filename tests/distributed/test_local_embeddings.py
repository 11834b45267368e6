"""A refresh whose embeddings stay on the hosts that made them: killed, resumed and wiped, it finds what `shared` finds.

`refresh_on_every_rank` runs on the ranks, which take themselves for hosts of their own, each with its own disk: it
writes shards, encodes, indexes, mines and measures. The tests go on with one folder, in order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import RankResult, report, run_ranks
from tests.distributed.test_passes import TINY, Untrained, connect, made_up

HERE = "tests.distributed.test_local_embeddings"
NUM_DOCUMENTS, PER_SHARD, NUM_PARTS = 160, 10, 8
DONE: dict[str, int] = {"parts": 0, "scored": 0}


# --- on the ranks ----------------------------------------------------------------------------------------------------


def refresh_on_every_rank() -> None:
    import torch

    torch.set_num_threads(1)
    from engine.config.file import load_config
    from engine.config.timetable import WeightsOf
    from engine.data.corpus import open_data, write_shards
    from engine.evaluation.evaluate import evaluate_systems
    from engine.evaluation.systems import RETRIEVER, System
    from engine.models.retriever import Retriever
    from engine.refresh.refresh import candidates_of
    from engine.retrievers.kinds import dense
    from engine.retrievers.places import gather_embeddings
    from engine.run import Run
    from engine.training.publishing import publish_weights

    folder, coordinator = Path(os.environ["TEST_FOLDER"]), connect()
    words = [f"run.path={folder / 'run'}", f"data.documents_per_shard={PER_SHARD}", "evaluation.fuse=false"]
    words += [f"data.generated_documents={NUM_DOCUMENTS}", "evaluation.depth=20"]
    if hosts := os.environ.get("TEST_HOSTS", "").split():
        coordinator.hosts[:] = hosts
        if "TEST_NO_DISK" not in os.environ:
            os.environ["TEST_DISK"] = str(folder / f"disk-{coordinator.host}")
        words += ["index.embeddings=local", "index.local_folder=$TEST_DISK/scratch"]
    misbehave(coordinator.rank)
    run = Run.open(load_config(TINY, words), coordinator, torch.device("cpu"))
    dataset, name, texts = made_up(run, folder / "data", NUM_DOCUMENTS)
    run.once("shards", write_shards, dataset, texts, run.folder)
    data = open_data(run.config, dataset, texts, run.folder)
    module = Retriever.load(name, pooling="cls", similarity="dot", tied=True)
    run.once("weights", lambda stage: publish_weights(stage.run, Untrained(module), texts["retriever"], "000"))  # type: ignore[arg-type]
    candidates_of(run, data, "000")
    weights = WeightsOf("retriever", 0)
    if "TEST_GATHER" in os.environ:
        run.once("gather/000", gather_embeddings, data, dense(weights))
    stage = f"evaluate/{os.environ['TEST_MEASURED']}"
    run.once(stage, evaluate_systems, data, run.folder, "dev", [System("G0", RETRIEVER, weights)])
    print(json.dumps(DONE))
    run.coordinator.close()


def misbehave(rank: int) -> None:
    """Count the parts that this rank writes, and those that it scores; die in one where the test says so."""
    import engine.retrievers.dense as dense
    from engine.index.held.scores import ScoredBlocks

    write, score = dense.write_held, ScoredBlocks._scores_of

    def die(where: str, done: int) -> None:
        if os.environ.get("TEST_DIES") == where and rank == 1 and DONE[where] == done:
            os.kill(os.getpid(), signal.SIGKILL)

    def written(*arguments: Any) -> None:
        die("parts", 2)
        write(*arguments)
        DONE["parts"] += 1

    def scored(*arguments: Any) -> Any:
        die("scored", 6)
        DONE["scored"] += 1
        return score(*arguments)

    dense.write_held, ScoredBlocks._scores_of = written, scored  # type: ignore[method-assign]


# --- in the tests ----------------------------------------------------------------------------------------------------


def start(folder: Path, world_size: int, *, hosts: str = "", measured: str = "a", **env: str) -> list[RankResult]:
    variables = {"TEST_FOLDER": str(folder), "TEST_HOSTS": hosts, "TEST_MEASURED": measured}
    return run_ranks(f"{HERE}:refresh_on_every_rank", world_size, timeout=150, env={**variables, **env})


def parts_done(results: list[RankResult], what: str = "parts") -> int:
    assert all(result.returncode == 0 for result in results), report(results)
    return sum(json.loads(result.stdout.splitlines()[-1])[what] for result in results)


@dataclass
class Made:
    """What a run has made, by the hashes of its files."""

    index: dict[str, str]
    candidates: dict[str, str]
    ranking: str


def made_in(run: Path) -> Made:
    def hashes(folder: Path) -> dict[str, str]:
        paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    ranking = hashlib.sha256((run / "results" / "dev-G0-000.trec").read_bytes()).hexdigest()
    return Made(hashes(run / "index" / "000"), hashes(run / "candidates" / "000"), ranking)


def homes_in(run: Path) -> dict[str, str]:
    markers = sorted((run / "index" / "000" / "embeddings").glob("*.held.json"))
    return {path.name: json.loads(path.read_text())["host"] for path in markers}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("shared")
    assert parts_done(start(folder, 1)) == 0, "of one host's own disk"
    return made_in(folder / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    results = start(folder, 2, hosts="one two", TEST_DIES="parts", TEST_PATIENCE="12")
    assert results[1].returncode == -signal.SIGKILL, report(results)
    assert not (folder / "run" / "index" / "000" / "manifest.json").exists()
    return folder


@pytest.fixture(scope="module")
def resumed(killed: Path) -> tuple[Path, int, dict[str, str]]:
    """The run on other ranks, how many parts they encoded, and which they had found."""
    before = homes_in(killed / "run")
    return killed, parts_done(start(killed, 3, hosts="one two two", TEST_GATHER="yes")), before


def test_a_killed_rank_costs_the_shards_it_was_at(resumed: tuple[Path, int, dict[str, str]], shared: Made) -> None:
    folder, encoded, before = resumed
    assert sorted(set(before.values())) == ["one", "two"]
    assert encoded == NUM_DOCUMENTS // PER_SHARD - len(before)
    assert made_in(folder / "run") == shared
    after = homes_in(folder / "run")
    assert {name: after[name] for name in before} == before
    for host in ("one", "two"):
        arrays = [path.name for path in (folder / f"disk-{host}").rglob("part-*.npy")]
        assert sorted(arrays) == sorted(
            name.replace(".held.json", ".npy") for name, home in after.items() if home == host
        )


def test_a_wiped_disk_costs_its_own_shards(resumed: tuple[Path, int, dict[str, str]], shared: Made) -> None:
    """The encoding is finished by the ledger; what it left on one host is gone, and another search needs it."""
    folder = resumed[0]
    lost = [name for name, host in homes_in(folder / "run").items() if host == "two"]
    shutil.rmtree(folder / "disk-two")
    gathered = folder / "run" / "index" / "000" / "embeddings" / "gathered.json"
    gathered.rename(folder / "gathered.json")
    (folder / "run" / "results" / "dev-G0-000.trec").unlink()
    results = start(folder, 2, hosts="two one", measured="b")
    (folder / "gathered.json").rename(gathered)
    assert parts_done(results) == len(lost)
    assert "encode/000: embeddings are lost with a host or its disk, and are encoded again" in results[0].stderr
    assert made_in(folder / "run") == shared


def test_another_host_searches_what_was_gathered(resumed: tuple[Path, int, dict[str, str]], shared: Made) -> None:
    folder = resumed[0]
    (folder / "run" / "results" / "dev-G0-000.trec").unlink(missing_ok=True)
    assert parts_done(start(folder, 1, hosts="three", measured="c", TEST_NO_DISK="yes")) == 0, "nor a folder of its own"
    assert made_in(folder / "run") == shared


def test_a_rank_killed_in_a_search_of_all_hosts_costs_the_part_it_was_at(tmp_path: Path, shared: Made) -> None:
    """Mining: a host has scored its own documents in two of its four parts; the next start scores the others."""
    results = start(tmp_path, 2, hosts="one two", TEST_DIES="scored", TEST_PATIENCE="12")
    assert results[1].returncode == -signal.SIGKILL, report(results)
    left = len(list((tmp_path / "run" / "candidates").rglob("scores-*.npy")))
    assert 2 <= left <= 6, "two of the host that died, the other's four at most"
    assert not (tmp_path / "run" / "candidates" / "000" / "manifest.json").exists()
    results = start(tmp_path, 2, hosts="two one")
    assert parts_done(results) == 0, "embeddings were finished"
    mined, measured = NUM_PARTS - left, NUM_PARTS
    assert parts_done(results, "scored") == mined + measured
    assert made_in(tmp_path / "run") == shared

"""A teacher's scores by real ranks: the same bytes by one rank and by two, and after a kill.

The run is prepared once, as a recipe leaves it when its ranker is trained; each start gets a copy of it and scores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.processes import RankResult, report, run_ranks

HERE = "tests.distributed.test_scoring"
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
PATIENCE = float(os.environ.get("TEST_PATIENCE", "60"))
NUM_BLOCKS = 5


class Trained:
    """Stands for an engine at the end of its training."""

    name = "ranker"

    def __init__(self, module: Any) -> None:
        self.module = module

    def full_state_dict(self) -> dict[str, Any]:
        return dict(self.module.state_dict())


def opened(folder: Path) -> tuple[Any, Any]:
    """Open the run of a folder, with its shards."""
    import torch

    from engine.config.file import load_config
    from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport
    from engine.data.corpus import model_texts, open_data, random_model_folder, write_shards
    from engine.run import Run
    from shards.formats import open_dataset

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        coordinator = Coordinator(LocalTransport())
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        coordinator = Coordinator(StoreTransport(rank, world_size, address, port, PATIENCE), PATIENCE)
    run = Run.open(load_config(TINY, [f"run.path={folder / 'run'}"]), coordinator, torch.device("cpu"))
    dataset = open_dataset(folder / "data")
    source = coordinator.only_rank_zero("model", lambda: str(random_model_folder(run.config, dataset, run.folder)))
    texts = model_texts(run.config, dict.fromkeys(run.config.models, source))
    run.once("shards", write_shards, dataset, texts, run.folder)
    return run, open_data(run.config, dataset, texts, run.folder)


def candidates_of(data: Any) -> Any:
    """Ten documents a query, the same in every process; one of them is there twice, as in a joint pool."""
    from collections import Counter

    from engine.data.candidates import Candidates
    from shards.embeddings import Stamp

    rng = np.random.default_rng(5)
    documents_QK = np.stack([rng.choice(data.shards.num_documents, 10, replace=False) for _ in data.train.queries])
    documents_QK[:, 9] = documents_QK[:, 0]
    scores_QK = np.zeros(documents_QK.shape, np.float32)
    qids = [query.id for query in data.train.queries]
    return Candidates("joint", Stamp("", "", ""), qids, documents_QK, scores_QK, Counter())


def score(folder: Path, *, dies_at: int | None = None) -> int:
    """Score what a folder's run has to score; return how many blocks this rank did."""
    import torch

    from engine.config.timetable import WeightsOf
    from engine.refresh import scoring

    torch.set_num_threads(1)
    run, data = opened(folder)
    candidates, done = candidates_of(data), 0
    # Blocks as in a larger pass: about five of them.
    num_pairs = sum(len(own) for own in data.train.positives) + 9 * len(data.train)

    def counted(*args: Any) -> Any:
        nonlocal done
        if done == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)  # long enough that every rank gets something
        done += 1
        return score_block(*args)

    score_block = scoring._score_block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_PAIRS_A_BLOCK", num_pairs // NUM_BLOCKS + 10)
        patch.setattr(scoring, "_score_block", counted)
        run.once("scores", scoring.score_candidates, data, candidates, WeightsOf("ranker", 0), "ranker-000")
    run.coordinator.close()
    if run.lock is not None and run.is_main:
        run.lock.release()
    return done


def score_on_every_rank() -> None:
    dies_at = 2 if os.environ.get("TEST_DIES") == os.environ["RANK"] else None
    print(json.dumps(score(Path(os.environ["TEST_FOLDER"]), dies_at=dies_at)))


def start(folder: Path, world_size: int, **env: str) -> list[RankResult]:
    variables = {"TEST_FOLDER": str(folder), **env}
    return run_ranks(f"{HERE}:score_on_every_rank", world_size, "store", timeout=150, env=variables)


def bytes_of(folder: Path) -> dict[str, bytes]:
    root = folder / "run" / "teacher_scores"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder and a run with shards and a ranker."""
    from engine.models.kinds import load_untrained
    from engine.training.publishing import publish_weights
    from shards.made.generated import generate_dataset

    folder = tmp_path_factory.mktemp("prepared")
    generate_dataset(folder / "data", num_documents=120, seed=1)
    run, data = opened(folder)
    module = load_untrained(run.config.models["ranker"], str(run.folder.path / "random_model"), seed=1, name="ranker")
    publish_weights(run, Trained(module), data.texts["ranker"], "000")  # type: ignore[arg-type]
    run.lock.release()
    return folder


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = copy_of(prepared, tmp_path_factory.mktemp("alone"))
    assert score(folder) == NUM_BLOCKS
    found = bytes_of(folder)
    assert sorted(found) == [f"ranker-000/{name}" for name in NAMES]
    return found


NAMES = ("documents.npy", "offsets.npy", "scores.npy", "teacher_scores.json")


def copy_of(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return folder


def test_two_ranks_give_the_bytes_of_one(prepared: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    """Symptom: sums in another order round otherwise, so that a student's run could not be repeated."""
    results = start(copy_of(prepared, tmp_path), 2)
    assert all(result.returncode == 0 for result in results), report(results)
    done = [json.loads(result.stdout.splitlines()[-1]) for result in results]
    assert sum(done) == NUM_BLOCKS, "each exactly once"
    assert min(done) >= 1
    assert bytes_of(tmp_path) == alone


def test_a_killed_pass_goes_on_and_gives_the_same_bytes(
    prepared: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Symptom: hours of a teacher's work were lost with one process."""
    results = start(copy_of(prepared, tmp_path), 1, TEST_DIES="0")
    assert results[0].returncode == -signal.SIGKILL, report(results)
    assert len(list((tmp_path / "run" / "teacher_scores").rglob("teacher_scores.json"))) == 2
    assert score(tmp_path) == NUM_BLOCKS - 2
    assert bytes_of(tmp_path) == alone

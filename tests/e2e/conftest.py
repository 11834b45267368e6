"""The runs that several tests look at; each is made once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from shards.made.generated import generate_dataset
from tests.e2e.starts import TINY, Ended, Zygote, deepspeed_command, start, the_zygote


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end."""

    folder: Path
    ended: Ended


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    return the_zygote()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The smallest recipe through the real launcher, on two ranks; its data are its own. Never changed by a test."""
    return made_once("tiny", deepspeed_command(2), tmp_path_factory)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same recipe by plain `python`, on one rank. Never changed by a test."""
    return made_once("alone", [sys.executable, "launcher/run.py"], tmp_path_factory)


def made_once(name: str, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run the smallest recipe, or wait for the other process of the tests that does, and share what it has made."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    record = shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            made = finished(command, shared / name / "run")
            record.write_text(json.dumps(asdict(made.ended)))
    return Finished(shared / name / "run", Ended(**json.loads(record.read_text())))


def finished(command: list[str], folder: Path) -> Finished:
    ended = start([*command, "--config", str(TINY), f"run.path={folder}", "run.device=cpu"])
    assert ended.code == 0, ended.out[-2000:] + ended.err[-6000:]
    return Finished(folder, ended)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the BEIR layout, smaller than the recipe's own."""
    folder = tmp_path_factory.mktemp("data") / "small"
    generate_dataset(folder, num_documents=80, num_queries=80, seed=1)
    return folder


@pytest.fixture(scope="session")
def corpus_alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents without queries or judgements."""
    folder = tmp_path_factory.mktemp("corpus") / "alone"
    folder.mkdir()
    shutil.copy(small_data / "corpus.jsonl", folder)
    return folder


QUICK = (
    *("ar2.iterations=1", "warmup_retriever.steps=4", "warmup_ranker.steps=2", "ar2.retriever.steps=2"),
    *("ar2.ranker.steps=2", "evaluation.max_dev_queries=8", "evaluation.test_at_end=false"),
    *("evaluation.zero_shot=false", "evaluation.rerank_depth=6"),
)
"""A run of a moment, with retriever, ranker and the weights of a mixture."""


@pytest.fixture(scope="session")
def quick_run(zygote: Zygote, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest recipe in a few steps, on one rank."""
    folder = tmp_path_factory.mktemp("quick") / "mine"
    ended = zygote.recipe(f"run.path={folder}", f"data.path={small_data}", *QUICK).wait()
    assert ended.code == 0, ended.err[-3000:]
    return folder

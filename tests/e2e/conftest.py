"""The runs that several tests look at; each is made once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shards.made.generated import generate_dataset
from tests.e2e.starts import TINY, Ended, Zygote, a_zygote, deepspeed_command, start


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end."""

    folder: Path
    ended: Ended


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with a_zygote(tmp_path_factory.mktemp("zygote")) as zygote:
        yield zygote


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The smallest recipe through the real launcher, on two ranks; its data are its own."""
    return finished([*deepspeed_command(2)], tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same recipe by plain `python`, on one rank."""
    return finished([sys.executable, "launcher/run.py"], tmp_path_factory.mktemp("alone") / "run")


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

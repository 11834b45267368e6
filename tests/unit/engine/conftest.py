"""A run of one rank on the CPU, for tests of what happens inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.config.file import load_config
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.run import Run

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Yield a function that opens `tmp_path/run` with overrides; called again, it is a second start."""
    opened: list[Run] = []

    def open_(*words: str) -> Run:
        config = load_config(TINY, [f"run.path={tmp_path / 'run'}", *words])
        opened.append(Run.open(config, Coordinator(LocalTransport()), torch.device("cpu")))
        return opened[-1]

    yield open_
    for run in opened:  # TensorBoard's threads write until then, and the folder goes
        run.metrics.close()

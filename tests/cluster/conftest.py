"""The lab that the tests of this folder share; where it cannot be made they are skipped, and say why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, why_not


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes and a login host, up for all tests."""
    if reason := why_not("pdsh"):
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture
def folder(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A folder of the test's own that all hosts share."""
    path = lab.folder / re.sub(r"\W+", "-", request.node.name)
    path.mkdir()
    return path

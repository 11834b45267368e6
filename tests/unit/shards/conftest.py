"""What the tests of conversions share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power cuts are not what is tested here, and each costs milliseconds."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "downloads"

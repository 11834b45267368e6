"""How the tests are shared by several processes (`pytest -n 2`)."""

from __future__ import annotations

from pathlib import Path

import pytest

_TOGETHER = ("distributed", "e2e", "faults")
"""Folders whose tests share runs that are made once, and start processes of their own: one worker takes all of one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares fixtures that are dear."""
    here = Path(__file__).parent
    for item in items:
        if (first := item.path.relative_to(here).parts[0]) in _TOGETHER:
            item.add_marker(pytest.mark.xdist_group(first))

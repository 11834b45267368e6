"""Which versions are installed, said without importing any of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

_DISTRIBUTIONS = {"faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")}
"""Packages that come under several names."""


def installed_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the version of each package; None where it is not installed."""
    return {name: _version(*_DISTRIBUTIONS.get(name, (name,))) for name in packages}


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None

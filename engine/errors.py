"""Every error that the engine raises on purpose; the root and the data errors live in `shards.errors`."""

from __future__ import annotations

from shards.errors import ArtifactError, DataError, SparringError

__all__ = [
    "ArtifactError",
    "ConfigError",
    "CoordinationError",
    "DataError",
    "IndexQualityError",
    "ModelError",
    "SparringError",
    "TrainingError",
]


class ConfigError(SparringError):
    """The configuration is not usable: an unknown key, a wrong type, or values that contradict each other."""


class ModelError(SparringError):
    """A model or tokenizer cannot be found, loaded, exported or published."""


class TrainingError(SparringError):
    """Training has left the range in which its result means anything, such as a loss that is not finite."""


class IndexQualityError(SparringError):
    """The built index finds too few of the documents that exact search finds."""


class CoordinationError(SparringError):
    """Ranks did not meet: one is missing, stands at another barrier, or failed while others waited for it."""

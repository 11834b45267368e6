"""Data folders as objects."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Literal

from engine.config.text import absolute_path
from engine.errors import ConfigError
from shards.formats import open_dataset
from shards.records import Dataset


def load_data(
    path: str | PathLike[str],
    format: Literal["auto", "beir", "dpr", "msmarco"] = "auto",
    *,
    needs_queries: bool = True,
) -> Dataset:
    """Read a data folder and check all of it, as a run does before it begins.

    Args:
        path: The folder: BEIR, DPR or MS MARCO layout, or one that `convert` made.
        format: Its layout; `auto` looks at the names of its files.
        needs_queries: Whether a corpus without queries and judgements is refused.

    Returns:
        The data set: `queries` (qid -> query), `qrels` (split -> qid -> docid -> grade), `num_documents`, `dropped`
        (reason -> how many records are left out), `positives(split, qid)`; `documents()` streams the corpus, which
        stays on disk.

    Raises:
        DataError: A file is missing, malformed or contradicts another.
        ConfigError: The path is no path.
    """
    try:
        folder = absolute_path(str(Path(path)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path!r} is no path: {error}", expected="the path of a data folder") from error
    return open_dataset(folder, format, needs_queries=needs_queries)

"""Sparring from Python: data, recipes, training in this process, and search in what was trained.

    import sparring

    data = sparring.load_data("data/mine")                       # a BEIR folder, or whatever data.path takes
    recipe = sparring.Recipe.load("tiny", data={"path": data.path}, run={"path": "runs/mine"})
    trained = sparring.train(recipe)                             # goes on where an earlier start stopped
    searcher = sparring.Searcher.open(trained.path)              # a run, or what `export` wrote
    for found in searcher.search("a question", k=5):
        print(found.score, found.title)

Errors are `SparringError` and its kinds. What needs torch is imported when it is first used, so that `import sparring`
takes no time. `docs/python.md` has the whole of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.errors import ArtifactError, ConfigError, DataError, ModelError, SparringError, TrainingError
    from launcher.commands.search_engine import Found
    from shards.records import Dataset, Document, Query
    from sparring.data import load_data
    from sparring.recipe import Recipe
    from sparring.searcher import Reranked, Searcher
    from sparring.training import Callback, Trained, train

__version__ = "0.1.0"
__all__ = [
    "ArtifactError",
    "Callback",
    "ConfigError",
    "DataError",
    "Dataset",
    "Document",
    "Found",
    "ModelError",
    "Query",
    "Recipe",
    "Reranked",
    "Searcher",
    "SparringError",
    "Trained",
    "TrainingError",
    "__version__",
    "load_data",
    "train",
]

_WHERE = {
    **dict.fromkeys(
        ("ArtifactError", "ConfigError", "DataError", "ModelError", "SparringError", "TrainingError"), "engine.errors"
    ),
    **dict.fromkeys(("Dataset", "Document", "Query"), "shards.records"),
    "Found": "launcher.commands.search_engine",
    "load_data": "sparring.data",
    "Recipe": "sparring.recipe",
    **dict.fromkeys(("Reranked", "Searcher"), "sparring.searcher"),
    **dict.fromkeys(("Callback", "Trained", "train"), "sparring.training"),
}
"""Name -> the module that it is taken from when somebody asks for it."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)

"""The export of a ranker whose head is a linear layer on raw token states: a CrossEncoder of three modules.

transformers has no classifier of this form, so the export has none: its backbone lies in a folder of its own, and
whoever takes the whole folder for a classifier finds no config.json, where a fresh head would be made otherwise. From
sentence-transformers 6 on, a CrossEncoder may be a chain of modules: a Transformer, a Pooling, and a Dense layer that
gives the score. With transformers alone, the README tells how to score.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from engine.models.export_parts import MODULES, describe_tower, write_modules, write_pooling
from engine.models.projection import IDENTITY, load_projection
from engine.models.retriever import pool
from engine.models.sentence_transformers import SETTINGS_FILE
from engine.models.source import HEAD, TRANSFORMER, added_to_logit
from engine.models.start import RankerStart
from shards.files import write_json

_POOLING = "pooling"


def describe_pooled_ranker(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write beside a ranker's backbone and head what a CrossEncoder reads.

    Args:
        folder: Holds what `save_pooled` wrote.
        metadata: The ranker's, with its `head` and `max_length`.
    """
    describe_tower(folder / TRANSFORMER, metadata["max_length"])
    write_pooling(folder / _POOLING, folder / TRANSFORMER, metadata["head"])
    chain = ((TRANSFORMER, "Transformer"), (_POOLING, "Pooling"), (HEAD, "Dense"))
    write_modules(folder, [(path, MODULES + kind) for path, kind in chain])
    settings = {"__version__": {"sentence_transformers": "6.0.0"}, "model_type": "CrossEncoder"}
    write_json(folder / SETTINGS_FILE, {**settings, "activation_fn": IDENTITY, "prompts": {}})


def pooled_logits(folder: Path, start: RankerStart, batch: Mapping[str, Tensor]) -> Tensor:
    """Score pairs with transformers alone, as the README of an export says.

    Args:
        folder: The export.
        start: What it says of its head.
        batch: Padded inputs of N pairs.

    Returns:
        Raw logits [N, 1].
    """
    backbone = transformers.AutoModel.from_pretrained(folder / start.transformer, trust_remote_code=False).eval()
    pooled_NH = pool(backbone(**batch).last_hidden_state, batch["attention_mask"], start.form)  # type: ignore[arg-type]
    logits_N1: Tensor = load_projection(folder, [start.layer], pooled_NH.shape[-1])(pooled_NH)  # type: ignore[list-item]
    return logits_N1


def prior_told(metadata: Mapping[str, Any]) -> str:
    """Return what is said of retrievers' scores that were added to the ranker's; empty where there were none."""
    added = added_to_logit(metadata)
    if not added:
        return ""
    missing = []
    if metadata.get("prior"):
        missing.append("`sparring export RUN --iteration 0` writes that retriever")
    if metadata.get("bm25_prior"):
        missing.append("BM25's index is in the run's folder")
    return f"""
**Not the whole score.** This ranker was trained and measured with

    logit + {" + ".join(added)}

which this folder does not hold: {"; ".join(missing)}. `sparring serve RUN` scores with all of it.
"""

"""What an iteration need not compute because another one with the same weights has: embeddings, index, candidates.

That happens where a phase has no steps: a recipe that starts from a trained retriever has its zero-shot index as the
index of the warm-up. The files are hard-linked under the new iteration's name; only the stamps are written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.errors import ArtifactError
from engine.log import get_logger
from shards.embeddings import Stamp
from shards.files import read_json, write_json

log = get_logger(__name__)


def take_over_same_weights(target: Path, stamp: Stamp) -> bool:
    """Give an artifact's folder the content of a sibling that the same weights made of the same corpus.

    What the sibling holds may be incomplete: each file still vouches for itself, and the rest is computed.

    Args:
        target: The folder to make, such as `index/001`; where it exists already, nothing is done.
        stamp: What its content must be made from.

    Returns:
        Whether a sibling was found and taken over.
    """
    if target.exists() or not target.parent.is_dir():
        return False
    for sibling in sorted(target.parent.iterdir()):
        if sibling.is_dir() and not sibling.name.startswith(".") and _is_of_same_weights(sibling, stamp):
            temporary = target.with_name(f".{target.name}.tmp-linked")
            shutil.rmtree(temporary, ignore_errors=True)
            _link(sibling, temporary, stamp)
            temporary.rename(target)
            log.info("%s was made by the weights of %s: taken over", target.name, sibling.name)
            return True
    return False


def _is_of_same_weights(folder: Path, stamp: Stamp) -> bool:
    """Tell whether all stamps in a folder, at least one, name these weights and this corpus."""
    stamps = [found for path in sorted(folder.rglob("*.json")) if (found := _stamp_of(path)) is not None]
    wanted = (stamp.weights_sha256, stamp.corpus_sha256)
    return bool(stamps) and all((found.get("weights_sha256"), found.get("corpus_sha256")) == wanted for found in stamps)


def _stamp_of(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path, "the description of an artifact")
    except ArtifactError:
        return {}  # damaged: its folder is of nobody's weights
    stamp = content.get("stamp") if isinstance(content, dict) else None
    return stamp if isinstance(stamp, dict) else None


def _link(source: Path, target: Path, stamp: Stamp) -> None:
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.name.startswith("."):
            continue  # half-written
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif path.suffix == ".json" and _stamp_of(path) is not None:
            write_json(place, json.loads(path.read_text(encoding="utf-8")) | {"stamp": asdict(stamp)})
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, place)

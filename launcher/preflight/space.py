"""How much a recipe will write into its run folder, by the estimates of `launcher.plan`, and what of it is there.

Nothing is fetched or read through for it: what cannot be known from what lies on this host is named as unknown.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config.recipe import Config
from engine.errors import ConfigError, SparringError
from engine.index.gpu import index_obstacle
from engine.index.plan import cut_parts, plan_index
from launcher.plan.corpus import Corpus, corpus_of
from launcher.plan.models import ModelShape, encoder_of, shape_of
from launcher.plan.postings import postings_use
from launcher.plan.storage import DiskUse, disk_use, index_needs, shard_sizes
from shards.files.sizes import size

_ASSUMED_QUERIES = 500_000
"""Training queries, where files do not tell their number; MS MARCO has as many."""
_GIGAFLOPS = 50.0
"""For minutes of the index's estimate, which are not used here."""
_TOLD_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class PlannedIndex:
    """The index that a recipe makes, for a FAISS with GPUs."""

    factory: str
    obstacle: str
    """Why FAISS keeps it on CPUs, in words; empty where it does not."""
    remedy: str
    required: bool
    """Whether it must be on GPUs."""


@dataclass(frozen=True, slots=True)
class Space:
    """What a recipe writes."""

    parts: dict[str, int]
    """What -> bytes."""
    unknown: tuple[str, ...] = ()
    """Why something is not counted."""
    present_bytes: int = 0
    """What lies in the run folder already and counts as written."""
    index: PlannedIndex | None = None
    """What will be searched; None where nothing is, or where it is not known."""
    local_bytes: int = 0
    """On the hosts' own disks together."""
    local_parts: int = 1
    """Equal parts of it, each of which lies on one host."""

    def local_share(self, ranks: int, world_size: int) -> int:
        """Return the bytes on the disk of a host with so many of the ranks."""
        parts = -(-self.local_parts * ranks // max(1, world_size))
        return self.local_bytes * min(parts, self.local_parts) // self.local_parts

    @property
    def needed_bytes(self) -> int:
        """Bytes still to be written."""
        return max(0, sum(self.parts.values()) - self.present_bytes)

    @property
    def words(self) -> str:
        """The estimate in words, the largest parts first."""
        listed = sorted(self.parts.items(), key=lambda part: -part[1])
        text = ", ".join(f"{what} {size(part)}" for what, part in listed if part)
        text = f"{size(self.needed_bytes)} ({text})"
        if self.present_bytes >= _TOLD_BYTES:
            text += f", {size(self.present_bytes)} of which are there"
        return text


def estimate_space(config: Config) -> Space:
    """Estimate what a recipe writes into its run folder at most at a time, and what of it is there.

    Args:
        config: The recipe.

    Returns:
        The estimate; without parts, and with the reason, where something is not known that all depends on.
    """
    corpus, found = _corpus(config), {model: _shape(config, model) for model in config.models}
    shapes = {model: shape for model, shape in found.items() if shape is not None}
    unknown = [f"the {model}'s weights" for model in found if model not in shapes]
    if corpus is None:
        unknown.append("the corpus")
    if corpus is None or unknown:
        return Space({}, tuple(unknown))
    config = config.sized(corpus.sizes)
    if not config.learns_from_queries:  # nothing is searched
        return _space(config, disk_use(config, corpus, shapes, None))
    dimension = shapes[encoder_of(config)].dimension
    try:
        plan = plan_index(config.index, num_documents=corpus.documents, dimension=dimension)
    except ConfigError:  # the recipe itself tells it, by the exact number of documents
        return Space({}, ("the index",))
    needs = index_needs(config, corpus, plan, dimension, _GIGAFLOPS)
    postings = postings_use(config, corpus, shapes)
    use = disk_use(config, corpus, shapes, needs, postings=postings.disk_bytes if postings else 0)
    space = _space(config, use)
    obstacle, remedy = index_obstacle(plan, dimension)
    return replace(
        space,
        index=PlannedIndex(plan.factory, obstacle, remedy, config.index.gpu == "always"),
        local_bytes=use.local_bytes,
        local_parts=len(cut_parts(shard_sizes(config, corpus.documents))),
    )


def _space(config: Config, use: DiskUse) -> Space:
    parts = {what: own for what, (own, _) in use.parts.items()}
    return Space(parts, (), min(_size_of(config.run.path), sum(parts.values())))


def _corpus(config: Config) -> Corpus | None:
    documents = None if config.data.path else config.data.generated_documents
    for queries in (None, _ASSUMED_QUERIES if config.data.path else 2 * config.data.generated_documents):
        with contextlib.suppress(SparringError, OSError):
            return corpus_of(config, documents=documents, queries=queries)
    return None


def _shape(config: Config, model: str) -> ModelShape | None:
    """Return a model's shape, where its configuration lies on this host."""
    from huggingface_hub import try_to_load_from_cache

    from engine.models.source import cached_source

    name = config.models[model].name
    with contextlib.suppress(SparringError, OSError, ValueError):
        if name != "random":
            source = cached_source(name)
            if not isinstance(source, Path) and not isinstance(try_to_load_from_cache(source, "config.json"), str):
                return None
        return shape_of(config, model)
    return None


def _size_of(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total

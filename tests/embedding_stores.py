"""Small stores of made-up embeddings, for tests of what is built on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.index.files import TRAINED, parse_index
from engine.index.plan import IndexPlan
from engine.index.steps import Steps
from engine.index.train import train_once
from shards.embeddings import EmbeddingStore, Stamp, write_part
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name


def clustered(num: int, dimension: int, seed: int) -> np.ndarray:
    """Return float32 [num, dimension] in a dozen clusters, the same ones for every seed."""
    centers = np.random.default_rng(99).standard_normal((12, dimension))
    rng = np.random.default_rng(seed)
    return (centers[rng.integers(12, size=num)] + 0.6 * rng.standard_normal((num, dimension))).astype(np.float32)


def corpus_of(sizes: Sequence[int]) -> CorpusManifest:
    """Return the manifest of a corpus with shards of the given sizes, which need not exist."""
    firsts = np.cumsum([0, *sizes]).tolist()
    entries = tuple(
        ShardEntry(shard_name(i), 1024, "a" * 64, size, firsts[i], "a" * 64, {"r": 1}) for i, size in enumerate(sizes)
    )
    stream = TokenStream("r", "a" * 64, 8)
    return CorpusManifest("a" * 64, "{text}", (stream,), entries, sum(sizes), {"r": len(sizes)}, "a" * 64)


def make_store(
    folder: Path, embeddings_ND: np.ndarray, sizes: Sequence[int], *, weights: str = "b" * 64
) -> EmbeddingStore:
    """Write embeddings as shards of the given sizes into `folder/embeddings` and open them."""
    manifest = corpus_of(sizes)
    stamp = Stamp("3", weights, manifest.sha256)
    for entry in manifest.shards:
        write_part(folder / "embeddings", entry, embeddings_ND[entry.documents.start : entry.documents.stop], stamp)
    return open_store(folder, sizes, weights=weights)


def open_store(folder: Path, sizes: Sequence[int], *, weights: str = "b" * 64) -> EmbeddingStore:
    """Open what `make_store` wrote."""
    manifest = corpus_of(sizes)
    return EmbeddingStore.open(folder / "embeddings", manifest, Stamp("3", weights, manifest.sha256))


def trained_in(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> str:
    """Train an index with one rank, into a folder; return its hash."""
    return train_once(Steps(Coordinator(LocalTransport()), "index@3", 60), folder, store, plan, seed).sha256


def trained_index(folder: Path, store: EmbeddingStore, plan: IndexPlan, seed: int) -> Any:
    """Train an index with one rank, into a folder; return it."""
    trained_in(folder, store, plan, seed)
    return parse_index(folder / TRAINED)

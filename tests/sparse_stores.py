"""Small stores of made-up sparse vectors, for tests of what is built on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sparse

from shards.embeddings import Stamp
from shards.postings import PostingsStore, write_postings
from tests.embedding_stores import corpus_of


def random_sparse(num: int, num_terms: int, seed: int, *, share: float = 0.1, steps: int | None = None) -> np.ndarray:
    """Return float32 [num, num_terms], a share of it above 0; with `steps`, weights of so many values, so that scores
    tie. Some rows have no term, and some terms no row."""
    rng = np.random.default_rng(seed)
    weights = rng.random((num, num_terms)) * 3 if steps is None else rng.integers(1, steps + 1, (num, num_terms)) / 4
    weights *= rng.random((num, num_terms)) < share
    weights[rng.random(num) < 0.1] = 0
    weights[:, ::7] = 0
    return weights.astype(np.float32)


def make_postings(
    folder: Path, weights_NV: np.ndarray, sizes: Sequence[int], *, dtype: str = "float32"
) -> PostingsStore:
    """Write sparse vectors as shards of the given sizes and open them."""
    manifest = corpus_of(sizes)
    stamp = Stamp("3", "b" * 64, manifest.sha256)
    for entry in manifest.shards:
        rows_NV = sparse.csr_array(weights_NV[entry.documents.start : entry.documents.stop])
        write_postings(folder, entry, rows_NV, stamp, dtype=dtype)  # type: ignore[arg-type]
    return PostingsStore.open(folder, manifest, stamp)

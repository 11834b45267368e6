"""The best of a row of lexical scores, of which most are 0: what peers of the engine's own search are given."""

from __future__ import annotations

import numpy as np

from engine.search import top_of_row


def top_matches(scores_N: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best of the documents that score above 0, and their scores: [top_k], padded with -1 and -inf."""
    sharing = np.flatnonzero(scores_N > 0)
    places_K, best_K = top_of_row(scores_N[sharing], top_k)
    documents_K = np.full(top_k, -1, dtype=np.int64)
    documents_K[places_K >= 0] = sharing[places_K[places_K >= 0]]
    return documents_K, best_K

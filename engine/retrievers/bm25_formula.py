"""What BM25 makes of counts: the weight of a word in a document, and what a word is worth by itself.

Source: Robertson and Zaragoza (2009); the variant is Lucene's (Kamphuis et al., 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Formula:
    """BM25 over one corpus.

    Attributes:
        k1: How soon further occurrences of a word count no more.
        b: What a document's length counts, 0 to 1.
        num_documents: Documents of the corpus.
        mean_length: Their words on average.
    """

    k1: float
    b: float
    num_documents: int
    mean_length: float

    def idf(self, num_documents_V: npt.NDArray[np.int64]) -> Floats:
        """Return what words are worth that so many documents have: float64 [V], above 0."""
        worth_V: Floats = np.log1p((self.num_documents - num_documents_V + 0.5) / (num_documents_V + 0.5))
        return worth_V

    def saturation(self, lengths_N: Floats) -> Floats:
        """Return how many occurrences in documents of some lengths make half of a word's worth: float64 [N]."""
        saturation_N: Floats = self.k1 * (1 - self.b + self.b * lengths_N / self.mean_length)
        return saturation_N

"""A retriever's score inside a ranker's: the ranker begins at the retriever's level and learns what is left to say.

The retriever is G0, which no game changes; its documents' vectors are those that its index was made of, so that a pair
costs a query's encoding and an inner product.

Source: none, it is ours; a cross-encoder as a correction of a first stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.data.batches import Group
from engine.data.corpus import Data
from engine.retrievers.dense import open_dense_scorer
from engine.retrievers.kinds import dense
from engine.run import Run, RunFolder
from engine.search import Rescorer
from shards.records import Query


class RankerPrior:
    """What is added to a ranker's logits.

    Args:
        scorer: The retriever.
        data: Corpus and training queries.
        scale: What its inner products are multiplied by.
        device: Where the ranker's scores are.
    """

    def __init__(self, scorer: Rescorer, data: Data, scale: float, device: torch.device) -> None:
        self._scorer, self._data, self._scale, self._device = scorer, data, scale, device

    @classmethod
    def open(cls, run: Run, data: Data, folder: RunFolder | None = None) -> RankerPrior | None:
        """Open what the recipe asks for; None where it asks for nothing.

        Args:
            run: Whose weights and settings.
            data: The corpus.
            folder: Holds the retriever's vectors: the run's own folder, unless it is said, or one below it for another
                corpus.

        Raises:
            ArtifactError: The vectors are missing, damaged, or of other weights.
        """
        prior = run.config.prior
        if prior is None:
            return None
        scorer = open_dense_scorer(run, data, folder or run.folder, dense(prior.weights))
        return cls(scorer, data, prior.scale, run.device)

    def of_documents(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return what is added for each query's documents, given by their corpus indices."""
        return [[self._scale * score for score in own] for own in self._scorer.score(queries, documents)]

    def of_groups(self, groups: Sequence[Group]) -> Tensor:
        """Return what is added for the documents of training queries: float32 [B, N]."""
        queries = [self._data.train.queries[group.query] for group in groups]
        added = self.of_documents(queries, [group.documents.tolist() for group in groups])
        return torch.tensor(added, dtype=torch.float32, device=self._device)

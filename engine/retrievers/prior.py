"""Retrievers' scores inside a ranker's: the ranker begins at their level and learns what is left to say.

Two retrievers can have a say. G0, which no game changes: its documents' vectors are those that its index was made of,
so that a pair costs a query's encoding and an inner product. And BM25, whose score is taken as a share of what the
query's words are worth together, so that a long query's does not drown the rest.

Source: none, it is ours; a cross-encoder as a correction of a first stage, mixed linearly with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config.recipe import Prior
from engine.data.batches import Group
from engine.data.corpus import Data
from engine.retrievers.bm25 import BM25Searcher
from engine.retrievers.bm25_index import open_bm25, words_of
from engine.retrievers.choice import Choice
from engine.retrievers.dense import open_dense_scorer
from engine.retrievers.kinds import BM25, build
from engine.run import Run, RunFolder
from engine.search import Rescorer
from shards.records import Document, Query


class BM25Share:
    """BM25's scores, each as a share of what the words of its query are worth: from 0 to below 1.

    Args:
        searcher: BM25.
    """

    def __init__(self, searcher: BM25Searcher) -> None:
        self._searcher = searcher

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents that somebody else found; see `Rescorer.score`."""
        return self._shares([query.text for query in queries], self._searcher.score(queries, documents))

    def score_texts(self, queries: Sequence[str], documents: Sequence[Sequence[Document]]) -> list[list[float]]:
        """Score documents that are in no corpus; see `BM25Searcher.score_texts`."""
        texts = [[words_of(document) for document in own] for own in documents]
        return self._shares(queries, self._searcher.score_texts(queries, texts))

    def _shares(self, queries: Sequence[str], scores: Sequence[Sequence[float]]) -> list[list[float]]:
        worth = self._searcher.worth(queries).tolist()
        return [[one / most if most else 0.0 for one in own] for own, most in zip(scores, worth, strict=True)]


class RankerPrior:
    """What is added to a ranker's logits.

    Args:
        parts: Retrievers, and what the scores of each are multiplied by.
        data: Corpus and training queries.
        device: Where the ranker's scores are.
    """

    def __init__(self, parts: Sequence[tuple[Rescorer, float]], data: Data, device: torch.device) -> None:
        self._parts, self._data, self._device = parts, data, device

    @classmethod
    def open(cls, run: Run, data: Data, folder: RunFolder | None = None) -> RankerPrior | None:
        """Open what the recipe asks for; None where it asks for nothing.

        Args:
            run: Whose weights and settings.
            data: The corpus.
            folder: Holds the retrievers' vectors and indexes: the run's own folder, unless it is said, or one below it
                for another corpus.

        Raises:
            ArtifactError: The vectors or BM25's index are missing, damaged, or of something else.
        """
        folder = folder or run.folder
        parts = [(_open(run, data, folder, prior), prior.scale) for prior in run.config.priors]
        return cls(parts, data, run.device) if parts else None

    def of_documents(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return what is added for each query's documents, given by their corpus indices."""
        added = [[0.0] * len(own) for own in documents]
        for scorer, scale in self._parts:
            added = plus(added, scorer.score(queries, documents), scale)
        return added

    def of_groups(self, groups: Sequence[Group]) -> Tensor:
        """Return what is added for the documents of training queries: float32 [B, N]."""
        queries = [self._data.train.queries[group.query] for group in groups]
        added = self.of_documents(queries, [group.documents.tolist() for group in groups])
        return torch.tensor(added, dtype=torch.float32, device=self._device)


def plus(scores: Sequence[Sequence[float]], more: Sequence[Sequence[float]], scale: float = 1.0) -> list[list[float]]:
    """Add other scores of the same documents of the same queries, each times a factor."""
    return [[one + scale * other for one, other in zip(*own, strict=True)] for own in zip(scores, more, strict=True)]


def choice_of_prior(prior: Prior) -> Choice:
    """Name the retriever whose score it is."""
    return Choice(prior.retriever, prior.weights)


def build_prior(run: Run, data: Data, folder: RunFolder | None = None) -> None:
    """Make what the scores are read from, as stages of the run, unless it is there; see `RankerPrior.open`."""
    for prior in run.config.priors:
        build(run, data, folder or run.folder, choice_of_prior(prior))


def _open(run: Run, data: Data, folder: RunFolder, prior: Prior) -> Rescorer:
    if prior.retriever == BM25.kind:
        return BM25Share(open_bm25(run, data, folder))
    return open_dense_scorer(run, data, folder, choice_of_prior(prior))

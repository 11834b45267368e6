"""The joint pool: candidates of several retrievers laid end to end, and negatives drawn from them.

A document that k retrievers found stands in k lists, and so is k times as likely (R2ANKER appendix B: "without
deduplication"). Eq. 9 of the paper writes a product of the retrievers' distributions; what its appendix describes, and
what is done here, is their mixture.

The pool holds no copy of the lists. It is a view over the retrievers' `Candidates`, which lie on disk, with a bit for
each entry that filters left, and the few documents that were drawn from the corpus where too little was left: for half
a million queries and three lists of 200, some 40 MB instead of 3.6 GB. `engine.refresh.pooling` makes and publishes it.

Names of shapes: E entries of a query in all lists, K candidates of one retriever, D documents, n negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.data.candidates import Candidates
from engine.data.filtered import Filtered
from engine.data.found_positives import FoundPositive
from engine.data.samplers import Sampler, draw_weighted, normalised
from engine.errors import ArtifactError, ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Entries:
    """What the retrievers found of one query, list behind list; a document stands once in each that has it.

    Attributes:
        documents_E: Global document indices, int64 [E].
        sources_E: Which retriever's list, by its place among them, ascending, int64 [E].
        ranks_E: Rank in that list, from 1, known documents taken out, int64 [E].
        scores_E: That retriever's score, float64 [E].
        places_E: Where the entry stands in the lists with their padding, int64 [E].
        positives: For each retriever, the positives that it found.
    """

    documents_E: NDArray[np.int64]
    sources_E: NDArray[np.int64]
    ranks_E: NDArray[np.int64]
    scores_E: NDArray[np.float64]
    places_E: NDArray[np.int64]
    positives: tuple[list[FoundPositive], ...]

    def __len__(self) -> int:
        return len(self.documents_E)

    @property
    def num_documents(self) -> int:
        """How many different documents there are."""
        return len(np.unique(self.documents_E))

    def where(self, mask_E: NDArray[np.bool_]) -> Entries:
        """Return the entries of a mask, bool [E]."""
        return Entries(
            self.documents_E[mask_E],
            self.sources_E[mask_E],
            self.ranks_E[mask_E],
            self.scores_E[mask_E],
            self.places_E[mask_E],
            self.positives,
        )

    def score_of_positive(self, source: int, document: int) -> float | None:
        """Return a retriever's score of a positive; None where it did not find it."""
        return next((one.score for one in self.positives[source] if one.document == document), None)


class JointLists:
    """The candidates of several retrievers, query by query.

    Args:
        parts: Of one retriever each, at least one.

    Raises:
        ConfigError: There is none.
        ArtifactError: They are of different corpora.
    """

    def __init__(self, parts: Sequence[Candidates]) -> None:
        if not parts:
            raise ConfigError("a joint pool of no retriever is asked for", expected="the candidates of at least one")
        corpora = {part.stamp.corpus_sha256 for part in parts}
        if len(corpora) > 1:
            raise ArtifactError(
                f"the candidates of {', '.join(part.source for part in parts)} are of {len(corpora)} corpora",
                expected="one corpus, in which a number means the same document",
                remedy="mine all of them in this run",
            )
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.documents_QK.shape[1] for part in parts)]).tolist()

    @property
    def width(self) -> int:
        """Entries of a query with padding: the sum of all K."""
        return int(self._starts[-1])

    def of(self, qid: str) -> Entries:
        """Return what the retrievers found of a query.

        Documents that mining drew at random where a retriever found too few are left out: nobody found them.

        Args:
            qid: Query id.

        Raises:
            DataError: A retriever was not asked for the query.
            ArtifactError: A score is not a number.
        """
        documents, scores, sources, ranks, places, positives = [], [], [], [], [], []
        for source, part in enumerate(self.parts):
            if qid not in part:
                raise DataError(
                    f"the candidates of {part.source} ({part.stamp.iteration}) lack query {qid!r}, which others have",
                    expected="candidates of each retriever for every query that is trained on",
                    remedy=f"mine all training queries with {part.source}; where nothing is found for one, its row is "
                    "empty, and is counted",
                )
            row = part.row_number(qid)
            row_K, scores_K = part.documents_QK[row], part.scores_QK[row]
            columns = np.flatnonzero((row_K >= 0) & ~np.isneginf(scores_K))
            if not np.isfinite(scores_K[columns]).all():
                raise ArtifactError(
                    f"the candidates of {part.source} score a document of query {qid!r} with no finite number",
                    expected="finite scores",
                    remedy=f"delete the candidates of {part.source} and mine again",
                )
            documents.append(row_K[columns])
            scores.append(scores_K[columns].astype(np.float64))
            sources.append(np.full(len(columns), source))
            ranks.append(columns + 1)
            places.append(self._starts[source] + columns)
            positives.append(part.positives.at(row))
        return Entries(
            np.concatenate(documents),
            np.concatenate(sources),
            np.concatenate(ranks),
            np.concatenate(scores),
            np.concatenate(places),
            tuple(positives),
        )


def weigh(entries: Entries, sampler: Sampler, positive: int, n: int) -> NDArray[np.float64]:
    """Weigh the entries of a query: lists laid end to end, inside each the sampler's weights.

    Args:
        entries: Those that may be drawn.
        sampler: Weighs each retriever's.
        positive: The document that the negatives stand beside.
        n: Negatives that are to be drawn.

    Returns:
        Logarithms of weights, float64 [E]; those of a retriever with K of the entries sum to K.

    Source: R2ANKER appendix B, which is this with equal weights.
    """
    weights_E = np.empty(len(entries))
    ends = np.searchsorted(entries.sources_E, np.arange(len(entries.positives) + 1)).tolist()
    for source, (start, stop) in enumerate(pairwise(ends)):
        if start < stop:
            scores_K = entries.scores_E[start:stop]
            log_weights_K = sampler.log_weights(scores_K, entries.score_of_positive(source, positive), n)
            weights_E[start:stop] = normalised(log_weights_K) + np.log(stop - start)
    return weights_E


def draw(
    entries: Entries, sampler: Sampler, positive: int, n: int, rng: np.random.Generator, *, repeats: bool
) -> NDArray[np.int64]:
    """Draw negatives of a query from all lists together.

    Args:
        entries: What filters left.
        sampler: Weighs them.
        positive: The document that the negatives stand beside.
        n: How many at most.
        rng: From `engine.data.negatives.step_rng`.
        repeats: Whether a document can be drawn once for each list that has it, or once at all.

    Returns:
        Global document indices, int64: n of them, or as many as there are.
    """
    usable = entries.where(sampler.usable(entries.ranks_E))
    weights_E = weigh(usable, sampler, positive, n)
    # Entry by entry, each time by what is left: to pass over one whose document came already is the same as to draw
    # documents by the sums of their entries' weights. A document has at most one entry in each list.
    num_entries = n if repeats else n * len(entries.positives)
    documents = usable.documents_E[draw_weighted(weights_E, num_entries, rng)]
    if not repeats:
        documents = np.array(list(dict.fromkeys(documents.tolist()))[:n], dtype=np.int64)
    return documents


@dataclass(frozen=True, eq=False)
class JointPool:
    """A view over several retrievers' candidates, from which a step draws (`engine.data.negatives.NegativeSource`).

    Attributes:
        lists: The candidates.
        filtered: What filters left of them, and what was drawn where that was too little.
        sampler: Weighs what is left.
        repeats: Whether a document can be drawn once for each list that has it.
    """

    lists: JointLists
    filtered: Filtered
    sampler: Sampler
    repeats: bool

    def entries(self, qid: str) -> Entries:
        """Return what filters left of a query.

        Raises:
            DataError: The query is not in the pool.
        """
        if qid not in self.filtered:
            raise DataError(
                f"Query {qid!r} is not in the joint pool", expected="every training query is pooled before a phase"
            )
        found = self.lists.of(qid)
        return found.where(self.filtered.bits(qid, self.lists.width)[found.places_E])

    @property
    def qids(self) -> Sequence[str]:
        """Ids of the queries that are pooled."""
        return self.filtered.qids

    def row(self, qid: str) -> NDArray[np.int64]:
        """Return all documents that may be drawn for a query: what the sampler can take, and what was filled in."""
        entries = self.entries(qid)
        usable = entries.where(self.sampler.usable(entries.ranks_E))
        return np.concatenate([np.unique(usable.documents_E), self.filtered.fill(qid)])

    def draw(self, qid: str, positive: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw negatives, as `NegativeSource` has it: found ones first, then those drawn from the corpus."""
        drawn = draw(self.entries(qid), self.sampler, positive, n, rng, repeats=self.repeats)
        filled = self.filtered.fill(qid)
        if len(drawn) + len(filled) < n:
            raise ConfigError(
                f"num_negatives is {n}, but query {qid!r} has {len(drawn)} candidates and {len(filled)} documents that "
                "were drawn for it in the joint pool",
                expected="at least as many as negatives",
                remedy="lower num_negatives to what the pool was made for",
            )
        return np.concatenate([drawn, filled[: n - len(drawn)]])

"""Filters: what takes documents out of a query's candidates before negatives are drawn, one after the other.

The first to see a pool is always `KnownDocuments`: what the data know to be no negative is none, whoever found it.
The others come from the configuration, in its order, and each judges what the ones before it left. A filter
judges documents, not entries: what one retriever makes suspicious is out in all lists.

Names of shapes: E entries of a query in all lists, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.candidates import Candidates
from engine.data.joint import Entries
from engine.data.negatives import ANSWERS
from engine.errors import ConfigError, DataError
from shards.embeddings import Stamp


class Teacher(Protocol):
    """A ranker's scores of queries and documents (`engine.data.teacher_scores.TeacherScores` is one).

    Attributes:
        stamp: The ranker's weights and the corpus.
        margins_only: The scores are known up to a constant a query, so that no single one means anything.
    """

    stamp: Stamp
    margins_only: bool

    def of(self, qid: str, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return raw logits, float32 [N]; NaN where a document was not scored."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """The query whose candidates are filtered.

    Attributes:
        qid: Its id.
        known: Documents that are no negatives of it: global document index -> why.
        positives: Those among them that are its positives, int64.
    """

    qid: str
    known: Mapping[int, str]
    positives: NDArray[np.int64]


class Filter(Protocol):
    """Takes documents out.

    Attributes:
        name: As the configuration and the counts have it.
    """

    name: str

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Tell which entries stay.

        Args:
            asked: The query.
            entries: What the filters before left.

        Returns:
            bool [E].

        Raises:
            DataError: Something that the filter needs is not known of the query.
        """
        ...

    def forbids(self, asked: Asked) -> Collection[int]:
        """Return the documents that the filter knows by themselves, so that none of them is drawn at random."""
        ...


class _JudgesEntries:
    """A filter that knows nothing of documents that no retriever found."""

    def forbids(self, asked: Asked) -> Collection[int]:
        """Return nothing."""
        return ()


class KnownDocuments:
    """Takes out positives, known false negatives and the query itself; mining has done so, relabels come after it."""

    name = "known"

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what is not known."""
        return ~np.isin(entries.documents_E, np.fromiter(asked.known, dtype=np.int64, count=len(asked.known)))

    def forbids(self, asked: Asked) -> Collection[int]:
        """Return what is known."""
        return asked.known


class Answers(_JudgesEntries):
    """Takes out documents that contain an answer.

    Args:
        contains_answer: Of a query's id and a document.
    """

    name = ANSWERS

    def __init__(self, contains_answer: Callable[[str, int], bool]) -> None:
        self._contains_answer = contains_answer

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what contains none."""
        documents_D, of_entry_E = np.unique(entries.documents_E, return_inverse=True)
        has = [self._contains_answer(asked.qid, document) for document in documents_D.tolist()]
        return ~np.array(has, dtype=np.bool_)[of_entry_E]


class Listed:
    """Takes out what a file lists: additions and relabels.

    Args:
        name: `additions` or `relabels`.
        documents: Query id -> global document indices.
    """

    def __init__(self, name: str, documents: Mapping[str, Collection[int]]) -> None:
        self.name, self._documents = name, documents

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what is not listed."""
        return ~np.isin(entries.documents_E, np.array(self.forbids(asked), dtype=np.int64))

    def forbids(self, asked: Asked) -> Collection[int]:
        """Return what is listed of the query."""
        return list(self._documents.get(asked.qid, ()))


class RetrieverMargin(_JudgesEntries):
    """Takes out what a retriever scores nearly as high as a positive, in its own scores.

    One set of candidates serves all positives of a query, so a document must stay below each that the retriever found;
    of a retriever that found none, nothing is taken out.

    Args:
        share: Of a positive's score.
        difference: By which a negative must stay below it besides.

    Source: Moreira et al. 2024, "NV-Retriever", TopK-PercPos (share .95) and TopK-MarginPos (difference .05).
    """

    name = "margin"

    def __init__(self, share: float, difference: float) -> None:
        self._share, self._difference = share, difference

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what stays below all found positives of every retriever that found it."""
        above_E = np.zeros(len(entries), dtype=np.bool_)
        for source, found in enumerate(entries.positives):
            if found:
                lowest = min(below(one.score, self._share, self._difference) for one in found)
                above_E |= (entries.sources_E == source) & (entries.scores_E > lowest)
        return ~np.isin(entries.documents_E, entries.documents_E[above_E])


def below(positive: float, share: float, difference: float) -> float:
    """Return the highest score that a negative may have beside a positive's.

    Args:
        positive: Its score, of either sign.
        share: Of it.
        difference: Taken off besides.
    """
    return positive - (1 - share) * abs(positive) - difference


class _ByTeacher(_JudgesEntries):
    """A filter that judges by a teacher's logits.

    Args:
        teacher: Who scored every candidate that the filters before leave.

    Raises:
        DataError: Its scores are known up to a constant a query.
    """

    name: str

    def __init__(self, teacher: Teacher) -> None:
        if teacher.margins_only:
            raise DataError(
                f"the filter {self.name!r} needs a teacher's scores, and of {teacher.stamp.iteration} margins alone "
                "are known",
                expected="raw logits of single documents",
                remedy="score the candidates with a ranker, or take the filter out",
            )
        self._teacher = teacher

    def scores(self, asked: Asked, documents_N: NDArray[np.int64], what: str) -> NDArray[np.float64]:
        """Return logits, float64 [N], all of which must be there."""
        scores_N = self._teacher.of(asked.qid, documents_N).astype(np.float64)
        missing = int((~np.isfinite(scores_N)).sum())
        if missing:
            raise DataError(
                f"the filter {self.name!r} needs the teacher's scores of {len(documents_N)} {what} of query "
                f"{asked.qid!r}, {missing} of which have none that is finite",
                expected="a score of every document that the filter judges",
                remedy=f"let the teacher score all of them, or put a filter that takes them out before {self.name!r}",
            )
        return scores_N


class TeacherMargin(_ByTeacher):
    """As `RetrieverMargin`, by the teacher's logits of the query's positives and candidates."""

    name = "margin"

    def __init__(self, teacher: Teacher, share: float, difference: float) -> None:
        super().__init__(teacher)
        self._share, self._difference = share, difference

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what stays below all positives."""
        positives = self.scores(asked, asked.positives, "positives").tolist()
        lowest = min(below(score, self._share, self._difference) for score in positives)
        return self.scores(asked, entries.documents_E, "candidates") <= lowest


class RankerThresholds(_ByTeacher):
    """Takes out what the teacher takes for relevant.

    Args:
        teacher: Whose logits, through a sigmoid, are the probabilities.
        reject_above: Probability above which a document is a false negative.
        keep_below: Probability below which it must be to stay; None where the first number decides alone.

    Source: Qu et al. 2021, "RocketQA", section 4.2: .9 and .1 for a ranker trained on single pairs. The logits of one
        trained by a softmax over a list are no such probabilities: they may all be shifted alike.
    """

    name = "ranker_thresholds"

    def __init__(self, teacher: Teacher, reject_above: float, keep_below: float | None) -> None:
        super().__init__(teacher)
        self._reject_above, self._keep_below = reject_above, keep_below

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what is not taken for relevant; where it must, what is taken for irrelevant."""
        probabilities_E = 0.5 * (1 + np.tanh(0.5 * self.scores(asked, entries.documents_E, "candidates")))
        kept_E = probabilities_E <= self._reject_above
        return kept_E if self._keep_below is None else kept_E & (probabilities_E < self._keep_below)


class Constrained(_JudgesEntries):
    """Keeps what another retriever found too.

    Args:
        within: That retriever's candidates.
        top_k: Its best ones that count.

    Raises:
        ConfigError: It was searched less deep.

    Source: R2ANKER section 4.3, Table 6.
    """

    name = "constrained"

    def __init__(self, within: Candidates, top_k: int) -> None:
        depth = within.documents_QK.shape[1]
        if depth < top_k:
            raise ConfigError(
                f"negatives are to be within the top {top_k} of {within.source}, whose candidates are the top {depth}",
                expected="candidates of that depth",
                remedy=f"mine {within.source} deeper, or lower the filter's top_k",
            )
        self._within, self._top_k = within, top_k

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep what is among the other's best."""
        row = self._within.row_number(asked.qid)
        found_K = self._within.documents_QK[row, : self._top_k]
        found_K = found_K[~np.isneginf(self._within.scores_QK[row, : self._top_k])]
        return np.isin(entries.documents_E, found_K)


class Redistributed(_ByTeacher):
    """Keeps what the teacher scores highest, each document once, whoever and however many found it.

    Args:
        teacher: Who scores the candidates of all retrievers.
        top_k: Documents kept; of equal scores, the lower document indices.

    Source: R2ANKER section 4.4, Table 7. The paper samples from "the top candidates by the strong ranker" without a
        number; here the sampler's ranks are still the retrievers' own.
    """

    name = "redistributed"

    def __init__(self, teacher: Teacher, top_k: int) -> None:
        super().__init__(teacher)
        self._top_k = top_k

    def kept(self, asked: Asked, entries: Entries) -> NDArray[np.bool_]:
        """Keep the first entry of each of the best documents."""
        documents_D, first_D = np.unique(entries.documents_E, return_index=True)
        scores_D = self.scores(asked, documents_D, "candidates")
        kept_E = np.zeros(len(entries), dtype=np.bool_)
        kept_E[first_D[np.lexsort((documents_D, -scores_D))[: self._top_k]]] = True
        return kept_E

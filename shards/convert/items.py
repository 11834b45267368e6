"""What a record of a source turns into: documents, queries, judgements, training records, rows of runs.

`Document` and `Query` are those of `shards.records`; the rest is here. One record may give several of them: a question
of DPR is a query, a judgement and a training record.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shards.records import Document, Query


@dataclass(frozen=True, slots=True)
class AnsweredQuery:
    """A query of which answers alone are known: it belongs to a split although no judgement says so."""

    query: Query
    split: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A grade of a document for a query; above 0 is relevant."""

    split: str
    qid: str
    docid: str
    grade: int
    folder: str = "qrels"
    """`qrels`; or `exclusions`, for a document that is no negative of the query though nobody judged it relevant."""


@dataclass(slots=True)
class Training:
    """Positives and negatives of a query, as far as one record knows them.

    Attributes:
        split: `train`, `dev` or `test`.
        qid: The query.
        positives: Docids; none stands for those that the judgements name.
        negatives: Docids.
        scores: Of each negative the score that its first source gave it; None where there is none.
        sources: Of each negative the retrievers that proposed it.
    """

    split: str
    qid: str
    positives: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    sources: list[list[str]] = field(default_factory=list)

    def add_negative(self, docid: str, score: float | None, sources: list[str]) -> None:
        """Append a negative."""
        self.negatives.append(docid)
        self.scores.append(score)
        self.sources.append(sources)


@dataclass(frozen=True, slots=True)
class RunRow:
    """One row of a retriever's ranking; the score stays as it was written."""

    name: str
    qid: str
    docid: str
    rank: int
    score: str
    tag: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is whole but of no use, such as a question without a positive passage."""

    reason: str


Item = Document | Query | AnsweredQuery | Judgement | Training | RunRow | Dropped

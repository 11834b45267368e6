"""Which queries, positives and negatives a step takes, and how they become a model's inputs.

Everything is a function of (seed, stream, step): the order of the queries is a fresh permutation for each epoch, the
negatives of a query are drawn by a generator keyed by the step and its place in the batch. So any number of ranks sees
the same samples in the same order, a rank takes its slice of the step's batch, and a resumed run needs no more state
than the step's number. How ranks share a step and cut it does not depend on what it is made of: `StepSamples`.

Shapes: B queries, n negatives of a query, N = B * (1 + n) documents or pairs, group by group.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.config.timetable import AUTO, Phase, Visit
from engine.data.corpus import Data
from engine.data.negatives import NegativeSource, step_rng
from engine.errors import ConfigError
from engine.models.template import Batch, Collator
from shards.partition import split_range

G = TypeVar("G")
"""What the samples of a step are: groups of a query with its documents, or documents alone."""
GroupTokens = Callable[[Any], int]
"""From a sample to the number of tokens of the inputs that one model takes of it."""


@dataclass(frozen=True, slots=True)
class Group:
    """A query with its documents; all are numbers, of a training query or of a document in the corpus.

    Attributes:
        query: Row in `Data.train`.
        documents: int64 [1 + n]; the positive first.
    """

    query: int
    documents: np.ndarray


@dataclass(frozen=True, slots=True)
class MicroBatch(Generic[G]):
    """What a rank computes at once of its share of a step.

    Attributes:
        groups: Its samples: queries with their documents, or documents.
        share: Of the mean over the rank's samples.
        last: Whether the optimizer step follows.
        seed: Of its dropout. It follows from the place of the first sample in the batch of all ranks, so whichever rank
            has it draws the same.
    """

    groups: Sequence[G]
    share: float
    last: bool
    seed: int


@dataclass(frozen=True, slots=True)
class SampledQuery:
    """A query of a step by name, for the post-mortem of one that must not be taken."""

    rank: int
    query: str
    documents: list[str]


class StepSamples(Generic[G]):
    """How the ranks share the samples of a step and cut them into micro-batches; a class of samples has the fields.

    Attributes:
        visit: The phase, and which of its visits.
        seed: Of the run.
        rank: This rank.
        world_size: Number of ranks.
    """

    __slots__ = ()
    visit: Visit
    seed: int
    rank: int
    world_size: int

    def groups(self, step: int) -> list[G]:
        """Draw the whole step's samples, the same on every rank."""
        raise NotImplementedError

    def of(self, visit: Visit) -> StepSamples[G]:
        """Return the same samples for a visit whose phase is cut otherwise."""
        return replace(self, visit=visit)  # type: ignore[type-var]  # its classes are dataclasses

    def names(self, step: int) -> Sequence[Any]:
        """Name what a step is made of, rank by rank, as dataclasses for the post-mortem."""
        raise NotImplementedError

    def share(self, groups: Sequence[G]) -> Sequence[G]:
        """Return this rank's slice of a step's groups."""
        own = split_range(len(groups), self.rank, self.world_size)
        return groups[own.start : own.stop]

    def micro_batches(self, groups: Sequence[G], step: int, inputs: Iterable[GroupTokens]) -> Iterator[MicroBatch[G]]:
        """Cut this rank's share of a step.

        Args:
            groups: Of the whole step.
            step: Its number in the phase's schedule.
            inputs: Counts the tokens that each model takes of a sample; asked where micro-batches are cut by tokens.
        """
        own, place = self.share(groups), self.rank * (len(groups) // self.world_size)
        for piece in self._pieces(groups, list(inputs)):
            chunk, last = own[piece.start : piece.stop], piece.stop == len(own)
            seed = dropout_seed(self.seed, self.visit.stage, step, place + piece.start)
            yield MicroBatch(chunk, len(chunk) / len(own), last, seed)

    def _pieces(self, groups: Sequence[G], inputs: Sequence[GroupTokens]) -> list[range]:
        """Cut this rank's places into runs, on every rank equally many: under ZeRO-3 a forward is a collective."""
        phase, share = self.visit.phase, len(groups) // self.world_size
        assert phase.micro_batch_tokens != AUTO, "found before the first step"
        if phase.micro_batch_tokens is None:
            size = phase.micro_batch_size
            return [range(start, min(start + size, share)) for start in range(0, share, size)]
        tokens = [max(count(group) for count in inputs) for group in groups]
        of_ranks = [tokens[rank * share : (rank + 1) * share] for rank in range(self.world_size)]
        cuts = [cut_by_tokens(costs, phase.micro_batch_tokens) for costs in of_ranks]
        most = max(map(len, cuts))
        return (
            cuts[self.rank]
            if len(cuts[self.rank]) == most
            else cut_by_tokens(of_ranks[self.rank], phase.micro_batch_tokens, num_pieces=most)
        )


@dataclass(frozen=True, slots=True)
class Samples(StepSamples[Group]):
    """What the steps of one visit to a phase are made of.

    Attributes:
        visit: The phase, and which of its visits.
        seed: Of the run.
        data: Training queries and corpus.
        candidates: From which the negatives are drawn: of one retriever, or a pool of several.
        rank: This rank.
        world_size: Number of ranks.
    """

    visit: Visit
    seed: int
    data: Data
    candidates: NegativeSource
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        require_equal_shares(self.visit.phase, self.world_size)

    def groups(self, step: int) -> list[Group]:
        """Draw the whole step's groups, the same on every rank.

        Args:
            step: Number of the step in the phase's schedule.

        Returns:
            `batch_size` groups in the order of the batch.

        Raises:
            ConfigError: A query has fewer candidates than n.
        """
        phase, train = self.visit.phase, self.data.train
        rows = shuffled_rows(self.seed, phase.name, step * phase.batch_size, phase.batch_size, len(train))
        groups = []
        for place, row in enumerate(rows.tolist()):
            rng = step_rng(self.seed, f"negatives/{phase.name}", step, place)
            positive = int(rng.choice(train.positives[row]))
            if train.positive == "first":  # drawn all the same, so that the negatives are those of a drawn one
                positive = int(train.positives[row][0])
            documents = [np.array([positive], dtype=np.int64)]
            if phase.num_negatives:
                qid = train.queries[row].id
                documents.append(self.candidates.draw(qid, positive, phase.num_negatives, rng))
            groups.append(Group(row, np.concatenate(documents)))
        return groups

    def names(self, step: int) -> list[SampledQuery]:
        """Name the queries and documents of a step, rank by rank."""
        groups, docids = self.groups(step), self.data.shards.docids
        share = len(groups) // self.world_size
        return [
            SampledQuery(
                place // share,
                self.data.train.queries[group.query].id,
                [docids[document] for document in group.documents.tolist()],
            )
            for place, group in enumerate(groups)
        ]


def cut_by_tokens(tokens: Sequence[int], budget: int, *, num_pieces: int = 1) -> list[range]:
    """Cut a row of groups into runs of at most so many tokens.

    Args:
        tokens: Of each group; one alone may exceed the budget.
        budget: Tokens of a run.
        num_pieces: Runs to make at least, at most as many as there are groups; the largest are halved for it.

    Returns:
        Runs of places that cover all groups in order, none empty.
    """
    pieces: list[range] = []
    start, held = 0, 0
    for place, size in enumerate(tokens):
        if place > start and held + size > budget:
            pieces.append(range(start, place))
            start, held = place, 0
        held += size
    pieces.append(range(start, len(tokens)))
    while len(pieces) < num_pieces:
        largest = max(range(len(pieces)), key=lambda number: len(pieces[number]))
        piece = pieces[largest]
        middle = piece.start + len(piece) // 2
        pieces[largest : largest + 1] = [range(piece.start, middle), range(middle, piece.stop)]
    return pieces


def require_equal_shares(phase: Phase, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share.

    Raises:
        ConfigError: The number of ranks does not divide it.
    """
    if phase.batch_size % world_size:
        raise ConfigError(
            f"{phase.section}.batch_size is {phase.batch_size}, which {world_size} ranks cannot share equally",
            expected="a batch_size that the number of ranks divides",
            remedy=f"use a multiple of {world_size} for {phase.section}.batch_size",
        )


def dropout_seed(seed: int, stage: str, step: int, place: int) -> int:
    """Return the seed of a micro-batch's dropout.

    Args:
        seed: Of the run.
        stage: Name of the stage.
        step: Number of the step.
        place: Of the micro-batch's first query in the batch of all ranks.
    """
    return zlib.crc32(f"{seed}/{stage}/{step}/{place}".encode())


def shuffled_rows(seed: int, stream: str, start: int, count: int, num_rows: int) -> NDArray[np.int64]:
    """Return places `start` to `start + count` of an endless order of rows: training queries, or documents.

    Args:
        seed: Of the run.
        stream: Names the order.
        start: First place; epochs follow each other, each a permutation of its own.
        count: Number of places.
        num_rows: How many there are.

    Returns:
        Row numbers, int64 [count]; within an epoch none repeats.
    """
    rows = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, offset = divmod(start, num_rows)
        taken = _epoch(seed, stream, epoch, num_rows)[offset : offset + count]
        rows.append(taken)
        start, count = start + len(taken), count - len(taken)
    return np.concatenate(rows)


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, stream: str, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """Return the order of an epoch; kept, since half a million rows take 9 ms to shuffle, at every step of it."""
    order = step_rng(seed, f"order/{stream}", epoch, 0).permutation(num_rows)
    order.flags.writeable = False
    return order


def rows_drawn(visits: Iterable[Visit], seed: int, num_queries: int) -> NDArray[np.int64]:
    """Return the training rows that visits will draw, sorted, each once."""
    drawn = [
        shuffled_rows(seed, visit.phase.name, visit.places.start, len(visit.places), num_queries) for visit in visits
    ]
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))


class InputBuilder:
    """Makes a model's inputs of groups: in one row without padding where the model takes that, else padded.

    Args:
        data: Corpus and training queries.
        name: Whose inputs.
        collate: Makes batches in the form that the model takes.
        max_length: Tokens of a document or pair, special tokens included.
        query_max_length: Tokens of a query, special tokens included.
    """

    def __init__(self, data: Data, name: str, collate: Collator, *, max_length: int, query_max_length: int) -> None:
        self._data, self._stream, self._template = data, data.texts[name].stream, collate.template
        self._query, self._document = self._template.for_queries(), self._template.for_documents()
        self._collate, self._max_length, self._query_max_length = collate, max_length, query_max_length
        self._query_tokens = data.train.tokens[self._stream]

    def queries(self, groups: Sequence[Group]) -> Batch:
        """Join the queries of groups: B inputs."""
        single = self._query.single
        return self._collate([single(self._query_tokens[group.query], self._query_max_length) for group in groups])

    def documents(self, groups: Sequence[Group]) -> Batch:
        """Join the documents of groups: N inputs."""
        single = self._document.single
        return self._collate(
            [single(self._tokens(document), self._max_length) for group in groups for document in group.documents]
        )

    def pairs(self, groups: Sequence[Group]) -> Batch:
        """Join the query-document pairs of groups: N inputs."""
        pair = self._template.pair
        return self._collate(
            [
                pair(self._query_tokens[group.query], self._tokens(document), self._max_length)
                for group in groups
                for document in group.documents
            ]
        )

    def tokens_of_texts(self, group: Group) -> int:
        """Count the tokens of a group's query and documents, each for itself."""
        query = min(len(self._query_tokens[group.query]) + self._query.num_special_single, self._query_max_length)
        special = self._document.num_special_single
        return query + sum(min(length + special, self._max_length) for length in self._lengths(group))

    def tokens_of_pairs(self, group: Group) -> int:
        """Count the tokens of a group's query-document pairs."""
        extra = len(self._query_tokens[group.query]) + self._template.num_special_pair
        return sum(min(length + extra, self._max_length) for length in self._lengths(group))

    def _lengths(self, group: Group) -> Iterator[int]:
        return (self._data.shards.num_tokens(document, self._stream) for document in group.documents.tolist())

    def _tokens(self, document: int) -> NDArray[np.uint32]:
        return self._data.shards.tokens(int(document), self._stream)

"""Negatives: what of the retrieved documents may serve, and the n of them that one step trains on.

A step samples its n negatives afresh from the K candidates. What it draws depends on the seed, the step and the query
alone, never on the rank or on what was drawn before, so that any number of ranks, and a resumed run, see the same
samples.

Names of shapes: Q queries, K candidates a query, n negatives a step.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.found_positives import FoundPositive
from engine.errors import ConfigError

POSITIVES, FALSE_NEGATIVES, IDENTICAL_IDS = "positives", "false_negatives", "identical_ids"
"""Why a document is no negative of a query: judged so, known so, or the query itself."""
ANSWERS = "answers"
"""Why a document that contains an answer is taken out."""
_MOST_DRAWN = 1000
"""Documents looked at for a query whose negatives are drawn from the corpus, besides those of a small corpus."""


class NegativeSource(Protocol):
    """From what a step draws its negatives: one retriever's candidates, or a pool of several."""

    @property
    def qids(self) -> Sequence[str]:
        """Ids of the queries that it has, each once."""
        ...

    def row(self, qid: str) -> NDArray[np.int64]:
        """Return all documents that may be drawn for a query, each once.

        Args:
            qid: Query id.

        Returns:
            Global document indices, int64.

        Raises:
            DataError: The source does not have the query.
        """
        ...

    def draw(self, qid: str, positive: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw the negatives of a query.

        Args:
            qid: Query id.
            positive: Global document index of the positive that stands beside them; some samplers measure by it.
            n: How many, at least 1.
            rng: From `step_rng`.

        Returns:
            Global document indices, int64 [n].

        Raises:
            DataError: The source does not have the query.
            ConfigError: It has fewer than n negatives of it.
        """
        ...


class NoNegatives:
    """Where a phase draws none: its queries have each other's documents alone."""

    qids: Sequence[str] = ()

    def row(self, qid: str) -> NDArray[np.int64]:
        """Return no documents: int64 [0]."""
        return np.empty(0, dtype=np.int64)

    def draw(self, qid: str, positive: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Refuse to draw.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{n} negatives are to be drawn of {qid!r}, and the phase names no candidates",
            expected="a phase that draws none, or candidates",
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """What `remove_known` leaves of the hits of Q queries.

    Attributes:
        documents_QK: Global document indices, int64 [Q, top_k], left-aligned; padded with -1.
        scores_QK: Their scores, float32 [Q, top_k]; padded with -inf.
        removed: For each query, how many documents were taken out by reason.
        positives: For each query, the positives among these with rank and score.
    """

    documents_QK: NDArray[np.int64]
    scores_QK: NDArray[np.float32]
    removed: list[Counter[str]]
    positives: list[list[FoundPositive]]


def remove_known(
    documents_QK: NDArray[np.int64],
    scores_QK: NDArray[np.float32],
    known: Sequence[Mapping[int, str]],
    contains_answer: Callable[[int, int], bool] | None,
    top_k: int,
) -> Kept:
    """Take documents that are no negatives out of what was retrieved, and keep the best of the rest.

    Fetch more than `top_k` documents, by as many as are expected to be taken out. A row is read until `top_k` are
    kept, so that neither the counts nor the number of texts that are searched for answers grow with what was fetched
    beyond that.

    Args:
        documents_QK: Retrieved documents, best first, int64 [Q, K]; -1 is skipped.
        scores_QK: Their scores [Q, K].
        known: For each of the Q queries, the global document indices to take out and why, such as `positives`.
        contains_answer: Called with row and document index; True takes the document out. None takes none out.
        top_k: How many to keep for each query, at least 1.

    Returns:
        Documents and scores in the old order, and what was taken out.

    Source: AR2 section 3.1 (negatives are the top retrieved documents that are not positive); answer matching as in
        the released code.
    """
    if documents_QK.shape != scores_QK.shape or len(known) != len(documents_QK):
        raise ValueError(f"documents {documents_QK.shape}, scores {scores_QK.shape} and what is known of {len(known)}")
    kept_documents_QK = np.full((len(documents_QK), top_k), -1, dtype=np.int64)
    kept_scores_QK = np.full((len(documents_QK), top_k), -np.inf, dtype=np.float32)
    removed: list[Counter[str]] = [Counter() for _ in known]
    positives: list[list[FoundPositive]] = [[] for _ in known]
    for row, reasons in enumerate(known):
        num_kept = 0
        for rank, document in enumerate(documents_QK[row].tolist()):
            if num_kept == top_k:
                break
            if document < 0:
                continue
            if document in reasons:
                removed[row][reasons[document]] += 1
                if reasons[document] == POSITIVES:
                    positives[row].append(FoundPositive(document, rank + 1, float(scores_QK[row, rank])))
            elif contains_answer is not None and contains_answer(row, document):
                removed[row][ANSWERS] += 1
            else:
                kept_documents_QK[row, num_kept] = document
                kept_scores_QK[row, num_kept] = scores_QK[row, rank]
                num_kept += 1
    return Kept(kept_documents_QK, kept_scores_QK, removed, positives)


def draw_from_corpus(
    num_documents: int,
    n: int,
    rng: np.random.Generator,
    *,
    taken: Container[int],
    contains_answer: Callable[[int], bool] | None,
) -> list[int]:
    """Draw documents that a retriever has not found, for a query of which it found too few.

    Args:
        num_documents: Of the corpus.
        n: How many to draw.
        rng: From `step_rng`.
        taken: Documents that are no negatives of the query, or are among them already.
        contains_answer: Tells whether a document contains an answer of the query, and so is no negative; None where
            that is not asked.

    Returns:
        At most n global document indices, none twice: fewer where the corpus has no more, or where of a thousand hardly
        any is without an answer.
    """
    drawn: list[int] = []
    num_tried = min(num_documents, max(_MOST_DRAWN, 10 * n))
    for document in rng.choice(num_documents, size=num_tried, replace=False).tolist():
        if len(drawn) == n:
            break
        if document not in taken and not (contains_answer is not None and contains_answer(document)):
            drawn.append(document)
    return drawn


def sample_negatives(candidates_K: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw n of a query's candidates, each as likely as any other, none twice.

    Args:
        candidates_K: Global document indices [K]; -1 is never drawn.
        n: How many, at least 0.
        rng: From `step_rng`.

    Returns:
        Global document indices, int64 [n], in the order drawn.

    Raises:
        ConfigError: There are fewer than n. (The released code repeats the list instead, which counts some negatives
            twice without a word.)

    Source: AR2 section 3.1: n examples sampled at random from the top 100.
    """
    usable = candidates_K[candidates_K >= 0]
    if len(usable) < n:
        raise ConfigError(
            f"num_negatives is {n}, but the query has {len(usable)} candidates",
            expected="at least as many candidates as negatives for every query",
            remedy="lower num_negatives, or raise top_k so that more remain once the positives are taken out",
        )
    return rng.choice(usable, size=n, replace=False).astype(np.int64, copy=False)


def step_rng(seed: int, stream: str, step: int, item: int | str) -> np.random.Generator:
    """Return the random numbers of one item of one step, whichever rank asks and whatever was drawn before.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, such as `ranker/3`; two streams are independent.
        step: Step inside the stream.
        item: What is drawn for: a query's id, or its place in the global batch.

    Returns:
        A counter-based generator keyed by a hash of the four. (Python's own `hash` of a string differs between
        processes and would give every rank its own samples.)
    """
    words = json.dumps([seed, stream, step, item], ensure_ascii=False).encode()
    key = np.frombuffer(hashlib.blake2b(words, digest_size=16).digest(), dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))

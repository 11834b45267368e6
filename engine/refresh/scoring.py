"""Scoring: let a ranker score the training queries' documents once, for whoever wants to learn from it.

Source: R2ANKER Appendix C (a retriever is distilled from the ranker's scores). The teacher's weights are fixed then, so
what it says of a pair is computed once and read ever after, in place of a teacher that sits beside the student on every
device and scores the same documents in every epoch.

The pairs are a query's positives and candidates, each document once, however many retrievers proposed it. They are
scored in blocks (`engine.refresh.blocks`), which are handed out to the ranks; what an interrupted pass finished is not
scored again. A block is a function of the pairs alone, and so are the bytes of the result.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.config.timetable import Visit, WeightsOf
from engine.data.arrays import OpenedInTurn
from engine.data.batches import Samples, cut_by_tokens
from engine.data.corpus import Data
from engine.data.negatives import POSITIVES, NegativeSource
from engine.data.teacher_scores import TeacherScores, is_saved, join, scores_of_queries
from engine.evaluation.pairs import PairScorer
from engine.models.weights import weights_sha256
from engine.refresh.blocks import Blocks
from engine.reliability.progress import progress_bar
from engine.run import Run, Stage
from shards.embeddings import Stamp
from shards.files import canonical_json

_PAIRS_A_BLOCK = 2_048
"""Pairs scored between two finished parts, at least: less than a second of a GPU, a minute of a CPU's few cores."""
_MOST_BLOCKS = 4_096
"""Of a pass; with more pairs than so many blocks hold, blocks are larger."""


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Result of a stage that scores: how much.

    Attributes:
        queries: Training queries.
        pairs: Of a query and a document.
        positives: Of them, pairs with a positive.
    """

    queries: int
    pairs: int
    positives: int


class Pairs:
    """The pairs that a teacher is asked about; what they are is asked of `documents_of` whenever it is needed.

    Args:
        data: Training queries.
        rows: Training rows, int64 [Q].
        documents_of: From a row to its documents, int64, ascending, each once.
    """

    def __init__(self, data: Data, rows: NDArray[np.int64], documents_of: Callable[[int], NDArray[np.int64]]) -> None:
        self.data, self.documents_of = data, documents_of
        digest, lengths = hashlib.sha256(), []
        for row in rows.tolist():
            documents = documents_of(row)
            lengths.append(len(documents))
            digest.update(canonical_json([data.train.queries[row].id, len(documents)]).encode())
            digest.update(documents.astype("<i8").tobytes())
        self.sha256 = digest.hexdigest()
        """One hash for all pairs, by the ids of the queries and the indices of the documents."""
        size = max(_PAIRS_A_BLOCK, sum(lengths) // _MOST_BLOCKS)
        self.blocks = [rows[run.start : run.stop] for run in cut_by_tokens(lengths, size)] if lengths else [rows]
        """Runs of rows with about equally many pairs; at least one, be it empty."""

    @classmethod
    def of_pool(cls, data: Data, pool: NegativeSource) -> Pairs:
        """Take the positives and all candidates of every training query that was searched for.

        Args:
            data: Training queries.
            pool: Candidates.
        """
        train, searched = data.train, set(pool.qids)
        rows = [row for row, query in enumerate(train.queries) if query.id in searched]
        return cls(
            data,
            np.array(rows, dtype=np.int64),
            lambda row: np.union1d(train.positives[row], pool.row(train.queries[row].id)),
        )

    @classmethod
    def of_samples(cls, samples: Samples) -> Pairs:
        """Take what a visit to a phase will draw, and no more: it trains on the same as where all is scored.

        Args:
            samples: Of the visit.
        """
        drawn: dict[int, list[NDArray[np.int64]]] = {}
        phase, first = samples.visit.phase, samples.visit.first_step
        for step in range(first, first + phase.steps):
            for group in samples.groups(step):
                drawn.setdefault(group.query, []).append(group.documents)
        documents = {row: np.unique(np.concatenate(drawn.pop(row))) for row in sorted(drawn)}
        return cls(samples.data, np.array(list(documents), dtype=np.int64), documents.__getitem__)


def score_candidates(
    stage: Stage, data: Data, candidates: NegativeSource, weights: WeightsOf, name: str, *, visit: Visit | None = None
) -> ScoredPairs:
    """Score the training queries' positives and candidates with all ranks by a ranker of the run, and publish that.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        candidates: Of one retriever or of several.
        weights: The teacher: a ranker's name in the recipe, and which of its states.
        name: Of the scores in the run folder.
        visit: Score only what this visit to a phase will draw from the candidates.

    Returns:
        Counts.

    Raises:
        ConfigError: The recipe has no such ranker.
        ArtifactError: There are no such weights, they are damaged, or a score of theirs is not finite.
    """
    run, coordinator = stage.run, stage.run.coordinator
    folder, stamp = run.folder.teacher_scores(name), teacher_stamp(run, data, weights)
    if visit is None:
        pairs = Pairs.of_pool(data, candidates)
    else:
        pairs = Pairs.of_samples(Samples(visit, stage.seed, data, candidates, coordinator.rank, coordinator.world_size))
    asked = _describe(run, pairs, weights.model)
    blocks = Blocks(stage, folder, asked, pairs.blocks, lambda path: is_saved(path, stamp, asked))
    missing, scorer = blocks.missing(), None
    with (
        progress_bar(stage.name, len(blocks.rows), "block", shown=run.is_main) as bar,
        coordinator.agreement(f"{stage.name}: score"),
    ):
        for number in coordinator.hand_out(stage.name, missing):
            bar.update(number - bar.n)
            scorer = scorer or PairScorer.open(run, data, weights.model, weights.state)
            found = _score_block(scorer, pairs, blocks.rows[number], weights.model, stamp)
            found.save(blocks.part(number), asked=asked)

    def publish() -> list[int]:
        load = partial(TeacherScores.load, stamp=stamp)
        blocks.publish(lambda parts: join(OpenedInTurn(load, parts), folder, asked=asked))
        whole = TeacherScores.load(folder, stamp)
        return [len(whole), whole.num_pairs, whole.counts[POSITIVES]]

    counts = ScoredPairs(*coordinator.only_rank_zero(f"{stage.name}: publish", publish))
    run.metrics.write(stage.name, 0, {f"scores/{key}": float(number) for key, number in asdict(counts).items()})
    return counts


def teacher_stamp(run: Run, data: Data, weights: WeightsOf) -> Stamp:
    """Return what scores of a ranker of the run must come from.

    Raises:
        ArtifactError: It has no such weights.
    """
    sha256 = weights_sha256(run.folder.weights(weights.model, weights.state))
    return Stamp(weights.state, sha256, data.shards.manifest.sha256)


def _score_block(scorer: PairScorer, pairs: Pairs, rows: NDArray[np.int64], source: str, stamp: Stamp) -> TeacherScores:
    train, chosen = pairs.data.train, rows.tolist()
    queries, documents = [train.queries[row] for row in chosen], [pairs.documents_of(row) for row in chosen]
    scores = scorer.score(queries, [own.tolist() for own in documents])
    positives = sum(int(np.isin(own, train.positives[row]).sum()) for row, own in zip(chosen, documents, strict=True))
    return scores_of_queries(
        source,
        stamp,
        [
            (query.id, own, np.array(said, dtype=np.float32))
            for query, own, said in zip(queries, documents, scores, strict=True)
        ],
        counts=Counter({POSITIVES: positives}),
    )


def _describe(run: Run, pairs: Pairs, model: str) -> str:
    """Name a pass by all that its result depends on besides the stamp, so that a part of another one is not taken."""
    section = run.config.models[model]
    asked = {
        "pairs": pairs.sha256,
        "max_length": section.max_length,
        "query_max_length": run.config.query_max_length,
        "precision": section.precision,
        "tokens_per_batch": run.config.evaluation.tokens_per_batch,
    }
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()

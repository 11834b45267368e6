"""Rankers over candidates that somebody else chose, such as the official ones of a re-ranking task."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.metric_names import cutoff_of, family_of
from engine.data.candidate_sets import CandidateSets
from engine.data.corpus import Data
from engine.evaluation.evaluate import evaluate_system, record_ranking
from engine.evaluation.systems import System
from engine.results import Measured
from engine.run import RunFolder, Stage


def evaluate_candidates(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    split: str,
    sets: CandidateSets,
    systems: Sequence[System],
    sample: int | None = None,
) -> Measured:
    """Measure rankers on candidates that somebody else chose, all of them re-ranked.

    The candidates themselves have a row with their recall alone: they are in no order that could be measured.

    Args:
        stage: Where this runs; `evaluation.rerank_depth` is at least the size of the largest set.
        data: Corpus and queries.
        folder: As of `evaluate_systems`, and so is `split`.
        split: Whose queries have the candidates.
        sets: The candidates.
        systems: The candidates as a system, then the rankers over it.
        sample: As of `evaluate_systems`.

    Source: R2ANKER section 4 (BM25-reranking with official candidates).
    """
    chosen, *rankers = systems
    ranking = {
        qid: {data.shards.docids[document]: 0.0 for document in documents} for qid, documents in sets.documents.items()
    }
    recalls = [
        name
        for name in stage.run.config.evaluation.metrics
        if family_of(name) == "R" and cutoff_of(name) >= sets.largest
    ]
    recalls = recalls or [f"R@{max(1, sets.largest)}"]
    scores = [record_ranking(stage, data, folder, ranking, chosen, split, sample, recalls)]
    for system in rankers:
        scores += evaluate_system(stage, data, folder, system, split, sample=sample)
    return Measured(tuple(scores))

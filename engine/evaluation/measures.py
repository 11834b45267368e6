"""How good a ranking is: recall, reciprocal rank and nDCG by judgements, hit accuracy by answer match.

All numbers come from ir_measures, so that they are those of trec_eval. Two things are settled here, because they
change published numbers without a word elsewhere:

- A query without a ranking counts as 0; it is not left out of the mean.
- Documents with equal scores keep the order in which the run holds them. trec_eval would sort them by document id, and
  would compare scores as single-precision numbers, so that a ranking by an exact score could be measured as another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import ir_measures
from ir_measures import RR, R, Success, nDCG

from engine.data.trec import Rankings, best_first
from engine.errors import DataError

CUTOFFS = (1, 5, 20, 100)
"""The ranks at which AR2 reports recall (Tables 2 and 3)."""


def score_run(
    run: Rankings, qrels: Mapping[str, Mapping[str, int]], cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, float]:
    """Measure a ranking by judgements.

    Args:
        run: Rankings; queries that have no judgements are ignored.
        qrels: Query id -> document id -> grade; a grade of 1 or more is relevant. Queries without a relevant document
            are left out, since no ranking could find one.
        cutoffs: Ranks for recall, each at least 1.

    Returns:
        `R@k` for each cutoff (share of a query's relevant documents in its top k), `MRR@10` and `nDCG@10` (gain =
        grade), each a mean over all judged queries, 0..1.

    Raises:
        DataError: No query has a relevant document.

    Source: AR2 section 4.1, Table 2.
    """
    judged = {qid: dict(grades) for qid, grades in qrels.items() if any(grade > 0 for grade in grades.values())}
    if not judged:
        raise DataError(
            f"None of {len(qrels)} queries has a relevant document",
            expected="a grade of at least 1 for a document of at least one query",
            remedy="check the qrels file of this split",
        )
    named = {f"R@{cutoff}": R @ cutoff for cutoff in cutoffs} | {"MRR@10": RR @ 10, "nDCG@10": nDCG @ 10}
    values = ir_measures.calc_aggregate(list(named.values()), judged, _by_rank(run, judged))
    return {name: float(values[measure]) for name, measure in named.items()}


def answer_measures(
    run: Rankings, answered: Mapping[str, Set[str]], cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, float]:
    """Measure a ranking by answer match: how often one of the top k documents contains an answer.

    Args:
        run: Rankings.
        answered: For every query that is to count, the retrieved documents that contain one of its answers; an empty
            set where none does.
        cutoffs: Ranks, each at least 1.

    Returns:
        `A@k` for each cutoff, a mean over the queries of `answered`, 0..1. (The papers on open-domain question
        answering, AR2 among them, call this R@k.)

    Raises:
        DataError: `answered` has no query.

    Source: AR2 section 4.1 (Natural Questions, TriviaQA).
    """
    if not answered:
        raise DataError("No query has answers to look for", expected="at least one query with answers")
    judged = {qid: dict.fromkeys(documents, 1) for qid, documents in answered.items()}
    named = {f"A@{cutoff}": Success @ cutoff for cutoff in cutoffs}
    values = ir_measures.calc_aggregate(list(named.values()), judged, _by_rank(run, judged))
    return {name: float(values[measure]) for name, measure in named.items()}


def _by_rank(run: Rankings, judged: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Replace scores by minus the rank, which has no ties and is exact in single precision."""
    return {
        qid: {docid: -float(rank) for rank, docid in enumerate(best_first(qid, scores))}
        for qid, scores in run.items()
        if qid in judged and scores
    }

"""How good a ranking is: recall, reciprocal rank and nDCG by judgements, hit accuracy by answer match, TREC run files.

All numbers come from ir_measures, so that they are those of trec_eval. Two things are settled here, because they
change published numbers without a word elsewhere:

- A query without a ranking counts as 0; it is not left out of the mean.
- Documents with equal scores keep the order in which the run holds them. trec_eval would sort them by document id, and
  would compare scores as single-precision numbers, so that a ranking by an exact score could be measured as another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import ir_measures
from ir_measures import RR, R, Success, nDCG

from engine.errors import DataError
from shards.files import write_atomically

Run = Mapping[str, Mapping[str, float]]
"""Query id -> document id -> score; higher is better, equal scores in the order of the mapping."""

CUTOFFS = (1, 5, 20, 100)
"""The ranks at which AR2 reports recall (Tables 2 and 3)."""


def score_run(run: Run, qrels: Mapping[str, Mapping[str, int]], cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
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


def answer_measures(run: Run, answered: Mapping[str, Set[str]], cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
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


def check_trec_ids(ids: Iterable[str], what: str) -> None:
    """Refuse ids that a TREC run file cannot hold; called before a run, so that none is lost at its end.

    Args:
        ids: Query or document ids.
        what: What they are, for the message, such as `document`.

    Raises:
        DataError: An id is empty or contains white space, which separates the fields of such a file.
    """
    for identifier in ids:
        if len(identifier.split()) != 1 or identifier != identifier.strip():
            raise DataError(
                f"The {what} id {identifier!r} is empty or contains white space",
                expected="ids without white space, as in every TREC run file",
                remedy="replace the white space in the ids, in the qrels too",
            )


def write_trec(path: Path, run: Run, tag: str) -> None:
    """Write a ranking as a TREC run file, `qid Q0 docid rank score tag`, atomically.

    Args:
        path: The file; an older one is replaced.
        run: Rankings; written best first, ranks from 1, scores with all their digits.
        tag: Name of the system; one word.

    Raises:
        DataError: An id or the tag is not one word, or a score is not a number.
    """
    check_trec_ids([tag], "run")
    check_trec_ids(run, "query")
    with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for qid, scores in run.items():
            check_trec_ids(scores, "document")
            for rank, docid in enumerate(_ranking(qid, scores), start=1):
                file.write(f"{qid} Q0 {docid} {rank} {float(scores[docid])!r} {tag}\n")


def read_trec(path: Path) -> dict[str, dict[str, float]]:
    """Read a TREC run file.

    Args:
        path: The file.

    Returns:
        Query id -> document id -> score, in the order of the file.

    Raises:
        DataError: The file is missing, or a line is not `qid Q0 docid rank score tag`, or repeats a document; the
            line is named.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", expected="a TREC run file")
    run: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = line.split()
            try:
                qid, _, docid, _, score_text, _ = fields
                score = float(score_text)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number} reads {line.strip()!r}", expected="qid Q0 docid rank score tag"
                ) from error
            scores = run.setdefault(qid, {})
            if docid in scores:
                raise DataError(
                    f"{path}, line {number} ranks document {docid!r} of query {qid!r} again",
                    expected="every document once for a query",
                )
            scores[docid] = score
    return run


def _ranking(qid: str, scores: Mapping[str, float]) -> list[str]:
    """Return the documents best first; a NaN would make the order arbitrary."""
    for docid, score in scores.items():
        if math.isnan(score):
            raise DataError(f"The score of document {docid!r} for query {qid!r} is not a number")
    return sorted(scores, key=lambda docid: -scores[docid])  # sorted() is stable: equal scores keep their order


def _by_rank(run: Run, judged: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """Replace scores by minus the rank, which has no ties and is exact in single precision."""
    return {
        qid: {docid: -float(rank) for rank, docid in enumerate(_ranking(qid, scores))}
        for qid, scores in run.items()
        if qid in judged and scores
    }

"""Queries that are documents of the corpus: which, and whether the document is left out where the query is answered.

Where the task is to find what argues against a text, or asks the same, or does the same, the query is itself a
document, and has its id (ArguAna, Quora, search for code by code). Every retriever finds it first; it is no answer, and
no negative.

Source: Thakur et al. 2021 (BEIR), whose evaluation leaves out documents with the query's id (`ignore_identical_ids`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from engine.log import get_logger
from shards.records import Dataset

log = get_logger(__name__)


def find_own_documents(
    dataset: Dataset, index_of: Callable[[str], int | None], ignored: Literal["auto"] | bool
) -> dict[str, int]:
    """Return the documents that are left out of a query's hits and negatives, because they are the query itself.

    A judgement changes nothing in that, as in BEIR: a positive with the query's own id is left out of the hits, and
    counts as one that was not found.

    Args:
        dataset: Queries and judgements.
        index_of: Gives the global index of a docid; None for one that the corpus does not have.
        ignored: `DataConfig.ignore_identical_ids`.

    Returns:
        Query id -> global document index; empty where no id coincides, or none is to be left out.
    """
    if ignored is False:
        return {}
    own = {qid: index for qid in dataset.queries if (index := index_of(qid)) is not None}
    if not own:
        return {}
    positives = {
        qid: [docid for docid, grade in grades.items() if grade > 0]
        for judged in dataset.qrels.values()
        for qid, grades in judged.items()
        if grades.get(qid, 0) > 0 and qid in own
    }
    num_alone = sum(docids == [qid] for qid, docids in positives.items())
    if ignored == "auto" and 2 * num_alone > len(own):
        log.info(
            "%d of %d queries have the id of a document, and for %d this document is the only positive: queries and "
            "documents were numbered alike, and none is left out (data.ignore_identical_ids=true leaves them out)",
            *(len(own), len(dataset.queries), num_alone),
        )
        return {}
    log.info(
        "%d of %d queries have the id of a document, which is left out of their hits, negatives and metrics "
        "(data.ignore_identical_ids=false leaves it in)",
        *(len(own), len(dataset.queries)),
    )
    if positives:
        log.info(
            "%d queries have the document with their own id as a positive: as in BEIR, it is left out of their hits "
            "all the same, and counts as not found",
            len(positives),
        )
    return own

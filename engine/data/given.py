"""The negatives that the data themselves give the training queries, such as DPR's `hard_negative_ctxs`.

Whoever made the data has searched, and proposed passages by name (`bm25`, `random`, another system's). Here they are
counted and checked before any work; `engine.retrievers.given` makes a retriever of them, so that they are mined,
pooled and filtered as what any other found.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.config.pools import GIVEN
from engine.config.timetable import Timetable
from engine.errors import DataError
from engine.log import get_logger
from shards.errors import listed
from shards.records import Dataset

log = get_logger(__name__)
_NAMED = 3
"""Examples named in an error."""
_STAND_INS = {"random": "documents drawn at random stand in for them", "bm25": "what BM25 finds stands in for them"}


@dataclass(frozen=True, slots=True)
class GivenCounts:
    """How far given negatives go.

    Attributes:
        negatives: Of the training queries, those of one proposer or of all.
        lacking: Ids of the training queries that have none.
    """

    negatives: int
    lacking: tuple[str, ...]


def given_negatives(dataset: Dataset, proposed_by: str) -> Iterator[tuple[str, list[str]]]:
    """Stream the negatives that the data give.

    Args:
        dataset: The data.
        proposed_by: Who proposed those that are meant; empty for all.

    Yields:
        Query id and docids in the order of the data, none twice; queries of which none is left are passed over.

    Raises:
        DataError: The records cannot be read.
    """
    for record in dataset.read_given() if dataset.read_given else ():
        docids = list(
            dict.fromkeys(
                docid
                for docid, names in zip(record.docids, record.proposed_by, strict=True)
                if not proposed_by or proposed_by in names
            )
        )
        if docids:
            yield record.qid, docids


def require_given(timetable: Timetable, dataset: Dataset, trained: Sequence[str], without_given: str) -> None:
    """Refuse data that do not give the negatives that a recipe draws from, and count those that they do.

    Args:
        timetable: Its minings say what is drawn from.
        dataset: The data; what they give is gone through once for each such mining.
        trained: Ids of the training queries that are trained on.
        without_given: `data.without_given`.

    Raises:
        DataError: The data give no negatives, or none by that name; or a training query has none, and nothing stands
            in for them.
    """
    for proposed_by in _asked(timetable):
        counts = _count(dataset, trained, proposed_by)
        if counts.lacking and without_given == "error":
            raise lacking_given(counts.lacking, len(trained), proposed_by)
        log.info(
            "%s: %d negatives of %d training queries; %d have none%s",
            f"{GIVEN}@{proposed_by}" if proposed_by else GIVEN,
            counts.negatives,
            len(trained) - len(counts.lacking),
            len(counts.lacking),
            f": {_STAND_INS[without_given]}" if counts.lacking else "",
        )


def lacking_given(lacking: Sequence[str], num_queries: int, proposed_by: str) -> DataError:
    """Describe training queries that have no given negatives."""
    return DataError(
        f"{len(lacking)} of {num_queries} training queries have no negatives"
        f"{f' of {proposed_by}' if proposed_by else ''} in the data: {listed(list(map(repr, lacking)), _NAMED)}",
        expected="negatives for each of them, where they are drawn from what is given",
        remedy="set data.without_given to bm25 (what it finds stands in) or random (documents of the corpus do)",
    )


def require_given_documents(timetable: Timetable, dataset: Dataset, index_of: Callable[[str], int | None]) -> None:
    """Refuse given negatives that the corpus does not have, before any training.

    Args:
        timetable: As of `require_given`.
        dataset: The data.
        index_of: Gives the global index of a docid; None for one that the corpus does not have.

    Raises:
        DataError: The corpus lacks one.
    """
    for proposed_by in _asked(timetable):
        read_given_documents(dataset, proposed_by, index_of)


def read_given_documents(
    dataset: Dataset, proposed_by: str, index_of: Callable[[str], int | None]
) -> dict[str, array[int]]:
    """Read the given negatives of the training queries whole: 8 bytes of memory each.

    Args:
        dataset: The data.
        proposed_by: As of `given_negatives`.
        index_of: As of `require_given_documents`.

    Returns:
        Query id -> global document indices, in the order of the data.

    Raises:
        DataError: The corpus lacks one.
    """
    found: dict[str, array[int]] = {}
    unknown: list[str] = []
    for qid, docids in given_negatives(dataset, proposed_by):
        documents = [index_of(docid) for docid in docids]
        unknown += [f"{docid!r} of query {qid!r}" for docid, at in zip(docids, documents, strict=True) if at is None]
        found[qid] = array("q", [document for document in documents if document is not None])
    if unknown:
        raise DataError(
            f"the data give {len(unknown)} negatives that the corpus does not have: {listed(unknown, _NAMED)}",
            expected="negatives from this corpus, by its docids",
            remedy="convert the data with --on-unknown-docid drop, which leaves them out and counts them",
        )
    return found


def _asked(timetable: Timetable) -> list[str]:
    return [mining.proposed_by for mining in timetable.minings if mining.retriever == GIVEN]


def _count(dataset: Dataset, trained: Sequence[str], proposed_by: str) -> GivenCounts:
    if dataset.read_given is None:
        raise DataError(
            f"{dataset.path} gives no negatives, and `{GIVEN}` is to draw from them",
            expected="training records with negatives: DPR's biencoder-*-train.json, or training/train.jsonl of a "
            "converted folder",
            remedy="convert sources that have negatives (training records, triples), or draw from bm25",
        )
    lacking = dict.fromkeys(trained)
    num_negatives, names = 0, Counter[str]()
    for record in dataset.read_given():
        names.update(name for by in record.proposed_by for name in by)
    for qid, docids in given_negatives(dataset, proposed_by):
        if qid in lacking:
            num_negatives += len(docids)
            del lacking[qid]
    if not num_negatives:
        told = ", ".join(f"{name} ({number})" for name, number in names.most_common(8)) or "nobody by name"
        raise DataError(
            f"{dataset.path} gives no training query a negative"
            + (f" of {proposed_by!r}; those that it gives were proposed by {told}" if proposed_by else ""),
            expected="training records with negatives",
            remedy=f"name one of these, such as {GIVEN}@{names.most_common(1)[0][0]}, or {GIVEN} for all"
            if proposed_by and names
            else "draw from bm25, or convert sources that have negatives",
        )
    return GivenCounts(num_negatives, tuple(lacking))

"""Candidates that somebody else chose for re-ranking: for each query a set of documents, in a file without an order.

The official files of passage re-ranking are of this form, `qid TAB docid TAB query TAB passage`, with up to 1000 lines
a query. They say which documents are to be re-ranked and nothing of their ranks, so nothing is measured by the order
of their lines. The file is streamed; of each line two numbers are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import DataError
from shards.errors import listed
from shards.formats.lines import read_lines
from shards.records import Query

_NAMED = 3
"""Examples named in an error."""
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_COLUMNS = "qid, docid, query and passage, separated by tabs"


@dataclass(frozen=True, slots=True)
class CandidateSets:
    """What is to be re-ranked."""

    documents: dict[str, list[int]]
    """Query id -> global document indices, ascending; empty for a query that the file lacks. All queries that were
    asked for, in their order."""
    num_passed_over: int
    """Queries of the file that were not asked for."""

    @property
    def lacking(self) -> list[str]:
        """Queries that were asked for and have no candidate."""
        return [qid for qid, documents in self.documents.items() if not documents]

    @property
    def largest(self) -> int:
        """Documents of the query that has most."""
        return max(map(len, self.documents.values()), default=0)

    def told(self, path: Path) -> str:
        """Return a line for the log on what is re-ranked."""
        sizes = [len(documents) for documents in self.documents.values() if documents]
        text = (
            f"{path.name} has candidates for {len(sizes)} of {len(self.documents)} queries, "
            f"{sum(sizes) / max(1, len(sizes)):.1f} on average and {self.largest} at most; all of them are re-ranked"
        )
        if lacking := self.lacking:
            text += f"; the {len(lacking)} that it lacks count as 0 hits: {listed(lacking, _NAMED)}"
        if self.num_passed_over:
            text += f"; {self.num_passed_over} of its queries are not measured here and were passed over"
        return text


def read_candidate_sets(path: Path, queries: Sequence[Query], index_of: Callable[[str], int | None]) -> CandidateSets:
    """Read the candidates of some queries.

    Args:
        path: The file, plain or compressed (`.gz`, `.zst`). The lines of a query need not stand together.
        queries: Those that are measured; the file may have more, as it has those that nobody judged, or fewer.
        index_of: Gives the global index of a docid; None for one that the corpus does not have.

    Returns:
        A set for each of the queries.

    Raises:
        DataError: The file is missing, empty, damaged or an archive; a line has another form; it has none of the
            queries, or most of those that it has have another text there; a document is not in the corpus, or stands
            twice for a query.
    """
    if path.name.endswith(_ARCHIVES):
        raise DataError(
            f"{path} is an archive of files", expected=f"a file with lines of {_COLUMNS}", remedy="unpack it first"
        )
    texts = {query.id: query.text for query in queries}
    found: dict[str, array[int]] = {}
    passed_over: set[str] = set()
    other_texts: list[str] = []
    unknown: list[str] = []
    for number, line in read_lines(path):
        columns = line.split("\t", 3)
        if len(columns) != 4:
            if not line or line.isspace():
                continue
            raise DataError(
                f"{path} line {number} has {len(columns)} columns", expected=_COLUMNS, remedy="write it again"
            )
        qid, docid, text, _ = columns
        if qid not in texts:
            passed_over.add(qid)
            continue
        if qid not in found:
            found[qid] = array("q")
            if text.split() != texts[qid].split():
                other_texts.append(f"{qid} is {text[:60]!r} there and {texts[qid][:60]!r} in the data")
        document = index_of(docid)
        if document is None:
            unknown.append(f"{docid!r} in line {number}")
        else:
            found[qid].append(document)
    _require_these_queries(path, found, texts, passed_over, other_texts)
    if unknown:
        raise DataError(
            f"{path} has {len(unknown)} documents that the corpus does not have: {listed(unknown, _NAMED)}",
            expected="candidates from this corpus, by its docids",
            remedy="name the data folder by --data that the candidates belong to",
        )
    sets = {qid: np.sort(np.array(found.get(qid, ()), dtype=np.int64)) for qid in texts}
    repeated = [repr(qid) for qid, documents_N in sets.items() if (np.diff(documents_N) == 0).any()]
    if repeated:
        raise DataError(
            f"{path} has {len(repeated)} queries with a document twice: {listed(repeated, _NAMED)}",
            expected="every candidate once for a query",
            remedy="take the repeated lines out",
        )
    return CandidateSets({qid: documents_N.tolist() for qid, documents_N in sets.items()}, len(passed_over))


def _require_these_queries(
    path: Path, found: Mapping[str, object], texts: Mapping[str, str], passed_over: set[str], other_texts: list[str]
) -> None:
    """Refuse a file of other queries. Numbers are ids everywhere: that they are known says little without the texts."""
    remedy = "name the split by --split, or the data folder by --data, that the candidates belong to"
    if not found:
        raise DataError(
            f"{path} has none of the {len(texts)} queries: it has {listed(sorted(passed_over), _NAMED) or 'no query'}",
            expected=f"candidates of queries such as {listed(texts, _NAMED)}",
            remedy=remedy,
        )
    if 2 * len(other_texts) > len(found):
        raise DataError(
            f"{path} has other texts for {len(other_texts)} of {len(found)} queries: "
            f"{listed(other_texts, _NAMED, '; ')}",
            expected="the queries of the data under the same ids",
            remedy=remedy,
        )

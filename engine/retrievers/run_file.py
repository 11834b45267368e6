"""A ranking in a file as a retriever: what any other system found, to mine negatives from or to measure.

The file is TREC's (`qid Q0 docid rank score tag`) or has the ranks alone (`qid docid rank`, as MS MARCO has them). It
answers the queries that it holds, by their ids, and no others. Its order is that of the scores, as trec_eval has it;
ranks that say otherwise stop the reading, since nobody knows which of the two was meant.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.corpus import Data
from engine.data.trec import run_lines
from engine.errors import DataError
from engine.retrievers.choice import Choice
from engine.run import Run, RunFolder
from engine.search import Hits
from shards.embeddings import Stamp
from shards.errors import listed
from shards.files import sha256_file
from shards.records import Query

_NAMED = 3
"""Examples named in an error."""


class RunFileSearcher:
    """Answers queries from a run file; use `RunFileSearcher.open`.

    Attributes:
        source: `run_file`.
        block_size: Queries best searched in one call.
    """

    source: str
    block_size = 4096

    def __init__(self, path: Path, found: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]) -> None:
        self.source, self._path, self._found = "run_file", path, found

    @classmethod
    def open(cls, path: Path, index_of: Callable[[str], int | None]) -> RunFileSearcher:
        """Read a run file whole: 24 bytes of memory for each of its lines.

        Args:
            path: The file. The lines of a query need not stand together, nor in the order of the ranks.
            index_of: Gives the global index of a docid; None for one that the corpus does not have.

        Returns:
            A searcher.

        Raises:
            DataError: The file is missing or empty, a line has another form, a document is not in the corpus, a score
                is not a number, a query has a document or a rank twice, or its ranks contradict its scores.
        """
        documents: dict[str, array[int]] = {}
        scores: dict[str, array[float]] = {}
        ranks: dict[str, array[int]] = {}
        unknown: list[str] = []
        unordered: list[str] = []
        for line in run_lines(path, or_ranks_alone=True):
            document = index_of(line.docid)
            if document is None:
                unknown.append(f"{line.docid!r} in line {line.number}")
                continue
            if not np.isfinite(line.score):
                unordered.append(f"{line.score} in line {line.number}")
            documents.setdefault(line.qid, array("q")).append(document)
            scores.setdefault(line.qid, array("d")).append(line.score)
            ranks.setdefault(line.qid, array("q")).append(line.rank)
        _refuse(path, unknown, "documents that the corpus does not have", "a ranking of this corpus, by its docids")
        _refuse(path, unordered, "scores that are no finite numbers", "a number for every document")
        if not documents:
            raise DataError(f"{path} is empty", expected="a ranking of at least one query")
        _require_ranks_of_scores(path, ranks, scores)
        found = {qid: _best_first(documents.pop(qid), scores.pop(qid)) for qid in list(documents)}
        repeated = [qid for qid, (documents_N, _) in found.items() if len(np.unique(documents_N)) < len(documents_N)]
        _refuse(
            path, [repr(qid) for qid in repeated], "queries with a document twice", "every document once for a query"
        )
        return cls(path, found)

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return what the file has for each query.

        Args:
            queries: Q queries; their ids are looked up, not their texts.
            top_k: Documents per query, at least 1.

        Returns:
            Hits [Q, top_k], by score descending, then by document index ascending; padded where the file has fewer.

        Raises:
            DataError: The file does not have a query.
        """
        missing = [repr(query.id) for query in queries if query.id not in self._found]
        if missing:
            raise DataError(
                f"{self._path} lacks {len(missing)} of {len(queries)} queries: {listed(missing, _NAMED)}",
                expected="a ranking of every query that is searched",
                remedy="search these queries too and write the file again; where nothing is found for one, give it a "
                "line with any document and a score below all others",
            )
        documents_QK = np.full((len(queries), top_k), -1, dtype=np.int64)
        scores_QK = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
        for row, query in enumerate(queries):
            documents_N, scores_N = self._found[query.id]
            kept = min(top_k, len(documents_N))
            documents_QK[row, :kept], scores_QK[row, :kept] = documents_N[:kept], scores_N[:kept]
        return Hits(documents_QK, scores_QK)


def build_run_file(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Do nothing: the file is there, or opening it says that it is not."""


def open_run_file(run: Run, data: Data, folder: RunFolder, choice: Choice) -> RunFileSearcher:
    """Open the run file at a path."""
    return RunFileSearcher.open(Path(choice.path), data.shards.docids.index_of)


def run_file_stamp(run: Run, data: Data, choice: Choice) -> Stamp:
    """Return a stamp with the file's hash in the place of weights."""
    path = Path(choice.path)
    if not path.is_file():
        raise DataError(f"{path} does not exist", expected="a TREC run file")
    return Stamp(path.name, sha256_file(path), data.shards.manifest.sha256)


def _best_first(documents: array[int], scores: array[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Order by the scores as the file has them; rounded ones could tie where the file has an order."""
    documents_N, scores_N = np.array(documents, dtype=np.int64), np.array(scores, dtype=np.float64)
    order_N = np.lexsort((documents_N, -scores_N))
    return documents_N[order_N], scores_N[order_N]


def _require_ranks_of_scores(path: Path, ranks: dict[str, array[int]], scores: dict[str, array[float]]) -> None:
    """Refuse ranks that say another order than the scores."""
    numbers = {rank for own in ranks.values() for rank in (min(own), max(own))}
    if len(numbers) == 1 and {-float(*numbers)} != {score for own in scores.values() for score in own}:
        return  # one number in all lines is no rank; but where it is all that a line has, nothing else is there
    repeated: list[str] = []
    contrary: list[str] = []
    for qid, own in ranks.items():
        ranks_N, scores_N = np.array(own, dtype=np.int64), np.array(scores[qid], dtype=np.float64)
        order_N = np.argsort(ranks_N, kind="stable")
        if (np.diff(ranks_N[order_N]) == 0).any():
            repeated.append(repr(qid))
        elif (rises_N := np.flatnonzero(np.diff(scores_N[order_N]) > 0)).size:
            better, worse = order_N[rises_N[0]], order_N[rises_N[0] + 1]
            contrary.append(
                f"{qid!r} has score {float(scores_N[better])} at rank {ranks_N[better]} and {float(scores_N[worse])} "
                f"at rank {ranks_N[worse]}"
            )
    _refuse(path, repeated, "queries with a rank twice", "every rank once for a query, or the same number in all lines")
    _refuse(
        path,
        contrary,
        "queries whose ranks contradict their scores",
        "scores that fall from rank to rank: where lower is better, as with distances, write their negatives; where "
        "the ranks alone are meant, leave the scores out (qid docid rank)",
    )


def _refuse(path: Path, cases: list[str], what: str, expected: str) -> None:
    if cases:
        raise DataError(f"{path} has {len(cases)} {what}: {listed(cases, _NAMED)}", expected=expected)

"""Mining: search the training queries and keep what may serve as negatives.

Source: AR2 section 3.1 (negatives are drawn from the top of what the retriever finds) and, for answers, the filter of
its released code. Positives, known false negatives and documents that contain an answer are taken out, and the search
goes deeper for queries that keep too little.

The queries are searched in blocks, each a finished part on disk: blocks are handed out to the ranks, and what an
interrupted search finished is not searched again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from engine.data.answers import AnswerMatcher
from engine.data.candidates import Candidates, is_saved, join
from engine.data.corpus import FALSE_NEGATIVES, POSITIVES, Data
from engine.data.negatives import ANSWERS, remove_known
from engine.data.reuse import take_over_same_weights
from engine.errors import DataError
from engine.log import get_logger
from engine.refresh.part_search import search_over_ranks
from engine.reliability.progress import progress_bar
from engine.run import Stage
from engine.search import PartedSearcher, Searcher
from shards.embeddings import Stamp
from shards.files import canonical_json
from shards.records import Query

log = get_logger(__name__)
_BLOCKS_A_GROUP = 16
"""Blocks whose queries go through the parts of an unmerged index together; what is found takes disk meanwhile."""


@dataclass(frozen=True, slots=True)
class MinedQueries:
    """Result of a stage `candidates/NAME`: how many queries were searched, how many documents taken out by reason."""

    queries: int
    removed_positives: int
    removed_false_negatives: int
    removed_answers: int


def mine(
    stage: Stage,
    data: Data,
    searcher: Searcher,
    rows: np.ndarray,
    stamp: Stamp,
    *,
    top_k: int,
    needed: int,
    name: str,
) -> MinedQueries:
    """Search training queries with all ranks, and publish what is left as candidates.

    Args:
        stage: Where this runs.
        data: Corpus and training queries.
        searcher: Any retriever.
        rows: Training rows to search, int64 [Q].
        stamp: Iteration, weights and corpus that the searcher stands for.
        top_k: Candidates kept for a query.
        needed: Candidates that a query must keep, at most `top_k`.
        name: Of the candidates in the run folder.

    Returns:
        Counts of queries, and of documents taken out by reason.

    Raises:
        DataError: A query keeps fewer than `needed` of the whole corpus.
    """
    coordinator, folder = stage.run.coordinator, stage.run.folder.candidates(name)
    search = _describe_search(stage, rows, top_k, needed)
    parts = folder.with_name(f".{name}.parts-{search[:12]}")
    blocks = [rows[start : start + searcher.block_size] for start in range(0, len(rows), searcher.block_size)]
    blocks = blocks or [rows]  # without a query, there are still candidates, of nothing
    plan = _Plan(data, stamp, top_k, needed, *_first_depth(stage, data, rows, top_k))

    def look() -> list[int]:
        take_over_same_weights(folder, stamp)
        for other in folder.parent.glob(f".{name}.parts-*"):
            if other != parts:
                shutil.rmtree(other)  # of another search, which nobody will go on with
        return [] if is_saved(folder, stamp, search) else _missing(parts, len(blocks), stamp, search)

    missing: list[int] = coordinator.only_rank_zero(f"{stage.name}: plan", look)
    with progress_bar(stage.name, len(rows), "query", shown=stage.run.is_main) as bar:
        for group, numbers in _groups(searcher, missing):
            prepared = _search_group(stage, plan, searcher, blocks, group, parts)
            with coordinator.agreement(f"{stage.name}: search"):
                for number in coordinator.hand_out(stage.name, numbers):
                    bar.update(number * searcher.block_size - bar.n)
                    found = _mine_block(plan, prepared, blocks[number])
                    found.save(_part_of(parts, number), search=search)
            shutil.rmtree(_found_of(parts, group), ignore_errors=True)

    def publish() -> list[int]:
        if not is_saved(folder, stamp, search):
            join(
                [Candidates.load(_part_of(parts, number), stamp) for number in range(len(blocks))],
                folder,
                search=search,
            )
        shutil.rmtree(parts, ignore_errors=True)
        whole = Candidates.load(folder, stamp)
        return [len(whole), *(whole.removed[reason] for reason in (POSITIVES, FALSE_NEGATIVES, ANSWERS))]

    counts = MinedQueries(*coordinator.only_rank_zero(f"{stage.name}: publish", publish))
    iteration = int(name) if name.isdigit() else 0
    values = {f"candidates/{key}": float(number) for key, number in asdict(counts).items()}
    stage.run.metrics.write(stage.name, iteration, values)
    return counts


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is searched for, the same for all blocks."""

    data: Data
    stamp: Stamp
    top_k: int
    needed: int
    depth: int
    """Documents fetched of a query at first: more than top_k by what will be taken out of most."""
    with_answers: bool


def _first_depth(stage: Stage, data: Data, rows: np.ndarray, top_k: int) -> tuple[int, bool]:
    """Return how deep to search at first, and whether answers are taken out."""
    chosen = rows.tolist()
    with_answers = stage.run.timetable.remove_answers and any(data.train.queries[row].answers for row in chosen)
    most = max((len(data.train.known(row)) for row in chosen), default=0)
    extra = min(most, top_k) + (top_k // 4 if with_answers else 0)
    return min(data.shards.num_documents, top_k + extra), with_answers


def _groups(searcher: Searcher, missing: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield the blocks that are missing, by the group whose queries go through the parts of an index together."""
    size = _BLOCKS_A_GROUP if isinstance(searcher, PartedSearcher) and searcher.num_parts > 1 else 10**9
    for group, numbers in groupby(missing, key=lambda number: number // size):
        yield group, list(numbers)


def _search_group(
    stage: Stage, plan: _Plan, searcher: Searcher, blocks: list[np.ndarray], group: int, parts: Path
) -> Searcher:
    """Let all ranks search the parts of an index for a group of blocks; an index in one piece needs no such thing."""
    if not isinstance(searcher, PartedSearcher) or searcher.num_parts == 1:
        return searcher
    rows = np.concatenate(blocks[group * _BLOCKS_A_GROUP : (group + 1) * _BLOCKS_A_GROUP]).tolist()
    if not rows:
        return searcher
    queries = [plan.data.train.queries[row] for row in rows]
    folder, name = _found_of(parts, group), f"{stage.name} group {group}"
    return search_over_ranks(stage.run.coordinator, searcher, queries, plan.depth, folder, name=name)


def _describe_search(stage: Stage, rows: np.ndarray, top_k: int, needed: int) -> str:
    """Name a search by all that its result depends on besides the stamp, so that a part of another one is not taken."""
    asked = {"rows": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(), "top_k": top_k, "needed": needed}
    asked["remove_answers"] = stage.run.timetable.remove_answers
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()


def _missing(parts: Path, num_blocks: int, stamp: Stamp, search: str) -> list[int]:
    return [number for number in range(num_blocks) if not is_saved(_part_of(parts, number), stamp, search)]


def _part_of(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}"


def _found_of(parts: Path, group: int) -> Path:
    return parts / f"found-{group:06d}"


def answer_predicate(data: Data, rows: np.ndarray) -> Callable[[int, int], bool]:
    """Return a function (place in `rows`, document) -> whether the document contains an answer of that query."""
    matchers = [AnswerMatcher(data.train.queries[row].answers) for row in rows.tolist()]

    @lru_cache(maxsize=200_000)
    def text(document: int) -> str:
        return data.shards.document(document).text

    return lambda place, document: matchers[place].has(text(document))


def _mine_block(plan: _Plan, searcher: Searcher, rows: np.ndarray) -> Candidates:
    """Search, filter, and fetch deeper for the queries that keep fewer than `needed` documents.

    An answer such as "a" stands in every document, and then its filter says nothing about relevance: a query that
    keeps too little of the whole corpus is taken once more with only its positives removed, and counted.
    """
    data, top_k = plan.data, plan.top_k
    queries = [data.train.queries[row] for row in rows.tolist()]
    known = [data.train.known(row) for row in rows.tolist()]
    has_answer = answer_predicate(data, rows) if plan.with_answers else None
    documents_QK = np.full((len(rows), top_k), -1, dtype=np.int64)
    scores_QK = np.full((len(rows), top_k), -np.inf, dtype=np.float32)
    removed: dict[int, Counter[str]] = {}  # by query: counted anew where one is searched again
    num_documents, depths = data.shards.num_documents, [plan.depth]
    while depths[-1] < num_documents:
        depths.append(min(num_documents, depths[-1] * 4))
    passes = [(depth, has_answer) for depth in depths] + ([(num_documents, None)] if plan.with_answers else [])
    pending = np.arange(len(rows))
    for depth, predicate in passes:
        if not len(pending):
            break
        hits = searcher.search([queries[place] for place in pending], depth)
        place_of = pending.tolist()
        found, scores, counts = remove_known(
            hits.documents_QK,
            hits.scores_QK,
            [known[place] for place in place_of],
            _at_places(predicate, place_of) if predicate else None,
            top_k,
        )
        documents_QK[pending], scores_QK[pending] = found, scores
        removed |= dict(zip(place_of, counts, strict=True))
        pending = pending[(found >= 0).sum(1) < plan.needed]
        if len(pending) and depth == num_documents and predicate is not None:
            log.warning("%d queries have an answer that almost every document contains: not filtered", len(pending))
    if len(pending):
        _refuse_short(queries[pending[0]], int((documents_QK[pending[0]] >= 0).sum()), plan.needed, num_documents)
    qids = [query.id for query in queries]
    return Candidates(searcher.source, plan.stamp, qids, documents_QK, scores_QK, sum(removed.values(), Counter()))


def _at_places(predicate: Callable[[int, int], bool], places: list[int]) -> Callable[[int, int], bool]:
    return lambda row, document: predicate(places[row], document)


def _refuse_short(query: Query, num_left: int, needed: int, num_documents: int) -> None:
    raise DataError(
        f"query {query.id!r} has {num_left} documents left after its positives are taken out of all {num_documents}",
        expected=f"at least the {needed} negatives that a step draws",
        remedy="lower num_negatives, or use a larger corpus",
    )

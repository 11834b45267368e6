"""Mining: search the training queries and keep what may serve as negatives.

Source: AR2 section 3.1 (negatives are drawn from the top of what the retriever finds) and, for answers, the filter of
its released code. Positives, known false negatives, documents that contain an answer and the document that is the
query itself are taken out, and the search goes deeper for queries that keep too little: fewer than a step draws, or,
where the recipe asks for it, fewer than `top_k`. Where a retriever finds no more (no other document shares a word with
the query), what is missing of a step's negatives is drawn from the corpus at random: easy negatives, which the counts
tell of.

The queries are searched in blocks (`engine.refresh.blocks`), which are handed out to the ranks; what an interrupted
search finished is not searched again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from engine.config.pools import GIVEN
from engine.data.answers import AnswerMatcher
from engine.data.arrays import OpenedInTurn
from engine.data.candidates import Candidates, is_saved, join
from engine.data.corpus import Data
from engine.data.found_positives import FoundPositive, FoundPositives
from engine.data.negatives import (
    ANSWERS,
    FALSE_NEGATIVES,
    IDENTICAL_IDS,
    POSITIVES,
    draw_from_corpus,
    remove_known,
    step_rng,
)
from engine.data.reuse import take_over_same_weights
from engine.errors import DataError
from engine.log import get_logger
from engine.refresh.blocks import Blocks
from engine.refresh.part_search import search_over_ranks
from engine.reliability.progress import progress_bar
from engine.retrievers.scattered import is_scattered, search_in_rounds
from engine.run import Stage
from engine.search import PartedSearcher, Searcher, finds_too_little
from shards.embeddings import Stamp
from shards.files import canonical_json
from shards.records import Query

log = get_logger(__name__)
_DRAWN, _WITHOUT_HITS, _DEEPER, _SHORT = "drawn", "without_hits", "deeper", "short"
_COUNTED = (POSITIVES, FALSE_NEGATIVES, ANSWERS, IDENTICAL_IDS, _DRAWN, _WITHOUT_HITS, _DEEPER, _SHORT)
_BLOCKS_A_GROUP = 16
"""Blocks whose queries go through the parts of an unmerged index together; what is found takes disk meanwhile."""


@dataclass(frozen=True, slots=True)
class MinedQueries:
    """Result of a stage `candidates/NAME`: how many queries were searched, how many documents taken out by reason.

    Attributes:
        queries: Searched.
        removed_positives: Documents that are judged relevant.
        removed_false_negatives: Documents that are known to be.
        removed_answers: Documents that contain an answer.
        removed_identical_ids: Documents that are the query itself.
        drawn_at_random: Documents that took the place of hits which queries lacked.
        queries_without_hits: Queries for which nothing was found.
        queries_searched_deeper: Queries that kept too little at the first depth.
        queries_below_top_k: Queries that have fewer candidates than `top_k` in the end.
    """

    queries: int
    removed_positives: int
    removed_false_negatives: int
    removed_answers: int
    removed_identical_ids: int = 0
    drawn_at_random: int = 0
    queries_without_hits: int = 0
    queries_searched_deeper: int = 0
    queries_below_top_k: int = 0


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
        DataError: The whole corpus has fewer than `needed` negatives of a query.
    """
    coordinator, folder = stage.run.coordinator, stage.run.folder.candidates(name)
    search = _describe_search(stage, rows, top_k, needed)
    cut = [rows[start : start + searcher.block_size] for start in range(0, len(rows), searcher.block_size)]
    # Without a query, there are still candidates, of nothing.
    blocks = Blocks(stage, folder, search, cut or [rows], lambda path: is_saved(path, stamp, search))
    deepest = top_k * stage.run.timetable.search_deeper
    plan = _Plan(data, stamp, stage.seed, top_k, needed, deepest, *_first_depth(stage, data, rows, top_k))
    missing = blocks.missing(before=lambda: take_over_same_weights(folder, stamp))
    with progress_bar(stage.name, len(rows), "query", shown=stage.run.is_main) as bar:

        def mine_one(number: int, prepared: Searcher) -> None:
            bar.update(max(0, number * searcher.block_size - bar.n))
            found = _mine_block(plan, prepared, blocks.rows[number])
            found.save(blocks.part(number), search=search)

        for group, numbers in _groups(searcher, missing):
            if is_scattered(searcher):
                queries, place = _queries_of(plan, blocks, group), _found_of(blocks, group)
                label = f"{stage.name} group {group}"
                search_in_rounds(coordinator, searcher, queries, plan.depth, place, numbers, mine_one, name=label)
            else:
                prepared = _search_group(stage, plan, searcher, blocks, group)
                with coordinator.agreement(f"{stage.name}: search"):
                    for number in coordinator.hand_out(stage.name, numbers):
                        mine_one(number, prepared)
            shutil.rmtree(_found_of(blocks, group), ignore_errors=True)

    def publish() -> list[int]:
        load = partial(Candidates.load, stamp=stamp)
        blocks.publish(lambda parts: join(OpenedInTurn(load, parts), folder, search=search))
        whole = Candidates.load(folder, stamp)
        # Of what the data give, the lacking were counted before.
        if searcher.source != GIVEN and (
            warning := finds_too_little(searcher.source, whole.counts[_WITHOUT_HITS], len(whole))
        ):
            log.warning("%s", warning)
        return [len(whole), *(whole.counts[what] for what in _COUNTED)]

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
    seed: int
    top_k: int
    needed: int
    deepest: int
    """To which depth a query is searched that keeps fewer than top_k; beyond it, one that keeps fewer than needed."""
    depth: int
    """Documents fetched of a query at first: more than top_k by what will be taken out of most."""
    with_answers: bool

    def wanted(self, depth: int) -> int:
        """Return how many candidates of a query end its search at a depth."""
        return self.top_k if depth < self.deepest else self.needed

    def next_depth(self, depth: int) -> int:
        """Return how deep to search next."""
        num_documents = self.data.shards.num_documents
        return min(num_documents, 4 * depth, self.deepest if depth < self.deepest else num_documents)


def _first_depth(stage: Stage, data: Data, rows: np.ndarray, top_k: int) -> tuple[int, bool]:
    """Return how deep to search at first, and whether answers are taken out."""
    chosen = rows.tolist()
    with_answers = stage.run.timetable.remove_answers and any(data.train.queries[row].answers for row in chosen)
    most = max((len(data.train.known(row)) for row in chosen), default=0)
    extra = min(most, top_k) + (top_k // 4 if with_answers else 0)
    return min(data.shards.num_documents, top_k + extra), with_answers


def _groups(searcher: Searcher, missing: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield the blocks that are missing, by the group whose queries go through the parts of an index together."""
    together = isinstance(searcher, PartedSearcher) and searcher.num_parts > 1
    size = _BLOCKS_A_GROUP if together or is_scattered(searcher) else 10**9
    for group, numbers in groupby(missing, key=lambda number: number // size):
        yield group, list(numbers)


def _search_group(stage: Stage, plan: _Plan, searcher: Searcher, blocks: Blocks, group: int) -> Searcher:
    """Let all ranks search the parts of an index for a group of blocks; an index in one piece needs no such thing."""
    if not isinstance(searcher, PartedSearcher) or searcher.num_parts == 1:
        return searcher
    queries = _queries_of(plan, blocks, group)
    if not queries:
        return searcher
    folder, name = _found_of(blocks, group), f"{stage.name} group {group}"
    return search_over_ranks(stage.run.coordinator, searcher, queries, plan.depth, folder, name=name)


def _queries_of(plan: _Plan, blocks: Blocks, group: int) -> list[Query]:
    """Return the queries of a group of blocks, those of finished ones included."""
    rows = np.concatenate(blocks.rows[group * _BLOCKS_A_GROUP : (group + 1) * _BLOCKS_A_GROUP]).tolist()
    return [plan.data.train.queries[row] for row in rows]


def _describe_search(stage: Stage, rows: np.ndarray, top_k: int, needed: int) -> str:
    """Name a search by all that its result depends on besides the stamp, so that a part of another one is not taken."""
    rows_sha256 = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    asked: dict[str, str | int] = {"rows": rows_sha256, "top_k": top_k, "needed": needed}
    if stage.run.timetable.search_deeper > 1:
        asked["search_deeper"] = stage.run.timetable.search_deeper
    asked["remove_answers"] = stage.run.timetable.remove_answers
    asked["ignore_identical_ids"] = stage.run.config.data.ignore_identical_ids
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()


def _found_of(blocks: Blocks, group: int) -> Path:
    return blocks.parts / f"found-{group:06d}"


def answer_predicate(data: Data, rows: np.ndarray) -> Callable[[int, int], bool]:
    """Return a function (place in `rows`, document) -> whether the document contains an answer of that query."""
    matchers = [AnswerMatcher(data.train.queries[row].answers) for row in rows.tolist()]
    return lambda place, document: matchers[place].has(data.haystack_of(document))


def _mine_block(plan: _Plan, searcher: Searcher, rows: np.ndarray) -> Candidates:
    """Search, filter, fetch deeper for the queries that keep too few documents, and draw what is missing.

    An answer such as "a" stands in every document, and then its filter says nothing about relevance: a query that
    keeps too little of the whole corpus is taken once more with its answers left in, and counted.
    """
    block = _Block(plan, searcher, rows)
    pending = np.arange(len(rows))
    if plan.with_answers:
        pending = block.search(pending, answer_predicate(plan.data, rows))
        if len(pending):
            log.warning("%d queries have an answer that almost every document contains: not filtered", len(pending))
    pending = block.search(pending, None)
    if len(pending):
        kept = int((block.documents_QK[pending[0]] >= 0).sum())
        _refuse_short(block.queries[pending[0]], kept, plan.needed, plan.data.shards.num_documents)
    qids = [query.id for query in block.queries]
    block.count_short()
    counts = sum(block.counts.values(), Counter[str]())
    positives = FoundPositives.of(block.positives)
    return Candidates(searcher.source, plan.stamp, qids, block.documents_QK, block.scores_QK, counts, positives)


class _Block:
    """Queries that are searched together, and what is kept for them.

    Args:
        plan: What is searched for.
        searcher: Any retriever.
        rows: Training rows, int64 [Q].
    """

    def __init__(self, plan: _Plan, searcher: Searcher, rows: np.ndarray) -> None:
        self.queries = [plan.data.train.queries[row] for row in rows.tolist()]
        self.documents_QK = np.full((len(rows), plan.top_k), -1, dtype=np.int64)
        self.scores_QK = np.full((len(rows), plan.top_k), -np.inf, dtype=np.float32)
        self.counts: dict[int, Counter[str]] = {}  # by query: anew where one is searched again
        self.positives: list[list[FoundPositive]] = [[] for _ in self.queries]
        self._plan, self._searcher = plan, searcher
        self._num_found_Q = np.zeros(len(rows), dtype=np.int64)
        self._known = [plan.data.train.known(row) for row in rows.tolist()]

    def search(self, pending: np.ndarray, contains_answer: Callable[[int, int], bool] | None) -> np.ndarray:
        """Search queries, deeper and deeper while they keep too little.

        Args:
            pending: Places of the queries in the block.
            contains_answer: Of (place, document); None where answers are left in.

        Returns:
            Places of those for which the whole corpus has too little.
        """
        num_documents, depth = self._plan.data.shards.num_documents, self._plan.depth
        short = [pending[:0]]
        while len(pending):
            num_found_Q = self._search_to(depth, pending, contains_answer)
            num_kept_Q = (self.documents_QK[pending] >= 0).sum(1)
            no_more_Q = (num_found_Q < depth) | (depth == num_documents)
            short.append(pending[(num_kept_Q < self._plan.needed) & no_more_Q])
            pending, depth = (
                pending[(num_kept_Q < self._plan.wanted(depth)) & ~no_more_Q],
                self._plan.next_depth(depth),
            )
        ended = np.sort(np.concatenate(short))
        missing = [self._draw(place, contains_answer) for place in ended.tolist()]
        return ended[np.array(missing, dtype=np.int64) > 0]

    def _search_to(
        self, depth: int, pending: np.ndarray, contains_answer: Callable[[int, int], bool] | None
    ) -> np.ndarray:
        """Search queries to a depth and keep what may be a negative; return how many documents were found of each."""
        places = pending.tolist()
        hits = self._searcher.search([self.queries[place] for place in places], depth)
        kept = remove_known(
            hits.documents_QK,
            hits.scores_QK,
            [self._known[place] for place in places],
            _at_places(contains_answer, places) if contains_answer else None,
            self._plan.top_k,
        )
        self.documents_QK[pending], self.scores_QK[pending] = kept.documents_QK, kept.scores_QK
        num_found_Q = self._num_found_Q[pending] = hits.num_found_Q
        for row, (place, num_found) in enumerate(zip(places, num_found_Q.tolist(), strict=True)):
            self.counts[place] = kept.removed[row] + Counter(
                {_WITHOUT_HITS: int(num_found == 0), _DEEPER: int(depth > self._plan.depth)}
            )
            self.positives[place] = kept.positives[row]
        return num_found_Q

    def count_short(self) -> None:
        """Count the queries that keep fewer than `top_k`, be it that some of what they keep was drawn."""
        for place in np.flatnonzero(np.isneginf(self.scores_QK[:, -1])).tolist():
            self.counts[place][_SHORT] = 1

    def _draw(self, place: int, contains_answer: Callable[[int, int], bool] | None) -> int:
        """Draw what a query lacks of the needed documents from the corpus; return how many it still lacks."""
        row_K, num_documents = self.documents_QK[place], self._plan.data.shards.num_documents
        num_kept = int((row_K >= 0).sum())
        if self._num_found_Q[place] == num_documents:
            return self._plan.needed - num_kept  # all others are known or contain an answer
        drawn = draw_from_corpus(
            num_documents,
            self._plan.needed - num_kept,
            step_rng(self._plan.seed, "negatives from the corpus", 0, self.queries[place].id),
            taken=self._known[place].keys() | set(row_K[:num_kept].tolist()),
            contains_answer=partial(contains_answer, place) if contains_answer else None,
        )
        row_K[num_kept : num_kept + len(drawn)] = drawn
        self.counts[place][_DRAWN] = len(drawn)
        return self._plan.needed - num_kept - len(drawn)


def _at_places(predicate: Callable[[int, int], bool], places: list[int]) -> Callable[[int, int], bool]:
    return lambda row, document: predicate(places[row], document)


def _refuse_short(query: Query, num_left: int, needed: int, num_documents: int) -> None:
    raise DataError(
        f"query {query.id!r} has {num_left} documents left after its positives are taken out of all {num_documents}",
        expected=f"at least the {needed} negatives that a step draws",
        remedy="lower num_negatives, or use a larger corpus",
    )

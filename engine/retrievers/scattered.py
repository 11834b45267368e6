"""Searches a dense index whose embeddings lie on several hosts, which so have to search together.

Where any rank reads any embedding, it answers queries by itself. Here all ranks answer a group of queries step by step,
each step handed out and its results in files, so that an interrupted search goes on: encode the queries; find their
candidates by codes, which any rank reads (exact search: each host in its parts); score the candidates, each host its
own documents (`engine.index.held.scores`); order them. What is found is what one rank with all embeddings would find.

Whoever then works with the answers, block by block on any rank, may ask on: deeper, for some of the queries. Such a
block is not finished; what all blocks ask for is searched by all ranks together, and they are begun again.

Shapes: Q queries of a block, C candidates of a query.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from engine.coordination.coordinator import Coordinator
from engine.index.dense import DenseIndex, document_parts
from engine.index.held.scores import ScoredBlocks
from engine.index.held.store import HeldStore, homes_of
from engine.retrievers.dense import DenseSearcher
from engine.search import Hits, Searcher
from shards.files import save_array, write_atomically
from shards.records import Query

_QUERIES_A_BLOCK = 512


class Unanswered(Exception):
    """A search that all hosts have not made yet.

    Attributes:
        top_k: How deep.
        qids: Of the queries.
    """

    def __init__(self, top_k: int, qids: Sequence[str]) -> None:
        super().__init__(f"{len(qids)} queries to depth {top_k}")
        self.top_k, self.qids = top_k, list(qids)


class Answers:
    """A searcher that has answers on disk, and raises `Unanswered` for all others.

    Args:
        searcher: What was asked.
    """

    def __init__(self, searcher: DenseSearcher) -> None:
        self.source, self.block_size = searcher.source, searcher.block_size
        self._found: dict[tuple[str, int], tuple[Path, int]] = {}

    def add(self, queries: Sequence[Query], top_k: int, folder: Path) -> None:
        """Take the answers to queries at a depth from where `search_over_hosts` has put them."""
        for place, query in enumerate(queries):
            block, row = divmod(place, _QUERIES_A_BLOCK)
            self._found[query.id, top_k] = hits_path(folder, block), row

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return the `top_k` documents of each query, best first: [Q, top_k].

        Raises:
            Unanswered: Some have not been searched to this depth.
        """
        missing = [query.id for query in queries if (query.id, top_k) not in self._found]
        if missing:
            raise Unanswered(top_k, missing)
        shape = (len(queries), top_k)
        hits = Hits(np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32))
        places: dict[Path, list[tuple[int, int]]] = defaultdict(list)
        for place, query in enumerate(queries):
            path, row = self._found[query.id, top_k]
            places[path].append((place, row))
        for path, pairs in places.items():
            own, rows = (list(one) for one in zip(*pairs, strict=True))
            hits.documents_QK[own] = np.load(path, mmap_mode="r", allow_pickle=False)[rows]
            hits.scores_QK[own] = np.load(_scores_of(path), mmap_mode="r", allow_pickle=False)[rows]
        return hits


def is_scattered(searcher: object) -> TypeGuard[DenseSearcher]:
    """Tell whether all hosts have to search together."""
    if not isinstance(searcher, DenseSearcher):
        return False
    store = searcher.index.store
    return isinstance(store, HeldStore) and store.scattered


def search_in_rounds(
    coordinator: Coordinator,
    searcher: DenseSearcher,
    queries: Sequence[Query],
    top_k: int,
    folder: Path,
    units: Sequence[int],
    work: Callable[[int, Searcher], None],
    *,
    name: str,
) -> None:
    """Search queries by all hosts, and hand out units of work with the answers until none asks on.

    Args:
        coordinator: Between the ranks, which all call this alike.
        searcher: A scattered one.
        queries: All that the units may ask for, with different ids; the same on all ranks.
        top_k: The depth at which all of them are searched first.
        folder: Takes what is found; the caller removes it.
        units: Numbers of the units.
        work: Takes a unit and the answers, and finishes it unless its search raises `Unanswered`.
        name: Of the work, for progress and errors.
    """
    answers, by_id = Answers(searcher), {query.id: query for query in queries}
    asked = {top_k: list(queries)}
    while True:
        for depth, wanted in sorted(asked.items()):
            if not wanted:
                continue
            digest = hashlib.sha256("\n".join(query.id for query in wanted).encode()).hexdigest()
            found = folder / f"{depth:09d}-{digest[:12]}"
            search_over_hosts(coordinator, searcher, wanted, depth, found, name=f"{name} to depth {depth}")
            answers.add(wanted, depth, found)
        unanswered: list[tuple[int, int, list[str]]] = []
        with coordinator.agreement(name):
            for unit in coordinator.hand_out(name, units):
                try:
                    work(unit, answers)
                except Unanswered as more:
                    unanswered.append((unit, more.top_k, more.qids))
        told = sorted(chain(*coordinator.gather(f"{name}: what is asked on", unanswered)))
        if not told:
            return
        units, asked = [unit for unit, _, _ in told], defaultdict(list)
        for _, depth, qids in told:
            asked[depth] += [by_id[qid] for qid in qids]


@contextmanager
def answered(
    coordinator: Coordinator, searcher: Searcher, queries: Sequence[Query], top_k: int, folder: Path, *, name: str
) -> Iterator[Searcher]:
    """Give what answers queries at one depth on any rank: the searcher itself, or what all hosts have found.

    Args:
        coordinator: Between the ranks, which all call this alike.
        searcher: Any.
        queries: The same on all ranks.
        top_k: How deep the body searches.
        folder: Takes what is found, and goes with the body.
        name: Of the work.
    """
    if not is_scattered(searcher):
        yield searcher
        return
    answers = Answers(searcher)
    coordinator.only_rank_zero(f"{name}: clear", lambda: shutil.rmtree(folder, ignore_errors=True))
    if queries:
        search_over_hosts(coordinator, searcher, queries, top_k, folder, name=name)
        answers.add(queries, top_k, folder)
    yield answers
    coordinator.barrier(f"{name}: answered")
    coordinator.only_rank_zero(f"{name}: clear again", lambda: shutil.rmtree(folder, ignore_errors=True))


def search_over_hosts(
    coordinator: Coordinator, searcher: DenseSearcher, queries: Sequence[Query], top_k: int, folder: Path, *, name: str
) -> None:
    """Search queries by all hosts together. All ranks call it alike.

    Args:
        coordinator: Between the ranks.
        searcher: A scattered one.
        queries: With different ids, at least one; the same on all ranks.
        top_k: Documents of each.
        folder: Takes what is found, for these queries and this depth alone; what is there is not searched again.
        name: Of the work, for progress and errors.
    """
    starts = range(0, len(queries), _QUERIES_A_BLOCK)
    cut, index = [queries[start : start + _QUERIES_A_BLOCK] for start in starts], searcher.index
    store, exact = index.store, index.manifest.plan.exact
    assert isinstance(store, HeldStore), "of a scattered searcher"
    scored, numbers = ScoredBlocks(folder, store, len(cut)), range(len(cut))

    def hand_out(what: str, missing: Callable[[], list[int]], work: Callable[[int], None], homes: Any = None) -> None:
        label = f"{name}: {what}"
        units: list[int] = coordinator.only_rank_zero(f"{label}: plan", missing)
        own = None if homes is None else [homes[unit] for unit in units]
        with coordinator.agreement(label):
            for unit in coordinator.hand_out(label, units, homes=own):
                work(unit)

    def order(block: int) -> None:
        hits = index.candidates(_in_parts(folder, index, block), top_k) if exact else scored.hits(block, top_k)
        _write(hits_path(folder, block), hits)

    hand_out(
        "encode queries",
        lambda: [block for block in numbers if not scored.has_queries(block)],
        lambda block: scored.write_queries(block, searcher.encode(cut[block])),
    )
    if exact or index.num_parts > 1:
        homes = homes_of(store, document_parts(store.manifest)) if exact else None
        hand_out(
            "search parts",
            lambda: [part for part in range(index.num_parts) if not _scores_of(_found_path(folder, part)).exists()],
            lambda part: _search_part(folder, index, scored, len(cut), part, top_k),
            homes,
        )
    if not exact:

        def find(block: int) -> None:
            if index.num_parts > 1:
                found = _in_parts(folder, index, block)
            else:
                found = [index.search_parts(scored.queries(block), top_k)]
            scored.write_candidates(block, index.candidates(found, top_k).documents_QK)

        hand_out("find", lambda: [block for block in numbers if not scored.has_candidates(block)], find)
        scored.score(coordinator, f"{name}: score")
    hand_out("order", lambda: [block for block in numbers if not _scores_of(hits_path(folder, block)).exists()], order)


def _search_part(folder: Path, index: DenseIndex, scored: ScoredBlocks, num_blocks: int, part: int, top_k: int) -> None:
    """Search a part for all blocks at once, as its lists or embeddings are read once."""
    queries_QD = np.concatenate([scored.queries(block) for block in range(num_blocks)])
    _write(_found_path(folder, part), index.search_parts(queries_QD, top_k, [part]))


def _in_parts(folder: Path, index: DenseIndex, block: int) -> list[Hits]:
    """Return what was found for a block in each part."""
    own = slice(block * _QUERIES_A_BLOCK, (block + 1) * _QUERIES_A_BLOCK)
    paths = [_found_path(folder, part) for part in range(index.num_parts)]
    return [
        Hits(*(np.load(one, mmap_mode="r", allow_pickle=False)[own] for one in (path, _scores_of(path))))
        for path in paths
    ]


def hits_path(folder: Path, block: int) -> Path:
    """Return where the documents of the hits of a block lie."""
    return folder / f"hits-{block:04d}.documents.npy"


def _found_path(folder: Path, part: int) -> Path:
    return folder / f"found-{part:04d}.documents.npy"


def _scores_of(path: Path) -> Path:
    return path.with_name(path.name.replace(".documents.", ".scores."))


def _write(path: Path, hits: Hits) -> None:
    """Write hits, the scores last: with them, they are complete."""
    for target, array in ((path, hits.documents_QK), (_scores_of(path), hits.scores_QK)):
        with write_atomically(target, num_bytes=array.nbytes) as temporary:
            save_array(temporary, array)

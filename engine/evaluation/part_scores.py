"""What the parts of a mixture say of the documents that it orders, for the queries of this rank.

These are what the first part found, or what all that search found, in turn. Rankers' scores lie in the rankings that
were recorded of them over these documents, and so do those of a first part that found them alone; all others score the
documents here. So no part lacks a score: where a retriever did not find a document itself, it has the score that the
document would have been found with, which of BM25 is 0 where no word is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from engine.data.corpus import Data
from engine.data.trec import best_first, read_trec
from engine.errors import ArtifactError
from engine.evaluation.evaluate import Ranking, retriever_of
from engine.evaluation.fuse import mix
from engine.evaluation.summary import read_rows
from engine.evaluation.systems import RANKER, System
from engine.retrievers.kinds import build, open_searcher
from engine.run import Run, RunFolder, Stage
from engine.search import Rescorer, Searcher
from shards.partition import split_range
from shards.records import Query

_SCORED_TOGETHER = 512
"""Queries whose documents a further retriever scores in one call; the same for any number of ranks."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The documents of one query with the scores of all parts.

    Attributes:
        docids: In the order in which they were found, all of them.
        scores: Part's name -> its scores of the documents that are fused, which are the first of these.
    """

    docids: list[str]
    scores: dict[str, list[float]]

    def fused(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the mixture as a ranking: what is not fused stays below, in the order that it had."""
        mixed = mix(self.scores, weights)
        below = min(mixed, default=0.0)
        return dict(zip(self.docids, mixed, strict=False)) | {
            docid: below - place for place, docid in enumerate(self.docids[len(mixed) :], start=1)
        }


class SearcherScorer(Searcher, Rescorer, Protocol):
    """What finds documents and scores those that others found."""


def further_scorers(
    run: Run, data: Data, folder: RunFolder, system: System, opened: Mapping[str, Searcher] | None = None
) -> dict[str, SearcherScorer]:
    """Open the parts that score what was found, but for those whose scores there are already (`is_recorded`).

    Args:
        run: Whose weights.
        data: The corpus.
        folder: Holds the indexes.
        system: The mixture.
        opened: Parts that are open already, by name.

    Returns:
        Part's name -> its scorer.

    Raises:
        ArtifactError: An index is missing, damaged or of other weights.
    """
    scorers: dict[str, SearcherScorer] = {}
    for part in system.parts:
        if is_recorded(system, part):
            continue
        searcher = (opened or {}).get(part.name) or open_searcher(run, data, folder, retriever_of(part))
        if not isinstance(searcher, Rescorer):
            raise ValueError(f"{part.name} cannot score what others found")
        scorers[part.name] = cast(SearcherScorer, searcher)
    return scorers


def is_recorded(system: System, part: System) -> bool:
    """Tell whether a part's scores of the documents lie in its ranking: a ranker's, and of whoever found them alone."""
    return part.kind == RANKER or part is system.over


def score_parts(
    stage: Stage,
    data: Data,
    folder: RunFolder,
    system: System,
    queries: Sequence[Query],
    split: str,
    sample: int | None = None,
) -> dict[str, Scored]:
    """Return the scores of all parts for this rank's share of the queries.

    Args:
        stage: Where this runs.
        data: The corpus.
        folder: Holds indexes and rankings.
        system: The mixture.
        queries: Of the split.
        split: Whose rankings are read: that of the documents, and those of the rankers over it.
        sample: As of `evaluate_systems`.

    Returns:
        Query id -> documents with their scores.

    Raises:
        ArtifactError: A ranker's ranking is not of the documents that were found.
    """
    run = stage.run
    found = _found(system)
    for part in system.parts:
        if not is_recorded(system, part):
            build(run, data, folder, retriever_of(part))
    blocks = [queries[start : start + _SCORED_TOGETHER] for start in range(0, len(queries), _SCORED_TOGETHER)]
    own = [blocks[place] for place in split_range(len(blocks), run.coordinator.rank, run.coordinator.world_size)]
    scored: dict[str, Scored] = {}
    with run.coordinator.agreement(f"{stage.name}: score {system.name}"):
        _require_depth(run, folder, system, split, len(queries))
        read = [found, *(part for part in system.parts if part.kind == RANKER)]
        rankings = {part.name: read_trec(folder.results / part.run_file_name(split, sample)) for part in read}
        scorers = further_scorers(run, data, folder, system)
        for block in own:
            _score_block(run, data, system, block, rankings, scorers, scored)
    return scored


def _found(system: System) -> System:
    """Return whose ranking a mixture re-orders."""
    if system.over is None:
        raise ValueError(f"{system.name} re-orders nothing")
    return system.over


def _require_depth(run: Run, folder: RunFolder, system: System, split: str, num_queries: int) -> None:
    """Refuse rankers' rankings of another depth, below which their numbers are places and no scores."""
    depth = run.config.evaluation.rerank_depth
    rankers = {part.name for part in system.parts if part.kind == RANKER}
    for row in read_rows(folder.summary):
        is_read = row.system in rankers and (row.iteration, row.over) in {
            (part.iteration, part.over.name) for part in system.parts if part.over
        }
        if is_read and (row.split, row.num_queries) == (split, num_queries) and row.rerank_depth not in (None, depth):
            raise ArtifactError(
                f"{row.system} has re-ranked the top {row.rerank_depth} of each query of {split}",
                expected=f"the top {depth}, by evaluation.rerank_depth",
                remedy=f"measure it again to this depth: sparring evaluate {run.folder.path} --split {split}, then "
                "start the same command again",
            )


def _score_block(
    run: Run,
    data: Data,
    system: System,
    block: Sequence[Query],
    rankings: Mapping[str, Ranking],
    scorers: Mapping[str, Rescorer],
    scored: dict[str, Scored],
) -> None:
    """Add the scores of some queries to those of others."""
    first, depth = _found(system).name, run.config.evaluation.rerank_depth
    docids = [best_first(query.id, rankings[first].get(query.id, {})) for query in block]
    documents = [[data.shards.index_of(docid) for docid in own[:depth]] for own in docids]
    further = {name: scorer.score(block, documents) for name, scorer in scorers.items()}
    for place, query in enumerate(block):
        scores: dict[str, list[float]] = {}
        for part in system.parts:
            if part.name in further:
                scores[part.name] = further[part.name][place]
                continue
            found = rankings[part.name].get(query.id, {})
            if missing := [docid for docid in docids[place][:depth] if docid not in found]:
                raise ArtifactError(
                    f"the ranking of {part.name} lacks document {missing[0]!r} of query {query.id!r}, found by {first}",
                    expected=f"a score of {part.name} for each of the top {depth} of {first}",
                    remedy="measure both again: sparring evaluate RUN --split SPLIT, then start the same again",
                )
            scores[part.name] = [found[docid] for docid in docids[place][:depth]]
        scored[query.id] = Scored(docids[place], scores)

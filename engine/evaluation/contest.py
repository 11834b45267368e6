"""Lists of retrievers, and what rankers make of them: each measured once, by all ranks, and kept as a TREC file.

A file's name has a hash of what its ranking depends on: the data, the queries, the depth, and the identities of who
found the list and who re-ordered it. So a file that is there is right, a comparison that was stopped goes on, and a
second one of other runs takes what it shares with the first.

Source: R2ANKER section 4 (full ranking), Table 4.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.metric_names import cutoff_of
from engine.data.trec import best_first, read_trec, write_trec
from engine.evaluation.contestants import Contestant
from engine.evaluation.evaluate import Ranking, rerank_by, retrieve
from engine.evaluation.measures import query_values
from engine.log import get_logger
from engine.retrievers.kinds import build, forget_what_is_lost, open_searcher
from engine.run import Stage
from shards.files import canonical_json
from shards.records import Query

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Terms:
    """What all contestants are measured by.

    Attributes:
        split: Name of the split.
        queries: Those of it that are measured.
        qrels: Their judgements.
        fingerprint: Of the data.
        depth: Documents of a query that a retriever finds and a ranker re-orders; the runs' settings say the same.
        metric: One by judgements.
        relevance_threshold: Grade from which a document is relevant.
        split_queries: Queries that the split has.
    """

    split: str
    queries: Sequence[Query]
    qrels: Mapping[str, Mapping[str, int]]
    fingerprint: str
    depth: int
    metric: str
    relevance_threshold: int
    split_queries: int

    @property
    def told(self) -> str:
        """What a title says of them."""
        count = len(self.queries)
        of = "" if count == self.split_queries else f" of {self.split_queries}"
        graded = "" if self.relevance_threshold == 1 else f", relevant from grade {self.relevance_threshold}"
        return (
            f"{self.metric} on {self.split} ({count}{of} queries{graded}), top {self.depth} of each retriever re-ranked"
        )

    @property
    def file_name(self) -> str:
        """What the name of a file says of them: `dev-MRR@10-top-1000`, and the size of a sample."""
        sample = "" if len(self.queries) == self.split_queries else f"-{len(self.queries)}-queries"
        return f"{self.split}-{self.metric}-top-{self.depth}{sample}"

    def positives(self) -> dict[str, set[str]]:
        """Return the relevant documents of each query."""
        threshold = self.relevance_threshold
        return {
            query.id: {docid for docid, grade in self.qrels[query.id].items() if grade >= threshold}
            for query in self.queries
        }


class Contest:
    """Measures what has not been measured yet; all ranks call each method alike.

    Args:
        folder: Takes the rankings.
        terms: By which all are measured.
    """

    def __init__(self, folder: Path, terms: Terms) -> None:
        self.terms, self._folder = terms, folder
        qids = [query.id for query in terms.queries]
        self._key = [terms.fingerprint, terms.split, qids, terms.depth]
        self._seen: set[str] = set()

    def list_of(self, finder: Contestant) -> Path:
        """Return the file with what a retriever finds; it is searched, and its index built, where that is missing.

        Raises:
            DataError: A run file lacks a query, or is none of this corpus.
            ArtifactError: The index or the weights are damaged.
        """
        path, is_there = self._place(finder)
        if not is_there:
            run, choice = finder.run, finder.choice
            if choice is None:
                raise ValueError(f"{finder.label} finds nothing")
            self._build(finder)
            searcher = open_searcher(run, finder.data, run.folder, choice)
            found = retrieve(self._stage(finder), finder.data, searcher, self.terms.queries, finder.label)
            self._write(finder, path, found)
        return path

    def reordered(self, orderer: Contestant, finder: Contestant) -> Path:
        """Return the file with a retriever's list in the order of somebody's scores, as `reorder` does for several."""
        return self.reorder(orderer, [finder])[0]

    def reorder(self, orderer: Contestant, finders: Sequence[Contestant]) -> list[Path]:
        """Put retrievers' lists into the order of somebody's scores, where that was not done earlier.

        The first `Terms.depth` of each list are re-ordered; what lies deeper, as deep as the metric looks, keeps its
        order below. A document that is among the first of several lists for a query is scored once.

        Args:
            orderer: Whose scores.
            finders: Whose lists.

        Returns:
            A file for each list.

        Raises:
            ConfigError: The contestant cannot score what others found.
            ModelError: A score is not finite.
            ArtifactError: The index or the weights are damaged.
        """
        places = [self._place(finder, orderer) for finder in finders]
        missing = [(path, finder) for (path, is_there), finder in zip(places, finders, strict=True) if not is_there]
        if missing:
            lists = [read_trec(self.list_of(finder)) for _, finder in missing]
            if orderer.choice is not None:
                self._build(orderer)
            label = f"{orderer.label} over {', '.join(finder.label for _, finder in missing)}"
            depth = self.terms.depth
            scored = rerank_by(
                self._stage(orderer),
                orderer.data,
                orderer.scorer(),
                self.terms.queries,
                union_of(lists, depth),
                label,
                depth=depth * len(lists),
            )
            for (path, _), found in zip(missing, lists, strict=True):
                self._write(orderer, path, restricted(scored, found, depth))
        return [path for path, _ in places]

    def values(self, who: Contestant, path: Path) -> dict[str, float]:
        """Return the metric of each query for a file of this contest.

        Args:
            who: Of whose run the ranks are.
            path: The file.

        Raises:
            DataError: No query has a relevant document.
        """
        terms = self.terms

        def measure() -> dict[str, float]:
            ranking = read_trec(path, top=cutoff_of(terms.metric))
            return query_values(ranking, terms.qrels, terms.metric, relevance_threshold=terms.relevance_threshold)

        values: dict[str, float] = who.run.coordinator.only_rank_zero(f"measure {path.name}", measure)
        return values

    def _place(self, finder: Contestant, orderer: Contestant | None = None) -> tuple[Path, bool]:
        """Return where a ranking lies, whatever its labels were then, or where it goes; and whether it is there."""
        labels, identities = [self.terms.split], [finder.identity]
        if orderer is not None:
            labels += [_slug(orderer.label), "over"]
            identities.append(orderer.identity)
        key: list[object] = [self._key, identities]
        found_depth = finder.run.config.evaluation.search_depth
        if found_depth > self.terms.depth:  # as deep as a metric looks: for another one the list has another length
            key.append(found_depth)
        digest = hashlib.sha256(canonical_json(key).encode()).hexdigest()[:16]
        new = "-".join([*labels, _slug(finder.label), digest]) + ".trec"

        def look() -> str:
            return min((path.name for path in self._folder.glob(f"*-{digest}.trec")), default="")

        found: str = finder.run.coordinator.only_rank_zero(f"look for {new}", look)
        if found and found not in self._seen:
            log.info("%-28s measured earlier", found)
        self._seen.add(found or new)
        return self._folder / (found or new), bool(found)

    def _build(self, who: Contestant) -> None:
        if who.choice is not None:
            forget_what_is_lost(who.run, who.run.folder, [who.choice])
            build(who.run, who.data, who.run.folder, who.choice)

    def _write(self, who: Contestant, path: Path, ranking: Ranking) -> None:
        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_trec(path, ranking, tag=_slug(who.label))

        who.run.coordinator.only_rank_zero(f"write {path.name}", write)

    def _stage(self, who: Contestant) -> Stage:
        return Stage(who.run, f"compare on {self.terms.split}")


def union_of(lists: Sequence[Ranking], depth: int) -> Ranking:
    """Join the first documents of rankings of the same queries into one, each once, in the order in which they come.

    Args:
        lists: The rankings.
        depth: How many documents of a query each of them gives; so what one gives does not depend on the others.
    """
    joined: Ranking = {}
    for one in lists:
        for qid, found in one.items():
            own = joined.setdefault(qid, {})
            for docid in best_first(qid, found)[:depth]:
                own.setdefault(docid, -float(len(own)))
    return joined


def restricted(scored: Ranking, found: Ranking, depth: int) -> Ranking:
    """Give the documents of a ranking, in its order, the scores that they have in another one.

    Args:
        scored: Has scores for the first documents of each query, and maybe for others.
        found: The ranking.
        depth: How many are the first; those behind them keep their order below all of them, as `rerank` leaves them.
    """
    ordered: Ranking = {}
    for qid, scores in scored.items():
        docids = best_first(qid, found.get(qid, {}))
        top = {docid: scores[docid] for docid in docids[:depth]}
        below = min(top.values(), default=0.0)
        ordered[qid] = top | {docid: below - place for place, docid in enumerate(docids[depth:], start=1)}
    return ordered


def _slug(label: str) -> str:
    """Return a label as one word of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", label)

"""Queries with what retriever and ranker found before the game and after it: ranks of documents, side by side.

The queries are chosen, and the page says so: those that gained most, those that lost most, and some of the others, so
that what the game did is seen from both sides. Only their lines of the rankings are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.trec import best_first, rankings_by_query
from engine.evaluation.systems import RANKER
from launcher.commands.report.marking import Marker, Segment
from launcher.commands.report.opened import Opened
from launcher.commands.report.rankings import Ranked
from launcher.commands.report.standings import Standing, told
from shards.records import Query

_DEPTH = 100
"""Ranks that are looked at; what lies deeper is called so."""
_OF_EACH, _MOST_DOCUMENTS = 3, 12


@dataclass(frozen=True, slots=True)
class Move:
    """The rank of a document before and after; None where it is not among those that are looked at."""

    before: int | None
    after: int | None

    @property
    def told(self) -> str:
        """Say which way it went."""
        if self.before == self.after:
            return "" if self.after is None else "same"
        if self.before is None:
            return "new"
        if self.after is None:
            return "lost"
        return f"{abs(self.before - self.after)} {'up' if self.after < self.before else 'down'}"


@dataclass(frozen=True, slots=True)
class Found:
    """A document of an example.

    Attributes:
        docid: Its id.
        title: Its title, the query's words marked.
        passage: A piece of its text, likewise; empty where the texts are not there.
        is_positive: Whether the judgements say so.
        moves: For each of the table's columns.
    """

    docid: str
    title: tuple[Segment, ...]
    passage: tuple[Segment, ...]
    is_positive: bool
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """What one run found for a query.

    Attributes:
        run: Its name.
        columns: What each pair of ranks is of, such as `G0 (0) -> G (2)`.
        found: The documents.
    """

    run: str
    columns: tuple[str, ...]
    found: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A query with a table for each run that has one.

    Attributes:
        qid: Its id.
        text: Of the query.
        answers: Of the data, where it has them.
        why: What became of it in the first run.
        tables: By run.
    """

    qid: str
    text: str
    answers: tuple[str, ...]
    why: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Pair:
    """The same system before and after; the same row twice, where there is only one."""

    before: Ranked
    after: Ranked

    @property
    def name(self) -> str:
        """Name both."""
        return (
            told(self.before.row) if self.before is self.after else f"{told(self.before.row)} → {told(self.after.row)}"
        )


def examples_of(standings: Sequence[Standing], split: str, metric: str, num_queries: int) -> list[Example]:
    """Choose queries and lay side by side what was found for them.

    Args:
        standings: The runs; the first one's chooses.
        split: Whose queries.
        metric: By which they gained or lost.
        num_queries: At most.

    Returns:
        The chosen ones, those that gained first; none where the first run's queries or rankings are not there.

    Raises:
        DataError: A ranking is damaged.
        ArtifactError: The shards are.
    """
    pairs = [_pairs(standing, split) for standing in standings]
    if not pairs or not pairs[0]:
        return []
    chosen = _chosen(pairs[0][0], metric, num_queries)
    by_id = {query.id: query for query in pairs[0][0].after.queries}
    tables = [
        _tables(standing.opened, own, split, [by_id[qid] for qid in chosen])
        for standing, own in zip(standings, pairs, strict=True)
        if own and _same_data(standing, standings[0])
    ]
    return [
        Example(qid, by_id[qid].text, by_id[qid].answers, why, tuple(own[qid] for own in tables if qid in own))
        for qid, why in chosen.items()
    ]


def split_with_examples(standings: Sequence[Standing], splits: Sequence[str]) -> str | None:
    """Return the first split on which the first run has a state before and one after, else one with any ranking."""
    for both in (True, False):
        for split in splits:
            pairs = _pairs(standings[0], split)
            if pairs and (pairs[0].before is not pairs[0].after or not both):
                return split
    return None


def _pairs(standing: Standing, split: str) -> list[Pair]:
    """Return the first retriever and the ranker over it, each before and after; only those whose rankings are there."""
    roles = {role: [one for one in rows if one.path is not None] for role, rows in standing.by_role(split).items()}
    by_kind = [(rows[-1].row.kind == RANKER, role, rows) for role, rows in roles.items() if rows]
    retriever = next((one for one in by_kind if not one[2][-1].row.over), None)
    if retriever is None:
        return []
    ranker = next((one for one in by_kind if one[0] and one[1][1] == retriever[1][0]), None)
    return [Pair(one[2][0], one[2][-1]) for one in (retriever, ranker) if one is not None]


def _chosen(pair: Pair, metric: str, num_queries: int) -> dict[str, str]:
    """Return the chosen queries with what became of them, the gains first."""
    before, after = pair.before.values.get(metric, {}), pair.after.values.get(metric, {})
    gains = {qid: after[qid] - before[qid] for qid in after if qid in before}
    if not gains:
        return {query.id: "" for query in pair.after.queries[:num_queries]}
    ordered, third = sorted(gains, key=lambda qid: -gains[qid]), max(1, num_queries // 3)
    won = [qid for qid in ordered if gains[qid] > 0]
    lost = [qid for qid in reversed(ordered) if gains[qid] < 0]
    kept = [qid for qid in gains if gains[qid] == 0]
    even = kept[:: max(1, len(kept) // third)]  # not the first, where most kept what they had
    kept = list(dict.fromkeys([*even, *kept]))
    taken = {*won[:third], *lost[:third], *kept[:third]}
    # Where there are too few of one sort, there is room for more of the others.
    more = [qid for qid in (*won, *lost, *kept) if qid not in taken]
    taken |= set(more[: max(0, num_queries - len(taken))])
    words = dict.fromkeys(won, "better") | dict.fromkeys(lost, "worse") | dict.fromkeys(kept, "the same")
    chosen = [qid for qid in words if qid in taken][:num_queries]
    return {qid: f"{words[qid]}: {metric} {before[qid]:.3f} → {after[qid]:.3f}" for qid in chosen}


def _tables(opened: Opened, pairs: Sequence[Pair], split: str, queries: Sequence[Query]) -> dict[str, Table]:
    """Return what a run found for some queries, by query id."""
    qids = frozenset(query.id for query in queries)
    ranks = [tuple(_ranks(one.path, qids) for one in (pair.before, pair.after)) for pair in pairs]
    columns = tuple(pair.name for pair in pairs)
    tables = {}
    for query in queries:
        judged = opened.dataset.qrels[split].get(query.id, {}) if opened.dataset is not None else {}
        threshold = pairs[0].after.row.relevance_threshold
        positives = [docid for docid, grade in judged.items() if grade >= threshold]
        own = [tuple(side.get(query.id, {}) for side in both) for both in ranks]
        docids = _shown(own, positives)
        if any(any(both) for both in own):
            found = tuple(_found(opened, query, docid, docid in set(positives), own) for docid in docids)
            tables[query.id] = Table(opened.name, columns, found)
    return tables


def _ranks(path: Path | None, qids: frozenset[str]) -> dict[str, dict[str, int]]:
    """Return query id -> docid -> rank, for some queries of a ranking."""
    assert path is not None
    return {
        qid: {docid: rank for rank, docid in enumerate(best_first(qid, scores), start=1)}
        for qid, scores in rankings_by_query(path, _DEPTH)
        if qid in qids
    }


def _shown(ranks: Sequence[Sequence[Mapping[str, int]]], positives: Sequence[str]) -> list[str]:
    """Return the documents to show: positives, and the first of each ranking; by the last rank of the last column."""
    sides = [side for both in ranks for side in both]
    tops = [docid for side in reversed(sides) for docid in side if side[docid] <= _OF_EACH]
    docids = list(dict.fromkeys([*positives[:_OF_EACH], *tops]))[:_MOST_DOCUMENTS]
    afters = [both[-1] for both in reversed(ranks)]
    return sorted(docids, key=lambda docid: [side.get(docid, _DEPTH + 1) for side in afters])


def _found(
    opened: Opened, query: Query, docid: str, is_positive: bool, ranks: Sequence[Sequence[Mapping[str, int]]]
) -> Found:
    marker = Marker(opened.run.config.bm25, query.text)
    title = text = ""
    if opened.shards is not None:
        document = opened.shards.document(opened.shards.index_of(docid))
        title, text = document.title, document.text
    moves = tuple(Move(*(side.get(docid) for side in (both[0], both[-1]))) for both in ranks)
    return Found(docid, marker.marked(title), marker.marked(marker.snippet(text)), is_positive, moves)


def _same_data(standing: Standing, first: Standing) -> bool:
    """Whether two runs are of one data set, so that a query is the same query in both."""
    one, two = standing.opened.corpus, first.opened.corpus
    return one is not None and two is not None and one.dataset_sha256 == two.dataset_sha256

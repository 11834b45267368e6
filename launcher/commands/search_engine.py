"""A finished run as a two-stage search engine over its corpus, for whoever asks: the terminal, a server, Python.

The retriever of the iteration that is taken finds documents in its index, the ranker of that iteration re-orders them
where the recipe has one, and where weights of a mixture were fitted, the scores of both and of BM25 are mixed, of what
the retriever found or of what all that search found, as the weights were fitted. Titles
and texts come from the shards, so the data folder is not needed. Questions that are asked together are encoded and
scored together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from engine.config.models import RankerConfig
from engine.errors import ArtifactError, ConfigError
from engine.evaluation.evaluate import retriever_of
from engine.evaluation.fuse import interleave, mix
from engine.evaluation.fusion import read_fusion
from engine.evaluation.mixture import fitted_system
from engine.evaluation.pairs import PairScorer
from engine.evaluation.part_scores import SearcherScorer, further_scorers
from engine.evaluation.systems import system_of
from engine.retrievers.kinds import open_searcher
from engine.run import Run
from engine.search import Searcher
from launcher.commands.finished import corpus_of, open_run, require_search, states_of, taken_of
from shards.records import Query

Order = Literal["retriever", "ranker", "fused"]
"""By whose scores documents are ordered."""
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        text: Any text.
        top_k: Documents, at least 1.
        order: By whose scores; None for the best that the run has.
    """

    text: str
    top_k: int
    order: Order | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """One document of an answer."""

    by_ranker: float | None
    """The ranker's score; None where there is none, or nobody asked for it."""
    by_retriever: float
    """The retriever's score."""
    docid: str
    """Its id."""
    title: str
    """Its title; may be empty."""
    text: str
    """Its text."""
    mixed: float | None = None
    """The mixture of the scores; None where documents are in the order of one model."""

    @property
    def score(self) -> float:
        """The score by which the documents of the answer are ordered."""
        return next(score for score in (self.mixed, self.by_ranker, self.by_retriever) if score is not None)


class SearchEngine:
    """The models, index and corpus of a run, loaded once; one thread at a time may use it.

    Args:
        path: The run folder.
        shards: Where shards that were prepared beside the data lie now; None for where the run read them.
        fused: Whether the order is that of the mixture, where the run has fitted one; otherwise it is the ranker's.

    Raises:
        ConfigError: The folder holds no run, or one that has not finished its warm-ups, or the mixture was fitted for
            other models.
        ArtifactError: Shards, index or weights are missing or damaged.
    """

    def __init__(self, path: Path, shards: Path | None = None, *, fused: bool = True) -> None:
        self.run = open_run(path)
        require_search(self.run)
        self.iteration = taken_of(self.run)
        self._mixture = fitted_system(self.run.folder, self.run.config, taken=self.iteration)
        self._first = self._mixture.parts[0].name
        self.weights = read_fusion(self.run, self._mixture).weights if fused and self.run.folder.fusion.exists() else {}
        states = states_of(self.run, self.iteration)
        self.data = corpus_of(self.run, self.iteration, shards)
        table, config = self.run.timetable, self.run.config
        found_by = system_of(config, states[table.encoder])
        choice = retriever_of(found_by)
        _require_index(self.run, self.run.folder.index(table.artifact(choice.trained)), found_by.name)
        self._searcher = open_searcher(self.run, self.data, self.run.folder, choice)
        ranker = next((model for model, one in config.models.items() if isinstance(one, RankerConfig)), None)
        self.ranker = None if ranker is None else table.name_of(states[ranker])
        """What the ranker is called; None where there is none."""
        self.scorer = None if ranker is None else PairScorer.open(self.run, self.data, ranker, states[ranker].state)
        """Scores pairs of questions and documents of the corpus; None where there is no ranker."""
        names = " and ".join(name for name in (found_by.name, self.ranker) if name is not None)
        self.stage = f"iteration {self.iteration}" if table.ends is None else names
        """What answers, for whoever asks."""
        self._scorers: dict[str, SearcherScorer] | None = None
        if self.weights:
            self._open_parts()

    @property
    def num_documents(self) -> int:
        """Documents of the corpus."""
        return self.data.shards.num_documents

    @property
    def order(self) -> Order:
        """The order of an answer where none is asked for: the mixture's, else the ranker's, else the retriever's."""
        return "fused" if self.weights else "retriever" if self.ranker is None else "ranker"

    @property
    def parts(self) -> list[str]:
        """Names of the systems whose scores a mixture has, the retriever first."""
        return [part.name for part in self._mixture.parts]

    def require_order(self, order: Order | None, weights: Mapping[str, float] | None = None) -> None:
        """Refuse an order that this run has not.

        Args:
            order: Asked for; None for the run's own.
            weights: Of a mixture, in place of the fitted ones.

        Raises:
            ConfigError: There is no such order, no ranker, or no weights of a mixture.
        """
        if order is not None and order not in ORDERS:
            raise ConfigError(f"there is no order {order!r}", expected=f"one of {', '.join(ORDERS)}")
        if order == "ranker" and self.ranker is None:
            raise ConfigError(
                f"the run in {self.run.folder.path} has no ranker",
                expected="the order 'retriever'",
                remedy="ask for it",
            )
        if order == "fused" and not (weights or self.weights):
            raise ConfigError(
                f"no weights of a mixture are in use for the run in {self.run.folder.path}",
                expected="weights that were fitted on dev, in results/fusion.json",
                remedy=f"fit them: sparring evaluate {self.run.folder.path} --split dev --set evaluation.fuse=true; "
                "or ask for another order",
            )
        if unknown := sorted(set(weights or {}) - set(self.parts)):
            raise ConfigError(
                f"there are weights of {', '.join(unknown)}, which are no parts of the mixture",
                expected=f"weights of {', '.join(self.parts)}",
            )

    def search(self, question: str, top_k: int) -> list[Found]:
        """Answer a question.

        Args:
            question: Any text.
            top_k: Number of documents.

        Returns:
            The best documents, best first: by the mixture where there is one, else by the ranker, or the retriever.
        """
        return self.answer([Question(question, top_k)])[0]

    def answer(self, questions: Sequence[Question], weights: Mapping[str, float] | None = None) -> list[list[Found]]:
        """Answer questions together: what each finds depends on it alone, but for the last digits of its scores.

        Args:
            questions: Any number.
            weights: Of the mixture, by the names of its `parts`; None for those that were fitted.

        Returns:
            For each question the best documents, best first; fewer than asked for where there are no more.

        Raises:
            ConfigError: As of `require_order`, or the weights are negative or do not sum to 1.
        """
        orders: list[Order] = []
        for question in questions:
            self.require_order(question.order, weights)
            orders.append(question.order or self.order)
        queries = [Query("", question.text) for question in questions]  # no document has the empty id
        documents, by_retriever = self._retrieve(queries, questions, orders)
        self._join(queries, questions, orders, documents, by_retriever)
        judged = [place for place, order in enumerate(orders) if order != "retriever"]
        by_ranker: dict[int, list[float]] = {}
        if self.scorer is not None and judged:
            scored = self.scorer.score([queries[place] for place in judged], [documents[place] for place in judged])
            by_ranker = dict(zip(judged, scored, strict=True))
        fused = [place for place, order in enumerate(orders) if order == "fused"]
        mixed = self._mix(fused, queries, documents, by_retriever, by_ranker, weights or self.weights)
        return [
            self._found(documents[place], by_retriever[place], by_ranker.get(place), mixed.get(place), question.top_k)
            for place, question in enumerate(questions)
        ]

    def _retrieve(
        self, queries: Sequence[Query], questions: Sequence[Question], orders: Sequence[Order]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return of each question the documents that are ordered, with the retriever's scores."""
        rerank_depth = self.run.config.evaluation.rerank_depth
        found = self._found_by(self._searcher, queries, questions, range(len(questions)))
        documents: list[list[int]] = []
        scores: list[list[float]] = []
        for (own, own_scores), question, order in zip(found, questions, orders, strict=True):
            kept = question.top_k if order == "retriever" else max(question.top_k, rerank_depth)
            documents.append(own[:kept])
            scores.append(own_scores[:kept])
        return documents, scores

    def _found_by(
        self, searcher: Searcher, queries: Sequence[Query], questions: Sequence[Question], places: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """Return what a retriever finds for the questions at some places, and its scores, best first."""
        # As deep as an evaluation searches, so that what was measured is what is served: an index that is asked for
        # less re-scores fewer documents. And as deep as if the question were alone.
        search_depth = self.run.config.evaluation.search_depth
        depths = {place: min(max(questions[place].top_k, search_depth), self.num_documents) for place in places}
        found: dict[int, tuple[list[int], list[float]]] = {}
        for depth in sorted(set(depths.values())):
            asked = [place for place in places if depths[place] == depth]
            hits = searcher.search([queries[place] for place in asked], depth)
            for row, place in enumerate(asked):
                own = [int(document) for document in hits.documents_QK[row] if document >= 0]
                found[place] = own, [float(score) for score in hits.scores_QK[row, : len(own)]]
        return [found[place] for place in places]

    def _join(
        self,
        queries: Sequence[Query],
        questions: Sequence[Question],
        orders: Sequence[Order],
        documents: list[list[int]],
        by_retriever: list[list[float]],
    ) -> None:
        """Take turns with what the other parts of a mixture find, where its weights were fitted so."""
        found, rerank_depth = self._mixture.over, self.run.config.evaluation.rerank_depth
        places = [place for place, order in enumerate(orders) if order == "fused"]
        if found is None or not self._mixture.orders_hybrid or not places:
            return
        scorers = self._open_parts()
        others = [self._found_by(scorers[part.name], queries, questions, places) for part in found.parts[1:]]
        for row, place in enumerate(places):
            lists = [documents[place], *(of_part[row][0] for of_part in others)]
            documents[place] = interleave(lists, max(questions[place].top_k, rerank_depth))
        asked = [queries[place] for place in places]
        scored = scorers[self._first].score(asked, [documents[place] for place in places])
        for place, own in zip(places, scored, strict=True):
            by_retriever[place] = own

    def _open_parts(self) -> dict[str, SearcherScorer]:
        """Open what searches and scores for a mixture beside the ranker, unless it is open."""
        if self._scorers is None:
            opened = {self._first: self._searcher}
            self._scorers = further_scorers(self.run, self.data, self.run.folder, self._mixture, opened)
        return self._scorers

    def _mix(
        self,
        places: Sequence[int],
        queries: Sequence[Query],
        documents: Sequence[list[int]],
        by_retriever: Sequence[list[float]],
        by_ranker: Mapping[int, list[float]],
        weights: Mapping[str, float],
    ) -> dict[int, list[float]]:
        """Return the mixture of all scores, for the questions whose answers it orders."""
        if not places:
            return {}
        asked, found = [queries[place] for place in places], [documents[place] for place in places]
        further = {
            name: scorer.score(asked, found)
            for name, scorer in self._open_parts().items()
            if weights.get(name) and name != self._first
        }
        mixed = {}
        for row, place in enumerate(places):
            scores = {name: own[row] for name, own in further.items()} | {self._first: by_retriever[place]}
            if self.ranker is not None:
                scores[self.ranker] = by_ranker[place]
            try:
                mixed[place] = mix(scores, weights)
            except ValueError as error:
                raise ConfigError(str(error), expected="weights of 0 or more that sum to 1") from error
        return mixed

    def _found(
        self,
        documents: Sequence[int],
        by_retriever: Sequence[float],
        by_ranker: Sequence[float] | None,
        mixed: Sequence[float] | None,
        top_k: int,
    ) -> list[Found]:
        """Return the best documents of one question with their texts."""
        ordered_by = next(scores for scores in (mixed, by_ranker, by_retriever) if scores is not None)
        found = []
        for place in sorted(range(len(documents)), key=lambda place: -ordered_by[place])[:top_k]:
            one = self.data.shards.document(documents[place])
            own = None if mixed is None else mixed[place]
            judged = None if by_ranker is None else by_ranker[place]
            found.append(Found(judged, by_retriever[place], one.id, one.title, one.text, own))
        return found


def _require_index(run: Run, folder: Path, name: str) -> None:
    """Refuse a run without the index that answers; a part that is missing is told by whoever opens it."""
    if not folder.exists():
        raise ArtifactError(
            f"the run in {run.folder.path} has no index of {name}: there is no {folder}",
            expected="the index of the iteration that is taken, with its embeddings",
            remedy="start the run again with the same command, if it has not finished; else make the index again: "
            f"sparring evaluate {run.folder.path} --split dev",
        )

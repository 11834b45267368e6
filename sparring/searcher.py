"""Search in what was trained: the index of a run with its models, or the models of an export alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from engine.config.text import absolute_path
from engine.errors import ConfigError
from engine.run import RunFolder
from launcher.commands.search_engine import Found, Order, Question, SearchEngine
from launcher.commands.text_models import TextModels, require_index
from shards.records import Document

Several = list[str] | tuple[str, ...]
"""Several texts; one text alone is a sequence of texts, too, to Python."""


@dataclass(frozen=True, slots=True)
class Reranked:
    """A document that a ranker has scored.

    Attributes:
        place: Its place among those that were given, from 0.
        score: The ranker's; higher is better.
        document: As it was given.
    """

    place: int
    score: float
    document: str | Document | Found


class Searcher:
    """A retriever and a ranker, with the index of their run where there is one; loaded once, for one thread at a time.

    `Searcher.open` makes one.

    Args:
        path: The folder.
        engine: What searches; None for an export.
        models: For texts that are in no corpus.
    """

    def __init__(self, path: Path, engine: SearchEngine | None, models: TextModels) -> None:
        self.path, self._engine, self._models = path, engine, models

    @classmethod
    def open(cls, path: str | PathLike[str], *, shards: str | PathLike[str] | None = None) -> Searcher:
        """Open a run, for search, vectors and re-ranking; or what `export` wrote, for vectors and re-ranking.

        Args:
            path: A run folder, as `Trained.path`; RUN/export; or one model's folder in an export.
            shards: Where shards that were prepared beside the data lie now; None for where the run read them.

        Raises:
            ConfigError: The folder is neither, or the run has not finished its warm-ups.
            ArtifactError: Shards, index or weights are missing or damaged.
        """
        folder = _folder(path)
        engine = None
        if RunFolder(folder).config.exists():
            engine = SearchEngine(folder, None if shards is None else _folder(shards))
        return cls(folder, engine, TextModels(folder, engine))

    @property
    def engine(self) -> SearchEngine:
        """What searches.

        Raises:
            ArtifactError: This is an export, which has no index.
        """
        if self._engine is None:
            require_index(self.path)
        assert self._engine is not None
        return self._engine

    @property
    def num_documents(self) -> int:
        """Documents of the corpus."""
        return self.engine.num_documents

    @property
    def order(self) -> Order:
        """The order of a search: `fused` where weights were fitted, else `ranker`, else `retriever`."""
        return self.engine.order

    @overload
    def search(self, queries: str, k: int = 10, *, order: Order | None = None) -> list[Found]: ...

    @overload
    def search(self, queries: Several, k: int = 10, *, order: Order | None = None) -> list[list[Found]]: ...

    def search(
        self, queries: str | Several, k: int = 10, *, order: Order | None = None
    ) -> list[Found] | list[list[Found]]:
        """Find the best documents of the corpus.

        Args:
            queries: A question, or Q questions, which are encoded and scored together.
            k: Documents for each, at least 1.
            order: By whose scores: `retriever`, `ranker` or `fused`; None for `Searcher.order`.

        Returns:
            At most k documents, best first, with `score`, `by_retriever`, `by_ranker`, `docid`, `title` and `text`; for
            several questions a list for each.

        Raises:
            ConfigError: There is no such order, no ranker, or no weights of a mixture; k or a question is none.
            ArtifactError: This is an export, which has no index.
        """
        return self._answer(queries, k, order, None)

    @overload
    def fused(self, queries: str, k: int = 10, *, weights: Mapping[str, float] | None = None) -> list[Found]: ...

    @overload
    def fused(
        self, queries: Several, k: int = 10, *, weights: Mapping[str, float] | None = None
    ) -> list[list[Found]]: ...

    def fused(
        self, queries: str | Several, k: int = 10, *, weights: Mapping[str, float] | None = None
    ) -> list[Found] | list[list[Found]]:
        """Find the best documents by a mixture of the scores of retriever, ranker, further retrievers and BM25.

        Args:
            queries: As of `search`.
            k: As of `search`.
            weights: System (one of `parts`) to its weight; they sum to 1, and systems that are not named have 0. None
                takes those that the run has fitted on dev.

        Returns:
            As of `search`; `mixed` is the mixture of scores of mean 0 and deviation 1 within the question.

        Raises:
            ConfigError: No weights were fitted and none are given, or they are of other systems or do not sum to 1.
            ArtifactError: This is an export, or a part's index is missing.
        """
        if weights is not None and not weights:
            raise ConfigError("no weight is given", expected=f"weights of {', '.join(self.parts)} that sum to 1")
        return self._answer(queries, k, "fused", weights)

    @property
    def parts(self) -> list[str]:
        """Names of the systems that `fused` mixes, the retriever first."""
        return self.engine.parts

    def encode(self, texts: str | Sequence[str], side: str = "query") -> npt.NDArray[np.float32]:
        """Encode texts with the retriever; inner products of a query's and a document's vector are its scores.

        Args:
            texts: A text, or N texts; their ends are cut where they are longer than the model reads.
            side: `query` or `document`: the two may have towers, prompts and lengths of their own.

        Returns:
            float32 [D] for one text, [N, D] for several.

        Raises:
            ConfigError: There is no dense retriever, no text, or no such side.
        """
        found = self._models.encode(_texts(texts), side)
        return found[0] if isinstance(texts, str) else found

    def rerank(self, query: str, documents: Sequence[str | Document | Found]) -> list[Reranked]:
        """Order documents by the ranker's scores.

        Args:
            query: A question.
            documents: Texts, `Document`s where they have titles, or what a search has found; they need not be of the
                corpus.

        Returns:
            All of them, best first; equal scores as they were given.

        Raises:
            ConfigError: There is no ranker.
        """
        (asked,) = _texts([query])
        if isinstance(documents, str):
            raise ConfigError("the documents are one text", expected="a list of texts")
        given = [_document(one) for one in documents]
        (scores,) = self._models.rerank([asked], [given])
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [Reranked(place, scores[place], documents[place]) for place in order]

    def _answer(
        self, queries: str | Several, k: int, order: Order | None, weights: Mapping[str, float] | None
    ) -> list[Found] | list[list[Found]]:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"k is {k!r}", expected="a whole number of 1 or more")
        questions = _texts(queries)
        if not all(text.strip() for text in questions):
            raise ConfigError("a question is empty", expected="a text in each")
        answers = self.engine.answer([Question(text, k, order) for text in questions], weights)
        return answers[0] if isinstance(queries, str) else answers

    def __repr__(self) -> str:
        return f"Searcher({str(self.path)!r})"


def _document(given: str | Document | Found) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, Found):
        return Document(given.docid, given.title, given.text)
    return Document("", "", _texts([given])[0])


def _texts(given: str | Sequence[str]) -> list[str]:
    """Return texts as a list, and refuse what is none, or what no tokenizer takes."""
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"{given!r} is a {type(given).__name__}", expected="a text, or several")
    texts = [given] if isinstance(given, str) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"{text!r} is a {type(text).__name__}", expected="a text")
        if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ConfigError(f"{text!a} is no Unicode text: it holds half of a pair", expected="a text")
    return texts


def _folder(path: str | PathLike[str]) -> Path:
    try:
        return absolute_path(str(Path(path)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path!r} is no path: {error}", expected="the path of a folder") from error

"""The models of a run or of an export, for texts that are in no corpus: vectors, and scores of a ranker.

A run's models are those of the iteration that is taken; an export's are what lies in its folder. What a folder is, is
settled here once for all who open either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from engine.config.models import RankerConfig, RetrieverConfig
from engine.config.timetable import WeightsOf
from engine.errors import ArtifactError, ConfigError
from engine.models.dual import DOCUMENT, QUERY
from engine.models.source import METADATA_FILE, saved_metadata
from engine.models.texts import SIDES, TextEncoder, TextRanker
from engine.models.weights import DTYPES, frozen_ranker
from engine.retrievers.bm25_index import open_bm25
from engine.retrievers.prior import BM25Share, plus
from engine.run import Run, RunFolder
from launcher.commands.finished import corpus_of, open_run, require_search, states_of, taken_of
from launcher.commands.search_engine import SearchEngine
from shards.records import Document
from shards.writer import render

_ScoresTexts = Callable[[Sequence[str], Sequence[Sequence[Document]]], list[list[float]]]
T = TypeVar("T")


class TextModels:
    """A retriever and a ranker for texts as they are given; each is loaded when it is first needed.

    Args:
        path: A run folder, or a folder that `export` wrote.
        engine: The same run as it searches, whose ranker is then not loaded again; None where nobody searches.

    Raises:
        ConfigError: The folder is neither, or no model in it reads queries.
    """

    def __init__(self, path: Path, engine: SearchEngine | None = None) -> None:
        self.path = path
        self.is_export = not RunFolder(path).config.exists()
        self._encoder: _Later[TextEncoder]
        self._ranker: _Later[TextRanker]
        self._priors: list[tuple[_Later[_ScoresTexts], float]] = []
        if self.is_export:
            self._open_export(path)
        else:
            self._open_run(engine.run if engine else open_run(path), engine)

    @property
    def has_ranker(self) -> bool:
        """Whether there is a ranker."""
        return self._ranker.is_there

    @property
    def has_encoder(self) -> bool:
        """Whether there is a dense retriever."""
        return self._encoder.is_there

    def load(self) -> None:
        """Load now what is there, so that no question waits for it and what is damaged is told.

        Raises:
            ArtifactError: Weights are missing or damaged.
            ModelError: The score of an exported ranker has a part that an export does not hold.
        """
        for one in (self._encoder, self._ranker):
            if one.is_there:
                one.get()
        for prior, _ in self._priors:
            prior.get()

    def encode(self, texts: Sequence[str], side: str = QUERY) -> npt.NDArray[np.float32]:
        """Encode texts with the retriever.

        Args:
            texts: N texts, at least one; their ends are cut where they do not fit.
            side: `query` or `document`.

        Returns:
            float32 [N, D], whose inner products are the retriever's scores.

        Raises:
            ConfigError: There is no such side, no text, or no dense retriever.
        """
        if side not in SIDES:
            raise ConfigError(f"there is no side {side!r}", expected=f"one of {', '.join(SIDES)}")
        if not texts:
            raise ConfigError("there is no text to encode", expected="one text or more")
        return self._encoder.get().encode(texts, side)

    def rerank(self, queries: Sequence[str], documents: Sequence[Sequence[Document]]) -> list[list[float]]:
        """Score documents for queries with the ranker.

        Args:
            queries: Any texts.
            documents: Of each query its documents; their ends are cut where they do not fit.

        Returns:
            Scores for each query, in the order of its documents: logits, with the prior where the run's ranker has one.

        Raises:
            ConfigError: There is no ranker.
        """
        scores = self._ranker.get().score(queries, documents)
        for prior, scale in self._priors:
            scores = plus(scores, prior.get()(queries, documents), scale)
        return scores

    def too_long_to_encode(self, texts: Sequence[str], side: str = QUERY) -> str | None:
        """Say which text is longer than the retriever reads; None where none is."""
        return self._encoder.get().too_long(texts, side)

    def too_long_to_rerank(self, query: str, documents: Sequence[Document]) -> str | None:
        """Say which text is longer than the ranker reads; None where none is."""
        return self._ranker.get().too_long(query, documents)

    def _open_run(self, run: Run, engine: SearchEngine | None) -> None:
        require_search(run)
        table, config = run.timetable, run.config
        states = states_of(run, engine.iteration if engine else taken_of(run))
        tokens = config.evaluation.tokens_per_batch

        def encoder_of(model: str, state: str) -> TextEncoder:
            dtype = DTYPES[config.models[model].precision]
            return TextEncoder.open(run.folder.weights(model, state), run.device, dtype=dtype, tokens_per_batch=tokens)

        where = f"the run in {run.folder.path}"
        dense = [model for model in table.encoders if isinstance(config.models[model], RetrieverConfig)]
        self._encoder = _Later(f"{where} has no dense retriever")
        if dense:
            self._encoder.make = lambda: encoder_of(dense[0], states[dense[0]].state)
        self._ranker = _Later(f"{where} has no ranker")
        ranker = next((model for model, one in config.models.items() if isinstance(one, RankerConfig)), None)
        if engine is not None and engine.scorer is not None:
            self._ranker.make = engine.scorer.for_texts
        elif ranker is not None:
            folder, section = run.folder.weights(ranker, states[ranker].state), config.model(ranker, RankerConfig)
            template, tokens_per_batch = config.data.template, tokens
            self._ranker.make = lambda: TextRanker.of(
                frozen_ranker(section, folder, run.device),
                folder,
                document_template=template,
                device=run.device,
                tokens_per_batch=tokens_per_batch,
            )

        def open_prior(weights: WeightsOf | None) -> _ScoresTexts:
            if weights is None:
                return _bm25_of(run, engine).score_texts
            return partial(_by_vectors, encoder_of(weights.model, weights.state), config.data.template)

        for prior in config.priors if self.has_ranker else ():
            later = _Later[_ScoresTexts]("")
            later.make = partial(open_prior, prior.weights)
            self._priors.append((later, prior.scale))

    def _open_export(self, path: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not path.is_dir():
            raise ConfigError(f"there is no folder {path}", expected="a run folder, or one that `export` wrote")
        folders = [path, *sorted(one for one in path.iterdir() if one.is_dir())]
        models = {one: saved_metadata(one).get("model") for one in folders if (one / METADATA_FILE).exists()}
        retrievers = [one for one, kind in models.items() if kind == "retriever"]
        rankers = [one for one, kind in models.items() if kind == "ranker"]
        if not retrievers and not rankers:
            raise ConfigError(
                f"{path} holds neither a run nor an export: no config.yaml, and no model with a {METADATA_FILE}",
                expected="a run folder, a folder that `export` wrote, or one model's folder in that",
                remedy="name one; `export RUN` writes RUN/export",
            )
        for several in (retrievers, rankers):
            if len(several) > 1:
                raise ConfigError(
                    f"{path} holds several models of one kind: {', '.join(one.name for one in several)}",
                    expected="one retriever and one ranker at most",
                    remedy=f"name the folder of one model, such as {several[0]}",
                )
        self._encoder = _Later(f"the export in {path} has no dense retriever")
        if retrievers:
            self._encoder.make = lambda: TextEncoder.open(retrievers[0], device)
        self._ranker = _Later(f"the export in {path} has no ranker")
        if rankers:
            self._ranker.make = lambda: TextRanker.open(rankers[0], device)


def _by_vectors(
    encoder: TextEncoder, template: str, queries: Sequence[str], documents: Sequence[Sequence[Document]]
) -> list[list[float]]:
    """Score documents by a retriever's inner products."""
    scores = []
    for query, own in zip(queries, documents, strict=True):
        texts = [render(template, document) for document in own]
        scores.append((encoder.encode(texts, DOCUMENT) @ encoder.encode([query])[0]).tolist() if texts else [])
    return scores


def _bm25_of(run: Run, engine: SearchEngine | None) -> BM25Share:
    """Open BM25 of the corpus of a run, by whose words texts are scored."""
    return BM25Share(open_bm25(run, engine.data if engine else corpus_of(run, taken_of(run)), run.folder))


class _Later(Generic[T]):
    """Something that is made when it is first asked for.

    Args:
        absent: What is said where there is nothing to make it of.
    """

    def __init__(self, absent: str) -> None:
        self._absent, self._made = absent, list[T]()
        self.make: Callable[[], T] | None = None

    @property
    def is_there(self) -> bool:
        return self.make is not None

    def get(self) -> T:
        if self.make is None:
            raise ConfigError(self._absent, expected="one that has it", remedy="name another folder")
        if not self._made:
            self._made.append(self.make())
        return self._made[0]


def require_index(path: Path) -> None:
    """Refuse a folder in which there is nothing to search.

    Args:
        path: What was named as a run.

    Raises:
        ConfigError: It does not exist.
        ArtifactError: It is an export, which holds models alone.
    """
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}", expected="a run folder, or one that `export` wrote")
    if not RunFolder(path).config.exists() and any(path.glob(f"*/{METADATA_FILE}")) | (path / METADATA_FILE).exists():
        raise ArtifactError(
            f"{path} is an export: it holds models, and neither an index nor a corpus that could be searched",
            expected="the folder of a run",
            remedy="name the run's folder; or do without a search: `serve --no-search`, or `encode` and `rerank`",
        )

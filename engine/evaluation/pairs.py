"""Scores of query-document pairs by a published ranker, for whoever re-orders what a retriever found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from engine.config.models import RankerConfig
from engine.data.corpus import Data
from engine.models.ranker import Ranker
from engine.models.score import score_inputs
from engine.models.texts import TextRanker
from engine.models.weights import frozen_ranker
from engine.retrievers.prior import RankerPrior, plus
from engine.run import Run, RunFolder
from shards.records import Query


class PairScorer:
    """A ranker with its texts, ready to score.

    Pairs that are given together are computed together, by length. Whoever shares queries out over ranks gives them in
    blocks that do not depend on the number of ranks, since sums in another order round otherwise.

    Args:
        run: For lengths and device.
        data: The corpus.
        model: The ranker's name in the recipe.
        ranker: Frozen weights on the run's device.
        prior: What is added to its logits; None for nothing.
    """

    def __init__(self, run: Run, data: Data, model: str, ranker: Ranker, prior: RankerPrior | None = None) -> None:
        self._prior = prior
        self._data, self._text, self._max_length = data, data.texts[model], run.config.models[model].max_length
        self._scorer, self._collate = ranker.scorer(), ranker.collator(self._text.template)
        self._tokens_per_batch, self._device = run.config.evaluation.tokens_per_batch, run.device

    def for_texts(self) -> TextRanker:
        """Return the same ranker for documents that are in no corpus; without the prior, which needs stored vectors."""
        return TextRanker(
            self._scorer,
            self._collate,
            self._text.tokenizer,
            document_template=self._data.shards.manifest.template,
            max_length=self._max_length,
            max_query_tokens=self._text.max_query_tokens,
            device=self._device,
            tokens_per_batch=self._tokens_per_batch,
        )

    @classmethod
    def open(cls, run: Run, data: Data, model: str, state: str, folder: RunFolder | None = None) -> PairScorer:
        """Load the published weights of an iteration.

        Args:
            run: Whose weights.
            data: The corpus.
            model: The ranker's name in the recipe.
            state: Name of the iteration.
            folder: Holds the vectors of a prior: the run's own folder, unless it is said, or one below it.

        Raises:
            ConfigError: The recipe has no such ranker.
            ArtifactError: There are no such weights, or they are damaged.
        """
        section = run.config.model(model, RankerConfig)
        ranker = frozen_ranker(section, run.folder.weights(model, state), run.device)
        return cls(run, data, model, ranker, RankerPrior.open(run, data, folder))

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents for queries.

        Args:
            queries: Any queries.
            documents: Corpus indices for each of them.

        Returns:
            Raw logits for each query, with the prior where there is one, in the order of its documents.
        """
        tokens, stream, pair = self._data.shards.tokens, self._text.stream, self._text.template.pair
        inputs = [
            pair(query_tokens, tokens(document, stream), self._max_length)
            for query_tokens, own in zip(self._text.tokenize_queries(queries), documents, strict=True)
            for document in own
        ]
        scores = score_inputs(
            self._scorer, self._collate, inputs, tokens_per_batch=self._tokens_per_batch, device=self._device
        ).tolist()
        ends = list(accumulate(map(len, documents)))
        logits = [scores[end - len(own) : end] for own, end in zip(documents, ends, strict=True)]
        if self._prior is None:
            return logits
        return plus(logits, self._prior.of_documents(queries, documents))

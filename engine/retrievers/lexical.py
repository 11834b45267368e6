"""Lexical retrieval with learned weights (SPLADE): a frozen model's sparse vectors, searched exactly by their terms.

What it searches is made in one stage: the postings of the corpus, a part for each shard, stamped with the iteration and
the hash of the weights that made them (`shards.postings`). There is no index to train or tune: each part is turned over
when it is written, and all of a query's postings are looked at. R2ANKER's L1 and L2 search so (section 4.2).

Shapes: Q queries, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import scipy.sparse as sparse  # type: ignore[import-untyped]
import torch

from engine.config.models import LexicalConfig
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data, ModelText
from engine.index.postings import PostingsIndex
from engine.models.encode import Encoder
from engine.models.encode_sparse import encode_documents_sparsely, encode_queries_sparsely
from engine.models.lexical import Lexical
from engine.models.weights import frozen_lexical
from engine.retrievers.batch_size import tokens_per_batch
from engine.retrievers.choice import Choice
from engine.retrievers.encoding import EncodedCorpus, encode_over_ranks, stamp_of_weights
from engine.run import Run, RunFolder, Stage
from engine.search import Hits
from shards.postings import PostingsStore, postings_are_complete
from shards.records import Query

_POSTINGS = "postings"
"""Folder of the store in that of an index."""


class LexicalSearcher:
    """Searches postings with queries encoded by the model that made them.

    Args:
        model: Frozen weights, on `device`.
        text: Its tokenizer and template.
        index: Over postings of the same weights.
        max_length: Tokens of a query, special tokens included.
        tokens_per_batch: Padded tokens in one forward.
        device: Where the model is.
    """

    source = "lexical"
    block_size = 512

    def __init__(
        self,
        model: Lexical,
        text: ModelText,
        index: PostingsIndex,
        *,
        max_length: int,
        tokens_per_batch: int,
        device: torch.device,
    ) -> None:
        self._encoder, self._text, self._index = model.query_encoder(), text, index
        self._max_length, self._tokens_per_batch, self._device = max_length, tokens_per_batch, device

    @property
    def num_parts(self) -> int:
        """Parts of the postings that ranks can search one by one."""
        return self._index.num_parts

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return the `top_k` documents of each query, best first: [Q, top_k]."""
        return self._index.search(self.encode(queries), top_k)

    def encode(self, queries: Sequence[Query]) -> sparse.csr_array:
        """Encode queries with the model's query tower: sparse float32 [Q, V]."""
        return encode_queries_sparsely(
            self._encoder,
            self._text.template.for_queries(),
            self._text.tokenize_queries(queries),
            max_length=self._max_length,
            tokens_per_batch=self._tokens_per_batch,
            device=self._device,
        )

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents that somebody else found; see `PostingsIndex.score`."""
        return self._index.score(self.encode(queries), documents)

    def search_parts(self, queries_QV: sparse.csr_array, top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts of the postings; see `PostingsIndex.search_parts`."""
        return self._index.search_parts(queries_QV, top_k, parts)

    def finish(self, queries_QV: sparse.csr_array, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what was found in all parts; see `PostingsIndex.finish`."""
        return self._index.finish(found, top_k)


def build_lexical(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Encode a corpus into postings with published weights; see `RetrieverKind.build`."""
    run.once(f"{prefix}encode/{run.timetable.artifact(choice.trained)}", encode_postings, data, folder, choice)


def open_lexical(run: Run, data: Data, folder: RunFolder, choice: Choice) -> LexicalSearcher:
    """Open the lexical searcher of published weights over the postings in `folder`.

    Raises:
        ArtifactError: Postings are missing, damaged, or of other weights.
    """
    index = folder.index(run.timetable.artifact(choice.trained))
    store = PostingsStore.open(index / _POSTINGS, data.shards.manifest, stamp_of_weights(run, data, choice))
    return LexicalSearcher(
        _frozen(run, choice.trained),
        data.texts[choice.trained.model],
        PostingsIndex(store),
        max_length=run.config.query_max_length,
        tokens_per_batch=run.config.evaluation.tokens_per_batch,
        device=run.device,
    )


def lexical_is_built(run: Run, folder: RunFolder, choice: Choice) -> bool:
    """Tell whether postings are there; whether they are whole is seen when they are opened."""
    return (folder.index(run.timetable.artifact(choice.trained)) / _POSTINGS).is_dir()


def encode_postings(stage: Stage, data: Data, folder: RunFolder, choice: Choice) -> EncodedCorpus:
    """Encode the corpus with all ranks; shards that are encoded already, or by the same weights before, are not again.

    Args:
        stage: Where this runs.
        data: The corpus.
        folder: Takes the postings.
        choice: Whose published weights encode.
    """
    run, config, weights = stage.run, stage.run.config, choice.trained
    text, stamp = data.texts[weights.model], stamp_of_weights(run, data, choice)
    index = folder.index(run.timetable.artifact(weights))

    @cache
    def encoder() -> Encoder:
        return _frozen(run, weights).document_encoder()

    def encode(shard_numbers: Iterator[int], progress: Callable[[int, int], None]) -> None:
        encode_documents_sparsely(
            encoder(),
            text.template.for_documents(),
            data.shards,
            text.stream,
            shard_numbers,
            index / _POSTINGS,
            stamp,
            max_length=config.models[weights.model].max_length,
            tokens_per_batch=tokens,
            dtype=config.index.embedding_dtype,
            device=run.device,
            progress=progress,
        )

    tokens = tokens_per_batch(stage, data, weights, encoder, lambda rows_NV: rows_NV.to_sparse())
    return encode_over_ranks(
        stage,
        data,
        weights,
        index,
        stamp,
        is_complete=lambda entry: postings_are_complete(index / _POSTINGS, entry, stamp),
        encode=encode,
    )


def _frozen(run: Run, weights: WeightsOf) -> Lexical:
    section = run.config.model(weights.model, LexicalConfig)
    return frozen_lexical(section, run.folder.weights(weights.model, weights.state), run.device)

"""Dense retrieval: a frozen retriever's query tower over a document index (AR2 Eq. 1, section 3.3).

What it searches is made in two stages with an artifact each, so that a run that stopped between them goes on with what
is there: the embeddings of the corpus, and the index over them, both stamped with the iteration and the hash of the
weights that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from engine.config.models import RetrieverConfig
from engine.config.recipe import Config
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data, ModelText
from engine.errors import ArtifactError, ConfigError
from engine.index.build import BuiltIndex, build_index
from engine.index.dense import DenseIndex, IndexManifest
from engine.index.exact import Floats
from engine.index.held.deal import Deal
from engine.index.held.store import LocalDisk, write_held
from engine.index.plain import PlainIndex, export_index
from engine.index.plan import FLAT, IndexPlan, for_other_corpus, plan_index
from engine.log import get_logger
from engine.models.encode import Encoder, encode_documents, encode_queries
from engine.models.packed import PackedEncoder
from engine.models.quantized import has_int8_products
from engine.models.retriever import Retriever
from engine.models.weights import frozen_retriever
from engine.retrievers.batch_size import tokens_per_batch
from engine.retrievers.choice import Choice
from engine.retrievers.encoding import EncodedCorpus, encode_over_ranks, stamp_of_weights
from engine.retrievers.places import deal_embeddings, forget_lost_embeddings, local_disk, open_embeddings
from engine.run import Run, RunFolder, Stage
from engine.search import Hits
from shards.docids import DOCIDS_NAME
from shards.embeddings import EmbeddingStore, part_is_complete
from shards.records import Query

log = get_logger(__name__)


class DenseScorer:
    """A retriever with the stored embeddings of its documents, ready to score pairs; no index is opened.

    Args:
        retriever: Frozen weights, on `device`.
        text: Its tokenizer and template.
        store: Embeddings by the same weights.
        max_length: Tokens of a query, special tokens included.
        tokens_per_batch: Padded tokens in one forward.
        device: Where the retriever is.
    """

    def __init__(
        self,
        retriever: Retriever,
        text: ModelText,
        store: EmbeddingStore,
        *,
        max_length: int,
        tokens_per_batch: int,
        device: torch.device,
    ) -> None:
        self._encoder, self._text, self._store = retriever.query_encoder(), text, store
        self._max_length, self._tokens_per_batch, self._device = max_length, tokens_per_batch, device

    def encode(self, queries: Sequence[Query]) -> Floats:
        """Encode queries with the retriever's query tower: float32 [Q, D]."""
        return encode_queries(
            self._encoder,
            self._text.template.for_queries(),
            self._text.tokenize_queries(queries),
            max_length=self._max_length,
            tokens_per_batch=self._tokens_per_batch,
            device=self._device,
        )

    def score(self, queries: Sequence[Query], documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score documents that somebody else found, by inner products with their stored embeddings (Eq. 1).

        Args:
            queries: Any queries.
            documents: Global document indices for each of them.

        Returns:
            Scores for each query, in the order of its documents, as a search has them.
        """
        rows = (self._store.rows(np.array(own, dtype=np.int64)) for own in documents)
        return [(rows_KD @ query_D).tolist() for rows_KD, query_D in zip(rows, self.encode(queries), strict=True)]


class DenseSearcher(DenseScorer):
    """Searches a document index with queries encoded by the retriever that made it.

    Args:
        retriever: Frozen weights, on `device`.
        text: Its tokenizer and template.
        index: Built from embeddings of the same weights.
        max_length: Tokens of a query, special tokens included.
        tokens_per_batch: Padded tokens in one forward.
        device: Where the retriever is.
    """

    source = "dense"
    block_size = 512

    def __init__(
        self,
        retriever: Retriever,
        text: ModelText,
        index: DenseIndex,
        *,
        max_length: int,
        tokens_per_batch: int,
        device: torch.device,
    ) -> None:
        super().__init__(
            retriever, text, index.store, max_length=max_length, tokens_per_batch=tokens_per_batch, device=device
        )
        self.index = index

    @property
    def num_parts(self) -> int:
        """Parts of the index that ranks can search one by one."""
        return self.index.num_parts

    def search(self, queries: Sequence[Query], top_k: int) -> Hits:
        """Return the `top_k` documents of each query, best first: [Q, top_k]."""
        return self.index.search(self.encode(queries), top_k)

    def search_parts(self, queries_QD: Floats, top_k: int, parts: Sequence[int]) -> Hits:
        """Search some parts of the index; see `DenseIndex.search_parts`."""
        return self.index.search_parts(queries_QD, top_k, parts)

    def finish(self, queries_QD: Floats, found: Sequence[Hits], top_k: int) -> Hits:
        """Merge what was found in all parts; see `DenseIndex.finish`."""
        return self.index.finish(queries_QD, found, top_k)


def build_dense(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Encode and index a corpus with published weights; see `RetrieverKind.build`."""
    name = run.timetable.artifact(choice.trained)
    encode_dense(run, data, folder, choice, prefix)
    run.once(f"{prefix}index/{name}", index_corpus, data, folder, choice)


def encode_dense(run: Run, data: Data, folder: RunFolder, choice: Choice, prefix: str) -> None:
    """Encode a corpus with published weights, the first half of `build_dense`.

    What has been encoded on hosts or disks that are no more is encoded again.
    """
    forget_lost_embeddings(run, data, folder, choice, prefix)
    run.once(f"{prefix}encode/{run.timetable.artifact(choice.trained)}", encode_corpus, data, folder, choice)


def open_dense(run: Run, data: Data, folder: RunFolder, choice: Choice) -> DenseSearcher:
    """Open the dense searcher of published weights over the index in `folder`.

    Raises:
        ArtifactError: Index or embeddings are missing, damaged, or of other weights.
    """
    index, store = _stored(run, data, folder, choice)
    return DenseSearcher(
        frozen_encoder(run, choice.trained),
        data.texts[choice.trained.model],
        DenseIndex.open(index, store, device=run.device),
        max_length=run.config.query_max_length,
        tokens_per_batch=run.config.evaluation.tokens_per_batch,
        device=run.device,
    )


def open_dense_scorer(run: Run, data: Data, folder: RunFolder, choice: Choice) -> DenseScorer:
    """Open what scores pairs by published weights and the embeddings in `folder`.

    Raises:
        ArtifactError: The embeddings are missing, damaged, or of other weights.
    """
    return DenseScorer(
        frozen_encoder(run, choice.trained),
        data.texts[choice.trained.model],
        _stored(run, data, folder, choice)[1],
        max_length=run.config.query_max_length,
        tokens_per_batch=run.config.evaluation.tokens_per_batch,
        device=run.device,
    )


def export_dense(run: Run, data: Data, folder: RunFolder, choice: Choice, target: Path) -> PlainIndex:
    """Write the index in `folder` as a file that FAISS opens by itself, with the ids of its rows.

    Args:
        run: For its weights.
        data: The corpus.
        folder: As for `build_dense`.
        choice: With the weights that the index was made with.
        target: Folder that gets the files.

    Raises:
        ArtifactError: Index or embeddings are missing, damaged, or of other weights.
        DiskFullError: There was no space for it.
    """
    index, store = _stored(run, data, folder, choice)
    return export_index(index, store, data.shards.folder / DOCIDS_NAME, target)


def _stored(run: Run, data: Data, folder: RunFolder, choice: Choice) -> tuple[Path, EmbeddingStore]:
    """Return the folder of an index and the embeddings in it."""
    return folder.index(run.timetable.artifact(choice.trained)), open_embeddings(run, data, folder, choice)


def encode_corpus(stage: Stage, data: Data, folder: RunFolder, choice: Choice) -> EncodedCorpus:
    """Encode the corpus with all ranks; shards that are encoded already, or by the same weights before, are not again.

    Args:
        stage: Where this runs.
        data: The corpus.
        folder: Takes the embeddings.
        choice: Whose published weights encode.
    """
    run, config, weights = stage.run, stage.run.config, choice.trained
    text, stamp = data.texts[weights.model], stamp_of_weights(run, data, choice)
    index = folder.index(run.timetable.artifact(weights))

    disk, embeddings, dtype = local_disk(run, folder), index / "embeddings", config.index.embedding_dtype

    @cache
    def retriever() -> Retriever:
        return frozen_encoder(run, weights)

    @cache
    def encoder() -> Encoder:
        found = retriever().document_encoder()
        if config.index.encode_int8:
            assert isinstance(found, PackedEncoder), "refused before the run"
            found.quantize()
        return found

    def encode(shard_numbers: Iterator[int], progress: Callable[[int, int], None]) -> None:
        encode_documents(
            encoder(),
            text.template.for_documents(),
            data.shards,
            text.stream,
            shard_numbers,
            embeddings,
            stamp,
            max_length=config.models[weights.model].max_length,
            tokens_per_batch=tokens,
            dtype=dtype,
            device=run.device,
            progress=progress,
            write=None if disk is None else partial(write_held, embeddings, disk, stamp),
        )

    def deal(held_on: LocalDisk) -> Deal:
        def bytes_each() -> int:
            return np.dtype(dtype).itemsize * retriever().dimension

        return deal_embeddings(stage, data, weights, embeddings, stamp, held_on, bytes_each)

    tokens = tokens_per_batch(stage, data, weights, encoder, lambda rows_ND: rows_ND)
    return encode_over_ranks(
        stage,
        data,
        weights,
        index,
        stamp,
        is_complete=lambda entry: part_is_complete(embeddings, entry, stamp, dtype),
        encode=encode,
        deal=None if disk is None else partial(deal, disk),
    )


def require_int8(config: Config, name: str, model: Retriever, device: torch.device) -> None:
    """Refuse to encode in int8 what cannot be, before any work is done.

    Args:
        config: The recipe.
        name: Of a retriever in it.
        model: That retriever.
        device: This rank's.

    Raises:
        ConfigError: `index.encode_int8` is set, and the rank is on no CPU with int8 dot products, or the model is not
            in float32 or needs padding.
    """
    precision = config.models[name].precision
    reasons = {
        f"this rank computes on {device}": device.type != "cpu",
        "this processor has no int8 dot products (VNNI)": not has_int8_products(),
        f"{name}.precision is {precision}": precision != "fp32",
        f"the inputs of {name} are padded, as its trial at load said": not model.packs,
    }
    if config.index.encode_int8 and (found := [reason for reason, holds in reasons.items() if holds]):
        raise ConfigError(
            f"index.encode_int8 is true, but {'; '.join(found)}",
            expected="a CPU with int8 dot products, and a model in fp32 whose inputs need no padding",
            remedy="set index.encode_int8=false",
        )


def index_corpus(stage: Stage, data: Data, folder: RunFolder, choice: Choice) -> BuiltIndex:
    """Train, fill and merge the index over all ranks, and tune its search by recall against exact search."""
    run, settings, weights = stage.run, stage.run.config.index, choice.trained
    index = folder.index(run.timetable.artifact(weights))
    store = open_embeddings(run, data, folder, choice)
    plan = _plan(run, folder, num_documents=store.num_documents, dimension=store.dimension)
    if plan.exact and settings.factory != FLAT and folder != run.folder:
        log.info(
            "%s: %d documents are searched exactly, too few for the run's index.factory %s",
            *(stage.name, store.num_documents, settings.factory),
        )
    audit = _audit_queries(stage, data, weights)
    built = build_index(
        run.coordinator,
        store,
        plan,
        index,
        seed=stage.seed,
        audit_queries_QD=audit,
        recall_k=settings.recall_k,
        recall_floor=settings.recall_floor,
        device=run.device,
        warm_start=settings.warm_start,
        last=_earlier(run, folder, weights) if settings.warm_start else (),
    )
    told = ("recall", "nprobe", "refine_factor", "milliseconds_per_query", "train_iterations", "centroid_movement")
    measured = {key: getattr(built, key) for key in told}
    run.metrics.write(
        stage.name,
        weights.iteration or 0,
        {f"index/{key}": float(value) for key, value in measured.items() if value is not None},
    )
    return built


def _earlier(run: Run, folder: RunFolder, weights: WeightsOf) -> list[Path]:
    """Return where the indexes of a retriever's earlier iterations lie or lay, the newest first."""
    if folder != run.folder or weights.iteration is None:
        return []
    earlier = range(weights.iteration - 1, -1, -1)
    return [folder.index(run.timetable.artifact(WeightsOf(weights.model, iteration))) for iteration in earlier]


def dense_is_built(run: Run, folder: RunFolder, choice: Choice) -> bool:
    """Tell whether an index is there, made as the settings have it now; what it holds is not looked at.

    Args:
        run: For the settings.
        folder: As for `build_dense`.
        choice: With the weights that the index was made with.
    """
    try:
        manifest = IndexManifest.load(folder.index(run.timetable.artifact(choice.trained)))
    except ArtifactError:
        return False
    return manifest.plan == _plan(run, folder, num_documents=manifest.num_documents, dimension=manifest.dimension)


def _plan(run: Run, folder: RunFolder, *, num_documents: int, dimension: int) -> IndexPlan:
    settings = run.config.index
    if folder != run.folder:
        settings = for_other_corpus(settings, num_documents=num_documents, dimension=dimension)
    return plan_index(settings, num_documents=num_documents, dimension=dimension)


def frozen_encoder(run: Run, weights: WeightsOf) -> Retriever:
    """Load published weights of a model that searches the corpus.

    Raises:
        ConfigError: It is no retriever.
        ArtifactError: The weights are missing or damaged.
    """
    section = run.config.model(weights.model, RetrieverConfig)
    return frozen_retriever(section, run.folder.weights(weights.model, weights.state), run.device)


def _audit_queries(stage: Stage, data: Data, weights: WeightsOf) -> np.ndarray:
    """Encode a sample of real queries, the same on every rank: [A, D]."""
    run, count = stage.run, stage.run.config.index.audit_queries
    queries = data.train.queries or list(data.dataset.queries.values())
    chosen = np.random.default_rng(stage.seed).permutation(len(queries))[:count]
    return encode_queries(
        frozen_encoder(run, weights).query_encoder(),
        data.texts[weights.model].template.for_queries(),
        data.texts[weights.model].tokenize_queries([queries[row] for row in chosen.tolist()]),
        max_length=run.config.query_max_length,
        tokens_per_batch=run.config.evaluation.tokens_per_batch,
        device=run.device,
    )

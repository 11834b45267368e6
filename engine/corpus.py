"""From a data folder to what the engine reads: tokenised shards, templates, and the training queries.

The corpus is tokenised once, by all ranks together, into webdataset shards; every later pass over it, and every
document of a training batch, comes from there as token ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Config
from engine.errors import ArtifactError, DataError
from engine.log import get_logger, progress_bar
from engine.models.loading import load_tokenizer, tokenizer_fingerprint
from engine.models.random import make_random_model
from engine.models.template import InputTemplate
from engine.run import RunFolder, Stage
from shards.files import read_json, write_json
from shards.manifest import CorpusManifest, ShardEntry, TokenStream
from shards.reader import CorpusShards
from shards.records import Dataset, Document, Query
from shards.writer import Tokenization, publish_manifest, unpublish, write_shard

log = get_logger(__name__)


@dataclass(frozen=True)
class ModelText:
    """How one model reads text.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        template: Where its special tokens go.
        stream: Name of the token stream in the shards.
        max_query_tokens: Tokens of a query, special tokens not counted.
    """

    tokenizer: Any
    template: InputTemplate
    stream: str
    max_query_tokens: int

    def tokenize_queries(self, queries: Sequence[Query]) -> list[list[int]]:
        """Tokenise queries without special tokens, truncated."""
        return _token_ids(self.tokenizer, [query.text for query in queries], self.max_query_tokens)


@dataclass(frozen=True)
class TrainingQueries:
    """The training queries in a fixed order; a row number means one of them from here on.

    Attributes:
        queries: All queries of the train split that have a positive.
        positives: For each, the corpus indices of its positives, int64.
        retriever_tokens: For each, its token ids for the retriever.
        ranker_tokens: For each, its token ids for the ranker.
    """

    queries: list[Query]
    positives: list[np.ndarray]
    retriever_tokens: list[list[int]]
    ranker_tokens: list[list[int]]

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Data:
    """All that a recipe knows of its data."""

    dataset: Dataset
    shards: CorpusShards
    retriever_text: ModelText
    ranker_text: ModelText
    train: TrainingQueries

    def queries_of(self, split: str, limit: int | None, seed: int) -> list[Query]:
        """Return a split's queries, all or a sample drawn by the seed, in the split's order.

        Args:
            split: `train`, `dev` or `test`; may be absent from the data.
            limit: Number of queries in the sample; None for all.
            seed: Draws the sample.

        Returns:
            Queries, empty where the data has no such split.
        """
        qids = list(self.dataset.qrels.get(split, {}))
        if limit is not None and limit < len(qids):
            chosen = np.random.default_rng(seed).choice(len(qids), limit, replace=False)
            qids = [qids[row] for row in sorted(chosen)]
        return [self.dataset.queries[qid] for qid in qids]


def model_texts(config: Config, retriever_name: str | Path, ranker_name: str | Path) -> tuple[ModelText, ModelText]:
    """Load both tokenizers; models with equal tokenizers share one token stream.

    Raises:
        ModelError: A tokenizer cannot be loaded.
    """
    retriever_tokenizer, ranker_tokenizer = load_tokenizer(str(retriever_name)), load_tokenizer(str(ranker_name))
    shared = tokenizer_fingerprint(retriever_tokenizer) == tokenizer_fingerprint(ranker_tokenizer)
    max_query = config.retriever.query_max_length
    retriever_template = InputTemplate.from_tokenizer(retriever_tokenizer)
    specials = len(retriever_template.single([], max_query)[0])
    ranker_template = InputTemplate.from_tokenizer(ranker_tokenizer)
    return (
        ModelText(retriever_tokenizer, retriever_template, "retriever", max_query - specials),
        ModelText(ranker_tokenizer, ranker_template, "retriever" if shared else "ranker", max_query - specials),
    )


def write_corpus(
    stage: Stage, dataset: Dataset, texts: tuple[ModelText, ModelText], folder: RunFolder
) -> dict[str, int]:
    """Tokenise the corpus into shards, each rank its share; rank 0 publishes the manifest.

    Returns:
        Counts of documents, shards and tokens.
    """
    config, coordinator = stage.run.config, stage.run.coordinator
    tokenizations = _tokenizations(config, texts)
    size, rank, world = config.data.documents_per_shard, coordinator.rank, coordinator.world_size
    entries: list[ShardEntry] = []
    coordinator.only_rank_zero(f"{stage.name}: clear", lambda: unpublish(folder.shards))
    folder.shards.mkdir(parents=True, exist_ok=True)
    with (
        coordinator.agreement(f"{stage.name}: write"),
        progress_bar(stage.name, dataset.num_documents, "doc", shown=stage.run.is_main) as bar,
    ):
        for number, block in enumerate(_blocks(dataset.documents(), size)):
            if number % world == rank:
                entries.append(
                    write_shard(block, folder.shards, number, number * size, tokenizations, config.data.template)
                )
            bar.update(len(block))
    written = coordinator.gather(f"{stage.name}: entries", [entry.as_dict() for entry in entries])
    manifest = coordinator.only_rank_zero(
        f"{stage.name}: publish", lambda: _publish(folder.shards, written, dataset, tokenizations, config.data.template)
    )
    return dict(manifest)


def open_data(config: Config, dataset: Dataset, texts: tuple[ModelText, ModelText], folder: RunFolder) -> Data:
    """Open the shards of a data set and line up its training queries.

    Raises:
        ArtifactError: The shards are damaged, or were made with another tokenizer or of other data.
    """
    retriever_text, ranker_text = texts
    expect = {text.stream: tokenizer_fingerprint(text.tokenizer) for text in (ranker_text, retriever_text)}
    shards = CorpusShards.open(folder.shards, expect=expect)
    require_same_files(shards.manifest, dataset)
    train = [dataset.queries[qid] for qid in dataset.qrels.get("train", {}) if dataset.positives("train", qid)]
    positives = [
        np.array([shards.index_of(docid) for docid in dataset.positives("train", query.id)], dtype=np.int64)
        for query in train
    ]
    tokens = retriever_text.tokenize_queries(train)
    ranker_tokens = tokens if ranker_text.stream == retriever_text.stream else ranker_text.tokenize_queries(train)
    return Data(dataset, shards, retriever_text, ranker_text, TrainingQueries(train, positives, tokens, ranker_tokens))


def require_same_files(manifest: CorpusManifest, dataset: Dataset) -> None:
    """Refuse to go on with other data than the shards were made of.

    Raises:
        ArtifactError: The data changed since.
    """
    if manifest.dataset_sha256 != dataset.fingerprint:
        raise ArtifactError(
            f"the shards of the run were made of other files than those now in {dataset.path}",
            expected=f"data with fingerprint {manifest.dataset_sha256}, found {dataset.fingerprint}",
            remedy="restore the data, or choose another run.path",
        )


def require_training_queries(dataset: Dataset) -> None:
    """Refuse to train where nothing can be learnt from.

    Raises:
        DataError: The train split is missing or none of its queries has a positive.
    """
    if not any(dataset.positives("train", qid) for qid in dataset.qrels.get("train", {})):
        raise DataError(
            f"{dataset.path} has no training query with a positive document",
            expected="a train split, such as qrels/train.tsv in the BEIR layout",
            remedy="add one, or name another folder by data.path",
        )


def require_enough_documents(config: Config, dataset: Dataset) -> None:
    """Refuse a corpus that is too small for the negatives a step draws, before any work is done.

    Raises:
        DataError: Even with all documents but the positive, n cannot be drawn.
    """
    needed = max(config.ar2.num_negatives, config.warmup_ranker.num_negatives, config.warmup_retriever.hard_negatives)
    if dataset.num_documents <= needed:
        raise DataError(
            f"the corpus has {dataset.num_documents} documents, a step draws {needed} negatives and a positive",
            expected=f"more than {needed} documents",
            remedy="lower num_negatives, or use a larger corpus",
        )


def random_model_folder(config: Config, dataset: Dataset, folder: RunFolder) -> Path:
    """Make the untrained model that the name `random` stands for; its tokenizer is learnt on the corpus."""
    path, shape = folder.path / "random_model", config.random_model
    marker = path / "made_of.json"
    made_of = {"dataset_sha256": dataset.fingerprint, "seed": config.run.seed, **shape.model_dump()}
    if marker.exists() and read_json(marker, "the record of a random model") == made_of:
        return path
    shutil.rmtree(path, ignore_errors=True)  # an earlier start was cut off, or refused and then corrected
    make_random_model(
        path,
        _all_texts(dataset),
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        seed=config.run.seed,
    )
    write_json(marker, made_of)
    return path


def _all_texts(dataset: Dataset) -> Iterator[str]:
    for document in dataset.documents():
        yield f"{document.title} {document.text}"
    for query in dataset.queries.values():
        yield query.text


def _tokenizations(config: Config, texts: tuple[ModelText, ModelText]) -> list[Tokenization]:
    retriever_text, ranker_text = texts
    lengths = {"retriever": config.retriever.max_length}
    lengths[ranker_text.stream] = max(lengths.get(ranker_text.stream, 0), config.ranker.max_length)
    by_stream = {text.stream: text for text in (ranker_text, retriever_text)}
    return [
        Tokenization(
            TokenStream(stream, tokenizer_fingerprint(text.tokenizer), lengths[stream]),
            partial(_token_ids, text.tokenizer, limit=lengths[stream]),
        )
        for stream, text in sorted(by_stream.items())
    ]


def _token_ids(tokenizer: Any, strings: list[str], limit: int) -> list[list[int]]:
    if not strings:
        return []
    encoded = tokenizer(
        strings, add_special_tokens=False, truncation=True, max_length=limit, return_attention_mask=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _blocks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    stream = iter(documents)
    while block := list(islice(stream, size)):
        yield block


def _publish(
    folder: Path,
    written: list[list[dict[str, Any]]],
    dataset: Dataset,
    tokenizations: list[Tokenization],
    template: str,
) -> dict[str, int]:
    manifest = publish_manifest(
        folder,
        [ShardEntry.from_dict(entry) for entries in written for entry in entries],
        (document.id for document in dataset.documents()),
        dataset_sha256=dataset.fingerprint,
        template=template,
        streams=[tokenization.stream for tokenization in tokenizations],
    )
    counts = {"documents": manifest.num_documents, "shards": len(manifest.shards)}
    return counts | {f"{stream}_tokens": number for stream, number in manifest.num_tokens.items()}

"""Tokenised shards and the BM25 index beside the data, made once for all runs of recipes with the same tokenizers."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from engine.config.file import load_config
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.corpus import model_texts
from engine.data.tokenization import find_corpus, plan_corpus, write_corpus
from engine.errors import ConfigError
from engine.log import get_logger
from engine.models.trial import require_embeddings
from engine.results import one_line
from engine.retrievers.bm25_index import index_documents, is_indexed, prepared_place
from launcher.plan.models import settings_of
from shards.files import canonical_json
from shards.formats import open_dataset
from shards.manifest import CorpusManifest
from shards.reader import CorpusShards

log = get_logger(__name__)


def prepare_shards(data_path: Path, config_path: Path, words: list[str]) -> Path:
    """Write the token shards of a recipe, and the BM25 index of the corpus if it searches, into a data folder.

    A run whose tokenizers, lengths and template are served by them reads them in place. What is there already is not
    made again, and an interrupted preparation goes on.

    Args:
        data_path: A data folder; the shards go to `shards/NAME` in it.
        config_path: The recipe, for its models, lengths and template.
        words: `key=value` words over the recipe.

    Returns:
        The folder of the shards.

    Raises:
        ConfigError: The recipe's models are random ones, whose tokenizer is learnt by each run.
        DataError: The data cannot be read.
        ModelError: A tokenizer cannot be loaded, or is no tokenizer of a model that a run can take.
    """
    config = load_config(config_path, words)
    names = {name: section.name for name, section in config.models.items()}
    if "random" in names.values():
        raise ConfigError(
            f"the models of {config_path} are random ones, whose tokenizer each run learns on its own corpus",
            expected="models with a tokenizer of their own",
            remedy="name a pre-trained retriever and ranker",
        )
    dataset = open_dataset(data_path, config.data.format, needs_queries=config.learns_from_queries)
    texts = model_texts(config, names)
    for name, text in texts.items():
        settings = settings_of(config, name)
        require_embeddings(text.tokenizer, settings.vocab_size, name=names[name], section=name)
    plan = plan_corpus(config, dataset, texts)
    streams = [asdict(stream) for stream in plan.streams]
    digest = hashlib.sha256(canonical_json([plan.template, plan.documents_per_shard, streams]).encode()).hexdigest()
    own = data_path / "shards" / f"{config_path.stem}-{digest[:8]}"
    coordinator = Coordinator(LocalTransport())
    counts = write_corpus(coordinator, plan, dataset, own, name="shards")
    folder = find_corpus(plan, dataset, own) or own
    log.info("shards %s: %s", folder, one_line(counts))
    if not config.learns_from_queries or not config.bm25.enabled:
        return folder
    index, corpus_sha256 = prepared_place(folder, config.bm25), CorpusManifest.load(folder).sha256
    if is_indexed(index, corpus_sha256, config.bm25):
        log.info("BM25 index %s: there already", index)
    else:
        index_documents(coordinator, CorpusShards.open(folder), index, config.bm25)
        log.info("BM25 index %s: written", index)
    return folder

"""From a data folder to what the engine reads: tokenised shards, templates, and the training queries.

The corpus is tokenised once (`engine.data.tokenization`); every later pass over it, and every document of a training
batch, comes from there as token ids.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from engine.config.models import BottleneckConfig, RankerConfig
from engine.config.recipe import Config
from engine.data.answers import KEPT_TEXTS, AnswerFinder, Haystack, haystacks_of
from engine.data.identical import find_own_documents
from engine.data.negatives import FALSE_NEGATIVES, IDENTICAL_IDS, POSITIVES
from engine.data.requirements import require_same_files
from engine.data.tokenization import ModelText, WrittenCorpus, find_corpus, plan_corpus, write_corpus
from engine.errors import ArtifactError, DataError
from engine.log import get_logger
from engine.models.loading import load_tokenizer, tokenizer_fingerprint
from engine.models.prompts import ends_texts, prompts_of
from engine.models.random import make_random_model
from engine.models.template import InputTemplate
from engine.models.tokenizer_checks import require_mask_token, require_parts
from engine.models.wording import Wording
from engine.reliability.preemption import PREEMPTION
from engine.reliability.progress import progress_bar
from engine.run import Run, RunFolder, Stage
from shards.cache import copies_folder, copy_shard, require_space
from shards.files import read_json, write_json
from shards.manifest import MANIFEST_NAME
from shards.reader import CorpusShards
from shards.records import Dataset, Query

log = get_logger(__name__)

__all__ = ["Data", "ModelText", "TrainingQueries"]


@dataclass(frozen=True)
class TrainingQueries:
    """The training queries in a fixed order; a row number means one of them from here on.

    Attributes:
        queries: All queries of the train split that have a positive.
        positives: For each, the corpus indices of its positives, int64.
        tokens: Token stream to the token ids of each.
        false_negatives: For each, the corpus indices of documents that are known to be no negatives, int64; left out,
            none of any.
        own_documents: As of `Data`.
        positive: Which of the positives a step takes: one that is drawn, or the first.
    """

    queries: list[Query]
    positives: list[np.ndarray]
    tokens: Mapping[str, list[list[int]]]
    false_negatives: list[np.ndarray] | None = None
    own_documents: Mapping[str, int] = field(default_factory=dict)
    positive: Literal["drawn", "first"] = "drawn"

    def known(self, row: int) -> dict[int, str]:
        """Return the documents that are no negatives of a query: corpus index -> why."""
        missed = [] if self.false_negatives is None else self.false_negatives[row].tolist()
        own = self.own_documents.get(self.queries[row].id)
        known = {} if own is None else {own: IDENTICAL_IDS}
        return known | dict.fromkeys(missed, FALSE_NEGATIVES) | dict.fromkeys(self.positives[row].tolist(), POSITIVES)

    def __len__(self) -> int:
        return len(self.queries)

    def relabelled(self, positive: Mapping[str, Sequence[int]], out: Mapping[str, Sequence[int]]) -> TrainingQueries:
        """Return the queries with corrected labels.

        Args:
            positive: Query id -> corpus indices of documents that become positives, behind the others.
            out: Query id -> corpus indices of documents that are neither positives nor negatives.

        Raises:
            DataError: A query is left without a positive.
        """
        positives, false_negatives = list(self.positives), list(self.false_negatives or [])
        false_negatives += [np.empty(0, dtype=np.int64)] * (len(self) - len(false_negatives))
        for row, query in enumerate(self.queries):
            more, less = positive.get(query.id, ()), out.get(query.id, ())
            if not more and not less:
                continue
            judged = dict.fromkeys([*positives[row].tolist(), *more])
            positives[row] = np.array([document for document in judged if document not in less], dtype=np.int64)
            false_negatives[row] = np.unique(np.concatenate([false_negatives[row], np.array(less, dtype=np.int64)]))
            if not len(positives[row]):
                raise no_positive_left(query.id, len(less))
        return replace(self, positives=positives, false_negatives=false_negatives)


def no_positive_left(qid: str, num_out: int) -> DataError:
    """Describe a training query whose positives are all relabelled."""
    return DataError(
        f"query {qid!r} has no positive left after {num_out} of its documents are taken out",
        expected="at least one positive for every training query",
        remedy="take the query out of the train split, or name a document that becomes positive",
    )


@dataclass(frozen=True)
class Data:
    """All that a recipe knows of its data.

    Attributes:
        dataset: The source.
        shards: The tokenised corpus.
        texts: How each model reads text, by the model's name.
        train: The training queries.
        own_documents: Query id -> corpus index of the document that is the query itself, for the queries of all splits;
            it is no hit of the query and no negative. Empty where there is none, or none is left out.
    """

    dataset: Dataset
    shards: CorpusShards
    texts: Mapping[str, ModelText]
    train: TrainingQueries
    own_documents: Mapping[str, int] = field(default_factory=dict)

    def with_training_queries(self, queries: Sequence[Query], positives: Sequence[np.ndarray]) -> Data:
        """Return the data with more training queries behind the others, whose rows stay.

        Args:
            queries: Queries of the train split that are not among the others.
            positives: Of each the corpus indices of its positives, int64.
        """
        train, exclusions = self.train, self.dataset.exclusions.get("train", {})
        missed = list(train.false_negatives or [np.empty(0, dtype=np.int64)] * len(train))
        missed += [
            np.array([self.shards.index_of(docid) for docid in exclusions.get(query.id, ())], dtype=np.int64)
            for query in queries
        ]
        tokens = {
            stream: [*train.tokens[stream], *text.remember_queries(queries)]
            for stream, text in _by_stream(self.texts).items()
        }
        more = replace(
            train,
            queries=[*train.queries, *queries],
            positives=[*train.positives, *positives],
            tokens=tokens,
            false_negatives=missed,
        )
        return replace(self, train=more)

    @cached_property
    def haystack_of(self) -> Callable[[int], Haystack]:
        """Corpus index -> a document's text, ready to be looked through for answers; the last ones are kept."""
        return haystacks_of(lambda document: self.shards.document(document).text)

    @cached_property
    def answer_finder(self) -> AnswerFinder:
        """Finds documents by their docids that hold answers."""
        index_of = lru_cache(maxsize=KEPT_TEXTS)(self.shards.index_of)
        return AnswerFinder(lambda docid: self.haystack_of(index_of(docid)))

    def queries_of(self, split: str, limit: int | None, seed: int) -> list[Query]:
        """Return a split's queries, all or a sample drawn by the seed, in the split's order.

        Args:
            split: `train`, `dev` or `test`; may be absent from the data.
            limit: Number of queries in the sample; None for all.
            seed: Draws the sample.

        Returns:
            Queries, empty where the data has no such split.
        """
        return sample_queries(self.dataset, split, limit, seed)


def sample_queries(dataset: Dataset, split: str, limit: int | None, seed: int) -> list[Query]:
    """Return a split's queries, all or a sample; see `Data.queries_of`."""
    qids = list(dataset.qrels.get(split, {}))
    if limit is not None and limit < len(qids):
        chosen = np.random.default_rng(seed).choice(len(qids), limit, replace=False)
        qids = [qids[row] for row in sorted(chosen)]
    return [dataset.queries[qid] for qid in qids]


def model_texts(config: Config, sources: Mapping[str, str | Path]) -> dict[str, ModelText]:
    """Load the tokenizers of models; those that read texts alike share one token stream, named after the first.

    Args:
        config: For the length of a query, prompts and the words of pairs.
        sources: Model's name to where its tokenizer is: a hub id, a folder, or `package:NAME`.

    Raises:
        ModelError: A tokenizer cannot be loaded, does not suit the prompts or the words of a pair, or lacks what
            pre-training asks of it.
    """
    streams: dict[tuple[str, Wording, Wording], str] = {}
    texts: dict[str, ModelText] = {}
    known: dict[str, dict[str, list[int]]] = {}
    longest: int | None = None
    for name, source in sources.items():
        section = config.models[name]
        tokenizer = load_tokenizer(str(source), section=name, ends_texts=ends_texts(section, source))
        # A ranker reads query and document together, and so has no prompts, but may have words for a pair.
        words = section.pair_words if isinstance(section, RankerConfig) else None
        prompts = prompts_of(section, source)
        template = InputTemplate.from_tokenizer(tokenizer, prompts, words)
        if isinstance(section, BottleneckConfig):
            require_mask_token(tokenizer)
        if config.reads_parts:
            require_parts(template, name)
        if longest is None:  # one length for all, so that models with one tokenizer read the same queries
            longest = config.query_max_length - len(template.single([], config.query_max_length)[0])
        read_alike = tokenizer_fingerprint(tokenizer), template.queries, template.documents
        stream = streams.setdefault(read_alike, name)
        texts[name] = ModelText(tokenizer, template, stream, longest, prompts, known.setdefault(stream, {}))
    return texts


def write_shards(stage: Stage, dataset: Dataset, texts: Mapping[str, ModelText], folder: RunFolder) -> WrittenCorpus:
    """Tokenise the corpus of a run, unless its shards are there; see `engine.data.tokenization.write_corpus`."""
    plan = plan_corpus(stage.run.config, dataset, texts)
    written = write_corpus(stage.run.coordinator, plan, dataset, folder.shards, name=stage.name)
    if written.prepared is not None:
        log.info("the shards in %s are read in place, now and whenever this run is searched", written.prepared)
    return written


def open_data(config: Config, dataset: Dataset, texts: Mapping[str, ModelText], folder: RunFolder) -> Data:
    """Open the shards of a data set and line up its training queries.

    Raises:
        ArtifactError: The shards are damaged, or were made with another tokenizer or of other data.
    """
    plan = plan_corpus(config, dataset, texts)
    found = find_corpus(plan, dataset, folder.shards)
    if found is None and not (folder.shards / MANIFEST_NAME).exists():
        raise ArtifactError(
            f"no shards of {dataset.path} fit these models and lengths: there are none in {folder.shards}, and none "
            f"beside the data in {dataset.path / 'shards'}",
            expected="the shards that the run was begun with",
            remedy="restore them; `convert --tokenize-for` with the same recipe makes those beside the data once more",
        )
    shards = _open_shards(found or folder.shards, texts)
    require_same_files(shards.manifest.dataset_sha256, dataset)
    train = [dataset.queries[qid] for qid in dataset.qrels.get("train", {}) if dataset.positives("train", qid)]
    positives = [
        np.array([shards.index_of(docid) for docid in dataset.positives("train", query.id)], dtype=np.int64)
        for query in train
    ]
    exclusions = dataset.exclusions.get("train", {})
    false_negatives = [
        np.array([shards.index_of(docid) for docid in exclusions.get(query.id, ())], dtype=np.int64) for query in train
    ]
    tokens = {stream: text.remember_queries(train) for stream, text in _by_stream(texts).items()}
    own = find_own_documents(dataset, shards.docids.index_of, config.data.ignore_identical_ids)
    queries = TrainingQueries(train, positives, tokens, false_negatives, own, config.data.positive)
    return Data(dataset, shards, texts, queries, own)


def open_corpus(shards_folder: Path, texts: Mapping[str, ModelText]) -> Data:
    """Open shards alone, which hold ids, titles and texts too: data without queries, for whoever brings their own.

    Args:
        shards_folder: A run's shards, or those prepared beside its data.
        texts: How each model reads text.

    Raises:
        ArtifactError: The shards are missing, damaged, or were made with another tokenizer.
    """
    shards = _open_shards(shards_folder, texts)
    dataset = Dataset(
        path=shards_folder,
        format="shards",
        queries={},
        qrels={},
        dropped=Counter(),
        fingerprint=shards.manifest.dataset_sha256,
        num_documents=shards.num_documents,
        read_documents=lambda: map(shards.document, range(shards.num_documents)),
    )
    return Data(dataset, shards, texts, TrainingQueries([], [], {}))


def _open_shards(folder: Path, texts: Mapping[str, ModelText]) -> CorpusShards:
    expect = {stream: text.fingerprint for stream, text in _by_stream(texts).items()}
    return CorpusShards.open(folder, expect=expect)


def _by_stream(texts: Mapping[str, ModelText]) -> dict[str, ModelText]:
    return {text.stream: text for text in reversed(list(texts.values()))}  # of equal ones, the first


def copy_shards(data: Data, run: Run) -> Data:
    """Copy the shards to this host's own disk where `shards.cache` asks for it, and read them there.

    The ranks of a host share the copying, each by what it has of the list; what is there already is not copied again.

    Args:
        data: With the shards where they were written.
        run: For the settings and the ranks.

    Returns:
        The data, with the shards read from the copies.

    Raises:
        DiskFullError: A host has no space for them.
        ArtifactError: A shard is not the manifest's.
    """
    cache, coordinator = run.config.shards.cache, run.coordinator
    if cache is None:
        return data
    shards, here = data.shards, coordinator.ranks_of_host
    first_of_host = here[0] == coordinator.rank
    with coordinator.agreement("space for copies of the shards"):
        if first_of_host:
            require_space(cache, shards.folder, shards.manifest)
    own, num_bytes = shards.manifest.shards[here.index(coordinator.rank) :: len(here)], 0
    with (
        coordinator.agreement("copy shards"),
        progress_bar("copy shards", len(own), "shard", shown=run.is_main) as bar,
    ):
        for entry in own:
            PREEMPTION.require_none("copy shards")
            num_bytes += copy_shard(cache, shards.folder, shards.manifest, entry)
            bar.update()
    with coordinator.agreement("open copies of the shards"):
        copies = shards.read_from(copies_folder(cache, shards.manifest))
    copied = sum(coordinator.gather("bytes of the copies", num_bytes))
    log.info("the shards are read from %s on each host; %.1f MB were copied there", copies.copies, copied / 1e6)
    return replace(data, shards=copies)


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

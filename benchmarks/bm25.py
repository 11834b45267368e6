"""BM25 by parts against bm25s (and tantivy, where it is installed) on made-up passages of Zipf's words.

Every side builds its index of the same passages in processes of its own, then finds the best 100 of the same queries by
one thread; ours is built by one rank and by several, who share the parts. Passages have 20 to 100 words of a million,
drawn by their rank; queries 6 words beyond the 50 most frequent, which stand for stop words. The table has
seconds of the build by the clock, seconds of the processor for the build and for the search (of the process that needs
most; the drawing of the passages is in all of them), the largest resident set (VmHWM, with mapped pages of files), the
index on disk, and at how many places of the rankings ours has the document that bm25s has, its equal scores in the
order of the documents. Where it does not, their scores differ by rounding: `score off` is the largest difference at any
place, as a share. Ratios are to bm25s, by the processor's seconds. bm25s's `retrieve` spends nearly all of its time on
choosing the best of scores that are mostly 0; `chosen by us` has its scores with a choice among those above 0.

    python benchmarks/bm25.py [--sizes 250000 1000000 4000000 9000000] [--ranks 2] [--queries 512] [--without bm25s]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.report import machine_line, peak_rss_bytes, table

SIZES = (250_000, 1_000_000)
PER_SHARD, NUM_WORDS, FREQUENT = 20_000, 1_000_000, 50
TOP_K, MIB = 100, 2**20


class Clock:
    """Takes seconds by the clock and of the processor, from now on."""

    def __init__(self) -> None:
        self._start, self._start_of_processor = time.perf_counter(), time.process_time()

    def told(self) -> dict[str, float]:
        """Return both for a build."""
        return {
            "build": time.perf_counter() - self._start,
            "build_cpu": time.process_time() - self._start_of_processor,
        }


class Passages:
    """Draws passages and queries; the same numbers draw the same ones."""

    def __init__(self) -> None:
        weights = 1.0 / np.arange(1, NUM_WORDS + 1)
        self._upto = np.cumsum(weights / weights.sum())
        self._words = [f"w{number}" for number in range(NUM_WORDS)]

    def texts(self, shard: int, count: int) -> Iterator[str]:
        """Yield the passages of a shard."""
        rng = np.random.default_rng([3, shard])
        for length in rng.integers(20, 101, count).tolist():
            places = np.searchsorted(self._upto, rng.random(length)).clip(max=NUM_WORDS - 1)
            yield " ".join([self._words[place] for place in places.tolist()])

    def queries(self, count: int) -> list[str]:
        """Return queries of 6 words."""
        rng = np.random.default_rng(5)
        low = self._upto[FREQUENT]
        places = np.searchsorted(self._upto, low + (1 - low) * rng.random((count, 6))).clip(max=NUM_WORDS - 1)
        return [" ".join([self._words[place] for place in row]) for row in places.tolist()]


def shard_sizes(num_documents: int) -> list[int]:
    """Return the passages of each shard."""
    return [min(PER_SHARD, num_documents - first) for first in range(0, num_documents, PER_SHARD)]


def ours(job: dict[str, Any], passages: Passages) -> dict[str, Any]:
    """Build by parts as one of several ranks; rank 0 searches."""
    from engine.coordination.coordinator import Coordinator, LocalTransport, StoreTransport
    from engine.retrievers.bm25 import BM25Searcher
    from engine.retrievers.bm25_build import build_bm25
    from engine.retrievers.bm25_files import cut_documents
    from shards.records import Query

    rank, world_size = job["rank"], job["ranks"]
    transport: Any = LocalTransport() if world_size == 1 else StoreTransport(rank, world_size, "127.0.0.1", job["port"])
    coordinator, sizes = Coordinator(transport, 3600.0), shard_sizes(job["documents"])
    parts, folder = cut_documents(sizes), Path(job["folder"]) / "index"

    def read(number: int) -> Iterator[str]:
        return (text for shard in parts[number] for text in passages.texts(shard, sizes[shard]))

    coordinator.barrier("start")
    before, clock = peak_rss_bytes(), Clock()
    build_bm25(coordinator, read, [sum(sizes[shard] for shard in part) for part in parts], folder)
    told = clock.told() | {"before": before}
    if rank == 0:
        searcher = BM25Searcher.open(folder)
        queries = [Query(str(number), text) for number, text in enumerate(job["texts"])]
        start = time.process_time()
        hits = searcher.search(queries, TOP_K)
        told |= {"search": time.process_time() - start}
        save(job, hits.documents_QK, hits.scores_QK)
    coordinator.barrier("end")
    coordinator.close()
    return told


def theirs(job: dict[str, Any], passages: Passages) -> dict[str, Any]:
    """Build and search with bm25s alone, its own words included."""
    import bm25s
    import Stemmer

    from benchmarks.matches import top_matches

    before, clock = peak_rss_bytes(), Clock()
    sizes = shard_sizes(job["documents"])
    texts = [text for shard, size in enumerate(sizes) for text in passages.texts(shard, size)]
    words: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene", backend="numpy")
    index.index(bm25s.tokenize(texts, **words), show_progress=False)
    index.save(Path(job["folder"]) / "index", show_progress=False)
    told, start = clock.told() | {"before": before}, time.process_time()
    index.retrieve(bm25s.tokenize(job["texts"], **words), k=TOP_K, n_threads=0, show_progress=False)
    told |= {"search": time.process_time() - start}
    asked = bm25s.tokenize(job["texts"], return_ids=False, **words)
    start = time.process_time()
    found = [top_matches(index.get_scores(one), TOP_K) for one in asked]
    told |= {"chosen": time.process_time() - start}
    save(job, *(np.stack(columns) for columns in zip(*found, strict=True)))
    return told


def tantivys(job: dict[str, Any], passages: Passages) -> dict[str, Any]:
    """Build and search with tantivy: k1 1.2 and b 0.75, which it has fixed, and rounded lengths."""
    import tantivy  # type: ignore[import-not-found]

    before, clock = peak_rss_bytes(), Clock()
    folder = Path(job["folder"]) / "index"
    folder.mkdir()
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("text", stored=False, tokenizer_name="en_stem")
    builder.add_unsigned_field("number", stored=True)
    index = tantivy.Index(builder.build(), path=str(folder))
    writer = index.writer(heap_size=256 * MIB, num_threads=1)
    number = 0
    for shard, size in enumerate(shard_sizes(job["documents"])):
        for text in passages.texts(shard, size):
            writer.add_document(tantivy.Document(text=text, number=number))
            number += 1
    writer.commit()
    writer.wait_merging_threads()
    told = clock.told() | {"before": before}
    index.reload()
    searcher, start = index.searcher(), time.process_time()
    for text in job["texts"]:
        found = searcher.search(index.parse_query(text, ["text"]), TOP_K).hits
        [searcher.doc(address)["number"] for _, address in found]
    return told | {"search": time.process_time() - start}


SIDES = {"bm25s": theirs, "ours": ours, "tantivy": tantivys}


def save(job: dict[str, Any], documents_QK: Any, scores_QK: Any) -> None:
    """Keep a ranking for the comparison."""
    np.savez(Path(job["folder"]) / "found.npz", documents=documents_QK, scores=scores_QK)


def run(side: str, job: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Run a side in processes of its own and return its row."""
    from benchmarks.index_worlds import quiet

    port, processes = _free_port(), []
    environment = {**os.environ, **quiet(1), "OMP_NUM_THREADS": "1"}
    for rank in range(ranks):
        words = json.dumps(job | {"rank": rank, "ranks": ranks, "port": port})
        command = [sys.executable, __file__, "--side", side]
        processes.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert processes[-1].stdin
        processes[-1].stdin.write(words)
        processes[-1].stdin.close()
    told = []
    for process in processes:
        assert process.stdout
        lines = process.stdout.read().splitlines()
        if process.wait():
            raise SystemExit(f"{side} ended with {process.returncode}")
        told.append(json.loads(lines[-1]))
    index = Path(job["folder"]) / "index"
    return {
        "passages": job["documents"],
        "side": side if ranks == 1 else f"{side}, {ranks} ranks",
        "build s": max(one["build"] for one in told),
        "build CPU s": max(one["build_cpu"] for one in told),
        "search CPU s": told[0]["search"],
        "chosen by us s": told[0].get("chosen", ""),
        "VmHWM MiB": max(one["peak"] for one in told) / MIB,
        "of it before": max(one["before"] for one in told) / MIB,
        "disk MiB": sum(path.stat().st_size for path in index.rglob("*") if path.is_file()) / MIB,
    }


def agreement(folder: Path, reference: Path) -> dict[str, Any]:
    """Compare a ranking with bm25s's."""
    mine, other = np.load(folder / "found.npz"), np.load(reference / "found.npz")
    found_QK = other["documents"] >= 0
    same_QK = (mine["documents"] == other["documents"])[found_QK]
    off_QK = np.abs(mine["scores"][found_QK] / other["scores"][found_QK] - 1)
    return {"places alike": f"{same_QK.sum()} of {same_QK.size}", "score off": float(off_QK.max(initial=0.0))}


def measure(size: int, arguments: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Return the rows of one size."""
    sides: list[tuple[str, int]] = [("bm25s", 1), ("ours", 1)]
    sides += [("ours", arguments.ranks)] if arguments.ranks > 1 else []
    sides += [("tantivy", 1)] if importlib.util.find_spec("tantivy") else []
    rows, reference = [], place / f"bm25s-1-{size}"
    for side, ranks in sides:
        if side in arguments.without:
            continue
        folder = place / f"{side}-{ranks}-{size}"
        folder.mkdir()
        job = {"documents": size, "folder": str(folder), "texts": Passages().queries(arguments.queries)}
        row = run(side, job, ranks)
        if rows and reference.exists():
            row |= {f"{what} ratio": row[f"{what} CPU s"] / rows[0][f"{what} CPU s"] for what in ("build", "search")}
        if side == "ours" and reference.exists():
            row |= agreement(folder, reference)
        shutil.rmtree(folder / "index")
        rows.append(row)
        print(table([row]), flush=True)
    return rows


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measure and print; or be one process of a side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of passages")
    parser.add_argument("--ranks", type=int, default=2, help="of ours, besides one")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--without", nargs="+", default=[], choices=sorted(SIDES), help="sides to leave out")
    parser.add_argument("--folder", type=Path, help="where the indexes lie for a while")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        job = json.loads(sys.stdin.read())
        told = SIDES[arguments.side](job, Passages())
        print(json.dumps(told | {"peak": peak_rss_bytes()}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        rows = [row for size in arguments.sizes for row in measure(size, arguments, Path(name))]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print("\n" + table([{key: row.get(key, "") for key in keys} for row in rows]))
    print(f"\none thread a process, {arguments.queries} queries; {machine_line()}")


if __name__ == "__main__":
    main()
